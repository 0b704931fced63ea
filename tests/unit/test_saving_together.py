"""Saving over a folder, killed at any moment: the old or the new is there, whole, and no draft stays."""

import contextlib
import json
import os
import threading
import time
from pathlib import Path

import kill_trials
import pytest
import torch
from children import one_worker, together
from nets import Net, tokens
from tiny import llama

import peftlab as pl
from peftlab import files

KINDS = ("adapter", "prompt", "four-bit")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that can fork and kill")
C, W, R = "adapter_config.json", "adapter_model.safetensors", "README.md"


def outcomes(kind, folder, seeds):
    (lines,) = together((kill_trials.trials, kind, folder / "saved", seeds))
    assert len(lines) == len(seeds) and set(lines) <= {"old", "new", "nothing"}, lines
    return lines


@needs_fork
@one_worker
@pytest.mark.parametrize("kind", KINDS)
def test_three_kills(kind, tmp_path):
    outcomes(kind, tmp_path, range(3))


@needs_fork
@one_worker
@pytest.mark.kills
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_kills(kind, tmp_path):
    assert {"old", "new"} <= set(outcomes(kind, tmp_path, range(3, 53)))  # both happen, or nothing was tried


def attach(seed, **settings):
    model = Net()
    torch.manual_seed(seed)  # after the model, which has a seed of its own
    config = dict(r=3, alpha=5, target_modules=["up", "head"], init="random")
    return pl.attach(model, pl.LoRAConfig(**{**config, **settings}))


