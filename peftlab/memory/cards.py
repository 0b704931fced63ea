"""What fits on which card: `fits`, `largest`, `what_fits`.

A card's memory is the number in its data sheet, in GB of 1e9 bytes. Drivers show a few percent more or less. A step
fits if its estimate with the margin is not larger. The margin is 3% of the estimate, and 0.7 GB for the CUDA context
with the code of the kernels (0.65 GB on an H100). It covers all 87 runs in `results/memory.json` and all 47 in
`results/memory_families.json`, and it predicts all 13 trials in `results/qlora.json` on a card of 48 GB: which ran, and
which did not. What torch reserves beyond its tensors is not added, because torch gives it back before it fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from peftlab.checks import checked, one_of, whole
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.memory.counting.config import MOST
from peftlab.memory.counting.shapes import load_shape
from peftlab.memory.estimate import estimate, longest

GB = 10**9
CARDS = {
    "T4": 16, "RTX 3060": 12, "RTX 4090": 24, "L4": 24, "A10G": 24, "RTX 5090": 32, "V100": 32, "A100 40GB": 40,
    "L40S": 48, "RTX A6000": 48, "A100 80GB": 80, "H100": 80, "H200": 141, "B200": 180,
}  # fmt: skip
TOO_LOW = 0.03  # what to add to an estimate
RUNS, LOWEST, HIGHEST = 134, -0.019, 0.011  # estimate / measured - 1 of those runs; a minus is an estimate too low
CONTEXT = 700_000_000  # bytes of the CUDA context and the kernels' code; an H100 held 649 million


def with_margin(peak: int) -> int:
    """Return what should be free on a card for a step with this estimated peak: 3% more, and 0.7 GB for the context.

    >>> pl.memory.cards.with_margin(10_000_000_000)
    11000000000
    """
    return int((1 + TOO_LOW) * peak) + CONTEXT


def largest_estimate(memory: int) -> int:
    """Return the largest estimate that fits, with its margin, into this many bytes: `with_margin` the other way round.

    >>> pl.memory.cards.largest_estimate(11_000_000_000)
    10000000000
    """
    return max(0, round((memory - CONTEXT) / (1 + TOO_LOW)))


def card_bytes(card: str) -> int:
    """Return the largest estimate that fits on a card: what is left of its memory after the margin.

    Raises:
        PeftLabError: the card is not known (with near matches).
    """
    for name, size in CARDS.items():
        if name.lower() == str(card).lower():
            return largest_estimate(size * GB)
    raise PeftLabError(f"Unknown card {card!r}.{did_you_mean(str(card), CARDS)} Known: {', '.join(CARDS)}.")


def that_hold(peak: int) -> list[str]:
    """Return the cards that hold a peak of this many bytes, the smallest first."""
    return [card for card in sorted(CARDS, key=CARDS.__getitem__) if peak <= card_bytes(card)]


@checked()
def fits(card: str, shape: Any, method: str = "lora", **run: Any) -> bool:
    """Say whether a step fits on a card. `run` takes the arguments of `estimate`.

    >>> pl.memory.fits("T4", "llama-2-7b", "lora"), pl.memory.fits("T4", "llama-2-7b", "qlora")
    (False, True)
    """
    return estimate(shape, method, **run).peak_bytes <= card_bytes(card)


@checked()
def what_fits(shape: Any, method: str = "lora", **run: Any) -> list[str]:
    """Return the cards on which a step fits, the smallest first. `run` takes the arguments of `estimate`.

    >>> pl.memory.what_fits("llama-2-7b", "full", optimizer="adamw")
    ['A100 80GB', 'H100', 'H200', 'B200']
    """
    return that_hold(estimate(shape, method, **run).peak_bytes)


@checked()
def blocks_to_recompute(room: int, shape: Any, method: str = "lora", **run: Any) -> int | None:
    """Return how many blocks must be computed again in the backward pass for a step to fit, or None if all is too few.

    Args:
        room: bytes that the estimate may have: `card_bytes` of a card, or `largest_estimate` of its memory.
        run: the arguments of `estimate`, without `checkpointing`.

    >>> pl.memory.blocks_to_recompute(15 * 10**9, "llama-2-7b", "lora", batch=1, sequence=512)
    12
    """
    room, shape = whole("room", room, least=0), load_shape(shape, run.pop("labels", None))
    if shape.layout is None:
        raise PeftLabError(f"{shape.name} is no decoder, and only of a decoder some blocks are computed again.")

    def fits(blocks: int) -> bool:
        return estimate(shape, method, **{**run, "checkpointing": blocks}).peak_bytes <= room

    few, enough = -1, shape.layout.layers  # the answer lies between, `few` excluded
    if not fits(enough):
        return None
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if fits(middle) else (middle, enough)
    return enough


@checked()
def largest(what: str, card: str, shape: Any, method: str = "lora", **run: Any) -> int:
    """Return the largest batch, or the longest sequence, that fits on a card; 0 if not even 1 fits.

    Args:
        what: `"batch"` or `"sequence"`. The other one is set by `run`.
        card: a name in `CARDS`.
        run: the arguments of `estimate`.

    >>> pl.memory.largest("batch", "T4", "llama-3.2-1b", "lora")
    7
    """
    what = one_of("what", what, ("batch", "sequence"))
    room, shape = card_bytes(card), load_shape(shape, run.pop("labels", None))
    most = MOST if what == "batch" else longest(shape, method, run.get("virtual_tokens", 20))

    def peak(size: int) -> int:
        return estimate(shape, method, **{**run, what: size}).peak_bytes

    return _last(lambda size: peak(size) - room, min(1025, most), most)


def _last(excess: Callable[[int], float], guess: int, most: int) -> int:
    """Return the last whole number up to `most` whose excess is not above zero; 0 if that of 1 is.

    The excess grows with the number, and almost in a straight line. So the next number to try is where the line through
    the last two crosses zero. Each third time the gap is halved instead, so that a bend cannot keep the search waiting.
    """
    before = (1, excess(1))
    if before[1] > 0:
        return 0
    low, high, tried = 1, most + 1, 0
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        now = (guess, excess(guess))
        low, high = (low, guess) if now[1] > 0 else (guess, high)
        rise, tried = now[1] - before[1], tried + 1
        if tried % 3 == 0 or not rise:
            guess = (low + high) // 2
        else:
            guess = guess - math.ceil(now[1] * (now[0] - before[0]) / rise)
        before = now
    return low
