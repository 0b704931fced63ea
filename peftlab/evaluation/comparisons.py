"""Is a difference more than chance? Paired and unpaired tests, corrections for many tests, and how many items it takes.

Two models that answered the same items are compared item by item: what is hard about an item is hard for both, and
drops out. So a paired test needs fewer items than two separate intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

import numpy

from peftlab.checks import checked, number, one_of, whole
from peftlab.errors import PeftLabError
from peftlab.evaluation.intervals import MOST_ITEMS, normal_quantile
from peftlab.evaluation.scores import bleu_metric, by_column, chrf_metric
from peftlab.evaluation.values import items, numbers, pairs, rights, share, texts

METRICS: dict[str, Callable[[], Any]] = {"bleu": bleu_metric, "chrf": chrf_metric}
CORRECTIONS = ("holm", "bonferroni", "benjamini-hochberg")


class McNemar(NamedTuple):
    """How two models differ on the same items: items that only one of them has right, and the p-value."""

    first_only: int
    second_only: int
    p_value: float


class Difference(NamedTuple):
    """A difference (first less second) with its interval, and the p-value of its being none."""

    value: float
    low: float
    high: float
    p_value: float


@checked("first", "second")
def mcnemar(first: Sequence[Any], second: Sequence[Any]) -> McNemar:
    """Test whether two models are right equally often on the same items (McNemar 1947, exact).

    Only the items on which they disagree say something. If the models are equally good, each such item is one model's
    or the other's like the toss of a coin. With b and c of them

        p = min(1, 2 sum over k = 0..min(b, c) of C(b + c, k) / 2^(b + c))

    Args:
        first, second: for each item whether the model is right: True or False, or 1 or 0.

    Raises:
        PeftLabError: the lists differ in length, are empty, or hold something else.

    >>> pl.mcnemar([1, 1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1])
    McNemar(first_only=6, second_only=0, p_value=0.03125)
    """
    one, other = rights("first", first), rights("second", second)
    pairs(one, other)
    b = sum(p and not q for p, q in zip(one, other, strict=True))
    c = sum(q and not p for p, q in zip(one, other, strict=True))
    n, k = b + c, min(b, c)
    # whole numbers, divided once, from the largest down: C(n, k - 1) = C(n, k) k / (n - k + 1). Those that are left out
    # lie far below the last bit of the result.
    tail, ways = 0, math.comb(n, k)
    while ways > tail >> 100:
        tail, ways, k = tail + ways, ways * k // (n - k + 1), k - 1
    return McNemar(b, c, min(1.0, 2 * tail / 2**n))


@checked()
def two_proportion_test(right_1: int, total_1: int, right_2: int, total_2: int) -> float:
    """Return the p-value of two shares being equal, from counts alone: the z-test with a pooled share.

        z = (p1 - p2) / sqrt( p (1 - p) (1/n1 + 1/n2) )        p = (right_1 + right_2) / (n1 + n2)

    For published results that give no answer item by item. Where both answered the same items and you have their
    answers, `mcnemar` finds smaller differences.

    Raises:
        PeftLabError: more answers are right than there are, or there is none.

    >>> round(pl.two_proportion_test(60, 100, 45, 100), 3)
    0.034
    """
    total_1, total_2 = (
        whole(name, value, least=1, ceiling=MOST_ITEMS) for name, value in (("total_1", total_1), ("total_2", total_2))
    )
    right_1 = whole("right_1", right_1, least=0, most=total_1)
    right_2 = whole("right_2", right_2, least=0, most=total_2)
    pooled = (right_1 + right_2) / (total_1 + total_2)
    error = math.sqrt(pooled * (1 - pooled) * (1 / total_1 + 1 / total_2))
    if not error:  # all are right, or all are wrong
        return 1.0
    return 2 * NormalDist().cdf(-abs(right_1 / total_1 - right_2 / total_2) / error)


@checked("first", "second", "references")
def paired_bootstrap(
    first: Sequence[Any],
    second: Sequence[Any],
    references: Sequence[Any] | None = None,
    *,
    score: str = "mean",
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Test a difference of two models on the same items by drawing the items again (Efron 1979, Koehn 2004).

    Each sample draws n of the n items with replacement, the same ones for both models, and scores both. The interval
    holds the middle share of the differences. The p-value counts the samples that stray from the measured difference
    by as much as it is itself away from zero: (1 + how many) / (1 + samples).

    It needs some thirty items. Few items hold too little of what others would be: of eight, an interval of 95% held the
    true difference in 88% of the simulated cases. For a few items, right or wrong, take `mcnemar`, which is exact.

    Args:
        first, second: for `score="mean"` one number per item, such as a loss or 1 for right; else one text per item.
        references: the right texts, for BLEU and chrF; as for `bleu`.
        score: `"mean"`, `"bleu"` or `"chrf"`. A corpus score is no mean over items, so it is computed for each sample,
            from the counts of n-grams of each item.
        samples: how often the items are drawn.
        confidence: the share of the differences in the interval.
        seed: of the draws.

    Returns:
        (value, low, high, p_value): first less second.

    Raises:
        PeftLabError: the lists differ in length, hold fewer than two items, or do not fit the score; or sacrebleu is
            missing.

    >>> found = pl.paired_bootstrap([1.0, 1.2, 0.9, 1.4], [1.1, 1.4, 1.0, 1.7])
    >>> print(f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})")
    -0.175 (-0.250 to -0.100)
    """
    one_of("score", score, ("mean", *METRICS))
    samples, seed = whole("samples", samples, least=10, ceiling=1_000_000), whole("seed", seed, least=0)
    confidence = share("confidence", confidence)
    if score == "mean":
        one, other, final = _values(first, second, references)
    else:
        one, other, final = _counts(METRICS[score](), first, second, references)

    def difference(chosen: Any) -> float:
        return final(one[chosen].sum(0)) - final(other[chosen].sum(0))

    if len(one) < 2:
        raise PeftLabError("One item says nothing about others: the bootstrap needs two or more, better thirty.")
    measured, draws = difference(numpy.arange(len(one))), numpy.random.default_rng(seed)
    drawn = numpy.array([difference(draws.integers(len(one), size=len(one))) for _ in range(samples)])
    low, high = numpy.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    # the measured difference itself may differ in its last bits when it is drawn again
    strays = int((abs(drawn - measured) >= abs(measured) * (1 - 1e-9)).sum())
    return Difference(float(measured), float(low), float(high), (1 + strays) / (1 + samples))


