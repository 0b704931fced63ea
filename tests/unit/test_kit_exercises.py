"""Exercises: right answers pass, the usual mistakes get their remark, and no message gives the answer away."""

import math
import operator
import re
import statistics
from pathlib import Path

import nbformat
import pytest
import torch

from peftlab.errors import PeftLabError
from peftlab.kit import exercises
from peftlab.kit.exercises import grading

BOOK = Path(__file__).resolve().parents[2] / "book"
TOPICS = exercises._topics()
EVERY = [exercise for topic in TOPICS for exercise in exercises.exercises(topic)]


def energy_rank(values, share):
    return int(((values**2).cumsum(0) < share * (values**2).sum()).sum()) + 1


def gate_as_a_sigmoid(q, P, K):
    return torch.sigmoid((P @ q / len(q) ** 0.5).logsumexp(0) - (K @ q / len(q) ** 0.5).logsumexp(0))


# Answers worked out apart from the code that grades: (right, nearly right, wrong)
def gradient_by_autograd(x, g, down, up):
    down = down.clone().requires_grad_()
    (up @ torch.relu(down @ x)).backward(g)
    return down.grad


def same_example_mask(positions):
    """Row by row: a token sees what lies between its example's start and itself."""
    places = range(len(positions))
    start = [max(j for j in places if j <= i and positions[j] == 0) for i in places]
    return torch.tensor([[start[i] <= j <= i for j in places] for i in places])


def direction_by_autograd(v, m, g):
    v = v.clone().requires_grad_()
    (m * v / v.norm()).backward(g)
    return v.grad


def by_pieces(P, L, Q, of_P, of_L, of_Q):
    """Piece by piece: its number, and the means over its column of P and its row of Q."""
    return torch.stack([abs(L[i] * of_L[i]) + (P[:, i] * of_P[:, i]).abs().mean() + (Q[i] * of_Q[i]).abs().mean()
                        for i in range(len(L))])


def gain_item_by_item(first, second):
    """The mean gain and two of its errors, from one number per item."""
    gains = [float(b) - float(a) for a, b in zip(first, second, strict=True)]
    return statistics.fmean(gains), 2 * statistics.pstdev(gains) / math.sqrt(len(gains))


