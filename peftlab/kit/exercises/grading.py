"""What an exercise is, and the three ways to grade an answer: a number, a word from a list, a function.

`number`, `choice` and `function` each return a grader: a function from the reader's answer to a `Grade`. An exercise
also lists common mistakes. An answer that comes from one of them gets the remark written for it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from peftlab.checks import checked


class Grade(NamedTuple):
    """A verdict: whether the answer is right, and the sentence to print."""

    right: bool
    message: str


Grader = Callable[[Any], Grade]


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes:
        name: "topic.word", unique in the book.
        difficulty: "easy", "medium" or "hard".
        minutes: about how long a reader of the chapter needs.
        expects: what to put in place of None, such as "a whole number".
        grader: a function from the answer to a `Grade`.
    """

    name: str
    difficulty: str
    minutes: int
    expects: str
    grader: Grader


@checked()
def number(
    right: float, *, near: dict[float, str] | None = None, tolerance: float = 0.0, hint: str, then: str = ""
) -> Grader:
    """Grade a number.

    Args:
        right: the answer.
        near: {wrong number: remark} for common mistakes.
        tolerance: the greatest relative difference that still counts as right.
        hint: what to look at, for any other answer.
        then: a sentence to add to a right answer.
    """
    def grader(answer: Any) -> Grade:
        with contextlib.suppress(ValueError, RuntimeError):  # several numbers
            answer = answer.item() if hasattr(answer, "item") else answer
        answer = _without_commas(answer)
        if isinstance(answer, bool) or not isinstance(answer, (int, float)):
            return Grade(False, f"a number is wanted here, and this is {_kind(answer)}.")
        if _close(answer, right, tolerance):
            return Grade(True, f"right. {then}".strip())
        for wrong, remark in (near or {}).items():
            if _close(answer, wrong, tolerance):
                return Grade(False, f"nearly. {remark}")
        side = "too large" if answer > right else "too small"
        return Grade(False, f"not yet, it is {side}. {hint}")

    return grader


@checked()
def choice(
    right: str, *, options: Sequence[str], remarks: dict[str, str] | None = None, hint: str, then: str = ""
) -> Grader:
    """Grade a word out of `options`. `remarks` maps wrong words to why they are wrong."""
    def grader(answer: Any) -> Grade:
        word = str(answer).strip().lower()
        names = {str(option).lower(): option for option in options}
        if word not in names:
            return Grade(False, f"one of these words is wanted: {', '.join(map(str, options))}.")
        if names[word] == right:
            return Grade(True, f"right. {then}".strip())
        return Grade(False, f"not yet. {(remarks or {}).get(names[word], hint)}")

    return grader


@checked()
def function(
    reference: Callable[..., Any],
    *,
    cases: Callable[[], list[tuple[Any, ...]]],
    near: dict[str, Callable[..., Any]] | None = None,
    hint: str,
    then: str = "",
    tolerance: float = 1e-6,
) -> Grader:
    """Grade a function by what it returns.

    Args:
        reference: the right function.
        cases: a function without arguments that returns a list of argument tuples. It makes new ones at each call, so
            an answer may change its arguments.
        near: {remark: wrong function} for common mistakes. A remark is given if the answer returns what the wrong
            function returns, in every case.
        hint: what to look at, for any other answer.
        tolerance: the greatest relative difference (norm of the difference over norm of the right value).
    """
    def grader(answer: Any) -> Grade:
        if not callable(answer):
            return Grade(False, f"a function is wanted here, and this is {_kind(answer)}.")
        expected = [reference(*arguments) for arguments in cases()]
        try:
            found = [answer(*arguments) for arguments in cases()]
        except Exception as error:  # show the reader whatever their code raises
            return Grade(False, f"your function raised {type(error).__name__}: {error}")
        for got, want in zip(found, expected, strict=True):
            if _shape(got) != _shape(want):
                return Grade(False, f"not yet: the result is {_shape(got)} where {_shape(want)} is wanted.")
        if all(_same(got, want, tolerance) for got, want in zip(found, expected, strict=True)):
            return Grade(True, f"right, in {len(expected)} cases. {then}".strip())
        for remark, wrong in (near or {}).items():
            if all(_same(got, wrong(*arguments), tolerance) for got, arguments in zip(found, cases(), strict=True)):
                return Grade(False, f"nearly. {remark}")
        return Grade(False, f"not yet. {hint}")

    return grader


def _without_commas(answer: Any) -> Any:
    """Return the number that was typed with commas, which Python reads as a tuple: 1,234 is (1, 234)."""
    if not isinstance(answer, tuple) or len(answer) < 2 or not all(type(part) is int for part in answer):
        return answer
    first, *groups = answer
    if not 1 <= first < 1000 or not all(0 <= group < 1000 for group in groups):
        return answer
    return int("".join([str(first), *(f"{group:03}" for group in groups)]))


def _close(a: float, b: float, tolerance: float) -> bool:
    return a == b or math.isclose(a, b, rel_tol=tolerance, abs_tol=0.0)


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _shape(value: Any) -> str:
    """Say in words what a value is; for a tensor, its shape."""
    if hasattr(value, "shape"):
        return f"a tensor of shape {tuple(value.shape)}"
    return "a number" if isinstance(value, (int, float)) else _kind(value)


def _same(got: Any, want: Any, tolerance: float) -> bool:
    if _shape(got) != _shape(want):
        return False
    if hasattr(want, "shape"):
        got, want = got.detach().double(), want.detach().double()
        return bool((got - want).norm() <= tolerance * want.norm())
    return got == want or (isinstance(want, float) and _close(got, want, tolerance))