def _values(first: Any, second: Any, references: Any) -> tuple[Any, Any, Callable[[Any], float]]:
    """Return both models' numbers (items, 1), and the function from their sum to the mean."""
    if references is not None:
        raise PeftLabError('references are for score="bleu" and score="chrf"; a mean takes one number per item.')
    one, other = numbers("first", first), numbers("second", second)
    pairs(one, other)
    return numpy.array(one)[:, None], numpy.array(other)[:, None], lambda totals: totals[0] / len(one)


def _counts(metric: Any, first: Any, second: Any, references: Any) -> tuple[Any, Any, Callable[[Any], float]]:
    """Return both models' counts (items, counts), and the function from their sums to the score."""
    if references is None:
        raise PeftLabError("BLEU and chrF compare texts with references; give references.")
    both = [texts("first", first), texts("second", second)]
    right = items("references", references)
    pairs(*both)
    if len(right) != len(both[0]):
        raise PeftLabError(f"{len(both[0])} texts do not go with {len(right)} references.")
    columns = by_column(right)
    one, other = (numpy.array(metric._extract_corpus_statistics(given, columns), dtype=float) for given in both)
    return one, other, lambda totals: metric._compute_score_from_stats(totals.tolist()).score


@checked("p_values")
def adjust_p_values(p_values: Sequence[Any], *, method: str = "holm") -> list[float]:
    """Return p-values corrected for their number: of twenty tests of nothing, one is below 0.05 by chance.

    With the m values in ascending order, p_(1) to p_(m):

        bonferroni            m p
        holm                  max over i <= k of (m - i + 1) p_(i)        (Holm 1979) never worse than Bonferroni
        benjamini-hochberg    min over i >= k of m p_(i) / i              (Benjamini and Hochberg 1995)

    The first two bound the chance of even one false claim. The last bounds the share of false ones among the claims.

    Raises:
        PeftLabError: there is no value, or one is not between 0 and 1.

    >>> pl.adjust_p_values([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    one_of("method", method, CORRECTIONS)
    found = numbers("p_values", p_values)
    if not found or not all(0 <= p <= 1 for p in found):
        raise PeftLabError("p_values must be at least one number between 0 and 1.")
    m, order = len(found), sorted(range(len(found)), key=found.__getitem__)
    if method == "bonferroni":
        adjusted = [m * p for p in found]
    else:
        adjusted, bound = [0.0] * m, 0.0 if method == "holm" else 1.0
        ranked = list(enumerate(order, start=1))
        for i, place in ranked if method == "holm" else reversed(ranked):
            p = found[place]
            bound = max(bound, (m - i + 1) * p) if method == "holm" else min(bound, m * p / i)
            adjusted[place] = bound
    return [min(1.0, p) for p in adjusted]


@checked()
def items_needed(
    share_1: float,
    share_2: float,
    *,
    disagreement: float | None = None,
    power: float = 0.8,
    confidence: float = 0.95,
) -> int:
    """Return how many test items show that one share of right answers is not the other.

    Args:
        share_1, share_2: the two shares, between 0 and 1.
        disagreement: the share of items that only one of the two has right, for a paired test on the same items. Two
            similar models disagree on few. Without it, each model is tested on items of its own.
        power: how often the difference is found if it is there.
        confidence: 1 less the chance to find one where there is none.

    Returns:
        The number of items, for each model. It is the usual normal approximation, good for 30 items and more. The exact
        test of `mcnemar` is a little stricter: with so many items it found the difference in 77% to 79% of simulated
        cases instead of 80%. 2 / |share_1 - share_2| more items make that good.

    Raises:
        PeftLabError: the shares are equal, or differ by more than the disagreement.

    >>> pl.items_needed(0.48, 0.50), pl.items_needed(0.48, 0.50, disagreement=0.1)
    (9806, 1960)
    """
    p, q = (number(name, value, least=0, most=1) for name, value in (("share_1", share_1), ("share_2", share_2)))
    d, a, b = abs(p - q), normal_quantile(confidence), NormalDist().inv_cdf(share("power", power))
    if not d:
        raise PeftLabError("share_1 and share_2 are equal; no number of items shows a difference that is not there.")
    if disagreement is None:
        middle = fmean((p, q))
        # n = ( z_confidence sqrt(2 m (1 - m)) + z_power sqrt(p (1 - p) + q (1 - q)) )^2 / d^2        m = (p + q) / 2
        root = a * math.sqrt(2 * middle * (1 - middle)) + b * math.sqrt(p * (1 - p) + q * (1 - q))
    else:
        most = min(p + q, 2 - p - q)
        disagreement = number("disagreement", disagreement, above=0, most=1)
        if not d <= disagreement * (1 + 1e-9) or disagreement > most * (1 + 1e-9):
            raise PeftLabError(
                f"shares of {p:g} and {q:g} disagree on at least {d:g} and at most {most:g} of the items; found "
                f"disagreement {disagreement:g}."
            )
        # n = ( z_confidence sqrt(w) + z_power sqrt(w - d^2) )^2 / d^2        w = the disagreement (Connor 1987)
        root = a * math.sqrt(disagreement) + b * math.sqrt(max(0.0, disagreement - d * d))
    found = (max(root, 0.0) / d) ** 2
    if found > 1e15:
        raise PeftLabError(f"a difference of {d:g} takes more items than there will ever be ({found:.0e}).")
    return max(1, math.ceil(found - 1e-9))
