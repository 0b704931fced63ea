"""The measurements of the chapter on prompts and prefixes.

Sections, in the chapter's order:
    live                    the chapter's live run, and a longer one, with three seeds
    rate                    the support desk learned by smollm2-135m: each method and start at several learning rates
    steps                   rows that the prefixes of `rate` add: loss and gradient at every fifth step
    length                  the same with other numbers of virtual tokens
    t5                      a small T5 learns a job, and another one by a prompt, a prefix and LoRA (see `small_t5`)
    headlines               smollm2-135m writes the headline of a news article
    fullsize, fullsize-more a training step of the Llama-2-7B shape (random weights), beside peft
    reading                 what a prefix and a prompt cost that shape when it reads and writes
    seq2seq                 a training step of the t5-base shape, beside peft

The protocol of all that is learned: a grid of learning rates with three seeds each. The rate of a method is the one
with the lowest mean loss on validation examples. Its score is that of three seeds on all test examples. A point is one
run and cannot know which rate will be chosen, so every run is scored. That costs about a tenth of its time.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.assets.data import articles
from peftlab.bench import fullsize, small_t5, virtual_tokens
from peftlab.bench.virtual_tokens import config_of

SEEDS = (0, 1, 2)
# Learning rates to try: three for each factor of ten. The best should have a worse one on both sides.
RATES = {
    ("prompt", "random"): (3e-2, 1e-1, 3e-1, 1.0),
    ("prompt", "vocabulary"): (1e-2, 3e-2, 1e-1, 3e-1),
    ("prompt", "text"): (1e-2, 3e-2, 1e-1, 3e-1),
    ("deep prompt", "vocabulary"): (3e-2, 1e-1, 3e-1, 1.0),
    # Of prefixes more, up to rates that are too high: where does training become unstable?
    ("prefix", "random"): (3e-2, 1e-1, 3e-1, 1.0),
    ("prefix", "vocabulary"): (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    ("prefix", "text"): (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    ("prefix projected", "random"): (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    ("p-tuning", "random"): (1e-3, 3e-3, 1e-2, 3e-2),
    ("lora", "kaiming"): (1e-3, 3e-3, 1e-2, 3e-2),
}
LENGTHS = {
    ("prompt", 1): (1e-1, 3e-1, 1.0),
    ("prompt", 5): (3e-2, 1e-1, 3e-1),
    ("prompt", 80): (1e-2, 3e-2, 1e-1),
    ("prefix", 1): (1e-2, 3e-2, 1e-1),
    ("prefix", 80): (1e-2, 3e-2, 1e-1),
}
HEADLINES = {
    ("prompt", "vocabulary"): (1e-2, 3e-2, 1e-1),
    ("prefix", "vocabulary"): (3e-3, 1e-2, 3e-2),
    ("lora", "kaiming"): (1e-3, 3e-3, 1e-2),
}


def points() -> list[dict[str, Any]]:
    """Yield every point to measure. The small T5 takes longest, so it begins first."""
    desk = (*live(), *tried("rate", RATES), *length())
    news = ({"section": "headlines", "method": "none"}, *tried("headlines", HEADLINES))
    learned = (*small_t5.points(SEEDS), *desk, *news)
    return [*learned, *full_size(), {"section": "reading", "timed": True, "shape": "llama-2-7b"}, *seq2seq()]


def run(section: str, method: str, **changes: Any) -> dict[str, Any]:
    """Describe one run. It has as many steps as those of the LoRA chapter."""
    tokens = {} if method == "lora" else {"tokens": 20}
    return {"section": section, "method": method, **tokens, "steps": 70, "batch_size": 8, **changes}


def live() -> Iterator[dict[str, Any]]:
    """Repeat the live run of the chapter (45 steps of two), and a longer one (60 steps of four), with three seeds."""
    for (steps, batch_size), seed in product(((45, 2), (60, 4)), SEEDS):
        yield run("live", "prompt", init="vocabulary", learning_rate=1e-1, steps=steps, batch_size=batch_size,
                  seed=seed)  # fmt: skip


def tried(section: str, grid: Mapping[tuple[str, str], tuple[float, ...]]) -> Iterator[dict[str, Any]]:
    """Try the learning rates of each method and start."""
    for (method, init), rates in grid.items():
        for learning_rate, seed in product(rates, SEEDS):
            yield run(section, method, init=init, learning_rate=learning_rate, seed=seed)


def length() -> Iterator[dict[str, Any]]:
    """Vary the number of virtual tokens. Twenty are among the points of `rate`."""
    for (method, tokens), rates in LENGTHS.items():
        for learning_rate, seed in product(rates, SEEDS):
            yield run("length", method, init="vocabulary", tokens=tokens, learning_rate=learning_rate, seed=seed)


def full_size() -> Iterator[dict[str, Any]]:
    """Measure training steps at 7B. peft refuses a prefix with checkpointing, so only ours is measured."""
    for section, method, checkpointing, library in (
        ("fullsize", "prompt", False, "peftlab"), ("fullsize", "prefix", False, "peft"),
        ("fullsize", "prefix", False, "peftlab"), ("fullsize", "prefix", True, "peftlab"),
        ("fullsize-more", "prompt", False, "peft"), ("fullsize-more", "prompt", True, "peftlab"),
        ("fullsize-more", "p-tuning", False, "peftlab"), ("fullsize-more", "prefix projected", False, "peftlab"),
    ):  # fmt: skip
        yield {**fullsize.train(method, library, 4, checkpointing, tokens=20), "section": section}


def seq2seq() -> Iterator[dict[str, Any]]:
    """Measure training steps of t5-base."""
    for method in ("prompt", "prefix"):
        for library in ("peft", "peftlab"):
            yield {"section": "seq2seq", "timed": True, "shape": "t5-base", "method": method, "library": library,
                   "tokens": 20, "batch": 8, "sequence": 256}  # fmt: skip


def measure(point: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure one point, and return its rows."""
    section = point["section"]
    if section in ("fullsize", "fullsize-more"):
        rows = fullsize.measure({**point, "section": "fullsize"}, virtual_tokens.attached)
        return [{**row, "section": section} for row in rows]
    if section in ("reading", "seq2seq"):
        return virtual_tokens.measure(point)
    if section == "t5":
        return list(small_t5.measure(point))
    return list(learn(point))


