"""The package as a reader gets it: built into a wheel, from a copy of the checkout.

setuptools would leave a build folder in the checkout, and take stale files from it.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = ("peftlab", "pyproject.toml", "README.md", "LICENSE")


def build(root: Path, folder: Path) -> Path:
    """Build the wheel of the checkout `root` into `folder`; the path of the wheel."""
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "source"
        source.mkdir()
        for name in SOURCES:
            if (root / name).is_dir():
                shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(root / name, source / name)
        command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "wheel", "--no-deps"]
        command += ["--no-build-isolation", "--wheel-dir", str(folder), str(source)]
        done = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")
    return next(folder.glob("peftlab-*.whl"))