ANSWERS = {
    "choosing.interval": (0.07332, 0.03666, 7),
    "choosing.items": (1600, 400, 7),
    "choosing.pick": (lambda validation, test: min(zip(validation, test, strict=True))[1],
                      lambda validation, test: max(test), lambda validation, test: 7.0),
    "choosing.edge": ("go on", None, "take it"),
    "choosing.many": (0.6415, 1.0, 0.3),
    "choosing.paired": (
        gain_item_by_item,
        lambda a, b: (b.double().mean() - a.double().mean(), 2 * math.sqrt(
            (a.double().var(unbiased=False) + b.double().var(unbiased=False)) / len(a))),
        lambda a, b: (0.0, 1.0),
    ),
    "choosing.f1": (lambda hits, alarms, missed: 2 / ((hits + alarms) / hits + (hits + missed) / hits),
                    lambda hits, alarms, missed: hits / (hits + alarms), lambda hits, alarms, missed: 0.0),
    "choosing.bits": (0.7213, 0.5, 7),
    "choosing.capacity": (5, 4, 7),
    "choosing.cost": (20, 2.5, 7),
    "choosing.mcnemar": (0.030884, 0.015442, 7),
    "choosing.order": (0.52, 0.66, 7),
    "choosing.holm": (0.08, 0.004, 7),
    "choosing.fair": ("own rates", None, "one rate"),
    "family.dora_count": (483_840, 460_800, 7),
    "family.vera_count": (38_400, 30_720, 7),
    "family.dora": (
        lambda W, A, B, m, s: torch.diag(m) @ torch.nn.functional.normalize(W + s * B @ A, dim=1),
        lambda W, A, B, m, s: torch.diag(m) @ torch.nn.functional.normalize(W + B @ A, dim=1),
        lambda W, A, B, m, s: W,
    ),
    "family.direction": (direction_by_autograd, lambda v, m, g: m * g / v.norm(), lambda v, m, g: g),
    "family.budget": (
        lambda step, first, last, steps, start, end: end + (start - end)
        * (1 - max(0, min(step, steps - last) - first) / (steps - first - last)) ** 3,
        lambda step, first, last, steps, start, end: end + (start - end)
        * (1 - max(0, min(step, steps - last) - first) / (steps - first - last)),
        lambda step, first, last, steps, start, end: start,
    ),
    "family.score": (by_pieces, lambda P, L, Q, of_P, of_L, of_Q: (L * of_L).abs(), lambda P, L, Q, *gradients: L),
    "family.rate": (0.00125, 0.08, 1.0),
    "family.window": (0.00390625, 0.0078125, 0.5),
    "family.loha": (16, 8, 7),
    "family.convert": (lambda A, B, A0, B0: (torch.vstack([A0, A]), torch.hstack([-B0, B])),
                       lambda A, B, A0, B0: (torch.vstack([A0, A]), torch.hstack([B0, B])),
                       lambda A, B, A0, B0: (A, 3 * B)),
    "family.cayley": (lambda S: torch.linalg.solve((torch.eye(len(S)) - S).T, (torch.eye(len(S)) + S).T).T,
                      lambda S: torch.linalg.inv(torch.eye(len(S)) + S) @ (torch.eye(len(S)) - S), lambda S: S),
    "family.errors": (1.7936, 2.5346, 7),
    "family.serve": ("rslora", None, "oft"),
    "recipes.steps": (375, 3000, 11),
    "recipes.labels": (lambda prompt, answer, end: [-100 for _ in prompt] + answer + [end],
                       lambda prompt, answer, end: [-100] * len(prompt) + answer, lambda prompt, answer, end: []),
    "recipes.accumulate": (1.1, 1.5, 7.0),
    "recipes.padding": (0.6, 0.4, 0.9),
    "recipes.perplexity": (lambda sums, counts: 2.718281828459045 ** (sum(sums) / sum(counts)),
                           lambda sums, counts: math.exp(statistics.fmean(map(operator.truediv, sums, counts))),
                           lambda sums, counts: 1.0),
    "recipes.mask": (same_example_mask, lambda positions: torch.ones(2 * positions.shape).tril() > 0,
                     lambda positions: torch.zeros(2 * positions.shape).bool()),
    "recipes.half": (0.00048828125, 0.0009765625, 0.1),
    "recipes.dpo": (
        lambda c, r, cb, rb, beta: torch.log1p(torch.exp(-beta * (c - r - cb + rb))),
        lambda c, r, cb, rb, beta: torch.log1p(torch.exp(-beta * (c - r))),
        lambda c, r, cb, rb, beta: c,
    ),
    "recipes.baseline": (
        lambda rewards: torch.stack([r - torch.cat([rewards[:i], rewards[i + 1 :]]).mean()
                                     for i, r in enumerate(rewards)]),
        lambda rewards: rewards - rewards.mean(), lambda rewards: 0 * rewards,
    ),
    "recipes.reference": ("disabled", None, "copy"),
    "recipes.products": (8.192e12, 12.288e12, 5.0),
    "recipes.decay": (0.9048, 0.9, 0.5),
    "recipes.floor": (0.1333, 0.2857, 0.5),
    "lora.count": (1_843_200, 61_440, 7),
    "lora.first_step": ("b", None, "A"),
    "lora.forward": (lambda x, W, A, B, alpha, r: x @ (W + alpha / r * B @ A).T,
                     lambda x, W, A, B, alpha, r: x @ (W + B @ A).T,
                     lambda x, W, A, B, alpha, r: 2 * x @ W.T),
    "lora.merge": (lambda W, A, B, alpha, r: torch.add(W, B @ A, alpha=alpha / r),
                   lambda W, A, B, alpha, r: W + alpha * B @ A, lambda W, A, B, alpha, r: W),
    "lora.gradient": (lambda x, A, B, s, G: s * torch.einsum("no,oj,ni->ji", G, B, x),
                      lambda x, A, B, s, G: (G @ B).T @ x, lambda x, A, B, s, G: A),
    "lora.first_update": (1.6667e-4, 8.3333e-5, 1.0),
    "lora.alpha": (16 * math.sqrt(64), 2.0, 3),
    "lora.upper_half": (50, 75.0, 90),
    "qlora.bits": (4 + 8 / 128 + 32 / 32_768, 4.25, 9.0),
    "qlora.memory": (36.36, 35.58, 140.0),
    "qlora.states": (0.24, 0.08, 12.0),
    "qlora.codes": (
        lambda block, book: torch.tensor([(value / block.abs().max() - book).abs().argmin() for value in block]),
        lambda block, book: ((block / block.std())[:, None] - book).abs().argmin(1),
        lambda block, book: torch.zeros(len(block), dtype=torch.long),
    ),
    "qlora.backward": (
        lambda gradient, codes, book, scales: (gradient * scales) @ book[codes],
        lambda gradient, codes, book, scales: gradient @ book[codes],
        lambda gradient, codes, book, scales: 2 * gradient @ book[codes],
    ),
    "qlora.merge": ("Dequantize", None, "merge"),
    "qlora.pack": (lambda codes: torch.tensor([16 * int(a) + int(b) for a, b in codes.view(-1, 2)]),
                   lambda codes: codes[1::2] * 16 + codes[0::2], lambda codes: codes[0::2]),
    "qlora.share": (8.6619, 6.25, 50),
    "qlora.rounded": (13.2936, 18.8, 94),
    "adapters.count": (1_789_056, 894_528, 7),
    "adapters.start": ("up", None, "down"),
    "adapters.forward": (
        lambda y, down, b_down, up, b_up, s: y + s * b_up + s * torch.relu(y @ down.T + b_down) @ up.T,
        lambda y, down, b_down, up, b_up, s: s * (torch.relu(y @ down.T + b_down) @ up.T + b_up),
        lambda y, down, b_down, up, b_up, s: 2 * y),
    "adapters.merge": (lambda W, down, up: (torch.eye(len(W)).double() + up @ down) @ W,
                       lambda W, down, up: W + up @ down, lambda W, down, up: W),
    "adapters.flops": (0.0208333, 0.0104167, 0.5),
    "adapters.launches": (11.52, 5.76, 100),
    "adapters.parallel": (lambda x, h, down, up: torch.relu(x @ down.T) @ up.T + x + h,
                          lambda x, h, down, up: h + x + torch.relu(h @ down.T) @ up.T,
                          lambda x, h, down, up: h),
    "adapters.budget": (31, 32, 64),
    "adapters.gradient": (gradient_by_autograd,
                          lambda x, g, down, up: torch.outer(up.T @ g, x), lambda x, g, down, up: 0 * down),
    "ia3.count": (57_600, 1_920, 7),
    "ia3.gradient": (lambda x, W, G: torch.einsum("no,oi,ni->o", G, W, x), lambda x, W, G: G.sum(0),
                     lambda x, W, G: W.sum(1)),
    "ia3.merge": (lambda W, scale: W @ torch.diag(scale), lambda W, scale: torch.diag(scale) @ W,
                  lambda W, scale: W),
    "ia3.bias": ("key", None, "query"),
    "ia3.decay": (693, 500, 100),
    "ia3.biases": (8_448, 6_912, 11),
    "ia3.rotary": ("qwen2.5", None, "llama"),
    "ia3.rank": (12, 64, 3),
    "prompts.prefix": (1_966_080, 7_864_320, 7),
    "prompts.kept": ("none", None, "prefix"),
    "prompts.projection": (lambda n, k, h, L: k * (n + h + 2 * L * h + 2 * L) + h,
                           lambda n, k, h, L: k * (n + h + 2 * L * h), lambda n, k, h, L: n * k),
    "prompts.gate": (gate_as_a_sigmoid,
                     lambda q, P, K: torch.cat([P, K]).matmul(q).softmax(0)[: len(P)].sum(),
                     lambda q, P, K: torch.ones((), dtype=torch.float64)),
    "prompts.labels": (lambda labels, n: torch.nn.functional.pad(labels, (n, 0), value=-100),
                       lambda labels, n: torch.nn.functional.pad(labels, (n, 0)),
                       lambda labels, n: torch.nn.functional.pad(labels, (n, 0), value=-1)),
    "prompts.angle": (lambda rate, d, length: rate * math.sqrt(d) / length, lambda rate, d, length: rate / length,
                      lambda rate, d, length: rate),
    "prompts.reading": (1.25, 1.2, 2.0),
    "prompts.cache": (52.4288, 26.2144, 7),
    "prompts.position": (lambda n, lengths: torch.tensor([n + max(lengths) - i for i in lengths]),
                         lambda n, lengths: torch.full((len(lengths),), n),
                         lambda n, lengths: torch.zeros(len(lengths), dtype=torch.long)),
    "memory.sixteen": (51.2, 38.4, 7),
    "memory.stays": ("activations", None, "states"),
    "memory.family": ("reparameterised", None, "additive"),
    "memory.logits": (3 * 4 * 2 * 4096 * 128_256 / 1e9, 4 * 2 * 4096 * 128_256 / 1e9, 1),
    "memory.copies": (32.768, 16.384, 7),
    "memory.frozen": (lambda h, k, m, n, tokens: tokens * (12 * h + 4 * k + 6 * m + 4 * n + 8),
                      lambda h, k, m, n, tokens: tokens * (20 * h + 4 * k + 8 * m + 4 * n + 8),
                      lambda h, k, m, n, tokens: tokens),
    "memory.crossing": (lambda N, V, h, a, layers: (2 * N + 4 * V * h) / (a * layers + 12 * V),
                        lambda N, V, h, a, layers: 2 * N / (a * layers + 12 * V),
                        lambda N, V, h, a, layers: N / layers),
    "memory.margin": (23.875, 23.2, 7),
    "memory.states": (lambda card, spare, each: int((1 - spare) * card // each),
                      lambda card, spare, each: int(card // each), lambda card, spare, each: 7),
    "memory.longest": (lambda card, weights, each: max(0, (card - weights) // each),
                       lambda card, weights, each: card // each, lambda card, weights, each: 7),
    "lora.rank": (energy_rank, lambda s, share: energy_rank(s.sqrt(), share), lambda s, share: len(s) + 1),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(name):
    right, nearly, wrong = ANSWERS[name]
    assert exercises.grade(name, right).right
    assert exercises.grade(name, right).message.startswith("right")
    verdict = exercises.grade(name, wrong)
    assert not verdict.right and verdict.message.startswith("not yet")
    if nearly is not None:
        verdict = exercises.grade(name, nearly)
        assert not verdict.right and verdict.message.startswith("nearly")


def test_every_exercise_is_tried():
    assert {exercise.name for exercise in EVERY} == set(ANSWERS)
    for topic in TOPICS:
        for exercise in exercises.exercises(topic):
            assert exercise.name.startswith(f"{topic}.")
            assert exercise.difficulty in ("easy", "medium", "hard") and 1 <= exercise.minutes <= 60


@pytest.mark.parametrize("name", [n for n, (right, *_) in ANSWERS.items() if isinstance(right, (int, float))])
def test_no_message_holds_the_number(name, capsys):
    right = ANSWERS[name][0]
    for answer in (None, 0, 10**9, right * 2, right + 1, "text", [1], True):
        exercises.check(name, answer)
    told = capsys.readouterr().out
    assert f"{right:g}" not in told and f"{right:,.0f}" not in told and f"{right:.0f}" not in told


def test_answers_of_the_wrong_kind(capsys):
    for name in ANSWERS:
        exercises.check(name, None)
        exercises.check(name, ...)
    told = capsys.readouterr().out.replace("\n", " ")
    assert told.count("no answer yet") == 2 * len(ANSWERS)
    assert exercises.grade("lora.count", "12").message == "a number is wanted here, and this is of type str."
    assert "one of these words" in exercises.grade("lora.first_step", "C").message
    assert "a function is wanted" in exercises.grade("lora.forward", 3).message
    assert "raised ZeroDivisionError" in exercises.grade("lora.rank", lambda s, share: 1 / 0).message
    shape = exercises.grade("lora.merge", lambda W, A, B, alpha, r: W.T).message
    assert "a tensor of shape (6, 10) where a tensor of shape (10, 6) is wanted" in shape
    assert exercises.grade("lora.count", torch.tensor(1_843_200)).right


@pytest.mark.parametrize("typed, right", [
    ((1, 843, 200), True), ((1, 843, 201), False), ((184, 320, 0), False), ((1, 843, 200, 0), False),
])
def test_a_number_typed_with_commas_is_a_number(typed, right):
    grade = exercises.grade("lora.count", typed)
    assert grade.right is right and "a number is wanted" not in grade.message


@pytest.mark.parametrize("typed", [(1, 2000), (1843200,), (1.0, 843), (0, 843), (True, 843), (1, -5), ()])
def test_other_tuples_are_no_numbers(typed):
    assert "a number is wanted here, and this is of type tuple" in exercises.grade("lora.count", typed).message


def test_the_scaling_upside_down_gets_a_counterexample():
    for name, wrong in (
        ("lora.forward", lambda x, W, A, B, alpha, r: x @ W.T + r / alpha * (x @ A.T) @ B.T),
        ("lora.merge", lambda W, A, B, alpha, r: W + r / alpha * B @ A),
    ):
        message = exercises.grade(name, wrong).message
        assert message.startswith("nearly") and "alpha = 8 and r = 2" in message and "quarter" in message
    assert "alpha = 8 and r = 2" in exercises.grade("lora.first_update", 16 / 32 * math.sqrt(16 / 2304) / 1000).message


def test_an_answer_that_changes_its_arguments_spoils_nothing():
    def greedy(W, A, B, alpha, r):
        W += alpha / r * B @ A
        return W

    assert exercises.grade("lora.merge", greedy).right
    assert exercises.grade("lora.merge", greedy).right


def test_an_unknown_exercise_names_near_ones():
    with pytest.raises(PeftLabError, match="no exercise is called 'lora.cuont'.*Did you mean 'lora.count'"):
        exercises.check("lora.cuont", 1)
    with pytest.raises(PeftLabError, match="lora.count"):
        exercises.check("nonsense", 1)


def test_graders():
    graded = grading.number(2.0, tolerance=0.01, near={4.0: "Twice."}, hint="Think.", then="Good.")
    assert graded(2.01).message == "right. Good." and graded(2.1).message == "not yet, it is too large. Think."
    assert graded(4.0).message == "nearly. Twice." and not graded(float("nan")).right
    graded = grading.function(lambda x: x + 1.0, cases=lambda: [(1.0,), (2.0,)], hint="Add.")
    assert graded(lambda x: 1.0 + x).right and not graded(lambda x: 2.0).right


CHAPTERS = sorted(BOOK.glob("[0-9][0-9]_*.ipynb"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_poses_and_solves_every_exercise(path):
    """Each exercise of a chapter's topic is there twice: unanswered, and in a folded solution that nbval executes."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    posed, solved = {}, {}
    for cell in cells:
        for name in re.findall(r"pl\.check\(\s*[\"']([\w.]+)[\"']", cell.source):
            text = "".join(output.get("text", "") for output in cell.outputs).replace("\n", " ")
            (solved if "solution" in cell.metadata.get("tags", []) else posed)[name] = (cell, text)
    topics = {name.partition(".")[0] for name in posed}
    expected = {exercise.name for topic in topics for exercise in exercises.exercises(topic)}
    assert set(posed) == expected == set(solved)
    for name, (_, text) in posed.items():
        assert text.startswith(f"{name}: no answer yet."), name
    for name, (cell, text) in solved.items():
        assert f"{name}: right" in text, name
        assert "hide-cell" in cell.metadata.tags, f"the solution of {name} is folded on the page"
