"""What fits: the first step of a ladder of batches whose estimated peak, with its margin, the card holds.

The estimate is that of `peftlab.memory` for a step of `pl.train`. The margin is the one of `peftlab.memory.fits`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftlab.checks import scalar, shown
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.memory.cards import CARDS, GB, card_bytes, largest_estimate
from peftlab.memory.counting.shapes import Shape
from peftlab.memory.estimate import estimate

LARGEST_CARD = 10_000  # GB; more is a mistake
# A step: (examples at once, whether activations are computed again, "" or "ddp" or "fsdp")
Rung = tuple[int, bool, str]


@dataclass(frozen=True)
class Card:
    """A card: its name in `CARDS`, or an empty one, its memory in GB, and the largest estimate that it holds."""

    name: str
    gigabytes: float
    room: int

    def __str__(self) -> str:
        size = f"{self.gigabytes:g} GB"
        return f"{self.name} ({size})" if self.name and not self.name.endswith("GB") else self.name or size


def read_card(given: str | float) -> Card:
    """Return a card by its name, or by its memory: `"T4"`, `24`, `"24 GB"`.

    Raises:
        PeftLabError: an unknown name (with near matches), or a memory that no card has.
    """
    text = str(scalar(given)).strip()
    written = _letters(text)
    for name, gigabytes in CARDS.items():
        if _letters(name) == written:
            return Card(name, gigabytes, card_bytes(name))
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gb)?", text.lower())
    if number is None:
        known = ", ".join(CARDS)
        begins = [repr(name) for name in CARDS if written and _letters(name).startswith(written)]
        near = f" Did you mean {' or '.join(begins)}?" if begins else did_you_mean(text[:60], CARDS)
        if written in ("cpu", "mps", "none"):
            near = " Without a GPU leave the card out."
        raise PeftLabError(f"Unknown card {shown(given)}.{near} Known: {known}. Or give its memory in GB, such as 24.")
    size = float(number[1])
    if not 1 <= size <= LARGEST_CARD:
        raise PeftLabError(f"A card has between 1 and {LARGEST_CARD:,} GB, found {shown(given)}.")
    return Card("", size, largest_estimate(int(size * GB)))


def _letters(name: str) -> str:
    """Return a card's name as people also write it: "rtx4090", "A100-80GB"."""
    return re.sub(r"[\s_-]", "", name.lower())


def rungs(ladder: Sequence[Sequence[Any]], gpus: int) -> list[Rung]:
    """Return the steps to try. Several GPUs first hold a whole copy each (DDP), and then shards (FSDP)."""
    ways = ("",) if gpus == 1 else ("ddp", "fsdp")
    return [(batch, again, way) for way in ways for batch, again in ladder]


def first_that_fits(
    tried: Sequence[Rung], peak: Callable[[Rung], int], room: int | None
) -> tuple[Rung, int, bool | None]:
    """Return (the step, its peak, whether it fits): the first that fits, or the smallest if none does.

    Args:
        peak: gives the estimated peak of a step, in bytes.
        room: the largest estimate that fits. None: the card is not known, and the first step is taken.
    """
    if room is None:
        return tried[0], peak(tried[0]), None
    found = []
    for rung in tried:
        found.append((peak(rung), rung))
        if found[-1][0] <= room:
            return rung, found[-1][0], True
    size, rung = min(found, key=lambda one: one[0])
    return rung, size, False


def run_of(
    method: str, shape: Shape, chosen: Mapping[str, Any], sequence: int, gpus: int, rung: Rung
) -> dict[str, Any]:
    """Return a step as arguments of `peftlab.memory.estimate`, as `pl.train` computes it.

    A decoder's frozen weights are in 16 bits, unless its config says that they are stored, and so loaded, in float32.
    """
    batch, again, way = rung
    decoder = shape.kind == "decoder"
    wide = str(shape.config.get("dtype") or shape.config.get("torch_dtype")) in ("float32", "torch.float32")
    return {
        "r": chosen.get("r"),
        "targets": targets_of(chosen),
        "batch": batch,
        "sequence": sequence,
        "precision": "bf16" if decoder and method != "full" and (not wide or method == "qlora") else "mixed",
        "autocast": True,
        "optimizer": "adamw-fused",
        "checkpointing": again,
        "chunked_loss": decoder,
        "library": "peftlab",
        **({"gpus": gpus, "parallel": way} if way else {}),
    }


def targets_of(chosen: Mapping[str, Any]) -> str | None:
    """Return the targets as `estimate` and the configs take them: None stands for the queries and values."""
    targets = chosen.get("targets")
    return None if targets == "query-value" else targets


def peaks(shape: Shape, method: str, chosen: Mapping[str, Any], sequence: int, gpus: int) -> Callable[[Rung], int]:
    """Return a function that estimates the peak of a step, in bytes."""

    def peak(rung: Rung) -> int:
        return estimate(shape, method, **run_of(method, shape, chosen, sequence, gpus, rung)).peak_bytes

    return peak
