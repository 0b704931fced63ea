"""Every notebook runs as a reader runs it: from an empty folder, against the built wheel, and prints what is stored."""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import normalise
import pytest
import rules
from patience import HUNG_SECONDS
from surroundings import hidden

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
EVERY = sorted(BOOK.glob("*.ipynb"))
NOTEBOOKS = [path for path in EVERY if rules.code_cells(normalise.read(path))]


def title(path: Path) -> str:
    return path.relative_to(BOOK).with_suffix("").as_posix()


def test_the_wheel_holds_the_whole_package(installed):
    wheel = zipfile.ZipFile(next(installed.parent.glob("peftlab-*.whl")))
    inside = {name for name in wheel.namelist() if name.startswith("peftlab/")}
    sources = {p for p in (ROOT / "peftlab").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    missing = {p.relative_to(ROOT).as_posix() for p in sources if p.suffix in (".py", ".json", ".md")} - inside
    assert not missing, f"not in the wheel (see tool.setuptools.package-data): {sorted(missing)}"


def test_the_wheel_is_what_runs(installed, reader_environment, tmp_path):
    code = "import peftlab; print(peftlab.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=reader_environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).is_relative_to(installed)


def hidden_from(path: Path) -> set[str]:
    return hidden(rules.extras(normalise.read(path)))


def test_what_a_set_up_cell_does_not_bring_is_hidden():
    chapter = hidden(("notebooks",))
    assert {"bitsandbytes", "pytest", "hypothesis", "sphinx"} <= chapter
    assert not chapter & {"torch", "transformers", "peft", "matplotlib", "IPython", "ipykernel", "numpy", "gguf"}
    assert "bitsandbytes" not in hidden(("notebooks", "gpu"))


def test_a_kernel_cannot_import_what_is_hidden(reader_environment, tmp_path):
    code = "import sys\ntry:\n    import yaml\nexcept ModuleNotFoundError:\n    print('hidden')\nimport torch"
    environment = reader_environment | {"PEFTLAB_HIDDEN": "yaml"}
    for argument, told in (("ipykernel_launcher", "hidden\n"), ("other", "")):
        command = [sys.executable, "-c", code, argument]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == told


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=title)
def test_prints_what_is_stored(path, reader_environment, kernel, tmp_path, record_property):
    """nbval, strict: every output that is stored is compared with a fresh one.

    The kernel sees only the packages that the notebook's set-up cell brings.
    """
    shutil.copy(path, tmp_path)
    options, variables = kernel
    environment = {**reader_environment, "PEFTLAB_HIDDEN": ",".join(hidden_from(path)), **variables}
    own = [environment["PYTHONPATH"], str(Path(__file__).parent), str(BOOK / "_ext")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, own))  # for the plugin
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # the others of this environment take a second to import
    command = [sys.executable, "-m", "pytest", "-p", "nbval.plugin", "-p", "bound_numbers", "--nbval", *options]
    command += [f"--nbval-cell-timeout={HUNG_SECONDS}"]
    command += ["--nbval-sanitize-with", str(Path(__file__).with_name("sanitise.cfg"))]
    command += ["-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tmp_path), "-q", "--color=no", path.name]
    started = time.monotonic()
    # a kernel that hangs is ended with its process group by nbval's own cell time-out
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    record_property("notebook", title(path))
    record_property("seconds", time.monotonic() - started)
    left = sorted(p.name for p in tmp_path.iterdir() if p.name != path.name)
    if done.returncode:
        pytest.fail(f"{path.name} does not print what is stored (make refresh):\n{done.stdout[-6000:]}", pytrace=False)
    assert " skipped" not in done.stdout.splitlines()[-1], "nbval skipped a cell"
    assert not left, f"{path.name} leaves files in the reader's folder: {left}"
