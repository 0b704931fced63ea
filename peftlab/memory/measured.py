"""How far the estimate was from what GPUs measured, in the runs that are most like one: `measured_like`.

`measured.json` says of each run in six results files what it was, in the words of `described`, and how far off the
estimate is,

    error = estimated peak / measured peak - 1        a minus is an estimate that was too low

It also holds between which sizes all these runs lie, and the values of their settings.
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

from peftlab.catalogue import METHODS
from peftlab.checks import checked, one_of, shown, whole
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.memory.counting.config import MOST
from peftlab.memory.counting.methods import method_name
from peftlab.memory.counting.shapes import Shape, load_shape
from peftlab.memory.estimate import (
    LIBRARIES,
    OPTIMIZERS,
    PARALLEL,
    PRECISIONS,
    check_choices,
    checked_blocks,
    estimate,
    on_four_bits,
    uses_autocast,
)
from peftlab.memory.units import format_bytes

FILE = Path(__file__).with_name("measured.json")
FEW = 3  # fewer runs say too little of how far an error may go
BASES = {"bf16": "weights in 16 bits", "fp32": "weights in float32", "mixed": "float32 weights under autocast"}
# Optimisers whose states are the same: torch's AdamW in its three forms, and the 8-bit one with and without pages
STATES = {
    "adamw": "torch's adamw", "adamw-foreach": "torch's adamw", "adamw-fused": "torch's adamw",
    "paged-adamw8bit": "adamw8bit",
}  # fmt: skip
SIZES = {
    "r": "a rank of", "batch": "examples at once:", "sequence": "tokens each:", "gpus": "GPUs:",
    "parameters": "parameters of the model:", "peak_bytes": "a peak of",
}  # fmt: skip


class Agreement(NamedTuple):
    """How the estimate compares with the measured runs that are most like one.

    Attributes:
        runs: how many there are.
        lowest, highest, median: estimate / measured - 1 of these runs. A minus is an estimate that was too low.
        alike: what they have in common with the run asked for, in words.
        apart: what too few of them, or none, have in common with it besides.
        beyond: sizes of the run asked for that lie outside all measured runs, and settings that none of them has.
    """

    runs: int
    lowest: float
    highest: float
    median: float
    alike: tuple[str, ...]
    apart: tuple[str, ...]
    beyond: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = f"{self.runs} measured runs: {self.lowest:+.2%} to {self.highest:+.2%} ({', '.join(self.alike)})"
        apart = f"; not measured with {', '.join(self.apart)}" if self.apart else ""
        return told + apart + (f"; beyond what was measured: {', '.join(self.beyond)}" if self.beyond else "")


@checked("gpus", "peak_bytes")
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
    peak_bytes: int | None = None,
    **run: Any,
) -> Agreement:
    """Return how far the estimate was from the measured peak in the runs that are most like this one.

    First the runs that share the most important property are kept, then among them those that share the next one, and
    so on, in the order of `described`. A property that fewer than three of them share is passed over.

    Args:
        shape, method: as `estimate` takes them, and so are the others.
        peak_bytes: the estimated peak, if it is to be compared with the measured ones.
        run: the other arguments of `estimate`. They choose no runs. Those that no measured run comes near are told.

    Raises:
        PeftLabError: an unknown shape, method or argument, or a value that `estimate` does not take.

    >>> pl.memory.measured_like("llama-2-7b", "lora", checkpointing=True).alike[:4]
    ('one GPU', 'decoders', 'weights in 16 bits', 'lora')
    """
    known = inspect.signature(estimate).parameters
    for name in run:
        if name not in known:
            raise PeftLabError(f"{name} is no argument of a run.{did_you_mean(name, known)}")
    check_choices(**run, parallel=parallel, library=library, precision=precision, optimizer=optimizer)
    shape, method = load_shape(shape), method_name(method)
    checked_blocks(checkpointing, shape)
    for name in {"batch", "sequence"} & run.keys():
        whole(name, run[name], least=1, most=MOST)
    wanted = described(
        shape, method, precision=precision, optimizer=optimizer, checkpointing=checkpointing, library=library,
        four_bit=four_bit, gpus=gpus, parallel=parallel,
    )  # fmt: skip
    whole_run = {**run, "precision": precision, "four_bit": four_bit, "gpus": gpus}
    beyond = _beyond(sizes_of(shape, method, peak_bytes=peak_bytes, **whole_run), settings_of(method, **whole_run))
    found, alike, apart = _runs(), [], []
    for place, words in enumerate(wanted):
        same = [one for one in found if one[0][place] == words]
        if len(same) >= FEW:
            found = same
            alike.append(words)
        else:
            apart.append(words)
    errors = [error for _, error in found]
    middle = statistics.median(errors)
    return Agreement(len(errors), min(errors), max(errors), middle, tuple(alike), tuple(apart), beyond)


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


def sizes_of(shape: Any, method: str, **run: Any) -> dict[str, int]:
    """Return the sizes of a run, by the names of `SIZES`. One that it does not have is left out."""
    rank = METHODS[method_name(method)].default("r")
    given = {**_defaults(), "parameters": load_shape(shape).parameters, **run}
    given["r"] = None if rank is None else rank if given["r"] is None else given["r"]
    found = {name: whole(name, given.get(name), least=1, optional=True) for name in SIZES}
    return {name: size for name, size in found.items() if size is not None}


def settings_of(method: str, **run: Any) -> dict[str, Any]:
    """Return the settings of a run that are no sizes, and of which `described` says nothing."""
    looked_at = {*inspect.signature(described).parameters, *SIZES, "targets", "target_parameters", "transformers"}
    found = {name: run.get(name, usual) for name, usual in _defaults().items() if name not in looked_at}
    if found["autocast"] is None:
        found["autocast"] = uses_autocast(method, run.get("precision", "bf16"), run.get("four_bit"))
    return found


def _defaults() -> dict[str, Any]:
    arguments = inspect.signature(estimate).parameters.values()
    return {one.name: one.default for one in arguments if one.default is not one.empty}


def _beyond(sizes: dict[str, int], settings: dict[str, Any]) -> tuple[str, ...]:
    """Return in words what no measured run comes near."""
    content, told = _content(), []
    for name, size in sizes.items():
        lowest, highest = content["sizes"][name]
        if not lowest <= size <= highest:
            write = format_bytes if name == "peak_bytes" else "{:,}".format
            told.append(f"{SIZES[name]} {write(size)} (measured: {write(lowest)} to {write(highest)})")
    told += [f"{name}={shown(value)}" for name, value in settings.items() if value not in content["settings"][name]]
    return tuple(told)


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


@cache
def _runs() -> list[tuple[tuple[str, ...], float]]:
    """Return (what it was, error) of every run."""
    content = _content()
    words = content["words"]
    return [
        (tuple(words[number] for number in numbers), error)
        for rows in content["files"].values()
        for *numbers, error in rows
    ]
