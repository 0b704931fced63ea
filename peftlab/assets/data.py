"""Load data: the sets of this book, in fixed splits, or anything that `datasets` can load."""

import bz2
import contextlib
import csv
import gzip
import hashlib
import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy
from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features, Value

from peftlab.assets import support_desk
from peftlab.assets.fetch import ensure
from peftlab.checks import checked, whole
from peftlab.errors import PeftLabError, did_you_mean

NAMES = ("reviews", "news", "support-desk", "digits")
SPLITS = ("train", "validation", "test")
UNNAMED = "__index_level_0__"  # pandas makes it of the first cells of a table, where rows are longer than the headings
HELD_OUT = 0.1  # the share of each class that goes to validation, and the same again to test
BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def text_as_written(cell: str) -> str | None:
    """A cell of a table as the text that stands there: "NA" and "007" too; an empty one is None."""
    return cell or None


# How tables are read: only an empty cell is a missing value, and a column of texts is one also where they are numbers
AS_WRITTEN = {
    "keep_default_na": False,
    "na_values": [""],
    "converters": dict.fromkeys(
        ("text", "prompt", "completion", "ticket", "message", "instruction", "input", "output"), text_as_written
    ),
}


@checked()
def load_data(
    name: str | os.PathLike[str],
    *,
    sizes: Sequence[int] | None = None,
    difficulty: float | None = None,
    subset: str | None = None,
) -> DatasetDict:
    """Load a data set in splits.

    Args:
        name: one of
            `"reviews"`: 12,808 sentences about films; columns `text`, `label` (0 rotten, 1 fresh);
            `"news"`: 2,225 BBC articles; columns `text`, `label` (0 business, 1 entertainment, 2 politics, 3 sport,
            4 tech);
            `"support-desk"`: generated messages of customers; columns `message`, `ticket` (canonical JSON), `intent`,
            `product`, `urgency`, and `prompt` (the instruction with the message); see `support_desk`;
            `"digits"`: 5,000 handwritten digits of MNIST, 500 of each; columns `image` (28 x 28 grey values from 0 to
            255) and `label` (the digit);
            the path of a file (csv, tsv, json, jsonl, parquet, txt) or a folder of such files, or one that
            `save_to_disk` wrote; or a hub id such as `"org/data"`. Of csv and tsv files only an empty cell is a
            missing value, "NA" is a text; the columns text, prompt, completion, ticket, message, instruction, input and
            output are always texts.
        sizes: at most so many rows in train, validation and test; for the names above only.
        difficulty: of the support desk, from 0 to 1; for that one only.
        subset: the configuration of a hub data set that has several.

    Returns:
        A `DatasetDict`. The named sets have the splits `train`, `validation` and `test`, with 80, 10 and 10% of
        each class in a fixed random order. The splits are the same on every machine. Texts that differ only in case,
        spaces or punctuation are always in the same split, and so are news articles with the same headline.

    Raises:
        PeftLabError: an unknown name.
        AssetError: the data cannot be fetched.

    >>> pl.load_data("support-desk", sizes=(3, 1, 1))["train"][0]["ticket"]
    '{"intent":"refund","product":"printer","urgency":"urgent"}'
    """
    name = str(name)
    if sizes is not None:
        if len(sizes) != 3:
            raise PeftLabError(f"sizes must be three whole numbers (train, validation, test), not {sizes!r}.")
        sizes = tuple(whole("each of the sizes", size, least=0) for size in sizes)
    if difficulty is not None and name != "support-desk":
        raise PeftLabError(f"difficulty is a dial of support-desk; {name!r} has none.")
    if name == "support-desk":
        return _desk(sizes, difficulty)
    if name == "digits":
        return _digits(sizes)
    if name in ("reviews", "news"):
        return _classified(*(_reviews() if name == "reviews" else _news()), sizes)
    if sizes is not None:
        raise PeftLabError(f"sizes is for {', '.join(NAMES)} only; of {name!r} take `.select(range(n))` of a split.")
    return _elsewhere(name, subset)


