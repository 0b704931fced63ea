"""Bring a notebook into the one form that is stored, so that a refresh changes only what really changed.

    python tools/normalise.py book/02_lora.ipynb ...          rewrite these notebooks
    python tools/normalise.py --check book/*.ipynb            say which are not in form, and change nothing

The form: cells have an id made of their place and kind once, and keep it; sources and outputs are split into lines as
nbformat does; execution counts run 1..n; no times, no widget state, no trust marks; the kernel is named `python3` and
no Python version is recorded; keys are sorted, indent 1, one line end at the end.
"""

import argparse
import json
import sys
from pathlib import Path

import nbformat

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# metadata that tools leave in cells and that says nothing to a reader
NOISE = ("execution", "ExecuteTime", "collapsed", "scrolled", "trusted", "id", "outputId", "colab", "vscode")


def normalise(notebook) -> str:
    """The text to store for `notebook` (a nbformat node); the node itself stays as it was."""
    notebook = nbformat.from_dict(json.loads(json.dumps(notebook)))
    kept = {key: notebook.metadata[key] for key in ("mystnb", "title", "peftlab") if key in notebook.metadata}
    notebook.metadata = nbformat.from_dict(METADATA | kept)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    used, count = set(), 0
    for cell in notebook.cells:
        if not cell.get("id") or cell["id"] in used:
            cell["id"] = free_id(cell.cell_type, used)
        used.add(cell["id"])
        for key in NOISE:
            cell.metadata.pop(key, None)
        folded = cell.metadata.pop("jupyter", {}).get("source_hidden")
        if folded:  # a solution is folded in JupyterLab too
            cell.metadata["jupyter"] = {"source_hidden": True}
        cell.source = "\n".join(line.rstrip() for line in cell.source.strip("\n").split("\n"))
        if cell.cell_type == "code":
            count += 1
            executed = cell.get("execution_count") is not None
            cell.execution_count = count if executed else None
            cell.outputs = join_streams(cell.outputs)
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = cell.execution_count
                tidy(output)
        else:
            cell.pop("attachments", None)
    nbformat.validate(notebook)
    text = nbformat.writes(notebook, version=4)
    return json.dumps(json.loads(text), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def free_id(kind: str, used: set[str]) -> str:
    """The first id of the form `code-7` that no cell has yet."""
    number = next(n for n in range(1, len(used) + 2) if f"{kind}-{n}" not in used)
    return f"{kind}-{number}"


def join_streams(outputs: list) -> list:
    """Consecutive pieces of one stream as one piece: where a kernel cuts its text is chance."""
    joined: list = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def tidy(output) -> None:
    """Remove what an output holds beside its content."""
    metadata = output.get("metadata")
    if metadata:
        for key in ("needs_background",):
            metadata.pop(key, None)
        if metadata.get("image/png") == {}:
            metadata.pop("image/png")
    data = output.get("data", {})
    # a widget needs a kernel and its id is new in each run; the figure and the text stored with it are for the page
    if len(data) > 1:
        data.pop("application/vnd.jupyter.widget-view+json", None)
    if "image/png" in data:
        data["image/png"] = data["image/png"].strip() + "\n"


def read(path: Path):
    return nbformat.read(path, as_version=4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say which notebooks are not in form")
    parser.add_argument("notebooks", nargs="+", type=Path)
    arguments = parser.parse_args()
    changed = 0
    for path in arguments.notebooks:
        text = normalise(read(path))
        if text != path.read_text(encoding="utf-8"):
            changed += 1
            print(f"{path}: {'not in form' if arguments.check else 'rewritten'}")
            if not arguments.check:
                path.write_text(text, encoding="utf-8")
    return 1 if changed and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
