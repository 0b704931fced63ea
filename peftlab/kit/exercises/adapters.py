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


def _parallel(x, h, down, up):
    return h + x + (x @ down.T).clamp(min=0) @ up.T


def _parallel_cases():
    draw = _drawing()
    return [(draw(3, d), draw(3, d), draw(m, d), draw(d, m)) for d, m in [(6, 2), (5, 3), (4, 4)]]


def _gradient(x, g, down, up):
    slope = (down @ x > 0).to(x.dtype)
    return (slope * (up.T @ g))[:, None] * x


def _gradient_cases():
    draw = _drawing()
    return [(draw(d), draw(d), draw(m, d), draw(d, m)) for d, m in [(6, 4), (5, 3), (7, 5)]]


def _drawing():
    import torch

    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


EXERCISES = (
    Exercise("adapters.count", "easy", 5, "a whole number", number(
        2 * BLOCKS * ONE,
        near={BLOCKS * ONE: "That is one adapter per block; Houlsby's placement has two.",
              2 * ONE: "That is one block.",
              2 * BLOCKS * 2 * D * M: "The two biases are missing: m in the bottleneck, d at its end.",
              2 * BLOCKS * (2 * D * 16 + 16 + D): "16 is the reduction factor, not the width of the bottleneck."},
        hint="The bottleneck is d/16 wide. Down and up have d m weights each, and a bias each; there are two adapters "
             "in each block.",
        then="pl.memory.count(...).added is the same number; its .trainable counts the head, too.")),
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
        near={4 * D * M / (24 * D * D): "That is one adapter per block; Houlsby's placement has two.",
              2 * 2 * D * M / (24 * D * D): "A product of d by m costs two operations per entry, and there are two "
                                            "products in an adapter.",
              100 * 2 * 4 * D * M / (24 * D * D): "That is in percent; the share itself is asked for."},
        hint="An adapter has 2 d m weights; a weight costs a multiplication and an addition for each token. The block "
             "has 12 d squared weights.",
        then="How much time that is depends on how quickly the machine starts small operations.")),
    Exercise("adapters.launches", "easy", 5, "a number of milliseconds", number(
        32 * 4 * 0.09, tolerance=0.001,
        near={4 * 0.09: "That is one block; the model has 32.",
              32 * 2 * 0.09: "Houlsby's placement has two adapters in each block, and each adapter has two products.",
              32 * 0.09: "That is one product per block; two adapters with two products each make four.",
              32 * 4 * 90: "That is in microseconds; a millisecond has 1,000 of them."},
        hint="Count the products of one block: two adapters, and two products in each. Multiply by the blocks and by "
             "0.09 milliseconds.",
        then="It does not depend on the width of the adapter, nor on the number of tokens while they are few.")),
    Exercise("adapters.parallel", "medium", 10, "your function", function(
        _parallel, cases=_parallel_cases,
        near={"That adapter reads h, what the feed-forward made: it is Houlsby's. A parallel one reads x.":
                  lambda x, h, down, up: h + x + (h @ down.T).clamp(min=0) @ up.T,
              "The stream's own x is missing: BERT adds it to h before the norm.":
                  lambda x, h, down, up: h + (x @ down.T).clamp(min=0) @ up.T,
              "That adapter reads the sum x + h: it stands after the addition, not beside the feed-forward.":
                  lambda x, h, down, up: h + x + ((h + x) @ down.T).clamp(min=0) @ up.T,
              "What the feed-forward made, h, is missing.":
                  lambda x, h, down, up: x + (x @ down.T).clamp(min=0) @ up.T,
              "The relu is missing: without it the adapter is one matrix of low rank.":
                  lambda x, h, down, up: h + x + x @ down.T @ up.T},
        hint="Three terms are added: what the feed-forward made, the stream, and a(x).",
        then="The norm of BERT reads this sum.")),
    Exercise("adapters.budget", "medium", 10, "a whole number", number(
        (8_388_608 // 32 - 4096) // (2 * 4096 + 1),
        near={8_388_608 // 32 // (2 * 4096): "With 32 the two biases, m + d numbers, no longer fit into the budget.",
              (8_388_608 // 64 - 4096) // (2 * 4096 + 1): "That is Houlsby's placement; Pfeiffer's has one adapter "
                                                          "per block.",
              (8_388_608 - 4096) // (2 * 4096 + 1): "That spends the whole budget in one block; there are 32.",
              256: "That is the width at a reduction factor of 16. It needs eight times the budget."},
        hint="Divide the budget by the number of blocks. Then find the largest whole m with 2 d m + m + d no greater "
             "than that.",
        then="LoRA has two pairs of rank 16 per block; the adapter is about as wide as both ranks together.")),
    Exercise("adapters.gradient", "hard", 15, "your function", function(
        _gradient, cases=_gradient_cases,
        near={"The slope of relu is missing: where down @ x is below zero, nothing passes, and no gradient comes back.":
                  lambda x, g, down, up: (up.T @ g)[:, None] * x,
              "That is the gradient of W_up, g times v transposed.":
                  lambda x, g, down, up: g[:, None] * (down @ x).clamp(min=0),
              "The rows and columns are exchanged: W_down is m x d, and so is its gradient.":
                  lambda x, g, down, up: _gradient(x, g, down, up).T,
              "That multiplies by relu's value; the chain rule needs its slope, 1 or 0.":
                  lambda x, g, down, up: ((down @ x).clamp(min=0) * (up.T @ g))[:, None] * x},
        hint="u = down @ x. The slope is 1 where u is above zero, and 0 elsewhere. Multiply it entry by entry with "
             "up.T @ g, then take the outer product with x.",
        then="With up = 0 it is zero, whatever x and g are: that is why W_down rests for a step.")),
)
