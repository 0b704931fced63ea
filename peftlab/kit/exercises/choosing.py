"""Exercises of the chapter on choosing a method."""

from __future__ import annotations

import math
from typing import Any

from peftlab.kit.exercises.grading import Exercise, choice, function, number

RIGHT, ASKED = 84, 100
SHARE, WITHIN = 0.8, 0.02  # of right answers, and the two errors that are wanted
CHANCE, TRIED = 0.05, 20
ALONE, WINS, SMALLEST = (4, 14), (66, 38), 0.004  # only one right; wins in each order; the smallest p-value
NATS, LETTERS = 2.1, 4.2  # per token: the loss, and the letters that a token stands for
KEYS, TOKENS, CHOICES, BITS = 10_000, 8, 64, 2
PER_RANK = 30 * (2 * 576 + 576 + 192)  # numbers per rank of LoRA on the query and value of the book's model
STEPS, SECONDS, PRICE, RUNS = 3000, 1.2, 2.5, 8
COST = STEPS * SECONDS / 3600 * PRICE * RUNS


def _pick(validation: list[float], test: list[float]) -> float:
    return test[validation.index(min(validation))]


def _paired(first: Any, second: Any) -> tuple[Any, Any]:
    gain = second.double() - first.double()
    return gain.mean(), 2 * (gain.square().mean() - gain.mean() ** 2).sqrt() / math.sqrt(len(gain))


def _stacked(pair: Any) -> Any:
    """Return two numbers as one tensor, whether they are numbers or tensors."""
    import torch

    first, second = pair
    return torch.tensor([float(first), float(second)], dtype=torch.float64)


def _f1(hits: float, false_alarms: float, missed: float) -> float:
    return 2 * hits / (2 * hits + false_alarms + missed)


def _answers() -> list[tuple[Any, Any]]:
    import torch

    generator = torch.Generator().manual_seed(8)
    found = []
    for items in (50, 384):
        first = torch.rand(items, generator=generator) < 0.7
        change = torch.rand(items, generator=generator) < 0.2
        found.append((first, first ^ change))
    return found


def _apart(first: Any, second: Any) -> tuple[Any, Any]:
    """The error as if the two had answered different items."""
    p, q = first.double().mean(), second.double().mean()
    return q - p, 2 * ((p * (1 - p) + q * (1 - q)) / len(first)).sqrt()


def _paired_answer(answer: Any) -> Any:
    def wrapped(function_: Any) -> Any:
        return lambda first, second: _stacked(function_(first, second))

    grader = function(
        wrapped(_paired), cases=_answers,
        near={"That takes the two for independent. They answered the same items, and most answers agree.":
                  wrapped(_apart),
              "That is one error. The interval reaches two to each side.":
                  wrapped(lambda a, b: (_paired(a, b)[0], _paired(a, b)[1] / 2)),
              "The gain is the second minus the first.": wrapped(lambda a, b: _paired(b, a))},
        tolerance=0.02,
        hint="Give each item 1 if only the second is right, -1 if only the first is, and 0 otherwise. Take the mean, "
             "and two standard deviations over the root of the number of items.",
        then="Items on which both agree say nothing about the difference, and do not widen it.")  # fmt: skip
    return grader(wrapped(answer) if callable(answer) else answer)


