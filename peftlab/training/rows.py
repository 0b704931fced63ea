"""Examples in the forms that people have them in, as one: something with a length and integer indices.

| what is given | what is read |
| --- | --- |
| a list, a `datasets.Dataset`, a torch `Dataset` with a length | itself, row by row, when a row is needed |
| a `DatasetDict`, or a dict of such | the split called train (for evaluation: validation) |
| a dict of columns, what a tokenizer gives for many texts | a row of each place |
| a pandas DataFrame, a polars DataFrame, an Arrow table | its rows |
| a generator, an `IterableDataset` | as many examples as the steps take, read at the start |
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peftlab.errors import PeftLabError

TRAINING = ("train",)
EVALUATION = ("validation", "valid", "dev", "eval")


class Columns(Sequence):
    """Columns of one length, read as rows."""

    def __init__(self, columns: Mapping[str, Any], name: str) -> None:
        # a pandas Series is indexed by its labels, not by places
        self.columns = {key: value.tolist() if hasattr(value, "iloc") else value for key, value in columns.items()}
        lengths = {}
        for key, value in self.columns.items():
            if (
                isinstance(value, (str, bytes))
                or not hasattr(value, "__getitem__")
                or not getattr(value, "shape", (1,))
            ):
                raise PeftLabError(
                    f"{name} is a dict, and its {key!r} is one {type(value).__name__}. Put one example into a list, or "
                    "give a dict of columns, each with one entry an example."
                )
            lengths[key] = len(value)
        if len(set(lengths.values())) > 1:
            raise PeftLabError(f"{name} is a dict of columns of different lengths: {lengths}.")
        self.length = next(iter(lengths.values()), 0)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:  # an int; a Sequence's type has slices too
        if not -self.length <= index < self.length:
            raise IndexError(index)  # which also ends a loop over no columns at all
        return {key: value[index] for key, value in self.columns.items()}


def rows_of(
    data: Any, name: str, *, splits: Sequence[str] = (), wanted: int | None = None, endless: bool = True
) -> Sequence[Any]:
    """The data as something with a length and integer indices.

    Args:
        name: what messages call it.
        splits: the names of the split to take, where there are splits; without any they must be chosen.
        wanted: how many examples are read of what has no length; None reads all.
        endless: what has no length may be read; False says that steps are needed for it.

    Raises:
        PeftLabError: it is no data, or there is no such split, or it has no length and no steps were given.
    """
    if data is None or isinstance(data, (str, bytes, int, float)):
        raise PeftLabError(
            f"{name} is {data!r:.60}; give a list of encoded examples, for example of pl.encode_completion, or a "
            "data set of them."
        )
    if isinstance(data, Mapping):
        if not _holds_splits(data):
            return Columns(data, name)
        chosen = next((split for split in splits if split in data), None)
        if chosen is None:
            listed = ", ".join(map(repr, data))
            like = f"; it has none called {' or '.join(map(repr, splits))}" if splits else ""
            raise PeftLabError(
                f"{name} holds the splits {listed}{like}. Choose one: data[{next(iter(data), 'name')!r}]."
            )
        return rows_of(data[chosen], f"{name}[{chosen!r}]", wanted=wanted, endless=endless)
    if hasattr(data, "iloc") and hasattr(data, "columns"):
        if not data.columns.is_unique:
            raise PeftLabError(f"{name} has two columns of one name: {', '.join(map(str, data.columns))}.")
        return Columns({str(key): data[key] for key in data.columns}, name)
    for method in ("to_dicts", "to_pylist"):  # polars and pyarrow
        if hasattr(data, method):
            return getattr(data, method)()
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return data
    if hasattr(data, "batch_size") and hasattr(data, "collate_fn"):
        raise PeftLabError(
            f"{name} is a {type(data).__name__}, which gives batches; give the examples, loader.dataset."
        )
    if not isinstance(data, Iterable):
        more = " Call it: it is a function." if callable(data) else ""
        raise PeftLabError(f"{name} is a {type(data).__name__}, which has no examples.{more}")
    if not endless:
        raise PeftLabError(
            f"{name} is a {type(data).__name__}, which has no length; say how long to train with steps=..., not epochs."
            if splits == TRAINING
            else f"{name} is a {type(data).__name__}, which has no length; give as many examples as you want, for "
            "example list(itertools.islice(data, 500))."
        )
    return list(data if wanted is None else itertools.islice(data, wanted))


def _holds_splits(data: Mapping[str, Any]) -> bool:
    """Whether the values are data sets, and not columns of one."""
    if not data:
        return False
    first = next(iter(data.values()))
    if hasattr(first, "column_names") or (hasattr(first, "iloc") and hasattr(first, "columns")):
        return True
    known = any(split in data for split in (*TRAINING, *EVALUATION, "test"))
    return known and isinstance(first, (list, tuple)) and bool(first) and isinstance(first[0], Mapping)
