"""Regular expressions of a user or of a folder, matched within a time limit.

Python's own `re` can take longer than the universe has existed for a short expression such as `(a|a)*b`, and nothing
can stop it. The package `regex` reads the same expressions and stops after a time that it is given.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING

from peftlab.errors import PeftLabError

if TYPE_CHECKING:
    import regex

SECONDS = 1.0  # of processor time, for all matches of one call of the library together
EACH = 1e-5  # what every match may take beyond that, so that large models with many patterns have the time they need
LONGEST = 20_000  # characters of an expression; compiling takes a second for five times as many
MOST_REPEATS = 10_000  # the product of an expression's counts, {n}: `regex` unfolds nested ones
COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
# Names joined by "|", such as re.escape writes: no expression, but a list
NAMES = re.compile(r"(?:[\w \-|]|\\\W)*", re.ASCII)
# Nothing repeated, no choice: `re` needs no more than a step for each character, and is the faster of the two
PLAIN = re.compile(r"(?:[\w .\-]|\\\W)*", re.ASCII)


class Budget:
    """Hold the time that is left for matching."""

    def __init__(self) -> None:
        self.left = SECONDS


BUDGET: ContextVar[Budget | None] = ContextVar("budget", default=None)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Let all matches within the block share one budget of time."""
    if BUDGET.get() is not None:
        yield
        return
    token = BUDGET.set(Budget())
    try:
        yield
    finally:
        BUDGET.reset(token)


def fullmatch(pattern: str, text: str) -> bool:
    """Say whether an expression matches a whole text.

    Raises:
        PeftLabError: it is no regular expression, or takes too long.
    """
    if NAMES.fullmatch(pattern):
        return text in _names(pattern)
    return _timed(pattern, "fullmatch", text) is not None


def match(pattern: str, text: str) -> regex.Match | None:
    """Return the match of an expression at the beginning of a text; the errors are those of `fullmatch`."""
    return _timed(pattern, "match", text)


def ends(pattern: str, path: str) -> bool:
    """Say whether a path, or what follows one of its dots, matches an expression (as Hugging Face peft's tables)."""
    if PLAIN.fullmatch(pattern):
        return _plain_end(pattern).match(path) is not None
    return _timed(rf"(.*\.)?({pattern})$", "match", path) is not None


def check(pattern: str) -> None:
    """Refuse what is no regular expression, or too large to be one that names modules."""
    if not isinstance(pattern, str):
        raise PeftLabError(f"{pattern!r} is no regular expression; give a string.")
    if not NAMES.fullmatch(pattern):
        compiled(pattern)


@lru_cache(maxsize=4096)
def compiled(pattern: str) -> regex.Pattern:
    """Compile an expression within limits."""
    import regex  # only when there is an expression: `peftlab.memory` also runs in a browser, which has no such package

    if len(pattern) > LONGEST:
        raise PeftLabError(
            f"The regular expression {pattern[:60]!r}... has {len(pattern):,} characters, more than {LONGEST:,}. Name "
            "the modules in a list."
        )
    repeats = 1
    for least, most in COUNT.findall(pattern):
        repeats *= max(1, *(int(number[:9]) for number in (least, most) if number), 1)
        if repeats > MOST_REPEATS:
            raise PeftLabError(
                f"The regular expression {pattern[:200]!r} repeats its parts more than {MOST_REPEATS:,} times. Write "
                "it with fewer counts, or name the modules in a list."
            )
    try:
        re.compile(pattern)  # what `regex` takes beyond it, Hugging Face peft would refuse
        return regex.compile(pattern, regex.VERSION0)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        told = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise PeftLabError(
            f"{pattern[:200]!r} is no regular expression: {told}. For one name, give a list."
        ) from None


def _timed(pattern: str, how: str, text: str) -> regex.Match | None:
    """Match once, within what is left of the budget."""
    budget, expression = BUDGET.get() or Budget(), compiled(pattern)
    began = time.thread_time()
    try:
        found = getattr(expression, how)(text, timeout=max(budget.left, EACH))
    except TimeoutError:
        budget.left = 0.0
        raise PeftLabError(_slow(pattern)) from None
    budget.left -= time.thread_time() - began - EACH
    if budget.left < 0:
        raise PeftLabError(_slow(pattern))
    return found


def _slow(pattern: str) -> str:
    return (
        f"The regular expression {pattern[:200]!r} takes too long to match this model's module names: it was stopped "
        f"after {SECONDS:g} s. Repeat nothing inside a repetition, such as (a+)+, or name the modules in a list."
    )


@lru_cache(maxsize=4096)
def _plain_end(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


@lru_cache(maxsize=256)
def _names(pattern: str) -> frozenset[str]:
    return frozenset(re.sub(r"\\(.)", r"\1", name) for name in pattern.split("|"))
