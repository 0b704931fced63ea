"""Exercises of the chapter on adapters."""

from peftlab.kit.exercises.grading import Exercise, choice, function, number

# BERT-base: width, blocks; adapters with a reduction factor of 16
D, M, BLOCKS = 768, 48, 12
ONE = 2 * D * M + M + D


def _forward(y, down, b_down, up, b_up, s):
    return y + s * ((y @ down.T + b_down).clamp(min=0) @ up.T + b_up)


def _forward_cases():
    draw = _drawing()
    sizes = [(6, 2, 1.5), (7, 3, 4), (5, 4, 1)]
    return [(draw(2, 5, d), draw(m, d), draw(m), draw(d, m), draw(d), s) for d, m, s in sizes]


def _merge(W, down, up):
    return W + up @ down @ W


def _merge_cases():
    draw = _drawing()
    return [(draw(d, i), draw(m, d), draw(d, m)) for d, i, m in [(6, 6, 2), (5, 5, 3), (4, 4, 1)]]


def _drawing():
    import torch

    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


EXERCISES = (
    Exercise("adapters.count", "easy", 5, "a whole number", number(
        2 * BLOCKS * ONE,
        near={BLOCKS * ONE: "That is one adapter a block; Houlsby's placement has two.",
              2 * ONE: "That is one block.",
              2 * BLOCKS * 2 * D * M: "The two biases are missing: m in the bottleneck, d at its end.",
              2 * BLOCKS * (2 * D * 16 + 16 + D): "16 is the reduction factor, not the width of the bottleneck."},
        hint="The bottleneck is d/16 wide. Down and up have d m weights each, and a bias each; there are two adapters "
             "in each block.",
        then="pl.memory.count says the same, plus the head.")),
    Exercise("adapters.start", "easy", 5, '"down", "up", "both" or "neither"', choice(
        "up", options=("down", "up", "both", "neither"),
        remarks={"down": "The gradient of W_down passes back through W_up, and that is zero at the start.",
                 "both": "The gradient of W_down passes back through W_up, and that is zero at the start.",
                 "neither": "Then nothing would ever be learned. What multiplies the gradient of W_up?"},
        hint="Write both gradients down by the chain rule and put W_up = 0 in.",
        then="As with LoRA's A and B: one rests for a step, then both move.")),
    Exercise("adapters.forward", "medium", 10, "your function", function(
        _forward, cases=_forward_cases,
        near={"The residual is missing: an adapter adds to y.":
                  lambda y, down, b_down, up, b_up, s: s * ((y @ down.T + b_down).clamp(min=0) @ up.T + b_up),
              "The scale also belongs to the bias at the end.":
                  lambda y, down, b_down, up, b_up, s: y + s * (y @ down.T + b_down).clamp(min=0) @ up.T + b_up,
              "The relu is missing: without it the two products are one.":
                  lambda y, down, b_down, up, b_up, s: y + s * ((y @ down.T + b_down) @ up.T + b_up),
              "The scale is missing.": lambda y, down, b_down, up, b_up, s: _forward(y, down, b_down, up, b_up, 1)},
        hint="Down, bias, relu, up, bias, times s, plus y. torch's layers store (out, in), so y meets a transpose.",
        then="That is all of a Houlsby adapter.")),
    Exercise("adapters.merge", "medium", 10, "your function", function(
        _merge, cases=_merge_cases,
        near={"That adapter reads the layer's input; here it reads its output, which is W x.":
                  lambda W, down, up: W + up @ down,
              "The order is turned round: the adapter acts on what W has made.":
                  lambda W, down, up: W + W @ up @ down,
              "The residual is missing.": lambda W, down, up: up @ down @ W},
        hint="Write y = W x into y + up (down y) and collect what stands before x.",
        then="With any nonlinearity between the two products no such matrix exists.")),
    Exercise("adapters.flops", "medium", 10, "a number", number(
        2 * 4 * D * M / (24 * D * D), tolerance=0.01,
        near={4 * D * M / (24 * D * D): "That is one adapter a block; Houlsby's placement has two.",
              2 * 2 * D * M / (24 * D * D): "A product of d by m costs two operations an entry, and there are two "
                                            "products in an adapter.",
              100 * 2 * 4 * D * M / (24 * D * D): "That is in percent; the share itself is asked for."},
        hint="An adapter has 2 d m weights; a weight costs a multiplication and an addition for each token. The block "
             "has 12 d squared weights.",
        then="How much time that is depends on how quickly the machine starts small operations.")),
)
