"""Render the book into _build/html; a warning fails the build. What `make book` and the browser tests call.

The build always starts from nothing: Sphinx reports a page's warnings only when it reads the page again, so an
incremental build could pass where a fresh one fails.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"


def build(root: Path = ROOT) -> tuple[int, str, float]:
    """Build the book of the checkout `root`: (exit status, everything the tools printed, seconds)."""
    for folder in ("html", ".doctrees", "jupyter_execute"):
        shutil.rmtree(root / "_build" / folder, ignore_errors=True)
    command = [str(Path(sys.executable).parent / "jupyter-book"), "build", ".", "-W", "-n", "--keep-going"]
    started = time.monotonic()
    # without colour codes the log can be searched; a fixed hash seed keeps the pages of two builds alike
    environment = os.environ | {"NO_COLOR": "1", "PYTHONHASHSEED": "0"}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=root, env=environment, **both)
    output = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    return done.returncode, output, time.monotonic() - started


def main() -> int:
    print("book: rendering", flush=True)
    status, output, seconds = build()
    if status:
        told = [line for line in output.splitlines() if re.search(r"WARNING|ERROR|CRITICAL", line)]
        # without a warning it was an exception, whose traceback is at the end
        print("\n".join(told) or output[-4000:], file=sys.stderr)
        print("book: not rendered, see above", file=sys.stderr)
        return 1
    print(f"book: rendered in {seconds:.0f} s; open {(SITE / 'index.html').relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
