"""Exercises of the chapter on training recipes."""

import math

from peftlab.kit.exercises.grading import Exercise, choice, function, number

EXAMPLES, BATCH, ACCUMULATION, EPOCHS = 4000, 4, 8, 3
LENGTHS = (40, 50, 60, 250)  # tokens of the four examples of a batch
SHORT, LONG = (10, 2.0), (90, 1.0)  # two parts of a batch: their labels, and the mean loss of these
WEIGHTS, TOKENS = 1e9, 2048
MISSING, RANK = (3, 2, 1, 1), 2  # the singular values of what is missing, and LoRA's rank


def _left(values, rank):
    """Return the share of the squared distance that a change of this rank leaves."""
    squares = [value**2 for value in values]
    return sum(squares[rank:]) / sum(squares)


def _labels(prompt, answer, end):
    return [-100] * len(prompt) + [*answer, end]


def _perplexity(sums, counts):
    return math.exp(sum(sums) / sum(counts))


def _mask(positions):
    import torch

    row = torch.cumsum(positions == 0, 0)
    place = torch.arange(len(positions))
    return (row[:, None] == row[None, :]) & (place[None, :] <= place[:, None])


def _causal(positions):
    import torch

    return torch.ones(len(positions), len(positions)).tril().bool()


def _blocks(positions):
    import torch

    row = torch.cumsum(positions == 0, 0)
    return row[:, None] == row[None, :]


def _dpo(chosen, rejected, chosen_before, rejected_before, beta):
    import torch

    margin = (chosen - chosen_before) - (rejected - rejected_before)
    return -torch.nn.functional.logsigmoid(beta * margin)


def _without_reference(chosen, rejected, chosen_before, rejected_before, beta):
    return _dpo(chosen, rejected, 0 * chosen, 0 * rejected, beta)


def _baseline(rewards):
    return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)


def _positions():
    import torch

    return [(torch.tensor(row),) for row in ([0, 1, 2, 0, 1], [0, 1, 2, 3], [0, 0, 1, 2, 0, 1, 2])]


def _pairs():
    import torch

    generator = torch.Generator().manual_seed(1)
    return [(*(-20 * torch.rand(4, 3, dtype=torch.float64, generator=generator)), beta) for beta in (0.1, 0.5, 1.0)]


def _rewards():
    import torch

    return [(torch.tensor(row, dtype=torch.float64),) for row in ([1, 0, 0, 1], [0.5, 2], [1, 1, 0, 1, 0.25])]


