"""What a run does at its step k, as a function of k and a seed alone.

The learning rate, the examples and the random numbers of a step depend on nothing that happened before it. So a run
that was killed goes on where it stopped by knowing k: no generator's state, no sampler's position needs to be stored.
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
    """The learning rate of update ``step`` = 0 .. steps - 1, as transformers' schedulers have it.

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
    """``warmup`` below 1 is a share of all steps, rounded up; from 1 on it is a number of steps."""
    return math.ceil(warmup * steps) if warmup < 1 else int(warmup)


@dataclass
class DataOrder:
    """Which examples make the batch of a step.

    Each epoch is a permutation drawn from the seed and the epoch's number; the epochs stand one behind the other and
    are cut into batches, so only the very last batch may be smaller.

    Args:
        examples: how many there are.
        batch: examples an optimiser step (all accumulated ones together).
        total: examples of the whole run, counted with repetition.
        lengths: give them to bring examples of like length together, which saves padding: within stretches of 32
            batches the examples are sorted by length, and the order of the batches is drawn.
    """

    examples: int
    batch: int
    total: int
    seed: int
    lengths: Sequence[int] | None = None
    _epochs: dict[int, list[int]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """The number of optimiser steps."""
        return -(-self.total // self.batch)

    def at(self, step: int) -> list[int]:
        """The indices of the examples of step 0 .. len - 1."""
        start = step * self.batch
        stop = min(start + self.batch, self.total)
        # position p of the run is place p mod n in epoch p div n
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
    """A 63-bit seed made of these parts: other parts, another seed, without any relation between the two."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed torch (CPU and every GPU), Python's ``random`` and numpy's global generator."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


@contextmanager
def borrowed_generators() -> Iterator[None]:
    """Let the block seed and use the global random generators, and put them back to where they were."""
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
