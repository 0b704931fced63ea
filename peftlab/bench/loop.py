"""`pl.train` beside a plain loop around the same model, in pairs and in changing order.

The plain loop does what nobody can leave out: forward, backward, clipping, AdamW. Its batch lies on the device from the
beginning, it reads no loss, and it keeps no history. So what `pl.train` takes longer is the price of what it does more.
A loop that trains on data does some of this, too, and takes longer than this one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftlab.bench.models import vocabulary_of
from peftlab.core.checkpointing import memory_settings
from peftlab.core.modes import device_of, mode
from peftlab.settings import Settings
from peftlab.training.precision import autocast, choose_precision
from peftlab.training.ranks import Ranks
from peftlab.training.run import Run
from peftlab.training.schedule import borrowed_generators

Row = dict[str, Any]
Step = Callable[[], None]


def loop_pairs(
    model: nn.Module, batch: int, sequence: int, *, steps: int = 2, pairs: int = 20, warm_up: int = 3, **settings: Any
) -> Row:
    """Time `steps` steps of both loops, `pairs` times: plain first, then `pl.train` first, and so on.

    The pairs are short and many, because a host that others use too is faster in one second than in the next.

    Args:
        model: with what is to train; its values move.
        settings: of `pl.train`, for example `checkpointing=True`. Without `fast`, both loops take the plain path.

    Returns:
        the median seconds of a step, `plain_seconds` and `train_seconds`; `ratio`, the median over the pairs of train /
        plain; `ratio_low` and `ratio_high`, between which half of the pairs lie; `ratio_from` and `ratio_to`, between
        which the true median lies with a probability of 95% (`median_interval`); and `pairs`.
    """
    precision = choose_precision(settings.pop("precision", "auto"), device_of(model))
    given = Settings(
        batch_size=batch,
        steps=10**6,
        schedule="constant",
        progress=False,
        precision=precision,
        **({"fast": False} | settings),
    )
    texts = torch.randint(vocabulary_of(model), (4 * batch, sequence), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": text.tolist(), "labels": text.tolist()} for text in texts]
    seconds: dict[str, list[float]] = {"plain": [], "train": []}
    with plain_steps(model, texts[:batch], given) as plain, train_steps(model, data, given) as train:
        kinds = [("plain", plain), ("train", train)]
        for _, step in kinds:
            mean_seconds(step, warm_up)
        for _ in range(pairs):
            for kind, step in kinds:
                seconds[kind].append(mean_seconds(step, steps))
            kinds.reverse()
    ratios = [train / plain for plain, train in zip(seconds["plain"], seconds["train"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    least, most = median_interval(ratios)
    return {
        "plain_seconds": statistics.median(seconds["plain"]),
        "train_seconds": statistics.median(seconds["train"]),
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
        "ratio_from": least,
        "ratio_to": most,
        "pairs": pairs,
    }


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the two of n values between which the true median lies with a probability of about 95%.

    Each value is above it with a probability of one half, whatever the distribution. So how many are is binomial, with
    the mean n / 2 and the standard deviation sqrt(n) / 2. Values that depend on each other tell less than this.

    >>> from peftlab.bench.loop import median_interval
    >>> median_interval(range(1, 101))
    (40, 61)
    """
    ordered, n = sorted(values), len(values)
    rank = max(1, math.floor(n / 2 - 1.96 * math.sqrt(n) / 2))  # from both ends
    return ordered[rank - 1], ordered[n - rank]


@contextmanager
def plain_steps(model: nn.Module, ids: torch.Tensor, settings: Settings) -> Iterator[Step]:
    """Lend one step of the plain loop on a batch (b, t)."""
    device = device_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0, fused=device.type == "cuda")
    ids = ids.to(device)

    def step() -> None:
        with autocast(device, settings.precision):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, settings.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with borrowed_generators(), mode(model, True), memory_settings(model, settings.checkpointing):
        yield step


@contextmanager
def train_steps(model: nn.Module, data: list[Row], settings: Settings) -> Iterator[Step]:
    """Lend one step of `pl.train`, as its own loop makes it."""
    run = Run(model, data, settings, device=device_of(model), ranks=Ranks(model))

    def step() -> None:
        run.update()
        run.clear()

    with run.ready():
        yield step
        run.settle()


def mean_seconds(step: Step, steps: int) -> float:
    """Return the mean seconds of so many steps, until the device is done with them."""
    _wait()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    _wait()
    return (time.perf_counter() - started) / steps


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
