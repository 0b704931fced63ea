"""Run a chapter anew and store its outputs: what `make refresh CH=02` calls.

    python tools/refresh.py 02              book/02_*.ipynb
    python tools/refresh.py start_here      one page by its name

Each notebook runs in a fresh kernel and an empty folder, with this checkout's package. Its outputs are stored only if
every cell ran without an error and wrote nothing to stderr; the file changes in one step or not at all.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from normalise import normalise, read

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
HUNG_SECONDS = 3600  # ends a cell that hangs, not one that is slow


def chosen(chapter: str) -> list[Path]:
    """The notebooks of a chapter: its number, or the name of a file without its ending."""
    patterns = [f"{chapter}_*.ipynb", f"{chapter}.ipynb"]
    found = sorted({path for pattern in patterns for path in BOOK.glob(pattern)})
    if not found:
        known = ", ".join(sorted(p.stem for p in BOOK.glob("*.ipynb"))) or "none yet"
        raise SystemExit(f"refresh: no notebook for {chapter!r}; there are: {known}")
    return found


def complaints(notebook) -> list[str]:
    """What forbids storing the outputs: errors, text on stderr, cells that did not run."""
    found = []
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), start=1):
        first = cell.source.strip().splitlines()[0] if cell.source.strip() else "(empty)"
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"cell {number} ({first}): {output.ename}: {output.evalue}")
            elif output.get("name") == "stderr":
                found.append(f"cell {number} ({first}): wrote to stderr: {output.text.strip()[:200]}")
        if cell.execution_count is None:
            found.append(f"cell {number} ({first}): was not executed")
    return found


def execute(path: Path) -> tuple[object, float]:
    """The notebook at `path`, executed in an empty folder, and the seconds that took."""
    notebook = read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="peftlab-") as folder:
        client = NotebookClient(
            notebook,
            timeout=HUNG_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            # the kernel's remark on its own transport is no business of the page
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
        try:
            client.execute(env={key: value for key, value in os.environ.items() if key != "MPLBACKEND"})
        except CellExecutionError:
            pass  # the error is among the outputs, and is reported with its cell
    return notebook, time.monotonic() - started


def store(path: Path, text: str) -> None:
    """Write in one step: a reader sees the old file or the new one."""
    temporary = path.with_suffix(".ipynb.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapter", help="a chapter's number, 02, or a notebook's name, start_here")
    status = 0
    for path in chosen(parser.parse_args().chapter):
        name = path.relative_to(ROOT)
        print(f"refresh: running {name}", flush=True)
        notebook, seconds = execute(path)
        problems = complaints(notebook)
        if problems:
            print("\n".join(f"{name}: {problem}" for problem in problems), file=sys.stderr)
            print(f"refresh: {name} stays as it was", file=sys.stderr)
            status = 1
            continue
        text = normalise(nbformat.from_dict(notebook))
        changed = text != path.read_text(encoding="utf-8")
        store(path, text)
        print(f"refresh: {name} ran in {seconds:.0f} s, {'outputs stored' if changed else 'nothing changed'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
