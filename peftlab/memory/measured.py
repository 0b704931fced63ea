"""How far the estimate was from what GPUs measured, in the runs that are most like one: `measured_like`.

`measured.json` says of each run in six results files what it was, in the words of `described`, and how far off the
estimate is,

    error = estimated peak / measured peak - 1        a minus is an estimate that was too low

`python tools/memory_errors.py` makes it from the results files. A test computes errors again.
"""

from __future__ import annotations

import inspect
import json
import os
import statistics
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from peftlab.checks import checked, one_of, whole
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.memory.counting.methods import method_name
from peftlab.memory.counting.shapes import Shape, load_shape
from peftlab.memory.estimate import LIBRARIES, MOST, OPTIMIZERS, PARALLEL, PRECISIONS, estimate, on_four_bits

FILE = Path(__file__).with_name("measured.json")
FEW = 3  # fewer runs say too little of how far an error may go
BASES = {"bf16": "weights in 16 bits", "fp32": "weights in float32", "mixed": "float32 weights under autocast"}
# Optimisers whose states are the same: torch's AdamW in its three forms, and the 8-bit one with and without pages
STATES = {
    "adamw": "torch's adamw", "adamw-foreach": "torch's adamw", "adamw-fused": "torch's adamw",
    "paged-adamw8bit": "adamw8bit",
}  # fmt: skip


class Agreement(NamedTuple):
    """How the estimate compares with the measured runs that are most like one.

    Attributes:
        runs: how many there are.
        lowest, highest, median: estimate / measured - 1 of these runs. A minus is an estimate that was too low.
        alike: what they have in common with the run asked for, in words.
        apart: what too few of them, or none, have in common with it besides.
    """

    runs: int
    lowest: float
    highest: float
    median: float
    alike: tuple[str, ...]
    apart: tuple[str, ...]

    def __str__(self) -> str:
        told = f"{self.runs} measured runs: {self.lowest:+.2%} to {self.highest:+.2%} ({', '.join(self.alike)})"
        return f"{told}; not measured with {', '.join(self.apart)}" if self.apart else told


@checked("gpus")
def measured_like(
    shape: str | os.PathLike[str] | dict | Shape,
    method: str = "lora",
    *,
    precision: str = "bf16",
    optimizer: str = "adamw",
    checkpointing: bool | int = False,
    library: str = "peft",
    four_bit: bool | None = None,
    gpus: int = 1,
    parallel: str = "ddp",
    **run: Any,
) -> Agreement:
    """Return how far the estimate was from the measured peak in the runs that are most like this one.

    First the runs that share the most important property are kept, then among them those that share the next one, and
    so on, in the order of `described`. A property that fewer than three of them share is passed over.

    Args:
        shape, method: as `estimate` takes them, and so are the others.
        run: the other arguments of `estimate`. Errors depend little on them, so they are not looked at.

    Raises:
        PeftLabError: an unknown shape, method or argument, or a value that `estimate` does not take.

    >>> pl.memory.measured_like("llama-2-7b", "lora", checkpointing=True).alike[:4]
    ('one GPU', 'decoders', 'weights in 16 bits', 'lora')
    """
    known = inspect.signature(estimate).parameters
    for name in run:
        if name not in known:
            raise PeftLabError(f"{name} is no argument of a run.{did_you_mean(name, known)}")
    wanted = described(
        shape, method, precision=precision, optimizer=optimizer, checkpointing=checkpointing, library=library,
        four_bit=four_bit, gpus=gpus, parallel=parallel,
    )  # fmt: skip
    found, alike, apart = _runs(), [], []
    for place, words in enumerate(wanted):
        same = [one for one in found if one[0][place] == words]
        if len(same) >= FEW:
            found = same
            alike.append(words)
        else:
            apart.append(words)
    errors = [error for _, error in found]
    return Agreement(len(errors), min(errors), max(errors), statistics.median(errors), tuple(alike), tuple(apart))


def described(
    shape: Any, method: str, *, precision: str = "bf16", optimizer: str = "adamw", checkpointing: bool | int = False,
    library: str = "peft", four_bit: bool | None = None, gpus: int = 1, parallel: str = "ddp",
) -> tuple[str, ...]:  # fmt: skip
    """Return what a run is in words, the most important first: what two runs must share to be alike."""
    shape, method = load_shape(shape), method_name(method)
    experts = any(module.kind == "experts" for module in shape.modules)
    several = whole("gpus", gpus, least=1, ceiling=MOST) > 1
    return (
        one_of("parallel", parallel, PARALLEL).upper() if several else "one GPU",
        "mixtures of experts" if experts else f"{shape.kind}s",
        "a base in four bits" if on_four_bits(method, four_bit) else BASES[one_of("precision", precision, PRECISIONS)],
        "lora" if method == "qlora" else method,  # it is LoRA on a base in four bits
        "activations computed again" if checkpointing else "activations kept",
        STATES.get(one_of("optimizer", optimizer, OPTIMIZERS), optimizer),
        f"the layers of {one_of('library', library, LIBRARIES)}",
    )


@cache
def _runs() -> list[tuple[tuple[str, ...], float]]:
    """Return (what it was, error) of every run."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    words = content["words"]
    return [
        (tuple(words[number] for number in numbers), error)
        for rows in content["files"].values()
        for *numbers, error in rows
    ]