EXERCISES = (
    Exercise("choosing.interval", "easy", 5, "a share", number(
        2 * math.sqrt(RIGHT / ASKED * (1 - RIGHT / ASKED) / ASKED), tolerance=0.01,
        near={math.sqrt(RIGHT / ASKED * (1 - RIGHT / ASKED) / ASKED): "That is one error.",
              2 * RIGHT / ASKED * (1 - RIGHT / ASKED) / ASKED: "Take the root: that is a variance.",
              200 * math.sqrt(RIGHT / ASKED * (1 - RIGHT / ASKED) / ASKED): "That is in points. Give a share of 1.",
              2 / math.sqrt(ASKED): "That would be so if the share scattered by 1. It scatters by the root of "
                                    "p(1 - p)."},
        hint="The binomial error is the root of p(1 - p)/n.",
        then="So a test of a hundred items cannot tell most methods apart.")),
    Exercise("choosing.items", "medium", 10, "a whole number", number(
        round(SHARE * (1 - SHARE) * (2 / WITHIN) ** 2), tolerance=0.002,
        near={round(SHARE * (1 - SHARE) / WITHIN**2): "That is for one error of 2 points. Two errors are to be 2 "
                                                      "points.",
              round(2 * SHARE * (1 - SHARE) * (2 / WITHIN) ** 2): "That is for the difference of two scores. One "
                                                                  "score is asked for."},
        hint="Set two roots of p(1 - p)/n equal to two points, and solve for n.",
        then="Half the interval needs four times as many items.")),
    Exercise("choosing.pick", "easy", 5, "your function", function(
        _pick, cases=lambda: [([0.9, 0.4, 0.5], [0.61, 0.72, 0.75]), ([0.3, 0.2, 0.6, 0.7], [0.8, 0.78, 0.81, 0.4]),
                              ([1.2, 1.1], [0.5, 0.55])],
        near={"That is chosen on the test set: its score is too good.": lambda validation, test: max(test),
              "A loss is better when it is lower.":
                  lambda validation, test: test[validation.index(max(validation))],
              "That is the loss on validation. The score on test is asked for.":
                  lambda validation, test: min(validation)},
        hint="Find the place of the lowest validation loss. Return the test score at that place.",
        then="The other test scores need not even be computed.")),
    Exercise("choosing.edge", "easy", 5, '"take it", "go on", "new seed" or "test"', choice(
        "go on", options=("take it", "go on", "new seed", "test"),
        remarks={"take it": "The next higher one may be better still. You have not seen the loss rise.",
                 "new seed": "A seed moves the loss a little. The rate moves it far more, and you have not found its "
                             "best.",
                 "test": "The test set chooses nothing."},
        hint="On which side of the lowest loss have you not looked?",
        then="Go on until the loss is higher on both sides.")),
    Exercise("choosing.many", "medium", 10, "a probability", number(
        1 - (1 - CHANCE) ** TRIED, tolerance=0.01,
        near={CHANCE * TRIED: "Chances do not add up like that: with 21 comparisons it would be over 1.",
              CHANCE: "That is the chance for one comparison.",
              (1 - CHANCE) ** TRIED: "That is the chance that none stands out.",
              CHANCE**TRIED: "That is the chance that all of them stand out."},
        hint="What is the chance that none of them stands out?",
        then="Who compares twenty methods finds a winner more often than not.")),
    Exercise("choosing.paired", "hard", 15, "your function", _paired_answer),
    Exercise("choosing.f1", "medium", 10, "your function", function(
        _f1, cases=lambda: [(10.0, 5.0, 20.0), (3.0, 0.0, 1.0), (40.0, 60.0, 10.0)],
        near={"That is the mean of precision and recall. F1 is their harmonic mean.":
                  lambda hits, alarms, missed: (hits / (hits + alarms) + hits / (hits + missed)) / 2,
              "That is the precision.": lambda hits, alarms, missed: hits / (hits + alarms),
              "That is the recall.": lambda hits, alarms, missed: hits / (hits + missed)},
        hint="Precision is hits over all alarms, recall is hits over all that should be found. Take 2PR/(P + R).",
        then="Items that are rightly passed over do not count. So it does not praise a model that never says "
             "\"urgent\".")),
    Exercise("choosing.bits", "medium", 10, "a number of bits", number(
        NATS / math.log(2) / LETTERS, tolerance=0.01,
        near={NATS / LETTERS: "That is in nats. A bit is ln 2 nats.",
              NATS / math.log(2): "That is per token. Another tokenizer has other tokens.",
              NATS * math.log(2) / LETTERS: "Divide by ln 2: a nat is more than a bit.",
              NATS * LETTERS / math.log(2): "A token stands for several letters, so a letter costs less than a token."},
        hint="Divide the loss by the letters per token, and by ln 2.",
        then="Bits per letter can be compared between models whose tokens differ. Perplexities cannot.")),
    Exercise("choosing.capacity", "medium", 10, "a whole number", number(
        math.ceil(KEYS * TOKENS * math.log2(CHOICES) / BITS / PER_RANK),
        near={KEYS * TOKENS * math.log2(CHOICES) / BITS / PER_RANK: "A rank is a whole number. Which way must you "
                                                                    "round?",
              math.floor(KEYS * TOKENS * math.log2(CHOICES) / BITS / PER_RANK): "That is a little too small: round "
                                                                                "up.",
              math.ceil(KEYS * TOKENS * CHOICES / BITS / PER_RANK): "One of 64 tokens is 6 bits, not 64.",
              math.ceil(KEYS * TOKENS * math.log2(CHOICES) / PER_RANK): "Here a parameter holds two bits."},
        hint="How many bits are there to learn? How many parameters hold them? How many does one rank have?",
        then="For a task with so much to remember the rank is set by counting, not by habit. The adapters that the "
             "chapter measures stored fewer bits per parameter, so this rank is the least.")),
    Exercise("choosing.cost", "easy", 5, "a number of dollars", number(
        COST, tolerance=0.01,
        near={COST / RUNS: "That is one run. You search the rate, too.",
              STEPS * SECONDS / 60 * PRICE * RUNS: "The price is for an hour, and an hour has 3,600 seconds.",
              STEPS * SECONDS * PRICE * RUNS: "The price is for an hour, not for a second."},
        hint="Steps times seconds, over 3,600, times the price, times the runs.",
        then="The search costs more than the run that you keep. Count it.")),
    Exercise("choosing.mcnemar", "medium", 10, "a p-value", number(
        2 * sum(math.comb(sum(ALONE), k) for k in range(min(ALONE) + 1)) / 2 ** sum(ALONE), tolerance=0.01,
        near={sum(math.comb(sum(ALONE), k) for k in range(min(ALONE) + 1)) / 2 ** sum(ALONE):
                  "The difference could be on either side. Double it.",
              2 * math.comb(sum(ALONE), min(ALONE)) / 2 ** sum(ALONE):
                  "As uneven or more: add the cases that are more uneven still."},
        hint="Items on which both are right or both are wrong say nothing. What is left are tosses of a coin.",
        then="The items on which they agree changed nothing.")),
    Exercise("choosing.order", "easy", 5, "a share", number(
        sum(WINS) / 200, tolerance=0.001,
        near={WINS[0] / 100: "That is one order alone.", WINS[1] / 100: "That is one order alone."},
        hint="Take the mean over both orders.",
        then="The judge likes the first place. The two models are about equal.")),
    Exercise("choosing.holm", "medium", 5, "a p-value", number(
        TRIED * SMALLEST, tolerance=0.001,
        near={SMALLEST: "That is the value for a single test. The best of twenty is no single test.",
              SMALLEST / TRIED: "A correction makes a p-value larger, not smaller."},
        hint="What is the smallest of m values multiplied by?",
        then="So nothing is shown.")),
    Exercise("choosing.fair", "easy", 5, '"one rate", "own rates", "best test" or "more steps"', choice(
        "own rates", options=("one rate", "own rates", "best test", "more steps"),
        remarks={"one rate": "A rate that suits one method is far off for another. That compares rates.",
                 "best test": "The best of many test scores is too good, and more so for the method with more runs.",
                 "more steps": "Then two things differ, and you do not know which of them helped."},
        hint="In which of them does the method alone differ, with nothing chosen on the test set?",
        then="It costs more runs. That is why one sees it so rarely.")),
)  # fmt: skip