EXERCISES = (
    Exercise("recipes.steps", "easy", 5, "a whole number", number(
        EPOCHS * EXAMPLES // (BATCH * ACCUMULATION),
        near={EPOCHS * EXAMPLES // BATCH: "That counts batches. The optimiser steps once for several of them.",
              EXAMPLES // (BATCH * ACCUMULATION): "That is one time through the data.",
              EPOCHS * EXAMPLES: "That is one step for each example."},
        hint="How many examples does one update use, batch times accumulation? And how often are they all used?",
        then=f"A warm-up of a tenth would be the first {math.ceil(EPOCHS * EXAMPLES / (BATCH * ACCUMULATION) / 10)} of "
             "them: pl.train rounds up.")),
    Exercise("recipes.labels", "easy", 5, "your function", function(
        _labels, cases=lambda: [([5, 6, 7], [8, 9], 2), ([5], [6, 7, 8], 0), ([4, 4], [3], 1)],
        near={"The end token stands in the answer, but it is not learned: this model would not stop.":
                  lambda prompt, answer, end: [-100] * len(prompt) + [*answer, -100],
              "The end token is missing, and the labels are one shorter than the tokens.":
                  lambda prompt, answer, end: [-100] * len(prompt) + [*answer],
              "The prompt is learned too. The model then learns to write what customers write.":
                  lambda prompt, answer, end: [*prompt, *answer, end]},
        hint="One label for each token of prompt, answer and end. -100 stands where nothing is learned.",
        then="The model shifts the labels by one place itself.")),
    Exercise("recipes.accumulate", "easy", 5, "a number", number(
        (SHORT[0] * SHORT[1] + LONG[0] * LONG[1]) / (SHORT[0] + LONG[0]), tolerance=1e-6,
        near={(SHORT[1] + LONG[1]) / 2: "That is the mean of the two means. A label of the first part would count nine "
                                        "times as much as one of the second.",
              SHORT[1] + LONG[1]: "The sum of two means is no mean."},
        hint="Add up the losses of all labels, and divide by how many labels there are.",
        then="pl.train divides by the labels of the whole batch, so that accumulation changes nothing.")),
    Exercise("recipes.padding", "easy", 5, "a share, such as 0.25", number(
        1 - sum(LENGTHS) / (len(LENGTHS) * max(LENGTHS)), tolerance=1e-3,
        near={sum(LENGTHS) / (len(LENGTHS) * max(LENGTHS)): "That is the share of real tokens.",
              60.0: "Give it as a share between 0 and 1."},
        hint="Every row of the batch is as long as its longest example.",
        then="Packed, the three short ones would share a row.")),
    Exercise("recipes.perplexity", "medium", 10, "your function", function(
        _perplexity, cases=lambda: [([20.0, 90.0], [10, 90]), ([3.0, 40.0, 8.0], [2, 10, 5]), ([7.0], [7])],
        near={"That is the mean of the batches' means. A batch with few labels counts as much as a full one.":
                  lambda sums, counts: math.exp(sum(s / n for s, n in zip(sums, counts, strict=True)) / len(sums)),
              "That averages the perplexities. Average the losses first, and take exp at the end.":
                  lambda sums, counts: sum(math.exp(s / n) for s, n in zip(sums, counts, strict=True)) / len(sums)},
        hint="Perplexity is exp of the loss per label, over all labels.",
        then="pl.perplexity does the same.")),
    Exercise("recipes.mask", "hard", 15, "your function", function(
        _mask, cases=_positions,
        near={"A token sees the examples before its own: that is the plain causal mask.": _causal,
              "Within an example a token sees the tokens behind it. It may only look back.": _blocks},
        hint="Give each token the number of its example (how many zeros up to it), and compare these numbers. Then "
             "keep what lies on or below the diagonal.",
        then="transformers makes this mask from the positions.")),
    Exercise("recipes.half", "medium", 10, "a number, such as 2**-5", number(
        2**-11,
        near={2**-10: "That is the distance from 1 to the next number in fp16, so adding it works.",
              2**-24: "That is the smallest number above zero. Near 1 the numbers lie further apart.",
              2**-8: "That is bf16, which has seven bits behind the point."},
        hint="fp16 keeps ten bits behind the point. What is the next number above 1, and what is rounded down to 1?",
        then="Adding 0.0004 to a weight of 1 changes nothing, however often you do it. (Below 1 the numbers lie "
             "closer.)")),
    Exercise("recipes.dpo", "medium", 10, "your function", function(
        _dpo, cases=_pairs,
        near={"The reference is missing: only what has changed since then counts.": _without_reference,
              "The sign of the margin is wrong: this loss rewards the worse answer.":
                  lambda c, r, cb, rb, beta: _dpo(r, c, rb, cb, beta),
              "beta is missing.": lambda c, r, cb, rb, beta: _dpo(c, r, cb, rb, 1.0)},
        hint="How much has the better answer gained against the reference, and how much the worse one? Put beta times "
             "the difference into -log sigmoid.",
        then="At the start both have gained nothing, and the loss is log 2.")),
    Exercise("recipes.baseline", "medium", 10, "your function", function(
        _baseline, cases=_rewards,
        near={"The answer's own reward is in its baseline, which makes every difference too small.":
                  lambda rewards: rewards - rewards.mean(),
              "That divides by how many answers there are, and only the others are averaged.":
                  lambda rewards: rewards - (rewards.sum() - rewards) / len(rewards)},
        hint="For each answer, take the mean of the rewards of all others, and subtract it.",
        then="If all rewards are equal, nothing is learned.")),
    Exercise("recipes.reference", "easy", 5, '"copy", "disabled", "merged" or "none"', choice(
        "disabled", options=("copy", "disabled", "merged", "none"),
        remarks={"copy": "That works, and holds all weights twice.",
                 "merged": "Merging puts the update into the weights: then it is no longer the model from before.",
                 "none": "Without a reference nothing holds the model near to what it was."},
        hint="Which state of the attached model is the model from before, to the bit?",
        then="Two forward passes, one set of weights.")),
    Exercise("recipes.products", "easy", 5, "a number of operations", number(
        2 * 2 * TOKENS * WEIGHTS, tolerance=0.01,
        near={2 * 3 * TOKENS * WEIGHTS: "That is full fine-tuning, or a step with checkpointing. A frozen weight needs "
                                        "no gradient, and nothing is computed twice.",
              2 * TOKENS * WEIGHTS: "That is the forward pass alone.",
              2 * 2 * WEIGHTS: "That is for one token."},
        hint="2 operations for each weight and token, once forward and once backward for the gradient of the input.",
        then="At 650 TFLOP/s that is 13 ms.")),
    Exercise("recipes.decay", "medium", 5, "a share, such as 0.5", number(
        math.exp(-0.1), tolerance=0.002,
        near={math.exp(-0.05): "That is the linear schedule, whose mean rate is half its peak. Here the rate is "
                               "constant.",
              1 - 0.1: "Near, but each step takes its share of what is left then.",
              0.0: "Each step takes a ten-thousandth of it."},
        hint="Each step multiplies it by one minus rate times decay.",
        then="With a tenth of that decay nearly all of it is left.")),
    Exercise("recipes.floor", "medium", 10, "a share, such as 1/2", number(
        _left(MISSING, RANK), tolerance=0.01,
        near={sum(MISSING[RANK:]) / sum(MISSING): "The distance is measured by the squares of the singular values.",
              1 - _left(MISSING, RANK): "That is the share that rank 2 takes away.",
              _left(MISSING, RANK + 1): "One square too few: two singular values are left out."},
        hint="The best matrix of rank 2 keeps the two largest singular values.",
        then="Whatever the rate, and however many steps.")),
)
