"""The command that tests other versions: which pins, which chapters with which extras, what it writes down."""

import json
import os
import subprocess
import sys

import other_versions
import pytest


def test_the_newest_have_no_pins_and_colab_has_its_own(monkeypatch):
    monkeypatch.delenv("TORCH", raising=False)
    assert other_versions.pinned("newest") == []
    colab = other_versions.pinned("colab")
    assert {"transformers==5.15.0", "peft==0.20.0", "datasets==4.0.0", "ipywidgets==7.7.1"} < set(colab)
    assert [line for line in colab if line.startswith("torch==")] == [
        line for line in other_versions.lines(other_versions.ROOT / "constraints.txt") if line.startswith("torch==")
    ]
    monkeypatch.setenv("TORCH", "2.11.0")
    assert other_versions.pinned("newest") == ["torch==2.11.0"]
    assert other_versions.pinned("colab")[-1] == "torch==2.11.0"


def test_it_starts_as_make_starts_it_without_the_paths_that_the_tests_have():
    command = [sys.executable, str(other_versions.ROOT / "tools" / "other_versions.py"), "--help"]
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=bare | {"PYTHONPATH": str(other_versions.ROOT)})
    assert done.returncode == 0, done.stderr
    assert "newest" in done.stdout


def test_every_chapter_runs_with_its_own_extras_and_the_fewest_come_first():
    found = other_versions.by_extras()
    assert list(found) == [("notebooks",), ("notebooks", "gpu"), ("notebooks", "evaluation")]
    assert sorted(path for paths in found.values() for path in paths) == sorted(
        (other_versions.ROOT / "book").glob("*.ipynb")
    )
    assert [path.stem for path in found["notebooks", "gpu"]] == ["03_qlora_nf4"]
    assert [path.stem for path in found["notebooks", "evaluation"]] == ["08_choosing"]


def test_what_passed_is_written_down(tmp_path, monkeypatch):
    note = tmp_path / "tested.json"
    note.write_text(json.dumps({"pinned": {"python": "3.11", "torch": "1.0"}}))
    monkeypatch.setattr(other_versions, "TESTED", note)
    other_versions.note("newest", sys.executable)
    written = json.loads(note.read_text())
    assert written["pinned"] == {"python": "3.11", "torch": "1.0"}
    assert set(written["newest"]) == {"python", "torch", "date"} and "+" not in written["newest"]["torch"]


@pytest.mark.parametrize("status", [0, 1])
def test_a_failed_run_of_tests_is_told(status, tmp_path, monkeypatch, capsys):
    (tmp_path / "pytest").write_text(f"#!/bin/sh\nexit {status}\n")
    (tmp_path / "pytest").chmod(0o755)
    assert other_versions.test("unit tests", tmp_path / "python", [], {}) is (status == 0)
    assert ("failed" if status else "passed") in capsys.readouterr().out
