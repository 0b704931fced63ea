"""The types of the package fit together: mypy finds nothing, with what pyproject.toml asks for."""

import subprocess
import sys
from pathlib import Path

import pytest

import peftlab

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(Path(peftlab.__file__).parents[1] != ROOT, reason="the types are those of the pinned libraries")
def test_mypy_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
