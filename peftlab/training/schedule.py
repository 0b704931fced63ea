"""What a run does at step k, computed from k and the seed alone.

The learning rate, the examples and the random numbers of a step depend on nothing that happened before. So a killed run
needs only k to continue: the state of generators and the position of a sampler need not be stored.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy
import torch


def learning_rate_at(step: int, steps: int, peak: float, warmup_steps: int = 0, schedule: str = "linear") -> float:
    """Return the learning rate of update `step` = 0 .. steps - 1, as transformers' schedulers compute it.

    With k the step, w the steps of warm-up and K all steps:

        warm-up, k < w      lr = peak k / w
        linear              lr = peak (K - k) / (K - w)
        cosine              lr = peak (1 + cos(pi (k - w) / (K - w))) / 2
        constant            lr = peak
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    remaining = (steps - step) / max(1, steps - warmup_steps)
    if schedule == "linear":
        return peak * max(0.0, remaining)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * (1.0 - remaining))))


def warmup_steps(warmup: float, steps: int) -> int:
    """Return the steps of warm-up. `warmup` is a share of all steps (rounded up) if below 1, else a number of steps."""
    return math.ceil(warmup * steps) if warmup < 1 else int(warmup)


@dataclass
class DataOrder:
    """The examples of each step.

    Each epoch is a permutation drawn from the seed and the epoch's number. The epochs follow each other and are cut
    into batches across their borders, so only the last batch of the run may be smaller.

    Args:
        examples: the number of examples.
        batch: examples per optimiser step, accumulated ones included.
        total: examples of the whole run, counted with repetition.
        lengths: if given, examples of similar length share a batch, which saves padding. Stretches of 32 batches are
            sorted by length, and then the order of the batches is drawn at random.
    """

    examples: int
    batch: int
    total: int
    seed: int
    lengths: Sequence[int] | None = None
    _epochs: dict[int, list[int]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """Return the number of optimiser steps."""
        return -(-self.total // self.batch)

    def at(self, step: int) -> list[int]:
        """Return the indices of a step's examples. Steps count from 0."""
        start = step * self.batch
        stop = min(start + self.batch, self.total)
        # position p of the run is place p mod n of epoch p div n
        return [self._epoch(p // self.examples)[p % self.examples] for p in range(start, stop)]

    def _epoch(self, epoch: int) -> list[int]:
        if epoch not in self._epochs:
            draw = random.Random(derived_seed(self.seed, "epoch", epoch))
            order = list(range(self.examples))
            draw.shuffle(order)
            if self.lengths is not None:
                order = self._grouped(order, self.lengths, draw)
            self._epochs = {key: value for key, value in self._epochs.items() if key == epoch - 1}
            self._epochs[epoch] = order
        return self._epochs[epoch]

    def _grouped(self, order: list[int], lengths: Sequence[int], draw: random.Random) -> list[int]:
        stretch = 32 * self.batch
        batches = []
        for start in range(0, len(order), stretch):
            near = sorted(order[start : start + stretch], key=lambda index: lengths[index])
            batches += [near[at : at + self.batch] for at in range(0, len(near), self.batch)]
        draw.shuffle(batches)
        return [index for batch in batches for index in batch]


def derived_seed(*parts: object) -> int:
    """Return a 63-bit seed computed from these parts. Different parts give unrelated seeds."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed torch (CPU and every GPU in use), Python's `random` and numpy's global generator."""
    # torch.manual_seed seeds these, and for every kind of device not in use yet it also notes the call with a stack
    # trace, which takes about a millisecond: too long for every step.
    torch.default_generator.manual_seed(seed)
    for devices in (torch.cuda, torch.xpu):
        if devices.is_initialized():
            devices.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


@contextmanager
def borrowed_generators() -> Iterator[None]:
    """Let the block seed and use the global random generators, and restore their states afterwards."""
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if gpus is not None:
            torch.cuda.set_rng_state_all(gpus)
