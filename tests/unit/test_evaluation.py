"""Scores, intervals and tests of differences: by hand, against scipy and sacrebleu, and by drawing at random."""

import itertools
import math
import random
import statistics
import time

import numpy
import pytest
import torch
from scipy import stats

from peftlab.errors import PeftLabError
from peftlab.evaluation import comparisons, intervals, judges, scores, values

TEXTS = ["the cat sat on the mat today", "no", "a dog runs in the park", "it is not here"]
RIGHT = ["the cat sat on a mat today", "no", "the dog runs in a park", "it is here"]
OTHER = ["a cat sat on a mat", "yes", "the dog runs in the park", "it is here now"]


# ---------------------------------------------------------------------------------------------------------- the scores


def test_accuracy_macro_f1_exact_match():
    predictions, references = [0, 0, 1, 1, 2, 0], [0, 0, 0, 1, 2, 2]
    assert scores.accuracy(predictions, references) == pytest.approx(4 / 6)
    for kind in (torch.tensor, numpy.array, tuple):
        found = scores.accuracy(kind(predictions), kind(references))
        assert found == pytest.approx(4 / 6) and isinstance(found, float)
        assert scores.macro_f1(kind(predictions), kind(references)) == pytest.approx(2 / 3)
    # by hand: F1 of 0 is 4/6, of 1 is 2/3, of 2 is 2/3
    assert scores.macro_f1(predictions, references) == pytest.approx(2 / 3)
    assert scores.macro_f1([0] * 20, [0] * 19 + [1]) == pytest.approx((38 / 39) / 2), "accuracy would say 0.95"
    assert scores.exact_match(["a b\n", "c"], ["a b", "C"]) == 0.5


@pytest.mark.parametrize("score", [scores.accuracy, scores.macro_f1, scores.exact_match, scores.bleu, scores.chrf])
def test_scores_refuse_lists_that_do_not_match(score):
    with pytest.raises(PeftLabError, match="2 predictions do not go with 1"):
        score(["a", "b"], ["a"])
    with pytest.raises(PeftLabError, match="empty"):
        score([], [])


def test_words_in_common():
    # both say "air" and "back", of 3 and 6 words: 2 * 2 / (3 + 6)
    assert scores.token_f1(["Air fares back"], ["Air Jamaica back in state control"]) == pytest.approx(4 / 9)
    assert scores.token_f1(["a a b", ""], ["a b b", ""]) == pytest.approx((4 / 6 + 1) / 2)
    assert scores.token_f1(["Same: words!"], ["same words"]) == 1.0
    assert scores.token_f1(["nothing"], ["at all"]) == 0.0
    with pytest.raises(PeftLabError, match="do not go with"):
        scores.token_f1(["a"], [])


def test_bleu_and_chrf_are_sacrebleus():
    import sacrebleu

    assert scores.bleu(TEXTS, RIGHT) == sacrebleu.corpus_bleu(TEXTS, [RIGHT]).score
    assert scores.chrf(TEXTS, RIGHT) == sacrebleu.corpus_chrf(TEXTS, [RIGHT]).score
    assert scores.chrf(TEXTS, RIGHT, word_order=2) == sacrebleu.corpus_chrf(TEXTS, [RIGHT], word_order=2).score
    upper = [text.upper() for text in TEXTS]
    assert scores.bleu(upper, RIGHT, lowercase=True) == scores.bleu(TEXTS, RIGHT) > scores.bleu(upper, RIGHT)
    both = scores.bleu(TEXTS, [[one, other] for one, other in zip(RIGHT, TEXTS, strict=True)])
    assert both == pytest.approx(100)
    more = "see the mat today"
    uneven = scores.bleu(TEXTS, [[RIGHT[0], more], RIGHT[1], [RIGHT[2]], RIGHT[3:]])
    assert scores.bleu(TEXTS, RIGHT) < uneven == sacrebleu.corpus_bleu(TEXTS, [RIGHT, [more, None, None, None]]).score
    with pytest.raises(PeftLabError, match="each entry of references"):
        scores.bleu(["a"], [[]])
    with pytest.raises(PeftLabError, match="tokenize must be one of '13a'"):
        scores.bleu(["a"], ["a"], tokenize="13")


