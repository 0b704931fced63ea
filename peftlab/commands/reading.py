"""The rows of a data set for `peftlab train`, each of which knows where it stands, so that an error can say so.

JSON is read here, line by line and value by value: a library that makes columns of it gives every message the keys of
all others, with nothing in them, and a template writes these too. Tables and saved data sets are read by `datasets`.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peftlab.errors import PeftLabError

JSON = (".jsonl", ".json")
OTHERS = (".csv", ".tsv", ".parquet", ".txt", ".arrow")
# Words in a file's name that tell its split
SPLITS = {"test": ("test", "testing", "eval", "evaluation"), "validation": ("validation", "valid", "dev", "val")}
Place = Callable[[], str]


class Row(dict):
    """The columns of a row, and where it stands: `x.jsonl, line 3`."""

    def __init__(self, columns: dict[str, Any], place: Place) -> None:
        super().__init__(columns)
        self.place = place

    @property
    def where(self) -> str:
        return self.place()


class Rows(list[Row]):
    """The rows of a split, and the names of its classes where the data set has them."""

    classes: tuple[str, ...] | None = None

    @property
    def columns(self) -> list[str]:
        """The columns of all rows, in the order in which they are found."""
        return list(dict.fromkeys(column for row in self for column in row))


def read(name: str) -> dict[str, Rows]:
    """Read a data set: a name of `peftlab.load_data`, a file, a folder or a hub id. Return its splits.

    Raises:
        PeftLabError: it cannot be read; for JSON the message names the line.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix.lower() in JSON:
        return {"train": json_rows(path)}
    if path.is_dir() and path.resolve() != path.resolve().parent:
        files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
        mine = [file for file in files if file.suffix.lower() in JSON]
        saved = any(file.name in ("dataset_dict.json", "state.json", "dataset_info.json") for file in files)
        if mine and not saved and not any(file.suffix.lower() in OTHERS for file in files):
            splits: dict[str, Rows] = {}
            for file in mine:
                splits.setdefault(_split_of(file), Rows()).extend(json_rows(file))
            return splits
    from peftlab.assets.data import load_data

    return splits_of(load_data(name), name)


def splits_of(data: Any, name: str) -> dict[str, Rows]:
    """The splits of a `DatasetDict` as rows. A table's row is known by its line, another's by its number."""
    path = Path(name).expanduser()
    is_table = path.is_file() and path.suffix.lower() in (".csv", ".tsv")
    splits = {}
    for split, part in data.items():
        if isinstance(part, Rows):
            splits[split] = part
            continue
        if is_table:
            places = [_in_table(path, number) for number in range(len(part))]
        else:
            places = [_text(f"row {number + 1} of {split}") for number in range(len(part))]
        splits[split] = Rows(Row(_without_holes(dict(row)), place) for row, place in zip(part, places, strict=True))
        splits[split].classes = getattr(part.features.get("label"), "names", None)
    return splits


def json_rows(path: Path) -> Rows:
    """Read JSON lines, or a file with one list of objects.

    Raises:
        PeftLabError: it is not JSON, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PeftLabError(f"{path} cannot be read: {error}. Save it as UTF-8.") from error
    if path.suffix.lower() == ".json" or text.lstrip().startswith("["):
        whole = _whole(text)
        if whole is not None:
            return Rows(Row(_object(row, place()), place) for row, place in _numbered(whole, path))
    rows = Rows()
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = _text(f"{path}, line {number}")
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise PeftLabError(
                    f"{place()} is not JSON: {error}; found {line.strip()!r:.80}. Each line holds one object, "
                    '{"prompt": "...", "completion": "..."}, for example.'
                ) from error
            rows.append(Row(_object(value, place()), place))
    if not rows:
        raise PeftLabError(f"{path} is empty.")
    return rows


def _whole(text: str) -> list[Any] | None:
    """The rows of a file that is one JSON value; None if it is several, one a line."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        lists = [entry for entry in value.values() if isinstance(entry, list) and entry and isinstance(entry[0], dict)]
        return lists[0] if len(value) == 1 and lists else [value]
    return value if isinstance(value, list) else None


def _numbered(values: list[Any], path: Path) -> Iterator[tuple[Any, Place]]:
    for number, value in enumerate(values, 1):
        yield value, _text(f"{path}, entry {number}")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PeftLabError(f"{where} is {value!r:.60} ({type(value).__name__}); a row is an object with named columns.")
    return value


def _text(words: str) -> Place:
    return lambda: words


def _in_table(path: Path, number: int) -> Place:
    """Where a row of a table begins: a cell may run over several lines."""

    def place() -> str:
        with (
            contextlib.suppress(csv.Error),  # it gives up at a cell of 131,072 characters
            path.open(encoding="utf-8-sig", newline="", errors="replace") as file,
        ):
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            line, found = 1, -1  # the headings are no row
            for cells in reader:
                if cells:
                    if found == number:
                        return f"{path}, line {line}"
                    found += 1
                line = reader.line_num + 1
        return f"{path}, row {number + 1}"

    return place


def _without_holes(value: Any) -> Any:
    """A row without the empty keys in its messages, which `datasets` adds where others have them.

    The columns themselves stay, because a hole there is a mistake.
    """
    return {key: _full(entry) if isinstance(entry, (list, dict)) else entry for key, entry in value.items()}


def _full(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _full(entry) for key, entry in value.items() if entry is not None}
    return [_full(entry) for entry in value] if isinstance(value, list) else value


def _split_of(path: Path) -> str:
    words = set(re.split(r"[^a-z]+", path.stem.lower()))
    return next((split for split, names in SPLITS.items() if words & set(names)), "train")
