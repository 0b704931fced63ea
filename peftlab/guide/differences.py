"""The difference of two groups of measured rows, its error, and how large a difference they could have seen.

The error has two parts, what other questions would change and what other seeds did:

    error^2 = v / n + variance of a over its k seeds / k + variance of b over its seeds / k

If the rows keep what became of each of the n questions, v is the variance of the differences question by question.
Otherwise v is p (1 - p) of `a`, plus that of `b`, for shares p. The interval is the difference, give or take two
errors.

A true difference of 2.84 errors has an interval without zero in four of five repeats: 2 + 0.84, because a normal number
lies below 0.84 four times in five. That is what the rows could have seen. Of a single run nobody knows what another
seed would do, so there the true errors are larger.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from peftlab.kit.measurements import Results

ERRORS = 2  # half the width of an interval, in errors
SEEN = ERRORS + 0.84  # a difference of so many errors is seen in four of five repeats
# What is read of a row: its number, how many questions it is a share of (0: it is no share), and that of each question
Read = Callable[[Mapping[str, Any]], tuple[float, int, list[float]]]


class Difference(NamedTuple):
    """The means of two groups of rows, and one error of their difference."""

    a: float
    b: float
    error: float

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.a - self.b - ERRORS * self.error

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.a - self.b + ERRORS * self.error

    @property
    def seen(self) -> float:
        """The difference that these rows see in four of five repeats."""
        return SEEN * self.error


def read_share(entry: Mapping[str, Any]) -> Read:
    """Return what reads the share of right answers of a row: the column `right`, of `of` or of `items` questions."""
    right, of, items = entry.get("right", "right"), entry.get("of"), entry.get("items", 0)

    def read(row: Mapping[str, Any]) -> tuple[float, int, list[float]]:
        answers = row.get("answers")  # "1101": what became of each question. In some files it is a number
        kept = [float(one) for one in answers] if isinstance(answers, str) else []
        n = row[of or items] if of or isinstance(items, str) else items
        return row[right] / row[of] if of else row[right], n, kept

    return read


def read_loss(column: str) -> Read:
    """Return what reads a loss of a row, and that of each text: its nats, per token of a text of mean length."""

    def read(row: Mapping[str, Any]) -> tuple[float, int, list[float]]:
        if "nats" not in row:
            return row[column], 0, []
        length = statistics.fmean(map(float, row["tokens"].split()))
        return row[column], 0, [float(nats) / length for nats in row["nats"].split()]

    return read


def difference(one: Results, other: Results, read: Read) -> Difference:
    """Return the means of two groups of rows, and the error of their difference."""
    a, b = ([read(row) for row in rows] for rows in (one, other))
    (a_mean, a_seeds), (b_mean, b_seeds) = (_over_seeds([value for value, _, _ in group]) for group in (a, b))
    if all(kept for _, _, kept in (*a, *b)):
        gaps = [x - y for x, y in zip(_each(a), _each(b), strict=True)]
        questions = statistics.variance(gaps) / len(gaps)
    else:
        questions = sum(_of_a_share(p, min(n for _, n, _ in group)) for p, group in ((a_mean, a), (b_mean, b)))
    return Difference(a_mean, b_mean, math.sqrt(questions + a_seeds + b_seeds))


def _of_a_share(p: float, n: int) -> float:
    """Return the variance of a share of n questions; 0 where there are none."""
    return max(p * (1 - p), 0.0) / n if n else 0.0


def _each(group: list[tuple[float, int, list[float]]]) -> list[float]:
    """Return the number of each question, the mean over the rows."""
    return [statistics.fmean(values) for values in zip(*(kept for _, _, kept in group), strict=True)]


def _over_seeds(values: list[float]) -> tuple[float, float]:
    """Return the mean, and how much of its variance the seeds make."""
    return statistics.fmean(values), statistics.variance(values) / len(values) if len(values) > 1 else 0.0