def test_bleu_by_hand(capfd):
    # 5 words against 5: 4/5 single words, 3/4 pairs, 2/3 triples, 1/2 runs of four
    wanted = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
    assert scores.bleu(["a b c d e"], ["a b c d f"]) == pytest.approx(wanted)
    # two words too short: the brevity penalty exp(1 - 7/5)
    assert scores.bleu(["a b c d e"], ["a b c d e f g"]) == pytest.approx(100 * math.exp(1 - 7 / 5))
    scores.bleu(["it ends ."] * 200, ["it ends ."] * 200)
    assert capfd.readouterr() == ("", ""), "sacrebleu warns of tokenised full stops"


# ------------------------------------------------------------------------------------------------------- the intervals


@pytest.mark.parametrize(
    ("right", "total", "confidence"), [(0, 7, 0.95), (7, 7, 0.95), (3, 11, 0.9), (631, 1319, 0.99)]
)
def test_binomial_interval_is_wilsons(right, total, confidence):
    ours = intervals.binomial_interval(right, total, confidence=confidence)
    theirs = stats.binomtest(right, total).proportion_ci(confidence, method="wilson")
    assert ours == pytest.approx((right / total, theirs.low, theirs.high), abs=1e-12)
    assert ours.half_width == pytest.approx((theirs.high - theirs.low) / 2, abs=1e-12)


def test_mean_interval_over_seeds_is_students():
    values = [0.80, 0.83, 0.84, 0.79]
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert intervals.mean_interval(values, confidence=0.9) == pytest.approx((0.815, *theirs))
    assert intervals.mean_interval(torch.tensor(values, dtype=torch.float64), confidence=0.9)[1] == pytest.approx(
        theirs[0]
    )


def test_mean_interval_over_seeds_and_items_holds_the_mean_as_often_as_it_says():
    """Each seed and each item has an effect of its own. An interval over the items alone forgets the seeds."""
    draws, held, only_items = numpy.random.default_rng(1), 0, 0
    for _ in range(300):
        table = draws.normal(0, 0.6, (4, 1)) + draws.normal(0, 1, (1, 20)) + draws.normal(0, 0.5, (4, 20))
        _, low, high = intervals.mean_interval(table)
        held += low <= 0 <= high
        error = table.mean(0).std(ddof=1) / 20**0.5
        only_items += abs(table.mean()) <= 2.09 * error
    assert 0.92 <= held / 300 <= 1 and only_items / 300 < 0.9


