"""Exercises of the chapter on the LoRA family."""

import math

from peftlab.kit.exercises.grading import Exercise, choice, function, number

BLOCKS, WIDTH, VALUES = 30, 576, 192  # of the book's model: its blocks, and the outputs of the query and the value
LORA_R, VERA_R = 8, 256
LORA = BLOCKS * LORA_R * (2 * WIDTH + WIDTH + VALUES)  # LoRA on query and value
RIGHT, OTHER, ASKED = 631, 677, 1319  # two published runs: LoRA of rank 32, and rsLoRA of rank 64
RATE, ROOT_R = 0.01, 64


def _dora(W, A, B, m, s):
    V = W + s * B @ A
    return m[:, None] * V / V.norm(dim=1, keepdim=True)


def _direction(v, m, g):
    u = v / v.norm()
    return (m / v.norm()) * (g - u * (g @ u))


def _budget(step, first, last, steps, start, end):
    z = min(max((step - first) / (steps - first - last), 0), 1)
    return end + (start - end) * (1 - z) ** 3


def _score(P, L, Q, of_P, of_L, of_Q):
    return (L * of_L).abs() + (P * of_P).abs().mean(0) + (Q * of_Q).abs().mean(1)


def _convert(A, B, A0, B0):
    import torch

    return torch.cat([A, A0]), torch.cat([B, -B0], dim=1)


def _cayley(S):
    import torch

    one = torch.eye(len(S), dtype=S.dtype)
    return (one + S) @ torch.linalg.inv(one - S)


def _tensors(*shapes, cases=3):
    import torch

    generator = torch.Generator().manual_seed(2)
    return [tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
            for _ in range(cases)]


def _change(convert):
    """The change of the weight that the converted pair stands for: a pair may be written in many ways."""
    def change(A, B, A0, B0):
        new_A, new_B = convert(A, B, A0, B0)
        return new_B @ new_A

    return change


def _converted(answer):
    grader = function(
        _change(_convert), cases=lambda: _tensors((3, 7), (5, 3), (3, 7), (5, 3)),
        near={"That is the finished product. On the published weight the first product must be taken away.":
                  lambda A, B, A0, B0: B @ A,
              "The first product must be subtracted, not added.": lambda A, B, A0, B0: B @ A + B0 @ A0,
              "(B - B0)(A - A0) is another matrix: it has mixed terms.":
                  lambda A, B, A0, B0: (B - B0) @ (A - A0)},
        hint="Put the two products beside each other: the rows of A above those of A0, the columns of B before those "
             "of -B0.",
        then="Twice the rank, and any tool that knows LoRA can load it.")  # fmt: skip
    return grader(_change(answer) if callable(answer) else answer)