def _desk(sizes: Sequence[int] | None, difficulty: float | None) -> DatasetDict:
    options: dict[str, Any] = {} if difficulty is None else {"difficulty": difficulty}
    splits = {}
    for split, size in zip(SPLITS, sizes or (None, None, None), strict=True):
        rows = support_desk.generate(split, size, **options)
        splits[split] = Dataset.from_list([row | {"prompt": support_desk.prompt(row["message"])} for row in rows])
    return DatasetDict(splits)


def _reviews() -> tuple[list[dict], list[str]]:
    """Read the sentences with their labels. Drop rows of category `plot`: they are summaries, not opinions."""
    labels = ["rotten", "fresh"]
    with bz2.open(
        ensure("reviews") / "rotten_tomatoes_corpus_full.csv.bz2", "rt", encoding="utf-8", newline=""
    ) as file:
        rows = [row for row in csv.DictReader(file) if row["category"] in labels]
    return [{"text": row["text"].strip(), "label": labels.index(row["category"])} for row in rows], labels


def _news() -> tuple[list[dict], list[str]]:
    """Read the articles with their topics. The folder `sports` is called `sport`, as at the BBC."""
    folders = ["business", "entertainment", "politics", "sports", "tech"]
    lines = (ensure("news") / "news.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    labels = [folder.replace("sports", "sport") for folder in folders]
    return [{"text": row["text"], "label": folders.index(row["label"])} for row in rows], labels


def _digits(sizes: Sequence[int] | None) -> DatasetDict:
    """Read the images, one a line: 784 grey values and the digit. Of each digit a tenth goes to each held-out split."""

    def place(line: str, order: str = "") -> bytes:
        return hashlib.sha256(f"{order}{line}".encode()).digest()

    with gzip.open(ensure("digits") / "mnist_5k.csv.gz", "rt", encoding="ascii") as file:
        lines = sorted(set(file.read().split()), key=place)  # no image is there twice
    by_digit: defaultdict[str, list[str]] = defaultdict(list)
    for line in lines:
        by_digit[line.rpartition(",")[2]].append(line)
    chosen: dict[str, list[str]] = {split: [] for split in SPLITS}
    for found in by_digit.values():
        held = round(HELD_OUT * len(found))
        for split, part in zip(SPLITS, (found[2 * held :], found[held : 2 * held], found[:held]), strict=True):
            chosen[split] += part
    names = [str(digit) for digit in range(10)]
    features = Features({"image": Array2D((28, 28), "uint8"), "label": ClassLabel(names=names)})
    result = {}
    for split, limit in zip(SPLITS, sizes or (None, None, None), strict=True):
        order = sorted(chosen[split], key=lambda line: place(line, split))[:limit]
        rows = numpy.array([line.split(",") for line in order], dtype=int).reshape(-1, 785)
        columns = {"image": rows[:, :-1].astype("uint8").reshape(-1, 28, 28), "label": rows[:, -1]}
        result[split] = Dataset.from_dict(columns, features=features)
    return DatasetDict(result)


def _classified(rows: list[dict], labels: list[str], sizes: Sequence[int] | None) -> DatasetDict:
    """Split rows {text, label} by class and by groups of similar texts, each split in a fixed random order."""
    groups = _groups([row["text"] for row in rows])
    by_class: defaultdict[str, list[list[int]]] = defaultdict(list)
    for group in sorted(groups, key=lambda group: _rank(rows[group[0]]["text"])):
        by_class[rows[group[0]]["label"]].append(group)
    chosen: dict[str, list[int]] = {split: [] for split in SPLITS}
    for found in by_class.values():
        share = HELD_OUT * sum(len(group) for group in found)
        room = {"test": share, "validation": share, "train": float("inf")}
        for group in found:
            split = next(split for split in room if room[split] >= len(group))
            room[split] -= len(group)
            chosen[split] += group
    features = Features({"text": Value("string"), "label": ClassLabel(names=labels)})
    result = {}
    for split, limit in zip(SPLITS, sizes or (None, None, None), strict=True):
        # Not the order in which the rows were divided: in that one the classes are not well mixed.
        order = sorted(chosen[split], key=lambda i: (_rank(rows[i]["text"], split), i))[:limit]
        result[split] = Dataset.from_list([rows[i] for i in order], features=features)
    return DatasetDict(result)


def _groups(texts: list[str]) -> list[list[int]]:
    """Return groups of indices of texts that differ only in case, spaces and punctuation, or share a headline."""
    root = list(range(len(texts)))

    def find(i: int) -> int:
        while root[i] != i:
            i = root[i]
        return i

    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        # The first of several lines is a headline. If there is only one line, it is the text itself.
        for key in {_plain(text), _plain(text.split("\n", 1)[0])}:
            root[find(i)] = find(first.setdefault(key, i))
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for i in range(len(texts)):
        groups[find(i)].append(i)
    return list(groups.values())


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def _rank(text: str, order: str = "") -> bytes:
    """Return a place in a random order that depends only on the text, so it is always the same."""
    return hashlib.sha256(f"{order}{_plain(text)}".encode()).digest()


def _elsewhere(name: str, subset: str | None) -> DatasetDict:
    """Load a local file or folder, or a hub data set, with `datasets`. The result always has splits."""
    path = Path(name).expanduser()
    options: dict[str, Any] = {}
    if os.path.realpath(path) == os.path.realpath(path / os.pardir):
        raise PeftLabError(f"{name!r} is the whole file system; give the folder that holds the data.")
    try:
        with quiet():
            if path.is_file():
                suffix = path.suffix.lower()
                if suffix not in BUILDERS:
                    raise PeftLabError(
                        f"{path}: a {suffix or 'nameless'} file is not known; use {', '.join(BUILDERS)}."
                    )
                _check_rows(path)
                options = {"sep": "\t"} if suffix == ".tsv" else {}
                options |= AS_WRITTEN if BUILDERS[suffix] == "csv" else {}
                loaded = datasets.load_dataset(BUILDERS[suffix], data_files=str(path), **options)
            elif path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
                loaded = datasets.load_from_disk(str(path))
            elif path.is_dir() or "/" in name:
                tables = path.is_dir() and {file.suffix.lower() for file in path.rglob("*.*")} & set(BUILDERS) == {
                    ".csv"
                }
                options = AS_WRITTEN if tables else {}
                loaded = datasets.load_dataset(str(path) if path.is_dir() else name, subset, **options)
            else:
                raise PeftLabError(
                    f"There is no data set {name!r}.{did_you_mean(name, NAMES)} Known: {', '.join(NAMES)}; "
                    'else give the path of a file or folder, or a hub id such as "org/data".'
                )
    except (OSError, ValueError, LookupError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, PeftLabError):
            raise
        reason = error.__cause__ or error  # the first message is only "an error occurred while generating"
        advice = ". Save it as UTF-8." if isinstance(reason, UnicodeDecodeError) else ""
        raise PeftLabError(f"{name!r} cannot be loaded: {' '.join(str(reason).split())[:400]}{advice}") from error
    splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})
    if "keep_default_na" in options and any(UNNAMED in part.column_names for part in splits.values()):
        raise PeftLabError(
            f"{name!r} has rows with more cells than there are headings. Put a text that has a comma in it into "
            "quotation marks."
        )
    return splits


def _check_rows(path: Path) -> None:
    """Refuse a file without rows, of which `datasets` says what only its makers understand."""
    with path.open("rb") as file:
        lines = list(itertools.islice((line for line in file if line.strip()), 2))
    if len(lines) < (2 if BUILDERS[path.suffix.lower()] == "csv" else 1):
        raise PeftLabError(f"{path} holds no rows.")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the bars and messages of `datasets` inside the block, then restore the user's settings."""
    verbosity, bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


@cache
def articles(characters: int = 600, tested: int = 100) -> tuple[list[dict], list[dict]]:
    """Return news articles as {"prompt", "headline"} for training and test, without repeated headlines.

    The prompt holds the first `characters` of the body and asks for the headline, the article's first line.
    """
    data, seen = load_data("news"), set()
    splits = []
    for split in ("test", "train"):
        rows = []
        for row in data[split]:
            headline, _, body = row["text"].partition("\n")
            if headline in seen or not body.strip():
                continue
            seen.add(headline)
            rows.append({"prompt": f"Write a headline.\n\n{body.strip()[:characters]}", "headline": headline.strip()})
        splits.append(rows)
    return splits[1], splits[0][:tested]