def test_mean_interval_by_hand():
    # seeds 0.5 and 1, items 0.75 each: nothing but the seeds and the rest
    table = [[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]
    # mean 0.5, all seeds and items alike; rest = +-0.5 each: MS = 8 * 0.25 / 3
    found = intervals.mean_interval(table)
    half = stats.t.ppf(0.975, 3) * math.sqrt(2 / 3 / 8)
    assert found == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    # seeds differ, items do not, and no rest: the interval over seeds
    assert intervals.mean_interval([[1.0] * 3, [2.0] * 3, [4.0] * 3]) == pytest.approx(
        intervals.mean_interval([1, 2, 4])
    )
    assert intervals.mean_interval([[1.0] * 3] * 2) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("wrong", [[], [1.0], [[1.0, 2.0]], [[1.0], [2.0]], [[1, 2], [1]], ["ab", "cd"], [1.0, None]])
def test_mean_interval_refuses(wrong):
    with pytest.raises(PeftLabError):
        intervals.mean_interval(wrong)


# ----------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize(("b", "c"), [(0, 0), (6, 0), (3, 9), (5, 5), (300, 340), (4000, 4100)])
def test_mcnemar_is_the_exact_binomial_test(b, c):
    first, second = [1] * b + [0] * c + [1, 0], [0] * b + [1] * c + [1, 0]
    wanted = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert comparisons.mcnemar(first, second) == (b, c, pytest.approx(wanted, rel=1e-9))
    assert comparisons.mcnemar(torch.tensor(first).bool(), numpy.array(second)) == comparisons.mcnemar(first, second)


def test_two_proportions_are_the_uncorrected_chi_squared_test():
    for a, n, b, m in ((60, 100, 45, 100), (677, 1319, 631, 1319), (1, 9, 8, 20)):
        wanted = stats.chi2_contingency([[a, n - a], [b, m - b]], correction=False).pvalue
        assert comparisons.two_proportion_test(a, n, b, m) == pytest.approx(wanted, rel=1e-9)
    assert comparisons.two_proportion_test(5, 5, 9, 9) == comparisons.two_proportion_test(0, 5, 0, 9) == 1.0


def test_paired_bootstrap_of_losses_is_near_scipys():
    draws = numpy.random.default_rng(3)
    hard = draws.normal(2, 1, 60)  # hard items are hard for both: an unpaired test would see nothing
    first, second = hard + draws.normal(0, 0.2, 60), hard + draws.normal(0.1, 0.2, 60)
    found = comparisons.paired_bootstrap(first, second, samples=4000)
    theirs = stats.bootstrap(
        (first - second,), numpy.mean, n_resamples=4000, method="percentile", rng=numpy.random.default_rng(0)
    ).confidence_interval
    assert found.value == pytest.approx(float(first.mean() - second.mean()))
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.005)
    assert found.p_value == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=0.01)
    assert comparisons.paired_bootstrap(first, first).p_value == 1.0
    assert (
        found
        == comparisons.paired_bootstrap(first, second, samples=4000)
        != comparisons.paired_bootstrap(first, second, samples=4000, seed=1)
    )


@pytest.mark.parametrize("score", ["bleu", "chrf"])
def test_paired_bootstrap_of_corpus_scores(score):
    one = getattr(scores, score)
    found = comparisons.paired_bootstrap(TEXTS, OTHER, RIGHT, score=score, samples=50)
    assert found.value == pytest.approx(one(TEXTS, RIGHT) - one(OTHER, RIGHT))
    # a sample is the score of the drawn texts, not a mean of the texts' scores
    draws, wanted = numpy.random.default_rng(0), []
    for _ in range(50):
        drawn = draws.integers(4, size=4)
        first, second, right = ([texts[i] for i in drawn] for texts in (TEXTS, OTHER, RIGHT))
        wanted.append(one(first, right) - one(second, right))
    assert (found.low, found.high) == pytest.approx(tuple(numpy.quantile(wanted, [0.025, 0.975])))
    with pytest.raises(PeftLabError, match="give references"):
        comparisons.paired_bootstrap(TEXTS, OTHER, score=score)
    with pytest.raises(PeftLabError, match="second must be a list of texts"):
        comparisons.paired_bootstrap(TEXTS, [1.0] * 4, RIGHT, score=score)
    with pytest.raises(PeftLabError, match="first has 4 values and second 3"):
        comparisons.paired_bootstrap(TEXTS, OTHER[:3], RIGHT, score=score)
    with pytest.raises(PeftLabError, match="references are for"):
        comparisons.paired_bootstrap([1.0], [2.0], RIGHT)


def test_corrections_for_many_tests():
    values = [0.001, 0.04, 0.03, 0.6, 0.02, 0.02]
    assert comparisons.adjust_p_values(values, method="benjamini-hochberg") == pytest.approx(
        stats.false_discovery_control(values)
    )
    assert comparisons.adjust_p_values(values, method="bonferroni") == pytest.approx([min(1, 6 * p) for p in values])
    # by hand: 6 x 0.001; 5 and 4 x 0.02; 3 x 0.03 is less than the one before; 2 x 0.04; 0.6
    assert comparisons.adjust_p_values(values) == pytest.approx([0.006, 0.1, 0.1, 0.6, 0.1, 0.1])
    with pytest.raises(PeftLabError, match="between 0 and 1"):
        comparisons.adjust_p_values([1.2])


