"""Values that a person gives for a score or a test, as plain Python values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from peftlab.checks import number, scalar, shown
from peftlab.errors import PeftLabError

LARGEST = 1e100  # of a score; squares and sums of larger ones overflow


class Interval(NamedTuple):
    """A value with the lower and the upper end of its interval. `pl.figures.intervals` draws such triples."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the distance between the ends."""
        return (self.high - self.low) / 2


def plain(values: Any) -> list[Any]:
    """Return a list of plain values from a list, a tensor, an array, a table or a column of a data set."""
    values = getattr(values, "values", values) if hasattr(values, "columns") else values  # a table iterates its names
    return list(map(scalar, values.tolist() if hasattr(values, "tolist") else values))


def same_length(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    """Require two lists of the same length with something in them."""
    if len(predictions) != len(references):
        raise PeftLabError(f"{len(predictions)} predictions do not go with {len(references)} references.")
    if not len(references):
        raise PeftLabError("There is nothing to compare: both lists are empty.")


def numbers(name: str, values: Any) -> list[float]:
    """Require a list of finite numbers (True and False count as 1 and 0) and return them as floats."""
    found = items(name, values)
    for value in found:
        size: Any = abs(value) if isinstance(value, Real) else math.inf
        if not size <= LARGEST:  # false for NaN, too
            raise PeftLabError(f"{name} must hold finite numbers, none above {LARGEST:g}; found {shown(value)}.")
    return [float(value) for value in found]


def texts(name: str, values: Any) -> list[str]:
    """Require a list of texts, one for each item."""
    found = items(name, values)
    for value in found:
        if not isinstance(value, str):
            raise PeftLabError(f"{name} must be a list of texts; found {shown(value)} in it.")
    return found


def rights(name: str, values: Any) -> list[bool]:
    """Require a list of True and False (or 1 and 0), one for each item."""
    found = items(name, values)
    for value in found:
        if not isinstance(value, Real) or value not in (0, 1):
            raise PeftLabError(f"{name} must say True or False for each item; found {shown(value)}.")
    return [bool(value) for value in found]


def items(name: str, values: Any) -> list[Any]:
    """Require a list and return its plain values."""
    listed = hasattr(values, "__len__") and hasattr(values, "__getitem__")  # a set has no order
    if isinstance(values, (str, bytes, Mapping)) or not listed or getattr(values, "shape", None) == ():
        raise PeftLabError(f"{name} must be a list with a value for each item; found {shown(values)}.")
    return plain(values)


def pairs(first: Sequence[Any], second: Sequence[Any]) -> None:
    """Require that two lists go item by item."""
    if len(first) != len(second):
        raise PeftLabError(
            f"A paired test compares the same items: first has {len(first)} values and second {len(second)}."
        )
    if not len(first):
        raise PeftLabError("There is nothing to compare: both lists are empty.")


def share(name: str, value: Any) -> float:
    """Require a share between 0 and 1, ends excluded, such as a confidence."""
    return number(name, value, above=0, below=1)
