"""Exercises of the LoRA chapter."""

import math

from peftlab.kit.exercises.grading import Exercise, choice, function, number

# smollm2-135m: hidden width, key/value width (3 of 9 heads of 64), layers
HIDDEN, KEY_VALUE, LAYERS = 576, 192, 30


def _count(r, widths=(HIDDEN, KEY_VALUE, KEY_VALUE, HIDDEN), layers=LAYERS):
    """Return the sum over the layers of r (d_in + d_out) for q, k, v and o."""
    return layers * sum(r * (HIDDEN + width) for width in widths)


def _forward(x, W, A, B, alpha, r):
    return x @ W.T + (alpha / r) * (x @ A.T) @ B.T


def _forward_cases():
    import torch

    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return [(draw(2, 5, d_in), draw(d_out, d_in), draw(r, d_in), draw(d_out, r), alpha, r)
            for d_in, d_out, r, alpha in [(6, 10, 2, 8), (8, 8, 4, 3), (7, 3, 1, 16)]]


def _merge(W, A, B, alpha, r):
    return W + (alpha / r) * B @ A


def _merge_cases():
    return [arguments[1:] for arguments in _forward_cases()]


def _gradient(x, A, B, s, G):
    return s * (G @ B).T @ x


def _gradient_cases():
    return [(x.reshape(-1, x.shape[-1]), A, B, alpha / r, x.reshape(-1, x.shape[-1]) @ W.T)
            for x, W, A, B, alpha, r in _forward_cases()]


def _first_update(r=16, alpha=32, width=768, rate=0.001):
    """Return the root mean square of s B A after Adam's first step: s sqrt(r / (3 d_in)) eta."""
    return alpha / r * math.sqrt(r / (3 * width)) * rate


def _rank_for(values, share):
    """Return the smallest r with s_1^2 + ... + s_r^2 >= share of the whole sum."""
    return _first(values, share, lambda s: s * s)


def _first(values, share, weigh):
    weights = [weigh(float(value)) for value in values]
    total, sofar = math.fsum(weights), 0.0
    for r, weight in enumerate(weights, 1):
        sofar += weight
        if sofar >= share * total:
            return r
    return len(weights)


def _rank_cases():
    import torch

    halving = torch.tensor([2.0 ** -(i / 2) for i in range(20)], dtype=torch.float64)
    slow = torch.tensor([1 / (1 + i) for i in range(50)], dtype=torch.float64)
    flat = torch.ones(10, dtype=torch.float64)
    return [(halving, 0.9), (slow, 0.9), (slow, 0.5), (flat, 0.55)]


