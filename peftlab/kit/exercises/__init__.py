"""Exercises which check the reader's answer: `pl.check("lora.count", answer)`.

An exercise's name is its chapter's topic and a word, `lora.count`; the file `peftlab/kit/exercises/lora.py` holds
all of that chapter's in a tuple named `EXERCISES`. A check says right, nearly (and what was probably forgotten) or
not yet (and what to look at); it never prints the answer.
"""

from __future__ import annotations

import importlib
import textwrap
from pathlib import Path
from typing import Any

from peftlab.errors import PeftLabError, did_you_mean
from peftlab.kit.exercises.grading import Exercise, Grade, choice, function, number

__all__ = ["Exercise", "Grade", "check", "choice", "exercises", "function", "grade", "number"]


def check(name: str, answer: Any) -> None:
    """Print what is to be said about the reader's answer to an exercise.

    Args:
        name: such as "lora.count".
        answer: a number, a word or a function, as the exercise asks for; None means not answered yet.

    Raises:
        PeftLabError: there is no exercise of that name.
    """
    exercise = find(name)
    if answer is None or answer is ...:
        message = f"no answer yet. Put {exercise.expects} in its place and run this cell again."
    else:
        message = exercise.grader(answer).message
    print(textwrap.fill(f"{name}: {message}", width=72))


def grade(name: str, answer: Any) -> Grade:
    """The verdict on an answer, a `Grade` with `right` (bool) and `message`."""
    return find(name).grader(answer)


def find(name: str) -> Exercise:
    """The exercise of that name."""
    topic = str(name).partition(".")[0]
    known = {exercise.name: exercise for exercise in exercises(topic)} if topic in _topics() else {}
    if name not in known:
        names = list(known) or [exercise.name for other in _topics() for exercise in exercises(other)]
        raise PeftLabError(f"no exercise is called {name!r}; there are: {', '.join(names)}."
                           + did_you_mean(str(name), names))
    return known[name]


def exercises(topic: str) -> tuple[Exercise, ...]:
    """All exercises of a chapter, by its topic such as "lora", a tuple."""
    return importlib.import_module(f".{topic}", __name__).EXERCISES


def _topics() -> list[str]:
    """The files beside this one that hold exercises."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "grading"))
