"""Measurements: rows of numbers that say where they come from.

A results file is written by `peftlab bench TOPIC --out FILE` and read by the chapters with `pl.results(TOPIC)`::

    {"topic": "lora",
     "provenance": {"gpu": "NVIDIA H100 80GB HBM3", "cpu": "...", "versions": {"torch": "2.11.0", ...},
                    "date": "2026-11-22", "command": "peftlab bench lora --out lora.json"},
     "rows": [{"shape": "llama-2-7b", "method": "lora", "r": 16, "peak_bytes": 14400000000}, ...]}

A number without its machine, versions, date and command is not a measurement: such a file is refused.
This module needs only the standard library, so the build of the book can read results without torch.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftlab.checks import checked
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.files import write_atomically

FOLDER = Path(__file__).parents[1] / "results"
SCALARS = (str, int, float, bool, type(None))


class Results:
    """Rows of one topic with their provenance.

    Attributes:
        topic: the name under which the file is stored.
        provenance: dict with `gpu` and `cpu` (a name, or None), `versions`, `date`, `command`.
        rows: list of dicts from column name to number, string, bool or None. The units are in the column names
            (`peak_bytes`, `seconds`). They are never converted.
    """

    def __init__(self, topic: str, provenance: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        self.topic, self.provenance, self.rows = topic, provenance, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return f"Results({self.topic!r}, {len(self.rows)} rows: {', '.join(self.columns)})"

    @property
    def columns(self) -> list[str]:
        """Names of all columns, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def where(self, **conditions: Any) -> Results:
        """Return the rows that meet every condition, as another `Results` with the same provenance.

        A condition is a value that the row must have, a list, tuple or set of such values, or a function of the value.
        A row without the column is left out.

        Raises:
            PeftLabError: no row has a column of that name (with near matches).
        """
        for name in conditions:
            self._known(name)
        rows = [row for row in self.rows if all(n in row and _meets(row[n], c) for n, c in conditions.items())]
        return Results(self.topic, self.provenance, rows)

    def one(self, **conditions: Any) -> dict[str, Any]:
        """Return the single row that meets every condition, a dict.

        Raises:
            PeftLabError: no row meets them, or more than one.
        """
        found = self.where(**conditions).rows
        if len(found) == 1:
            return found[0]
        told = ", ".join(f"{name}={value!r}" for name, value in conditions.items())
        if found:
            differ = [name for name in self.columns if len({repr(row.get(name)) for row in found}) > 1]
            raise PeftLabError(f"results {self.topic!r}: {len(found)} rows have {told}; "
                               f"they differ in {', '.join(differ) or 'nothing'}. Add one of these as a condition.")
        seen = {name: list(dict.fromkeys(row[name] for row in self.rows if name in row)) for name in conditions}
        raise PeftLabError(f"results {self.topic!r}: no row has {told}. Values there: "
                           + "; ".join(f"{name}: {', '.join(map(repr, values[:12]))}" for name, values in seen.items()))

    def column(self, name: str) -> list[Any]:
        """Return the values of one column, a list with one entry per row (None where the row lacks it)."""
        self._known(name)
        return [row.get(name) for row in self.rows]

    @property
    def machine(self) -> str:
        """The name of the GPU, or of the CPU if there was no GPU."""
        return str(self.provenance.get("gpu") or self.provenance["cpu"])

    @property
    def versions(self) -> str:
        """The names and versions of the libraries, in one line."""
        return ", ".join(f"{name} {version}" for name, version in sorted(self.provenance["versions"].items()))

    def cite(self) -> str:
        """Return one line that says where the numbers come from: machine, versions, date, command."""
        given = self.provenance
        return f"Measured on {self.machine}, {given['date']} ({self.versions}). To repeat it: {given['command']}"

    def _known(self, name: str) -> None:
        if name not in self.columns:
            raise PeftLabError(f"results {self.topic!r} have no column {name!r}; there are: {', '.join(self.columns)}."
                               + did_you_mean(name, self.columns))


def _meets(value: Any, condition: Any) -> bool:
    if callable(condition):
        return bool(condition(value))
    if isinstance(condition, (list, tuple, set, frozenset)):
        return value in condition
    return value == condition


@checked()
def results(topic: str | Path) -> Results:
    """Read the measurements of a topic.

    Args:
        topic: a name such as "lora" (a file shipped with the package), or the path of a file that `peftlab bench`
            wrote on this machine (it ends in `.json`).

    Raises:
        PeftLabError: there is no such topic (the known ones are named), or the file is not a results file, or it lacks
            part of its provenance.

    >>> pl.results("memory").provenance["gpu"]
    'NVIDIA H100 80GB HBM3'
    """
    path = Path(topic) if str(topic).endswith(".json") else FOLDER / f"{topic}.json"
    if not path.is_file():
        raise PeftLabError(f"no results {str(topic)!r}; there are: {', '.join(topics()) or 'none'}. "
                           "`peftlab bench TOPIC --out FILE.json` makes one; pass its path here."
                           + did_you_mean(str(topic), topics()))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PeftLabError(f"{path.name} is no results file: {error}") from None
    validate(content, path.name)
    return Results(content["topic"], content["provenance"], content["rows"])


def topics() -> list[str]:
    """Return the names of the results shipped with the package, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


@checked()
def validate(content: Any, name: str) -> None:
    """Require a results file with its full provenance. The error names the file and the fault."""
    fault = _fault(content)
    if fault:
        raise PeftLabError(f"{name}: {fault}. A results file is made by `peftlab bench TOPIC --out FILE.json`.")


def _fault(content: Any) -> str | None:
    if not isinstance(content, dict) or not isinstance(content.get("topic"), str):
        return "it has no topic"
    given = content.get("provenance")
    if not isinstance(given, dict):
        return "it has no provenance, so nobody can tell where its numbers come from"
    if not (given.get("gpu") or given.get("cpu")):
        return "its provenance names neither a gpu nor a cpu"
    versions = given.get("versions")
    if not isinstance(versions, dict) or not versions or not all(isinstance(v, str) for v in versions.values()):
        return "its provenance has no versions of the libraries"
    if not isinstance(given.get("command"), str) or not given["command"].strip():
        return "its provenance has no command that repeats the measurement"
    try:
        datetime.date.fromisoformat(given["date"])
    except (KeyError, TypeError, ValueError):
        return f"its provenance has no date of the form YYYY-MM-DD (found {given.get('date')!r})"
    rows = content.get("rows")
    if not isinstance(rows, list) or not rows:
        return "it has no rows"
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(value, SCALARS) for value in row.values()):
            return f"row {number} is not a flat table row (numbers, strings, true, false, null)"
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                return f"row {number} holds {value} in the column {name!r}; leave it out, or say null"
    return None


@checked()
def write(path: str | Path, topic: str, provenance: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Check the contents as `results` does, then write a results file, completely or not at all.

    Each row has its own line, so two measurements can be compared with diff.

    Raises:
        PeftLabError: part of the provenance is missing, or a row holds a value that a table cannot, such as NaN.
    """
    content = {"topic": topic, "provenance": provenance, "rows": rows}
    validate(content, Path(path).name)
    head = json.dumps({"topic": topic, "provenance": provenance}, indent=1, sort_keys=False)
    lines = ",\n  ".join(json.dumps(row, allow_nan=False) for row in rows)
    text = f'{head[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n'
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise PeftLabError(f"{path} cannot be written: {error.strerror or error}. Give another path.") from error