def test_items_needed_give_the_power_that_they_promise():
    draws, found = numpy.random.default_rng(5), {}
    n = comparisons.items_needed(0.5, 0.6)
    p_values = [comparisons.two_proportion_test(int(a), n, int(b), n)
                for a, b in zip(draws.binomial(n, 0.5, 400), draws.binomial(n, 0.6, 400), strict=True)]  # fmt: skip
    found["apart"] = sum(p < 0.05 for p in p_values) / 400
    n = comparisons.items_needed(0.5, 0.6, disagreement=0.2)
    p_values = []
    for _ in range(400):  # of 100 items, 15 only the second has right, and 5 only the first
        b, c, _ = draws.multinomial(n, [0.05, 0.15, 0.8])
        p_values.append(comparisons.mcnemar([1] * b + [0] * c, [0] * b + [1] * c).p_value)
    found["paired"] = sum(p < 0.05 for p in p_values) / 400
    assert 0.75 < found["apart"] < 0.86 and 0.7 < found["paired"] < 0.86, found
    # the usual value of textbooks: 387 or 388 for each group
    assert comparisons.items_needed(0.5, 0.6) in (387, 388)
    assert comparisons.items_needed(0.5, 0.6, power=0.9) > comparisons.items_needed(0.5, 0.6)
    with pytest.raises(PeftLabError, match="are equal"):
        comparisons.items_needed(0.5, 0.5)
    with pytest.raises(PeftLabError, match="disagree on at least 0.1"):
        comparisons.items_needed(0.5, 0.6, disagreement=0.05)
    with pytest.raises(PeftLabError, match="disagree on at least 0.1 and at most 0.3"):
        comparisons.items_needed(0.1, 0.2, disagreement=0.5)


# ---------------------------------------------------------------------------------------------------------- the judges


def test_win_rate_without_ties_is_the_binomial_interval():
    assert judges.win_rate(["win"] * 9 + ["loss"] * 4) == pytest.approx(intervals.binomial_interval(9, 13))
    tied = judges.win_rate(["win"] * 9 + ["loss"] * 4 + ["tie"] * 7)
    assert tied.value == pytest.approx((9 + 3.5) / 20)
    assert tied.half_width < intervals.score_interval(12.5 / 20, 20, 0.95).half_width, "ties vary less than wins"
    assert judges.win_rate(["tie"] * 5) == pytest.approx((0.5, 0.5, 0.5))


def test_win_rate_holds_the_true_rate_as_often_as_it_says():
    draws, held = random.Random(0), 0
    for _ in range(500):
        found = judges.win_rate(draws.choices(["win", "tie", "loss"], [0.5, 0.3, 0.2], k=60))
        held += found.low <= 0.65 <= found.high
    assert 0.92 <= held / 500 <= 0.975


def test_position_bias():
    # always the first: contradicts itself on every pair, and nobody wins
    found = judges.position_bias(["first"] * 40, ["first"] * 40)
    assert (found.consistent.value, found.first.value, found.win_rate.value) == (0.0, 1.0, 0.5)
    assert found.first.low > 0.9
    # a judge without bias, A better in 3 of 4
    fair = judges.position_bias(["first", "first", "first", "second"], ["second", "second", "second", "first"])
    assert (fair.consistent.value, fair.first.value, fair.win_rate.value) == (1.0, 0.5, 0.75)
    half = judges.position_bias(["first", "tie"], ["tie", "tie"])
    assert half.win_rate.value == pytest.approx((0.75 + 0.5) / 2) and half.consistent.value == 0.5
    with pytest.raises(PeftLabError, match="verdict must be one of"):
        judges.position_bias(["a"], ["first"])


