"""Make a chapter into homework: a copy of its notebook without the solutions.

    python tools/homework.py 02             writes _build/homework/02_lora.ipynb
    python tools/homework.py                every chapter

The cells with the tag `solution` are left out, with their outputs; everything else stays as it is.
"""

import argparse
from pathlib import Path

import nbformat
from normalise import read
from refresh import BOOK, ROOT, chosen

OUT = ROOT / "_build" / "homework"


def without_solutions(path: Path) -> nbformat.NotebookNode:
    """The notebook at `path` without the cells that bear the tag `solution`."""
    notebook = read(path)
    notebook.cells = [cell for cell in notebook.cells if "solution" not in cell.metadata.get("tags", ())]
    return notebook


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write chapters without their solutions.")
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER", help="for example 02 (default: every chapter)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="where to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    found = [path for chapter in arguments.chapters for path in chosen(chapter)] or sorted(BOOK.glob("*.ipynb"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in found:
        nbformat.write(without_solutions(path), arguments.out / path.name)
        print(arguments.out / path.name)


if __name__ == "__main__":
    main()
