"""The calculator of the book: what its page knows before Python is there, and the archive that Python then imports.

The archive holds the package's own files, as they are: those of `peftlab.memory` and what these import. It is made at
every build, so there is no second copy that could grow old.
"""

import ast
import inspect
import json
import zipfile
from pathlib import Path

import peftlab
from peftlab.catalogue import METHODS
from peftlab.kit.figures.style import ROLES
from peftlab.memory import CARDS, cards, estimate
from peftlab.memory.replay.tape import KINDS

PACKAGE = Path(peftlab.__file__).parent
ANSWERS = Path(__file__).with_name("calculator_answers.py")
ARCHIVE = "_static/peftlab-memory.zip"
COUNTED = ("pyodide.asm.wasm.gzip", "python_stdlib.zip", "pyodide-lock.json")  # what the worker counts as it comes
DATE = (1980, 1, 1, 0, 0, 0)  # of every file, so that two builds give the same archive

NAMES = {
    "weights": "weights", "adapter": "adapter", "gradients": "gradients", "optimizer": "optimiser states",
    "activations": "activations", "logits": "logits and loss", "workspace": "alive for a moment",
}  # fmt: skip
COLOURS = {"optimizer": "optimiser", "logits": "workspace"}  # roles of parts that are called otherwise


def files() -> list[Path]:
    """The files of `peftlab.memory`, and what they import of the package, one after the other."""
    waiting = [PACKAGE / "__init__.py", *PACKAGE.glob("memory/**/*.py")]
    found = set(PACKAGE.glob("memory/**/*.json"))
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += imported(path.read_text(encoding="utf-8"))
    return sorted(found)


def imported(source: str) -> list[Path]:
    """The package's files that a file imports when it is loaded."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    places = [PACKAGE.parent.joinpath(*name.split(".")) for name in names if name.split(".")[0] == PACKAGE.name]
    return [path for place in places for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]


def write_archive(path: Path) -> None:
    """Write the archive that the page's Python imports."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files():
            put(archive, file, file.relative_to(PACKAGE.parent).as_posix())
        put(archive, ANSWERS, ANSWERS.name)


def put(archive: zipfile.ZipFile, file: Path, name: str) -> None:
    entry = zipfile.ZipInfo(name, DATE)
    entry.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(entry, file.read_bytes())


def methods() -> list[str]:
    """The methods that the estimator knows."""
    return [name for name, row in METHODS.items() if row.tensors]


def default(name: str) -> object:
    """The default of an argument of `estimate`."""
    return inspect.signature(estimate).parameters[name].default


def embedded(sizes: dict[str, int]) -> dict:
    """What the script needs, as JSON can hold it.

    Args:
        sizes: bytes of each file in `COUNTED`.
    """
    arguments = inspect.signature(estimate).parameters.values()
    return {
        "defaults": {a.name: a.default for a in arguments if a.default is not a.empty},
        "takes": {name: [one.name for one in METHODS[name].options if one.counted] for name in methods()},
        "ranks": {name: METHODS[name].default("r") for name in methods()},
        "kinds": {kind: NAMES[kind] for kind in KINDS},
        "colours": {kind: ROLES[COLOURS.get(kind, kind)] for kind in KINDS},
        "margin": {"too_low": cards.TOO_LOW, "context": cards.CONTEXT, "runs": cards.RUNS},
        "cards": {name: size * cards.GB for name, size in CARDS.items()},
        "sizes": sizes,
    }  # fmt: skip


def as_json(data: dict) -> str:
    """JSON that may stand in a page."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
