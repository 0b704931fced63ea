"""Exercises that check the reader's answer: `pl.check("lora.count", answer)`.

An exercise is named after its chapter's topic and a word, such as `lora.count`. All exercises of that chapter are in
`peftlab/kit/exercises/lora.py`, in a tuple named `EXERCISES`. A check says "right", "nearly" (and what was probably
forgotten) or "not yet" (and what to look at). It never prints the answer.
"""

from __future__ import annotations

import importlib
import textwrap
from pathlib import Path
from typing import Any

from peftlab.checks import checked, one_of
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.kit.exercises.grading import Exercise, Grade, choice, function, number

__all__ = ["Exercise", "Grade", "check", "choice", "exercises", "function", "grade", "number"]


@checked()
def check(name: str, answer: Any) -> None:
    """Check the reader's answer to an exercise, and print the verdict.

    Args:
        name: such as "lora.count".
        answer: a number, a word or a function, as the exercise asks. None means not answered yet.

    Raises:
        PeftLabError: there is no exercise of that name.

    >>> pl.check("memory.stays", "gradients")
    memory.stays: not yet. A frozen weight has no gradient.
    """
    exercise = find(name)
    if answer is None or answer is ...:
        message = f"no answer yet. Put {exercise.expects} in its place and run this cell again."
    else:
        message = exercise.grader(answer).message
    print(textwrap.fill(f"{name}: {message}", width=72))


@checked()
def grade(name: str, answer: Any) -> Grade:
    """Return the verdict on an answer, a `Grade` with `right` (bool) and `message`."""
    return find(name).grader(answer)


def find(name: str) -> Exercise:
    """Return the exercise of that name."""
    topic = str(name).partition(".")[0]
    known = {exercise.name: exercise for exercise in exercises(topic)} if topic in _topics() else {}
    if name not in known:
        names = list(known) or [exercise.name for other in _topics() for exercise in exercises(other)]
        raise PeftLabError(f"no exercise is called {name!r}; there are: {', '.join(names)}."
                           + did_you_mean(str(name), names))
    return known[name]


@checked()
def exercises(topic: str) -> tuple[Exercise, ...]:
    """Return a tuple of all exercises of a chapter, given its topic, such as "lora"."""
    return importlib.import_module(f".{one_of('topic', topic, _topics())}", __name__).EXERCISES


def _topics() -> list[str]:
    """Return the names of the files in this folder that hold exercises."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "grading"))
