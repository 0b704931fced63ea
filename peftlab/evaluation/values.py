"""Values that a person gives for a score or a test, as plain Python values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Number, Real
from typing import Any, NamedTuple

from peftlab.checks import PLAIN, number, scalar, shown
from peftlab.errors import PeftLabError

LARGEST = 1e60  # of a score; fourth powers and sums of larger ones overflow


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
    try:
        return list(map(scalar, values.tolist() if hasattr(values, "tolist") else values))
    except RuntimeError as error:  # a sparse tensor, or one of the meta device
        raise PeftLabError(f"The values in {shown(values)} cannot be read ({error}); give a list of them.") from None


def same_length(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    """Require two lists of the same length with something in them."""
    if len(predictions) != len(references):
        raise PeftLabError(f"{len(predictions)} predictions do not go with {len(references)} references.")
    if not len(references):
        raise PeftLabError("There is nothing to compare: both lists are empty.")


def classes(predictions: Any, references: Any) -> tuple[list[Any], list[Any]]:
    """Require two lists of the same length, whose values can be equal to each other, and return their plain values."""
    same_length(predictions, references)
    both = plain(predictions), plain(references)
    for value in (*both[0], *both[1]):
        itself = value == value  # false for NaN; for a tensor with axes, or pandas' NA, it is neither True nor False
        if not PLAIN[bool].fits(itself):
            raise PeftLabError(f"Classes must be numbers or texts; found {shown(value)} among them.")
        if not itself:
            raise PeftLabError("NaN is no class: take the examples without a prediction or a reference out first.")
    first, second = ({_kind(value) for value in values if value is not None} for values in both)
    if first and second and "" not in first | second and first.isdisjoint(second):
        told = [" and ".join(sorted(kinds)) for kinds in (first, second)]
        raise PeftLabError(
            f"predictions holds {told[0]} and references {told[1]}, which are never equal. Give both as the same kind; "
            "of logits take the argmax."
        )
    return both


def _kind(value: Any) -> str:
    """Say what a value is, or nothing of one that may equal anything. Values of two kinds are never equal."""
    kinds: dict[str, Any] = {"numbers": Number, "texts": str, "bytes": bytes, "lists": (list, tuple), "dicts": dict}
    return next((words for words, kind in kinds.items() if isinstance(value, kind)), "")


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
