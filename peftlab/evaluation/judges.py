"""One model against another before a judge: the win rate with its ties, and what the order of the answers changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from peftlab.checks import checked, one_of
from peftlab.errors import PeftLabError
from peftlab.evaluation.intervals import score_interval
from peftlab.evaluation.values import Interval, pairs, share

OUTCOMES = {"win": 1.0, "tie": 0.5, "loss": 0.0}
VERDICTS = ("first", "second", "tie")


class PositionBias(NamedTuple):
    """What a judge does who sees each pair of answers in both orders.

    Attributes:
        consistent: the share of pairs on which both orders give the same verdict.
        first: how often the answer shown first wins, a tie being half a win. A judge without bias has 0.5.
        win_rate: of the first model, over both orders.
    """

    consistent: Interval
    first: Interval
    win_rate: Interval


@checked()
def win_rate(outcomes: Sequence[str], *, confidence: float = 0.95) -> Interval:
    """Return how often a model wins, a tie being half a win, with its interval.

    With a share t of ties, one outcome has the variance p (1 - p) - t / 4. The interval holds every p from which the
    measured one is at most z standard errors away. Without ties it is Wilson's (`binomial_interval`).

    Args:
        outcomes: `"win"`, `"tie"` or `"loss"` for each item.
        confidence: how often such an interval holds the true rate, between 0 and 1.

    Raises:
        PeftLabError: there is no outcome, or another word.

    >>> print(*(round(end, 2) for end in pl.win_rate(["win"] * 45 + ["tie"] * 10 + ["loss"] * 25)))
    0.62 0.52 0.72
    """
    values = [OUTCOMES[one_of("an outcome", word, OUTCOMES)] for word in outcomes]
    if not values:
        raise PeftLabError("There are no outcomes.")
    return _rate(values, share("confidence", confidence))


@checked()
def position_bias(forward: Sequence[str], swapped: Sequence[str], *, confidence: float = 0.95) -> PositionBias:
    """Measure whether a judge prefers the answer that it sees first, from verdicts on each pair in both orders.

    A verdict names a *place*, not a model. A judge who always says "first" contradicts itself on every pair, and a win
    rate from one order alone would give the model in that place every win. Over both orders it gives one half. (Judges
    also prefer long answers; that bias stays when the order is swapped.)

    Args:
        forward: `"first"`, `"second"` or `"tie"` for each pair, with model A's answer shown first.
        swapped: the same for the same pairs, with model B's answer shown first.
        confidence: of the three intervals.

    Returns:
        `consistent`, `first` and `win_rate` (of A), each (value, low, high). A pair counts once in `win_rate`: its
        value is the mean of its two verdicts, and a contradiction is a tie.

    Raises:
        PeftLabError: the lists differ in length, are empty, or hold another word.

    >>> found = pl.position_bias(["first", "first", "first"], ["first", "first", "second"])
    >>> print(round(found.consistent.value, 2), round(found.first.value, 2), round(found.win_rate.value, 2))
    0.33 0.83 0.67
    """
    pairs(forward, swapped)
    confidence = share("confidence", confidence)
    places = {"first": 1.0, "second": 0.0, "tie": 0.5}
    one, other = ([places[one_of("a verdict", word, VERDICTS)] for word in words] for words in (forward, swapped))
    # A stands first in `forward` and second in `swapped`
    for_a = [(a, 1 - b) for a, b in zip(one, other, strict=True)]
    agreed = sum(a == b for a, b in for_a) / len(for_a)
    values = [0.5 if {a, b} == {0.0, 1.0} else (a + b) / 2 for a, b in for_a]
    firsts = [(a + b) / 2 for a, b in zip(one, other, strict=True)]
    return PositionBias(
        score_interval(agreed, len(for_a), confidence), _rate(firsts, confidence), _rate(values, confidence)
    )


def _rate(values: list[float], confidence: float) -> Interval:
    """The mean of values between 0 and 1, with its interval."""
    # rate = (wins + ties / 2) / n
    mean = sum(values) / len(values)
    # Var = p (1 - p) - sum of x (1 - x) / n; a tie, x = 1/2, takes away a quarter
    return score_interval(mean, len(values), confidence, 4 * sum(x * (1 - x) for x in values) / len(values))
