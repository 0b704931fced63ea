"""The homework command of the teaching guide, run as the guide prints it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "book" / "appendix_teaching.md").read_text(encoding="utf-8")
COMMAND = re.search(r"Write the homework copies.*?```shell\n(.*?)```", GUIDE, re.DOTALL)[1]


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("chapter", ["02", "05"])
def test_the_guides_command_writes_a_chapter_without_solutions(chapter, tmp_path):
    words = shlex.split(COMMAND)
    assert words[0] == ".venv/bin/python" and words[-1] == "02"  # the environment that make book sets up
    command = [sys.executable, *words[1:-1], chapter, "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (written,) = tmp_path.iterdir()
    before = cells(ROOT / "book" / written.name)
    kept = [cell for cell in before if "solution" not in cell["metadata"].get("tags", ())]
    assert written.name.startswith(chapter) and len(kept) < len(before)
    assert [cell["source"] for cell in cells(written)] == [cell["source"] for cell in kept]


def test_a_chapter_that_does_not_exist_is_one_line(tmp_path):
    command = [sys.executable, "tools/homework.py", "99", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "no notebook for '99'" in done.stderr and "Traceback" not in done.stderr


def test_the_guide_says_where_the_copy_is():
    place = re.search(r"The copy is `(.*?)`", GUIDE)[1]
    assert place == "_build/homework/02_lora.ipynb" and (ROOT / "book" / Path(place).name).is_file()
