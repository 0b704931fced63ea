"""`pl.train` beside two loops of one's own around the same model, in turn and in changing order.

The plain loop does what nobody can leave out: forward, backward, clipping, AdamW. Its one batch lies on the device from
the beginning, it reads no loss, and it keeps no history. So what `pl.train` takes longer is the price of what it does
more. The reading loop does what a training loop mostly does: it also takes its batches from a `DataLoader`, copies them
to the device, and keeps the loss of each step.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from peftlab.bench.models import vocabulary_of
from peftlab.core.checkpointing import memory_settings
from peftlab.core.modes import device_of, mode
from peftlab.settings import Settings
from peftlab.training.precision import autocast, choose_precision
from peftlab.training.ranks import Ranks
from peftlab.training.run import Run
from peftlab.training.schedule import borrowed_generators

Row = dict[str, Any]
Step = Callable[[], object]


def loop_pairs(
    model: nn.Module, batch: int, sequence: int, *, steps: int = 2, pairs: int = 20, warm_up: int = 3, **settings: Any
) -> Row:
    """Time `steps` steps of each loop, `pairs` times: all three in one order, then in the other order, and so on.

    The times are short and many, because a host that others use too is faster in one second than in the next.

    Args:
        model: with what is to train; its values move.
        settings: of `pl.train`, for example `checkpointing=True`. Without `fast`, all loops take the plain path.

    Returns:
        the median seconds of a step, `plain_seconds`, `reading_seconds` and `train_seconds`; how `pl.train` compares
        with the plain loop, `ratio` and the four names beside it (`compared`), and with the reading loop,
        `reading_ratio` and so on; and `pairs`.
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
    seconds: dict[str, list[float]] = {"plain": [], "reading": [], "train": []}
    with (
        plain_steps(model, texts[:batch], given) as plain,
        reading_steps(model, texts, given) as reading,
        train_steps(model, data, given) as train,
    ):
        kinds = [("plain", plain), ("reading", reading), ("train", train)]
        for _, step in kinds:
            mean_seconds(step, warm_up)
        for _ in range(pairs):
            for kind, step in kinds:
                seconds[kind].append(mean_seconds(step, steps))
            kinds.reverse()
    beside = {"": "plain", "reading_": "reading"}
    return {
        **{f"{kind}_seconds": statistics.median(values) for kind, values in seconds.items()},
        **{
            f"{prefix}{name}": value
            for prefix, other in beside.items()
            for name, value in compared(seconds["train"], seconds[other]).items()
        },
        "pairs": pairs,
    }


def compared(one: Sequence[float], other: Sequence[float]) -> Row:
    """Compare two loops by the times that were taken in turn.

    Returns:
        `ratio`, the median over the pairs of one / other; `ratio_low` and `ratio_high`, between which half of the pairs
        lie; `ratio_from` and `ratio_to`, between which the true median lies with a probability of 95%
        (`median_interval`).

    >>> from peftlab.bench.loop import compared
    >>> compared([2.0, 2.0, 2.2], [1.0, 1.0, 1.0])["ratio"]
    2.0
    """
    ratios = [mine / theirs for mine, theirs in zip(one, other, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    least, most = median_interval(ratios)
    return {"ratio": middle, "ratio_low": low, "ratio_high": high, "ratio_from": least, "ratio_to": most}


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
    ids = ids.to(device_of(model))
    with own_steps(model, settings) as step:
        yield lambda: step(ids)


@contextmanager
def reading_steps(model: nn.Module, texts: torch.Tensor, settings: Settings) -> Iterator[Step]:
    """Lend one step of the reading loop, on texts (n, t)."""
    loader: Any = DataLoader(TensorDataset(texts), settings.batch_size, shuffle=True, drop_last=True)
    batches, losses = itertools.chain.from_iterable(itertools.repeat(loader)), []
    with own_steps(model, settings) as step:
        yield lambda: losses.append(step(next(batches)[0].to(device_of(model))).item())


@contextmanager
def own_steps(model: nn.Module, settings: Settings) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Lend one step of a loop of one's own. It takes a batch on the device, and returns the loss."""
    device = device_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0, fused=device.type == "cuda")

    def step(ids: torch.Tensor) -> torch.Tensor:
        with autocast(device, settings.precision):
            loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, settings.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

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
