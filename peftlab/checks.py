"""Checks of a value that a person gives: a whole number, a number, or one of a list.

Each check returns the value as a plain Python value. For a value that is not allowed it raises a `PeftLabError`, which
names the value and says what is allowed and what was found. For words it adds near matches.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from peftlab.errors import PeftLabError, did_you_mean

# For each limit: its words in an error, and the comparison.
LIMITS = {
    "least": ("of at least", operator.ge), "above": ("above", operator.gt),
    "most": ("of at most", operator.le), "below": ("below", operator.lt),
}  # fmt: skip


def whole(name: str, value: Any, *, usual: str = "", optional: bool = False, **limits: int) -> Any:
    """Require a whole number, Python's or numpy's; `True` and `False` are refused.

    Args:
        name: what the error calls the value.
        usual: the usual values, for the error.
        optional: allow `None` too.
        limits: `least` and `most` (allowed themselves), `above` and `below` (not allowed themselves).
    """
    return _check(name, value, Integral, "whole number", usual, optional, limits)


def number(name: str, value: Any, *, usual: str = "", optional: bool = False, **limits: float) -> Any:
    """Require a finite number. The arguments are those of `whole`; a whole number stays whole."""
    words = "number" if {"most", "below"} & limits.keys() else "finite number"
    return _check(name, value, Real, words, usual, optional, limits)


def one_of(name: str, value: Any, known: Iterable[Any]) -> Any:
    """Require one of the known values."""
    values = {one: one for one in known}
    try:
        return values[value]
    except (KeyError, TypeError):  # TypeError: a list, for example, cannot be looked up
        near = did_you_mean(str(value), [one for one in values if isinstance(one, str)])
        listed = ", ".join(map(repr, values))
        raise PeftLabError(f"{name} must be one of {listed}; found {value!r}.{near}") from None


def check_fields(config: Any, check: Callable[..., Any], *names: str, **limits: Any) -> None:
    """Check fields of a frozen dataclass, and keep what the check returns, so that a numpy integer becomes an `int`."""
    for name in names:
        object.__setattr__(config, name, check(name, getattr(config, name), **limits))


def _check(
    name: str, value: Any, kind: Any, words: str, usual: str, optional: bool, limits: Mapping[str, float]
) -> Any:
    if value is None and optional:
        return None
    # abs(value) < inf is false for NaN too
    fits = isinstance(value, kind) and not isinstance(value, bool) and abs(value) < math.inf
    if fits and all(LIMITS[limit][1](value, bound) for limit, bound in limits.items()):
        return int(value) if isinstance(value, Integral) else float(value)
    lowest = {"least": 1} if kind is Integral else {"above": 0}
    positive = lowest.items() <= limits.items()
    told = [f"{LIMITS[limit][0]} {bound:,}" for limit, bound in limits.items() if not (positive and limit in lowest)]
    allowed = " ".join([*["positive"] * positive, words, " and ".join(told)]).rstrip()
    raise PeftLabError(f"{name} must be a {allowed}{f' (usually {usual})' if usual else ''}, found {value!r}.")