EXERCISES = (
    Exercise("lora.count", "easy", 5, "a whole number", number(
        _count(16),
        near={_count(16, (HIDDEN,) * 4): "This model has fewer key and value heads than query heads: look at the "
                                         "shapes of k_proj and v_proj.",
              _count(16, layers=1): "That is one layer.",
              _count(16, (HIDDEN, KEY_VALUE)): "That is q and v only; k and o are asked for too.",
              _count(8): "That is r = 8.",
              LAYERS * 16 * HIDDEN * 4: "That is A alone; B has parameters too.",
              LAYERS * 16 * 2 * (HIDDEN + KEY_VALUE): "That is B alone; A has parameters too.",
              LAYERS * 2 * (HIDDEN * HIDDEN + HIDDEN * KEY_VALUE): "Those are the frozen weights of the four layers. "
                                                                   "LoRA trains r (d_in + d_out) numbers for each."},
        hint="One matrix of shape (d_out, d_in) gets r (d_in + d_out) parameters. Add the four of a layer, then count "
             "the layers.",
        then="pl.count_parameters will agree.")),
    Exercise("lora.first_step", "easy", 5, '"A", "B", "both" or "neither"', choice(
        "B", options=("A", "B", "both", "neither"),
        remarks={"A": "The gradient of A carries a factor B, and B is zero at the start.",
                 "both": "The gradient of A carries a factor B, and B is zero at the start.",
                 "neither": "Then nothing would ever be learned. Which factors does the gradient of B have?"},
        hint="Write both gradients down and put B = 0 in.",
        then="From the second step on, both move.")),
    Exercise("lora.forward", "medium", 10, "your function", function(
        _forward, cases=_forward_cases,
        near={"The scale alpha/r is missing.": lambda x, W, A, B, alpha, r: x @ W.T + x @ A.T @ B.T,
              "You scaled by alpha; it should be alpha/r.":
                  lambda x, W, A, B, alpha, r: x @ W.T + alpha * x @ A.T @ B.T,
              "You scaled by r/alpha, which is upside down. Try alpha = 8 and r = 2: the second path should count 4 "
              "times, and yours counts a quarter.":
                  lambda x, W, A, B, alpha, r: x @ W.T + r / alpha * x @ A.T @ B.T,
              "That is alpha divided by the square root of r, as in rsLoRA.":
                  lambda x, W, A, B, alpha, r: x @ W.T + alpha / math.sqrt(r) * x @ A.T @ B.T,
              "That is the low-rank path alone; the frozen path is missing.":
                  lambda x, W, A, B, alpha, r: alpha / r * x @ A.T @ B.T,
              "The frozen path must not be scaled.":
                  lambda x, W, A, B, alpha, r: alpha / r * (x @ W.T + x @ A.T @ B.T)},
        hint="Two paths, summed: x goes through W, and through A and then B, times alpha/r. torch's layers store "
             "(out, in), so x meets a transpose.",
        then="The matrix BA was never formed.")),
    Exercise("lora.merge", "medium", 10, "your function", function(
        _merge, cases=_merge_cases,
        near={"W + BA forgets the scale.": lambda W, A, B, alpha, r: W + B @ A,
              "You scaled by alpha; it should be alpha/r.": lambda W, A, B, alpha, r: W + alpha * B @ A,
              "You scaled by r/alpha, which is upside down. Try alpha = 8 and r = 2: BA should be added 4 times, and "
              "yours adds a quarter of it.": lambda W, A, B, alpha, r: W + r / alpha * B @ A,
              "That takes the update away: the sign is that of unmerging.":
                  lambda W, A, B, alpha, r: W - alpha / r * B @ A},
        hint="The merged weight W' must give x W'^T = x W^T + (alpha/r) x A^T B^T for every x.",
        then="One matrix, no extra cost at inference.")),
    Exercise("lora.gradient", "medium", 10, "your function", function(
        _gradient, cases=_gradient_cases,
        near={"The scaling s is missing: the second path is s H B^T.": lambda x, A, B, s, G: (G @ B).T @ x,
              "That is the gradient of B. For A, pass the gradient back through B first.":
                  lambda x, A, B, s, G: s * G.T @ (x @ A.T),
              "That has the shape of A transposed: the gradient of a matrix has the shape of that matrix.":
                  lambda x, A, B, s, G: s * x.T @ (G @ B),
              "That is the gradient of H, the middle numbers. One product with x is still missing.":
                  lambda x, A, B, s, G: s * G @ B},
        hint="The rule for Y = X M^T is dL/dM = (dL/dY)^T X and dL/dX = (dL/dY) M. Use it on s H B^T to get dL/dH, "
             "then on H = x A^T.",
        then="With B = 0 it is zero, which is why A waits for one step.")),
    Exercise("lora.first_update", "medium", 5, "a number", number(
        _first_update(), tolerance=0.005,
        near={_first_update() / 2: "The scaling s = alpha/r is missing.",
              _first_update() / 4: "You scaled by r/alpha. Try alpha = 8 and r = 2: s should be 4, not a quarter.",
              _first_update() * math.sqrt(3): "A uniform number between -c and c has variance c^2/3, not c^2.",
              _first_update() * 4: "You added the r terms as if all had the same sign. The variances add, so the size "
                                   "grows with the square root of r.",
              _first_update() * 1000: "The learning rate is missing: every entry of B moves by it.",
              2 * 16 / (3 * 768) * 0.001: "That is the variance's share. Take its square root."},
        hint="An entry of s B A is s times a sum of r terms, each the learning rate times an entry of A, with variance "
             "1/(3 d_in).",
        then="That is about a sixth of the learning rate, so LoRA can afford a larger one.")),
    Exercise("lora.alpha", "medium", 5, "a number", number(
        16 / math.sqrt(64) * 64, tolerance=1e-6,
        near={16 / math.sqrt(64): "That is the scale itself. Which alpha gives this scale when it is divided by r?",
              16.0: "With the same alpha the two scales differ by a factor of sqrt(r).",
              16 * 64: "You multiplied by r. Divide by sqrt(r) first."},
        hint="Set alpha'/r equal to alpha/sqrt(r) and solve for alpha'.",
        then="The two conventions differ by a factor of sqrt(r) in alpha.")),
    Exercise("lora.upper_half", "hard", 10, "a number in percent", number(
        50.0, tolerance=0.002,
        near={200 / 3: "That is LoRA in all blocks. The gradient need not go below the lowest adapter.",
              67.0: "That is LoRA in all blocks. The gradient need not go below the lowest adapter.",
              75.0: "That is LoRA in all blocks with checkpointing.",
              100 / 3: "That is the forward pass alone. The upper half still passes the gradient back.",
              100 / 6: "The forward pass goes through all blocks, the lower ones too.",
              500 / 6: "The frozen weights of the upper half have no gradient of their own.",
              1 / 2: "Give it in percent."},
        hint="Full fine-tuning has three products per layer: forward, the gradient passed on, the weight's own "
             "gradient. Which of them does each half of the blocks still need?",
        then="Below the lowest adapter, nothing needs a gradient.")),
    Exercise("lora.rank", "hard", 15, "your function", function(
        _rank_for, cases=_rank_cases,
        near={"You summed the singular values; the energy is the sum of their squares.":
                  lambda values, share: _first(values, share, lambda s: s),
              "Off by one: an index counts from 0, a rank from 1.":
                  lambda values, share: _rank_for(values, share) - 1},
        hint="The squared Frobenius norm of a matrix is the sum of its squared singular values. Add them up, largest "
             "first, until the share is reached; count how many it took.",
        then="Eckart and Young: no other matrix of that rank does better.")),
)
