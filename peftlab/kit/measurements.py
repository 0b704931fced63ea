"""Measurements: rows of numbers that say where they come from.

A results file is written by `peftlab bench TOPIC --out FILE` and read by the chapters with `pl.results(TOPIC)`::

    {"topic": "lora",
     "provenance": {"gpu": "NVIDIA H100 80GB HBM3", "cpu": "...", "versions": {"torch": "2.11.0", ...},
                    "date": "2026-11-22", "command": "peftlab bench lora --out lora.json",
                    "runs": {"5c01d2": {"host": "90ab34cd", "cpu": "...", "date": "2026-11-22"}}},
     "rows": [{"shape": "llama-2-7b", "method": "lora", "r": 16, "peak_bytes": 14400000000, "run": "5c01d2"}, ...]}

A number without its machine, versions, date and command is not a measurement: such a file is refused.
Each row names its run: one host on one day. Times may be compared within a run only; `within_run` and `ratio` refuse
anything else. A file from before there were runs is one run.
This module needs only the standard library, so the build of the book can read results without torch.
"""

from __future__ import annotations

import datetime
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from peftlab.checks import checked
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.files import write_atomically

FOLDER = Path(__file__).parents[1] / "results"
SCALARS = (str, int, float, bool, type(None))
RUN = ("host", "cpu", "date")  # what is told of each run


class Ratio(NamedTuple):
    """How many times as large one time is as another: the median over the processes, the smallest and the largest."""

    middle: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.least:.2f} to {self.most:.2f})"


class Results:
    """Rows of one topic with their provenance.

    Attributes:
        topic: the name under which the file is stored.
        provenance: dict with `gpu` and `cpu` (a name, or None), `versions`, `date`, `command`, and `runs`: from the
            name of each run to its `host`, `cpu` and `date`. Older files have no `runs`.
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

    def within_run(self, **conditions: Any) -> Results:
        """Return the rows that meet every condition, as `where` does, if one run measured them all.

        Only then may their times be compared.

        Raises:
            PeftLabError: the rows are of several runs.
        """
        found = self.where(**conditions)
        runs = list(dict.fromkeys(row.get("run") for row in found))
        if len(runs) > 1:
            told = ", ".join(self._told(run) for run in runs)
            raise PeftLabError(f"results {self.topic!r}: these rows are of {len(runs)} runs: {told}. Times may be "
                               f"compared within one run only. Add a condition, for example run={runs[0]!r}.")
        return found

    def ratio(self, one: dict[str, Any], other: dict[str, Any], column: str = "seconds") -> Ratio:
        """Return how many times as large a time of one row is as that of another, by the processes that measured both.

        Say that one thing is slower only if `least` is above 1.

        Raises:
            PeftLabError: the rows are of different runs, or lack that time.

        >>> measured = pl.results("lora")
        >>> base, merged = (measured.one(section="latency", state=s, tokens=512) for s in ("base", "merged"))
        >>> print(round(measured.ratio(base, merged).middle))
        1
        """
        if one.get("run") != other.get("run"):
            raise PeftLabError(f"results {self.topic!r}: these rows are of two runs: {self._told(one.get('run'))} and "
                               f"{self._told(other.get('run'))}. Times may be compared within one run only.")
        for row in (one, other):
            if not row.get(column):
                raise PeftLabError(f"results {self.topic!r}: a row has no {column!r}; its columns are "
                                   f"{', '.join(row)}." + did_you_mean(column, row))
        each = [name for number in range(1, 1 + (one.get("processes") or 0))
                if (name := f"{column}_{number}") in one and name in other] or [column]
        ratios = [one[name] / other[name] for name in each]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))

    def _told(self, run: str | None) -> str:
        """Name a run with its host and its date, where they are known."""
        known = self.provenance.get("runs", {}).get(run)
        return f"{run} (host {known['host']}, {known['date']})" if known else str(run)

    @property
    def machine(self) -> str:
        """The name of the GPU, or of the CPU if there was no GPU."""
        return str(self.provenance.get("gpu") or self.provenance["cpu"])

    @property
    def when(self) -> str:
        """The date, and the number of runs if there were several."""
        runs = len(self.provenance.get("runs", ()))
        return str(self.provenance["date"]) + (f", in {runs} runs" if runs > 1 else "")

    @property
    def versions(self) -> str:
        """The names and versions of the libraries, in one line."""
        return ", ".join(f"{name} {version}" for name, version in sorted(self.provenance["versions"].items()))

    def cite(self) -> str:
        """Return one line that says where the numbers come from: machine, versions, date, command."""
        given = self.provenance
        return f"Measured on {self.machine}, {self.when} ({self.versions}). To repeat it: {given['command']}"

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
    runs = given.get("runs")
    if runs is not None and not _tells_of_runs(runs):
        return f"its provenance does not say {', '.join(RUN)} of each run"
    rows = content.get("rows")
    if not isinstance(rows, list) or not rows:
        return "it has no rows"
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(value, SCALARS) for value in row.values()):
            return f"row {number} is not a flat table row (numbers, strings, true, false, null)"
        if runs is not None and row.get("run") not in runs:
            return f"row {number} names the run {row.get('run')!r}, which its provenance does not know"
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                return f"row {number} holds {value} in the column {name!r}; leave it out, or say null"
    return None


def _tells_of_runs(runs: Any) -> bool:
    return isinstance(runs, dict) and all(
        isinstance(run, dict) and all(isinstance(run.get(name), str) for name in RUN) for run in runs.values()
    )


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
