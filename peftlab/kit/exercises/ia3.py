"""Exercises of the chapter on IA3 and BitFit."""

import math

from peftlab.kit.exercises.grading import Exercise, choice, function, number

# smollm2-135m: hidden width, key/value width (3 heads of 64), inner width, layers
HIDDEN, KEY_VALUE, INNER, LAYERS = 576, 192, 1536, 30


def _gradient(x, W, G):
    return (G * (x @ W.T)).sum(0)


def _merge(W, scale):
    return W * scale


def _drawing():
    import torch

    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


def _gradient_cases():
    draw = _drawing()
    return [(draw(n, i), draw(o, i), draw(n, o)) for n, i, o in [(4, 6, 5), (7, 3, 3), (2, 5, 8)]]


def _merge_cases():
    draw = _drawing()
    return [(draw(o, i), draw(i)) for o, i in [(6, 6), (5, 5), (4, 4)]]


def _halved(shrink):
    """Return the steps until 1 has shrunk to a half, if each multiplies by 1 - shrink."""
    return math.ceil(math.log(0.5) / math.log(1 - shrink))


EXERCISES = (
    Exercise("ia3.count", "easy", 5, "a whole number", number(
        LAYERS * (2 * KEY_VALUE + INNER),
        near={LAYERS * (2 * HIDDEN + INNER): "This model has fewer key and value heads than query heads: look at the "
                                             "shapes of k_proj and v_proj.",
              2 * KEY_VALUE + INNER: "That is one layer.",
              LAYERS * (2 * KEY_VALUE + HIDDEN): "The feed-forward's scale stands on what enters down_proj, not on "
                                                 "what leaves it.",
              LAYERS * (2 * HIDDEN + HIDDEN): "Keys and values are scaled where they leave their layers, the "
                                              "feed-forward where it enters down_proj."},
        hint="One number for each entry of a key, of a value, and of what enters the feed-forward's last layer.",
        then="pl.count_parameters will agree.")),
    Exercise("ia3.gradient", "medium", 10, "your function", function(
        _gradient, cases=_gradient_cases,
        near={"The sum over the rows is right, but what is summed is G times what l multiplies, x W^T.":
                  lambda x, W, G: G.sum(0),
              "That is the mean over the rows; a gradient adds up.": lambda x, W, G: (G * (x @ W.T)).mean(0)},
        hint="y = l * (x W^T), row by row: what does dy/dl leave of G? Every row has its say.",
        then="One vector, whatever the size of W.")),
    Exercise("ia3.merge", "medium", 10, "your function", function(
        _merge, cases=_merge_cases,
        near={"That scales the rows, which are the outputs; here the inputs are scaled.":
                  lambda W, scale: W * scale[:, None],
              "That adds where it should multiply.": lambda W, scale: W + scale},
        hint="W (l * x) = (W diag(l)) x: which entries of W meet x_j?",
        then="No new layer remains, and the bias stays as it was.")),
    Exercise("ia3.bias", "medium", 5, '"query", "key", "value" or "none"', choice(
        "key", options=("query", "key", "value", "none"),
        remarks={"query": "A query's bias adds a different number to the score of each key, so it changes the weights.",
                 "value": "A value's bias goes straight into the output.",
                 "none": "One of them adds the same number to all scores of a row. What does softmax make of that?"},
        hint="Write a score as (q + b_q)(k + b_k) and see which terms are the same for every key of a row.",
        then="Its gradient is zero but for rounding, and Adam still moves it.")),
    Exercise("ia3.decay", "hard", 10, "a whole number", number(
        _halved(0.01 * 0.1), tolerance=0.002,
        near={500: "That takes the same amount each step; each step takes a share of what is left.",
              _halved(0.1): "The decay of AdamW is multiplied by the learning rate.",
              _halved(0.01): "The weight decay itself is missing from the factor."},
        hint="AdamW first multiplies a parameter by 1 - learning rate x weight decay, whatever the gradient.",
        then="A scale that nobody needs is pulled towards silence: use no weight decay here.")),
)