def stop_at(monkeypatch, what, number):
    """The next save stops at the `number`-th call of a function of `os`, as by Ctrl-C."""
    real, calls = getattr(os, what), []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(os, what, stopped)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_stopped_between_two_renames_leaves_one_of_both(tmp_path, monkeypatch, number):
    old, new = attach(1), attach(2, alpha=50, r=2)
    pl.save_adapter(old, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at(patched, "replace", number)
        pl.save_adapter(new, tmp_path)
    expected = old if number == 1 else new  # the first rename is the note's, from which on the new files count
    assert torch.equal(pl.load_adapter(Net(), tmp_path)(tokens()), expected(tokens()))
    pl.save_adapter(new, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [R, C, W]
    assert torch.equal(pl.load_adapter(Net(), tmp_path)(tokens()), new(tokens()))


def test_what_somebody_else_wrote_after_a_kill_is_what_loads(tmp_path, monkeypatch):
    """Hugging Face peft knows nothing of the note that a killed save left."""
    pl.save_adapter(attach(1), tmp_path / "one")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at(patched, "replace", 2)
        pl.save_adapter(attach(2, r=2), tmp_path / "one")
    third = attach(3, r=4)
    pl.save_adapter(third, tmp_path / "other")
    for name in (C, W):
        (tmp_path / "one" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    assert torch.equal(pl.load_adapter(Net(), tmp_path / "one")(tokens()), third(tokens()))


def test_a_note_leads_to_no_file_elsewhere(tmp_path):
    """A folder from elsewhere may hold a note too."""
    pl.save_adapter(attach(1), tmp_path / "secret")
    pl.save_adapter(attach(2), tmp_path / "folder")
    away = tmp_path / "secret" / W
    entry = {"draft": f"../secret/{W}", "before": files.file_sum(tmp_path / "folder" / W),
             "after": files.file_sum(away)}  # fmt: skip
    for name in (W, f"../secret/{W}"):
        (tmp_path / "folder" / files.NOTE).write_text(json.dumps({"format": 1, "files": {name: entry}}))
        assert files.settled(tmp_path / "folder", [W])[W] == tmp_path / "folder" / W
        kept = away.read_bytes()
        pl.save_adapter(attach(3), tmp_path / "folder")
        assert away.read_bytes() == kept


@pytest.mark.parametrize("note", ["{", "[]", '{"files": 7}', '{"files": {"a": null}}', "\xff"])
def test_a_damaged_note_says_nothing(note, tmp_path):
    model = attach(1)
    pl.save_adapter(model, tmp_path)
    (tmp_path / files.NOTE).write_text(note, encoding="latin-1")
    assert torch.equal(pl.load_adapter(Net(), tmp_path)(tokens()), model(tokens()))
    pl.save_adapter(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [R, C, W]


def test_drafts_of_dead_processes_go_and_other_files_stay(tmp_path):
    pl.save_adapter(attach(1), tmp_path)
    ours = [f".{W}.123-456.tmp", f".{C}.1-2.tmp", f".{files.NOTE}.77-1.tmp"]
    theirs = [f".{W}.old.tmp", ".notes.1-2.tmp", "x.tmp", f"{W}.1-2.tmp", ".hidden"]
    for name in ours + theirs:
        (tmp_path / name).write_text("draft")
    (tmp_path / f".{W}.9-9.tmp").mkdir()
    pl.save_adapter(attach(2), tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([R, C, W, *theirs, f".{W}.9-9.tmp"])


def test_an_unchanged_config_is_left_alone_so_one_rename_is_all(tmp_path, monkeypatch):
    pl.save_adapter(attach(1), tmp_path)
    renamed, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (renamed.append(Path(b).name), replace(a, b)))
    pl.save_adapter(attach(2), tmp_path)
    assert renamed == [W]
    pl.save_adapter(attach(2), tmp_path)
    assert renamed == [W]


def test_a_failing_disk_leaves_the_old_files_alone(tmp_path, monkeypatch):
    torch.manual_seed(0)
    pl.save_quantized(pl.quantize_model(llama(1)), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    for what in ("fsync", "replace"):
        with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
            patched.setattr(os, what, full)
            pl.save_quantized(pl.quantize_model(llama(2), format="fp4"), tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(files.fcntl is None, reason="needs locks on folders")
def test_one_save_at_a_time_and_a_reader_beside_it(tmp_path, monkeypatch):
    models = [attach(seed, r=seed) for seed in (1, 2, 3)]
    pl.save_adapter(models[0], tmp_path)
    stop, faults = threading.Event(), []

    def saving(model):
        with contextlib.suppress(Exception):
            while not stop.is_set():
                pl.save_adapter(model, tmp_path)

    def reading():
        expected = [model(tokens()) for model in models]
        for _ in range(40):
            found = pl.load_adapter(Net(), tmp_path)(tokens())
            if not any(torch.equal(found, one) for one in expected):
                faults.append("a mixture")

    threads = [threading.Thread(target=saving, args=(model,)) for model in models[1:]]
    for thread in threads:
        thread.start()
    try:
        reading()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not faults and sorted(os.listdir(tmp_path)) == [R, C, W]
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    with files.held(tmp_path), pytest.raises(pl.PeftLabError, match="Another process has been saving"):
        pl.save_adapter(models[0], tmp_path)


def test_files_that_are_no_adapters_are_not_overwritten(tmp_path):
    model = attach(1)
    for name, content in ((C, '{"theme": "dark"}'), (C, "not JSON"), (W, "weights of another program")):
        folder = tmp_path / f"{name}{len(content)}"
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(pl.PeftLabError, match="of something else than an adapter"):
            pl.save_adapter(model, folder)
        assert (folder / name).read_text() == content and len(os.listdir(folder)) == 1
    (tmp_path / "file").touch()
    with pytest.raises(pl.PeftLabError, match="is a file"):
        pl.save_adapter(model, tmp_path / "file")
    folder = tmp_path / "more"
    pl.save_adapter(model, folder)
    (folder / "adapter_encoder.safetensors").write_text("mine")  # of no adapter of ours
    (folder / "README.md").write_text("mine")
    pl.save_adapter(attach(2), folder)
    assert (folder / "adapter_encoder.safetensors").read_text() == (folder / "README.md").read_text() == "mine"


def test_a_model_is_not_overwritten_by_its_four_bits(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    with pytest.raises(pl.PeftLabError, match="of something else than a 4-bit model"):
        pl.save_quantized(pl.quantize_model(llama()), tmp_path / "base")
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "config.json").write_text('{"port": 80}')
    with pytest.raises(pl.PeftLabError, match="config.json of something else"):
        pl.save_quantized(pl.quantize_model(llama()), tmp_path / "app")


def test_two_models_saved_at_once_take_turns(tmp_path):
    """A process that holds the folder for a while is waited for."""
    if files.fcntl is None:
        pytest.skip("needs locks on folders")
    let_go = threading.Event()

    def hold():
        with files.held(tmp_path):
            let_go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    time.sleep(0.1)
    threading.Timer(0.3, let_go.set).start()
    began = time.monotonic()
    pl.save_adapter(attach(1), tmp_path)
    thread.join()
    assert time.monotonic() - began > 0.2
