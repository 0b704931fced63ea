"""The measurements of the chapter on choosing a method: the claims of "LoRA without regret", and where LoRA struggles.

smollm2-135m learns, with adapters on the queries and values where nothing else is said. Each setting tries its rates,
and the next ones while the best is at an edge; then other seeds run at the best rate, and they alone are scored
(`scored` is true in their rows). `search` has this protocol, `regret_plan` the settings, their rates and `PREDICTIONS`,
which was written before the first run.

Sections:
    first     one step: the size of LoRA's update and how far the loss falls by it, against the rank (`regret_first`)
    rank      the best rate against the rank, with alpha = 16 and with alpha = 2 r
    full      LoRA's best rate beside that of full fine-tuning, in runs of 15, 60 and 240 steps. LoRA's runs over 60
              steps are those of "rank" with r = 16 and alpha = 2 r
    where     the same number of parameters in different layers, on two tasks. On the desk, q and v together are the
              runs of "rank" with r = 16 and alpha = 2 r
    batch     the same 2,048 messages once, in batches of 8 to 512
    capacity  bits of random digits that are stored per parameter (`regret_strings`)
    rewiring  news with swapped words: LoRA of ranks 1 to 256 and full fine-tuning, two lengths (`regret_hard`)
    alphabet  news in Greek letters: LoRA of ranks 1 to 256 and full fine-tuning, on much and on little data (same file)
    base      the model before training, on the news in Greek letters
    live      the first steps of some runs of "full", "where" and "batch", loss by loss: what a chapter can run itself

Weights are float32. "capacity", "rewiring" and "alphabet" compute in bfloat16, because they are long. Rates of
"capacity" are chosen by the loss on the strings themselves: nothing is to be learned but these.

About 600 runs, as long as 60 steps of 8 messages on average. With four GPUs `--jobs 48`, and NVIDIA's MPS running (see
`family`); without it `--jobs 16`. `--only capacity,rewiring` took about twenty minutes of one H200 with MPS and
`--jobs 10`. `--only live` takes five minutes on two cores. Cut off, it goes on with the same command.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.bench import family, lora, regret_first, regret_hard, regret_strings, search
from peftlab.bench.family_variants import run
from peftlab.bench.regret_plan import ARTICLES, PASS, SEARCHES, Setting, live, long, short

Row = dict[str, Any]

AT_ONCE = 32  # messages that go through the model at once; a larger batch is the sum of several
FEW = 64  # validation examples on which a reader's own run is compared with these


def points() -> list[Row]:
    """Return every point to measure: long runs first, then short ones in the order of what matters most."""
    base = {"section": "base", "task": "greek", "tokens": ARTICLES["tokens"]}
    return [*started(long()), base, *regret_first.points(), *started(short()), *live()]


def started(settings: Iterable[Setting]) -> Iterator[Row]:
    """Yield the runs with which the settings begin."""
    yield from (point for one in settings for point in one.points())


def follow_up(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the next rates of a setting while its best one is at an edge, then other seeds at the best one."""
    tuned = (row for row in rows if row["section"] not in ("base", "first", "live"))
    yield from search.follow_up(tuned, lambda row: SEARCHES[search.setting_of(row)])


def measure(point: Row) -> list[Row]:
    """Measure one point, and return its rows."""
    section = point["section"]
    try:
        if section == "base":
            model, tokens = lora.base()[0], point["tokens"]
            found = regret_hard.read(model, "validation", tokens) | regret_hard.read(model, "test", tokens)
            return [{**point, **found, **family.on_news(model)}]
        if section == "first":
            return list(regret_first.measure(point))
        if section == "live":
            return [begun(point, point["stop"])]
        if section == "capacity":
            return [regret_strings.measure(point)]
        return [regret_hard.measure(point) if section in regret_hard.SECTIONS else learned(point)]
    finally:
        torch.cuda.empty_cache()  # other processes share the GPU


def learned(point: Row) -> Row:
    """Train on the desk or on the reviews as a point says, and return its row."""
    model, row = trained(point)
    row |= family.on_validation(point, model)
    return {**row, **family.on_news(model), **family.tested(point, model)} if point["scored"] else row


def trained(point: Row) -> tuple[nn.Module, Row]:
    """Train as a point says. Return the model, and a row with its loss on the first validation examples."""
    model, losses = fitted(point)
    few = family.encoded(point["task"], "validation")[:FEW]
    loss = pl.mean_loss(model, few, pl.Collator(lora.base()[1]), batch_size=AT_ONCE)
    return model, {**point, **losses, "few_loss": lora.finite(loss)}


def fitted(point: Row, **settings: Any) -> tuple[nn.Module, Row]:
    """Train as a point says. Return the model, and its losses on the way."""
    parts = max(1, point["batch_size"] // AT_ONCE)
    examples = passed() if point.get("of", point["section"]) == "batch" else None
    settings |= {"batch_size": point["batch_size"] // parts, "accumulation": parts}
    return family.trained(point, examples, **settings)


class Enough(Exception):
    """The first steps of a run are made."""


def begun(point: Row, stop: int) -> Row:
    """Make the first steps of a run, and return a row with their training losses, as a text with commas.

    Seed, order of the examples, warm-up and schedule are those of the whole run. So these are its own first steps.
    """
    losses: list[float] = []

    def watch(_: Any, step: Row) -> None:
        losses.append(step["loss"])
        if len(losses) == stop:
            raise Enough

    with suppress(Enough):
        fitted(point, callback=watch, fast="auto")  # a callback that only reads leaves the fast path as it is
    return {**point, "stop": stop, "curve": ",".join(f"{loss:.5f}" for loss in losses)}


def again(row: Row, *, stop: int | None = None, **changes: Any) -> Row:
    """Run a row of "rank", "full", "where" or "batch" again, with some of its settings changed, and return the new row.

    It has `few_loss`, the loss on the first validation examples, and no other score. So it takes a minute, and not ten.

    Args:
        row: what to run; what came of it does not matter.
        stop: make only so many steps of the run, which takes seconds. The new row then has the training loss of each
            of them in `curve`, as the rows of "live" do, and no other score.
        changes: columns of the row that get another value.
    """
    point = {**{name: row[name] for name in search.described(row)}, **changes}
    return trained(point)[1] if stop is None else begun(point, stop)


def own_run(*, r: int = 16, alpha: float = 16, learning_rate: float = 5.6e-3, steps: int = 60, seed: int = 0) -> Row:
    """Train LoRA once on the desk with settings of your own, and return a row for a figure of the book.

    Its `validation_loss` is that on the first 64 validation messages. Sixty steps take some minutes on two cores.
    """
    point = run("rank", "desk", "LoRA", {"alpha": alpha, "r": r}, learning_rate, seed, steps=steps)
    row = trained(point)[1]
    return {**row, "validation_loss": row["few_loss"]}


@cache
def passed() -> list[Any]:
    """Return the messages that are shown once."""
    rows = pl.load_data("support-desk")["train"].select(range(PASS))
    return [pl.encode_completion(lora.base()[1], row["prompt"], row["ticket"]) for row in rows]
