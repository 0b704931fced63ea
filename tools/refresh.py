"""Run a chapter anew and store its outputs: what `make refresh CH=02` calls.

    python tools/refresh.py 02              book/02_*.ipynb
    python tools/refresh.py start_here      one page by its name
    python tools/refresh.py --prose         run nothing; only fill in what prose binds (`make prose`)

Each notebook runs in a fresh kernel and an empty folder, with this checkout's package. Its outputs are stored only if
every cell ran without an error and wrote nothing to stderr; the file changes in one step or not at all. Then the prose
of all pages is filled in: values, references, citations and the numbers of sections, equations and figures
(book/_ext/portable.py has the marks). Drawings that a page without code shows as files are drawn anew.
"""

import argparse
import os
import re
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
sys.path.insert(0, str(BOOK / "_ext"))

import portable  # noqa: E402

from peftlab.kit import figures  # noqa: E402
from peftlab.kit.figures.style import png  # noqa: E402

PAGES = [ROOT / "index.md", *sorted(BOOK.glob("*.md")), ROOT / "README.md"]
DRAWING = re.compile(r"\]\((_static/drawing_([a-z0-9-]+)\.png)\)")
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


class Client(NotebookClient):
    """Runs a notebook, and evaluates after each cell the values that it gives to the prose."""

    async def async_execute_cell(self, cell, cell_index, **options):
        done = await super().async_execute_cell(cell, cell_index, **options)
        if cell.cell_type == "code" and (wanted := portable.expressions(cell)):
            asked = self.kc.execute("", silent=True, user_expressions=wanted)
            while (reply := await self.kc.get_shell_msg(timeout=None))["parent_header"].get("msg_id") != asked:
                pass
            store_values(self.nb, cell, portable.evaluated(reply))
        return done


def store_values(notebook, cell, texts: dict[str, str]) -> None:
    """Keep what a cell computed for the prose, and its figure's description where a page and Jupyter look for it."""
    alt = texts.pop("alt", None)
    notebook.metadata.setdefault("peftlab", {}).setdefault("values", {}).update(texts)
    if alt is not None:
        cell.metadata.setdefault("mystnb", {})["image"] = {"alt": alt}
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.setdefault("metadata", {}).setdefault("image/png", {})["alt"] = alt


def execute(path: Path) -> tuple[object, float]:
    """The notebook at `path`, executed in an empty folder, and the seconds that took."""
    notebook = read(path)
    notebook.metadata.pop("peftlab", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="peftlab-") as folder:
        client = Client(
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
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def fill_prose() -> int:
    """Fill in what the prose of every page binds; return 1 if a page names what is not there, and leave that page."""
    status, paths = 0, sorted(BOOK.glob("*.ipynb"))
    notebooks = {path: read(path) for path in paths}
    for path, notebook in notebooks.items():
        prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
        for cell, source in zip(prose, portable.number_headings(path.stem, [c.source for c in prose]), strict=True):
            cell.source = source
    book = portable.Book({path.stem: notebook for path, notebook in notebooks.items()}, BOOK)
    of_runs = portable.runs(BOOK)
    for path, notebook in notebooks.items():
        values = portable.stored_values(notebook) | of_runs
        try:
            for cell in notebook.cells:
                if cell.cell_type == "markdown":
                    cell.source = book.fill(path.stem, cell.source, values)
        except ValueError as error:
            print(f"{path.relative_to(ROOT)}: {error}", file=sys.stderr)
            status = 1
            continue
        text = normalise(notebook)
        if text != path.read_text(encoding="utf-8"):
            store(path, text)
            print(f"refresh: {path.relative_to(ROOT)}: prose filled in")
    return fill_pages(book, portable.values_of_all(notebooks.values()) | of_runs) or status


def fill_pages(book: portable.Book, values: dict[str, str]) -> int:
    """Fill in what pages without code bind, and draw; return 1 if one names what is not there, and leave that page."""
    status = 0
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        try:
            filled = book.fill(path.stem, text, values)
        except ValueError as error:
            print(f"{path.relative_to(ROOT)}: {error}", file=sys.stderr)
            status = 1
            continue
        if filled != text:
            store(path, filled)
            print(f"refresh: {path.relative_to(ROOT)}: prose filled in")
        for name, method in DRAWING.findall(filled):
            drawn = png(figures.block(method))
            if not (picture := BOOK / name).is_file() or picture.read_bytes() != drawn:
                picture.write_bytes(drawn)
                print(f"refresh: {picture.relative_to(ROOT)}: drawn")
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapter", nargs="?", help="a chapter's number, 02, or a notebook's name, start_here")
    parser.add_argument("--prose", action="store_true", help="run nothing, only fill in what prose binds")
    arguments = parser.parse_args()
    if (arguments.chapter is None) != arguments.prose:
        parser.error("name a chapter, or give --prose")
    status = 0
    for path in chosen(arguments.chapter) if arguments.chapter else []:
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
    return fill_prose() or status


if __name__ == "__main__":
    sys.exit(main())
