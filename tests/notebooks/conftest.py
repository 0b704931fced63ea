"""The package as a reader gets it: built into a wheel and installed in a place of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from wheel import build

ROOT = Path(__file__).resolve().parents[2]
OTHER_PYTHON = "PEFTLAB_READER_PYTHON"
LIMIT_SECONDS = 180  # on two CPU cores that do nothing else; only reported, so that a busy machine fails no test


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    """A folder that holds the installed wheel and nothing else. All workers share one."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return install(tmp_path_factory.mktemp("wheel"))
    work = tmp_path_factory.getbasetemp().parent / "wheel"  # of all workers of this run
    with FileLock(f"{work}.lock"):
        if not work.exists():
            unfinished = work.with_name("wheel-unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            install(unfinished)
            unfinished.rename(work)
    return work / "installed"


def install(work: Path) -> Path:
    """Build the wheel in a folder and install it there."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "install", "--no-deps", "--target", str(work / "installed"), str(build(ROOT, work))]
    subprocess.run(command, cwd=work, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    shutil.copyfile(Path(__file__).with_name("only_these.py"), work / "installed" / "sitecustomize.py")
    return work / "installed"


@pytest.fixture(scope="session")
def reader_environment(installed) -> dict[str, str]:
    """Environment variables under which `import peftlab` finds the wheel, and no hub can be asked.

    PYTHONPATH comes before an editable install of the checkout; test_the_wheel_is_what_runs makes sure of it.
    """
    # the kernel chooses its own way of drawing, as it does for a reader
    ours = ("PYTEST_", "COV_", "MPLBACKEND")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return environment | {
        "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "PEFTLAB_STRICT": "1",
    }  # fmt: skip


@pytest.fixture(scope="session")
def kernel(tmp_path_factory) -> tuple[list[str], dict[str, str]]:
    """nbval's options and environment for the kernel of OTHER_PYTHON, or for this environment's own.

    `make test-newest` and `make test-colab` name the Python of an environment that holds what a reader installed, and
    nothing else: there the wheel is installed, and nothing has to be hidden.
    """
    if not (python := os.environ.get(OTHER_PYTHON)):
        return ["--nbval-current-env"], {}
    folder = tmp_path_factory.mktemp("jupyter")
    spec = {"argv": [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "reader"}
    (folder / "kernels" / "reader").mkdir(parents=True)
    (folder / "kernels" / "reader" / "kernel.json").write_text(json.dumps(spec | {"language": "python"}))
    return ["--nbval-kernel-name=reader"], {"JUPYTER_PATH": str(folder), "PYTHONPATH": ""}


def pytest_terminal_summary(terminalreporter):
    """How long each notebook took, and whether it keeps the limit of a chapter."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    measured = [dict(report.user_properties) for report in reports]
    times = [(properties["notebook"], properties["seconds"]) for properties in measured if "notebook" in properties]
    if times:
        terminalreporter.section("notebooks")
        for title, seconds in times:
            over = f"  over the limit of {LIMIT_SECONDS} s" if seconds > LIMIT_SECONDS else ""
            terminalreporter.write_line(f"{title:<32} {seconds:6.1f} s{over}")
        terminalreporter.write_line(f"{'all':<32} {sum(seconds for _, seconds in times):6.1f} s")
