"""Exercises of the chapter on IA3 and BitFit."""

import math

from peftlab.kit.exercises.grading import Exercise, choice, function, number

# smollm2-135m: hidden width, key/value width (3 heads of 64), inner width, layers
HIDDEN, KEY_VALUE, INNER, LAYERS = 576, 192, 1536, 30


BERT = 768  # the width of bert-base
MOVED = 12  # of 64 scales


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
    Exercise("ia3.biases", "easy", 5, "a whole number", number(
        11 * BERT,
        near={9 * BERT: "The two norms are missing: each has a bias as wide as the model.",
              10 * BERT: "There are two norms, one behind attention and one behind the feed-forward part.",
              8 * BERT: "The first layer of the feed-forward part has four times as many outputs as the model is "
                        "wide, and each output has a bias.",
              7 * BERT: "Attention has four layers: queries, keys, values, and a last one that mixes the heads.",
              12 * 11 * BERT: "That is the whole model of twelve blocks. One block is asked for."},
        hint="A layer with n outputs has n biases. Go through attention, the feed-forward part and the norms.",
        then="BitFit trains these, in each block.")),
    Exercise("ia3.gradient", "medium", 10, "your function", function(
        _gradient, cases=_gradient_cases,
        near={"The sum over the rows is right, but what is summed is G times what l multiplies, x W^T.":
                  lambda x, W, G: G.sum(0),
              "That is the mean over the rows; a gradient adds up.": lambda x, W, G: (G * (x @ W.T)).mean(0)},
        hint="One row gives y_i = l_i (W x)_i. Differentiate by l_i, multiply by G_i, and add up all rows.",
        then="It is one vector, as long as the output is wide.")),
    Exercise("ia3.merge", "medium", 10, "your function", function(
        _merge, cases=_merge_cases,
        near={"That scales the rows, which are the outputs; here the inputs are scaled.":
                  lambda W, scale: W * scale[:, None],
              "That adds where it should multiply.": lambda W, scale: W + scale},
        hint="W (l * x) = (W diag(l)) x: which entries of W meet x_j?",
        then="No new layer remains, and the bias stays as it was.")),
    Exercise("ia3.bias", "medium", 5, '"query", "key", "value" or "none"', choice(
        "key", options=("query", "key", "value", "none"),
        remarks={"query": "A query's bias adds a different number to the score of each key, so it changes the shares.",
                 "value": "A value's bias goes straight into the output.",
                 "none": "One of them adds the same number to all scores of a row. What does softmax make of that?"},
        hint="Write a score as (q + b_q)(k + b_k). Which terms are the same for every key of a row?",
        then="Its gradient is only rounding, far below the epsilon in Adam's divisor, so it hardly moves.")),
    Exercise("ia3.rotary", "medium", 5, '"bert", "gpt2", "qwen2.5" or "llama"', choice(
        "qwen2.5", options=("bert", "gpt2", "qwen2.5", "llama"),
        remarks={"bert": "BERT adds its positions to the embeddings. So the key's bias adds the same number to all "
                         "scores of a row, and softmax does not see it.",
                 "gpt2": "GPT-2 adds its positions to the embeddings, as BERT does. Softmax does not see the key's "
                         "bias there.",
                 "llama": "Llama has rotary positions, but its keys have no bias."},
        hint="Two things are needed: a bias on the keys, and positions that turn queries and keys.",
        then="Its keys have biases, and rotary positions turn them by an angle that differs from key to key.")),
    Exercise("ia3.rank", "medium", 5, "a whole number", number(
        MOVED,
        near={64: "A scale that is still one changes nothing in its row.",
              1: "Each scale changes its own row by its own factor, and the rows of W point in different directions.",
              64 - MOVED: "Those are the rows that stay as they were."},
        hint="The change is diag(l - 1) W. How many of its rows are not zero, and can one be made from the others?",
        then="LoRA would need as large an r for a change of this rank.")),
    Exercise("ia3.decay", "hard", 10, "a whole number", number(
        _halved(0.01 * 0.1), tolerance=0.002,
        near={500: "That takes the same amount each step; each step takes a share of what is left.",
              _halved(0.1): "The decay of AdamW is multiplied by the learning rate.",
              _halved(0.01): "The weight decay itself is missing from the factor."},
        hint="AdamW first multiplies a parameter by 1 - learning rate x weight decay, whatever the gradient.",
        then="A scale that nobody needs is pulled towards silence: use no weight decay here.")),
)