def learn(point: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Train smollm2-135m as a point says, and measure what it learned."""
    (model, tokenizer), log = base(), []
    train, validation, test, prompts, wanted = task("news" if point["section"] == "headlines" else "desk")
    told = {name: point[name] for name in ("method", "init", "learning_rate", "seed") if name in point}
    try:
        if point["method"] != "none":
            torch.manual_seed(point["seed"])
            pl.attach(model, config_of(point, tokenizer))
            log = trained(model, train, tokenizer, point)
        losses = [pl.mean_loss(model, rows, pl.Collator(tokenizer), batch_size=10) for rows in (validation, test)]
        row = {**point, **summary(model, log), "validation_loss": losses[0], "test_loss": losses[1]}
        answers = pl.generate_text(model, tokenizer, prompts, max_new_tokens=24, batch_size=250, progress=False)
    finally:
        if pl.attached(model):
            pl.detach(model)
    if point["section"] == "headlines":
        scores = [pl.token_f1([answer], [headline]) for answer, headline in zip(answers, wanted, strict=True)]
        error = statistics.stdev(scores) / len(scores) ** 0.5
        yield {**row, "articles": len(scores), "token_f1": statistics.fmean(scores), "f1_error": error}
    else:
        exact = pl.support_desk.score(answers, wanted)["exact"]
        yield {**row, "messages": len(wanted), "correct": round(exact * len(wanted))}
    if point["section"] == "rate":
        yield from ({"section": "steps", **told, **step} for step in log if "early_share" in step)


@cache
def base() -> tuple[Any, Any]:
    """Load smollm2-135m with its tokenizer. All runs of a process share it: its weights are frozen in each."""
    return pl.load_model("smollm2-135m", device="cuda" if torch.cuda.is_available() else None)


@cache
def task(name: str) -> tuple[list[dict], list[dict], list[dict], list[Any], list[str]]:
    """Return examples of training, validation and test, and the prompts and answers of the test.

    The desk has 2,000 messages to train on, and 500 each for validation and test. For news, the last 200 articles of
    the training data are for validation. All of the test split are for the test.
    """
    if name == "desk":
        data, answer = pl.load_data("support-desk", sizes=(2000, 500, 500)), "ticket"
        splits = [list(data[split]) for split in ("train", "validation", "test")]
    else:
        (train, test), answer = articles(tested=1000), "headline"
        splits = [train[:-200], train[-200:], test]
    _, tokenizer = base()
    train, validation, test = (
        [pl.encode_completion(tokenizer, row["prompt"], row[answer], 256) for row in rows] for rows in splits
    )
    return train, validation, test, [row["prompt"] for row in splits[2]], [row[answer] for row in splits[2]]


def trained(model: nn.Module, examples: list[dict], tokenizer: Any, point: dict[str, Any]) -> list[dict[str, float]]:
    """Train as the point says. Return the loss and the gradient's norm of each step, up to a divergence."""
    log: list[dict[str, float]] = []

    def note(model: nn.Module, row: dict[str, Any]) -> None:
        log.append({name: row[name] for name in ("step", "loss", "grad_norm")})
        if row["step"] % 5 == 0 and point["method"].startswith("prefix"):
            log[-1]["early_share"] = early_share(model)

    try:
        pl.train(
            model, examples, tokenizer=tokenizer, steps=point["steps"], batch_size=point["batch_size"],
            learning_rate=point["learning_rate"], seed=point["seed"], precision="fp32", warmup=0.1, schedule="linear",
            group_by_length=True, progress=False, callback=note,
        )  # fmt: skip
    except pl.TrainingError:  # divergence is a result too; the model keeps its last finite state
        pass
    return log


def early_share(model: Any) -> float:
    """Return which share of a prefix's gradient, as a sum of squares, belongs to the first third of the layers.

    The table's columns and the rows of the MLP's last matrix stand in the order of the layers.
    """
    source = model.peftlab["default"]["prefix"].source
    grad = source.outer.weight.grad if hasattr(source, "outer") else source.rows.grad.T
    squares = grad.square().sum(1)
    return (squares[: len(squares) // 3].sum() / squares.sum()).item()


def summary(model: nn.Module, log: list[dict[str, float]]) -> dict[str, Any]:
    """Return what was trained, and the run in a few numbers. `worst_loss` is the largest of the second half."""
    if not log:  # nothing was trained
        return {"trainable": 0}
    losses = [row["loss"] for row in log]
    return {
        "trainable": pl.count_parameters(model).trainable,
        "finished_steps": len(log),
        "first_loss": losses[0],
        "train_loss": statistics.fmean(losses[-10:]),
        "worst_loss": max(losses[len(losses) // 2 :]),
        "largest_grad_norm": max(row["grad_norm"] for row in log),
    }