def test_a_mean_of_values_inside_has_their_own_variance():
    values = [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    low, high = judges._rate(values * 100, 0.95)[1:]
    assert (high - low) / 2 == pytest.approx(1.96 * statistics.pstdev(values) / 600**0.5, rel=0.01)


def test_every_interval_holds_its_value():
    for right, total in itertools.product(range(0, 6), [6]):
        value, low, high = intervals.binomial_interval(right, total)
        assert 0 <= low <= value <= high <= 1


# ------------------------------------------------------------------------------------------------- odd values of a kind


def test_tables_tensors_and_columns_are_lists_of_their_values():
    pandas = pytest.importorskip("pandas")
    rows = [[1, 0, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1]]
    wanted = intervals.mean_interval(rows)
    tensors = [[torch.tensor(value) for value in row] for row in rows]
    for given in (numpy.array(rows), torch.tensor(rows), torch.tensor(rows, dtype=torch.bfloat16), tensors,
                  pandas.DataFrame(rows, columns=list("dcba")), [numpy.array(row) for row in rows]):  # fmt: skip
        assert intervals.mean_interval(given) == wanted
    one = [1, 0, 1]
    for given in (pandas.Series(one, index=[7, 8, 9]), [torch.tensor(value) for value in one], tuple(one)):
        assert comparisons.mcnemar(given, [0, 0, 0]) == comparisons.mcnemar(one, [0, 0, 0])
    more = {"score": "chrf", "samples": 10}
    told = comparisons.paired_bootstrap(TEXTS, RIGHT, RIGHT, **more)
    assert comparisons.paired_bootstrap(numpy.array(TEXTS), RIGHT, pandas.Series(RIGHT), **more) == told


@pytest.mark.parametrize("given", [
    numpy.array(3), torch.tensor(1.0), {1, 0}, {"a": 1}, "101", None, 3, [10**400, 1], [1e300, 0], [float("nan"), 1],
    [None, 1], ["1", "0"], [1j, 0], [[1], [0]], numpy.array([1, "a"], dtype=object), [numpy.float32("inf"), 1], [],
])  # fmt: skip
def test_what_is_no_list_of_numbers_is_refused(given):
    for ask in (comparisons.adjust_p_values, intervals.mean_interval, lambda x: comparisons.mcnemar(x, [1, 0]),
                lambda x: comparisons.paired_bootstrap([1, 0], x, samples=10)):  # fmt: skip
        with pytest.raises(PeftLabError) as error:
            ask(given)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("references", [[1, 2], [None, "a"], [[], ["a"]], [["a"], [1]], [float("nan"), "a"], 3, "ab"])
def test_references_that_are_no_texts_are_refused(references):
    with pytest.raises(PeftLabError, match="references|texts"):
        comparisons.paired_bootstrap(["a", "b"], ["a", "c"], references, score="bleu", samples=10)


def test_one_item_is_no_sample():
    """Drawn again, one item is always itself: the interval would have no width and p would be 1 / samples."""
    with pytest.raises(PeftLabError, match="two or more"):
        comparisons.paired_bootstrap([2.0], [1.0])


def test_a_class_that_is_none_is_refused():
    for wrong in ([float("nan"), 1], [[1], [0]]):
        with pytest.raises(PeftLabError, match="NaN is no class|must be numbers or texts"):
            scores.macro_f1(wrong, wrong)


def test_what_can_never_be_equal_is_refused():
    """Numbers in a text, or logits where their argmax is meant: each answer would be wrong, without a word."""
    for score in (scores.accuracy, scores.macro_f1):
        for given in (["1", "0"], torch.zeros(2, 3), [b"1", b"0"], [[1], [0]]):
            with pytest.raises(PeftLabError, match="never equal|numbers or texts"):
                score(given, [1, 0])
        assert score([None, None], ["a", "b"]) == 0  # no answer is a wrong one
        assert score([True, 0.0], numpy.array([1, 0])) == 1
    assert scores.accuracy([{"a": 1}, None], [{"a": 1}, {"a": 2}]) == 0.5


def test_values_without_an_answer_to_equal_are_refused():
    pandas = pytest.importorskip("pandas")
    tensors = [torch.tensor([1, 2]), torch.tensor([1, 2])]
    for given in (tensors, [numpy.ones(2)] * 2, pandas.Series([1, None], dtype="Int64"), pandas.Series(["a", None])):
        for score in (scores.accuracy, scores.macro_f1):
            with pytest.raises(PeftLabError, match="numbers or texts|NaN is no class"):
                score(given, given)


@pytest.mark.parametrize("score", [scores.exact_match, scores.token_f1, scores.bleu, scores.chrf])
def test_each_text_of_a_column_is_looked_at(score):
    """A column with a hole, which only its first entry does not show; and a table, whose names are no answers."""
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"a": ["a", "b"], "b": ["a", "b"]})
    columns = pandas.Series(["a", None]), numpy.array(["a", 2], dtype=object)
    for asked in [
        (table, ["a", "b"]),
        *((one, ["a", "b"]) for one in columns),
        *((["a", "b"], one) for one in columns),
    ]:
        with pytest.raises(PeftLabError, match="text"):
            score(*asked)
    assert score(pandas.Series(TEXTS, index=range(7, 7 + len(TEXTS))), numpy.array(RIGHT)) == score(TEXTS, RIGHT)


