"""Atomic writes: a new file of ordinary mode, or the old one untouched and nothing beside it."""

import os
from pathlib import Path

import pytest

from peftlab.commands import run_folder
from peftlab.files import write_atomically


def test_writes_and_replaces_with_the_mode_of_any_new_file(tmp_path):
    ordinary, file = tmp_path / "ordinary", tmp_path / "file"
    ordinary.write_bytes(b"")
    write_atomically(str(file), b"old")
    write_atomically(file, b"new")
    assert file.read_bytes() == b"new" and file.stat().st_mode == ordinary.stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["file", "ordinary"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_error_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, step):
    file = tmp_path / "file"
    file.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_the_content_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("fsync"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    write_atomically(tmp_path / "file", b"new")
    assert order == ["fsync", "replace"]


def test_a_folder_takes_the_place_of_another_or_leaves_it(tmp_path, monkeypatch):
    old, new = tmp_path / "model", tmp_path / "draft"
    for folder in (old, new):
        folder.mkdir()
        (folder / "who").write_text(folder.name)
    rename = Path.rename

    def failing(self, target):
        if self == new:
            raise OSError("no space left")
        return rename(self, target)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="no space"):
            run_folder.replace_folder(new, old)
    assert (old / "who").read_text() == "model"
    run_folder.replace_folder(new, old)
    assert (old / "who").read_text() == "draft"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