EXERCISES = (
    Exercise("family.dora_count", "easy", 5, "a whole number", number(
        LORA + BLOCKS * (WIDTH + VALUES),
        near={LORA: "That is LoRA. DoRA trains the magnitudes too.",
              LORA + BLOCKS * 2 * WIDTH: "The magnitude has one number for each row of the weight, so for each output. "
                                         "The value projection has 192.",
              BLOCKS * (WIDTH + VALUES): "Those are the magnitudes alone."},
        hint="LoRA trains r numbers for each input and output of a layer. DoRA adds one for each output.",
        then="The magnitudes are 5% more.")),
    Exercise("family.vera_count", "easy", 5, "a whole number", number(
        BLOCKS * (WIDTH + VALUES + 2 * VERA_R),
        near={BLOCKS * (WIDTH + VALUES + VERA_R): "Each layer has its own d, also the second one of a block.",
              BLOCKS * 2 * (WIDTH + VERA_R): "b has one number for each output. The value projection has 192.",
              BLOCKS * VERA_R * (3 * WIDTH + VALUES): "That is LoRA of this rank. VeRA's matrices do not train."},
        hint="Each layer trains b, one number for each output, and d, one for each rank.",
        then="A twelfth of LoRA's of rank 8.")),
    Exercise("family.dora", "medium", 10, "your function", function(
        _dora, cases=lambda: _tensors((5, 7), (2, 7), (5, 2), (5,), ()),
        near={"s is missing in front of B A.": lambda W, A, B, m, s: _dora(W, A, B, m, 1.0),
              "That divides by the lengths of the frozen rows. Divide by those of W + s B A.":
                  lambda W, A, B, m, s: m[:, None] * (W + s * B @ A) / W.norm(dim=1, keepdim=True),
              "That divides the whole matrix by one number. Each row has a length of its own.":
                  lambda W, A, B, m, s: m[:, None] * (W + s * B @ A) / (W + s * B @ A).norm()},
        hint="Make V = W + s B A. Divide each row by its length, and multiply it by its number in m.",
        then="The rows of the result have the lengths m, whatever A and B are.")),
    Exercise("family.direction", "hard", 15, "your function", function(
        _direction, cases=lambda: [(v, m, g) for v, m, g in _tensors((6,), (), (6,))],
        near={"That is the detached form, which takes the length for a constant.":
                  lambda v, m, g: (m / v.norm()) * g,
              "u must have length 1: divide v by its length.":
                  lambda v, m, g: (m / v.norm()) * (g - v * (g @ v)),
              "The factor m / |v| is missing.": lambda v, m, g: (v.norm() / m) * _direction(v, m, g)},
        hint="Take out of g what lies along v, and multiply by m over the length of v.",
        then="Its product with v is zero: to first order a step does not change the length of v.")),
    Exercise("family.budget", "medium", 10, "your function", function(
        _budget, cases=lambda: [(step, 10, 20, 100, 24.0, 12.0) for step in (0, 10, 45, 70, 80, 100)],
        near={"After the middle part the budget stays at its end.":
                  lambda step, first, last, steps, start, end: start if step < first else
                  end + (start - end) * (1 - (step - first) / (steps - first - last)) ** 3,
              "That falls in a straight line. The cube makes it fall fast first.":
                  lambda step, first, last, steps, start, end: end + (start - end)
                  * (1 - min(max((step - first) / (steps - first - last), 0), 1))},
        hint="z is the share of the middle part that has passed, from 0 to 1. Keep it within these bounds.",
        then="Half way through the middle part seven eighths of the surplus are gone.")),
    Exercise("family.score", "medium", 10, "your function", function(
        _score, cases=lambda: _tensors((6, 3), (3,), (3, 4), (6, 3), (3,), (3, 4)),
        near={"Take the means of the entries of P and Q, not their sums.":
                  lambda P, L, Q, of_P, of_L, of_Q:
                  (L * of_L).abs() + (P * of_P).abs().sum(0) + (Q * of_Q).abs().sum(1),
              "Without absolute values, scores of both signs cancel.":
                  lambda P, L, Q, of_P, of_L, of_Q: L * of_L + (P * of_P).mean(0) + (Q * of_Q).mean(1),
              "That is the score of lambda alone.": lambda P, L, Q, of_P, of_L, of_Q: (L * of_L).abs()},
        hint="A number's score is its size times that of its gradient. Columns of P and rows of Q belong to a piece.",
        then="The package also multiplies by how far the scores jump.")),
    Exercise("family.rate", "medium", 5, "a number", number(
        RATE / math.sqrt(ROOT_R), tolerance=0.001,
        near={RATE * math.sqrt(ROOT_R): "rsLoRA's update is larger, so its rate must be smaller.",
              RATE / ROOT_R: "The two scalings differ by the root of r, not by r.",
              RATE: "At one alpha rsLoRA's update is larger than LoRA's."},
        hint="How many times as large is alpha over the root of r as alpha over r? The first update grows with both "
             "the scaling and the rate.",
        then="At rank 64 a rate that is right for one is eight times wrong for the other.")),
    Exercise("family.window", "easy", 5, "a share", number(
        16 / 4096, tolerance=0.001,
        near={16 * 2 / 4096: "Only A looks at the inputs. B is zero.",
              (16 / 4096) ** 2: "One side of the gradient is cut, not two.",
              4: "That is how many thousandths it is, or so. Divide by the width."},
        hint="A random window has r of the directions that the inputs have.",
        then="The rest of the gradient is not lost. A turns in the steps that follow.")),
    Exercise("family.loha", "easy", 5, "a whole number", number(
        16, near={4: "That is one of the two products.",
                  8: "The pieces of the two products meet in all pairs, they do not add up.",
                  576: "So high it can only be if r times r is that large."},
        hint="How many pieces has each product? Each piece of the one meets each piece of the other.",
        then="With the parameters of a LoRA of rank 8.")),
    Exercise("family.convert", "medium", 10, "your function", _converted),
    Exercise("family.cayley", "medium", 10, "your function", function(
        _cayley, cases=lambda: [(0.3 * (S - S.T),) for (S,) in _tensors((5, 5))],
        near={"That is the inverse rotation: the signs are exchanged.": lambda S: _cayley(-S),
              "I + S alone is a rotation only to first order. Divide by I - S.":
                  lambda S: _cayley(S) - _cayley(S) @ S},
        hint="(I + S) times the inverse of (I - S), where I has ones on its diagonal.",
        then="Its transpose is its inverse.")),
    Exercise("family.errors", "medium", 10, "a number of errors, such as 3.5", number(
        (OTHER - RIGHT) / ASKED / math.hypot(*(math.sqrt(k / ASKED * (1 - k / ASKED) / ASKED)
                                               for k in (RIGHT, OTHER))),
        tolerance=0.02,
        near={(OTHER - RIGHT) / ASKED / math.sqrt(RIGHT / ASKED * (1 - RIGHT / ASKED) / ASKED):
                  "Both scores scatter. The error of their difference is larger than that of one."},
        hint="Compute both shares and the binomial error of each. Squares of errors add; take the root of their sum.",
        then="Below two. And it is the second best of 63 runs, which were not chosen beforehand.")),
    Exercise("family.serve", "easy", 5, '"dora", "rslora", "vera" or "oft"', choice(
        "rslora", options=("dora", "rslora", "vera", "oft"),
        remarks={"dora": "It has a magnitude, which plain LoRA has no place for.",
                 "vera": "It has vectors and shared matrices. You could multiply them out first.",
                 "oft": "A rotation of the weight is no thin product."},
        hint="Which of them is, at the end, a product of two thin matrices times a number?",
        then="Write alpha times the root of r as alpha, and use_rslora is not needed.")),
)  # fmt: skip