def test_tensors_whose_values_cannot_be_read_are_refused():
    for given in (torch.zeros(2, device="meta"), torch.ones(2).to_sparse()):
        for ask in (comparisons.adjust_p_values, intervals.mean_interval, lambda x: scores.accuracy(x, [1, 0]),
                    lambda x: comparisons.mcnemar(x, [1, 0])):  # fmt: skip
            with pytest.raises(PeftLabError, match="cannot be read"):
                ask(given)


def test_the_largest_scores_do_not_overflow():
    most = values.LARGEST
    assert math.isfinite(intervals.mean_interval([[most, -most], [1, 2], [most, most]]).high)
    assert math.isfinite(comparisons.paired_bootstrap([most, -most], [0, 0], samples=10).high)
    with pytest.raises(PeftLabError, match="finite numbers"):
        intervals.mean_interval([[2 * most, -most], [1, 2]])


def test_mcnemar_of_a_hundred_thousand_disagreements_is_soon_done():
    n, b = 100_000, 49_800
    began = time.thread_time()
    found = comparisons.mcnemar([1] * b + [0] * (n - b), [0] * b + [1] * (n - b))
    assert time.thread_time() - began < 20
    z = (b + 0.5 - n / 2) / (math.sqrt(n) / 2)  # the normal approximation, with a correction for whole numbers
    assert found.p_value == pytest.approx(2 * statistics.NormalDist().cdf(z), rel=1e-4)


def test_ends_of_what_a_confidence_and_a_total_may_be():
    wide = intervals.binomial_interval(2, 10, confidence=0.9999999999999999)
    assert 0 <= wide.low < 0.01 and wide.high > 0.9
    assert intervals.mean_interval([1.0, 2.0, 3.0], confidence=0.9999999999999999).half_width > 1e6
    for right, total in ((1, 10**400), (10**300, 10**301)):
        with pytest.raises(PeftLabError, match="total"):
            intervals.binomial_interval(right, total)
        with pytest.raises(PeftLabError, match="total_2"):
            comparisons.two_proportion_test(1, 2, right, total)


def test_intervals_over_three_seeds_hold_the_truth():
    """Of 300 tables with known effects of seeds and items, about 95% of the intervals hold the true mean."""
    draws, held = numpy.random.default_rng(0), 0
    for _ in range(300):
        seeds, items = 0.3 * draws.standard_normal((3, 1)), draws.standard_normal((1, 20))
        found = intervals.mean_interval(seeds + items + draws.standard_normal((3, 20)))
        held += found.low <= 0 <= found.high
    assert 0.92 <= held / 300 <= 0.99
