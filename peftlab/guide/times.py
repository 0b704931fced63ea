"""How long a step takes, where exactly this step was measured on exactly this GPU. Nothing is scaled or guessed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from peftlab.kit.measurements import results

# Where steps of LoRA of all linear layers were timed, in the order of preference: as `pl.train` runs them by default,
# and on the plain path. (file, conditions on its rows)
SOURCES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("speed", {"rung": "fast"}),
    ("qlora_fullsize", {"kind": "step", "library": "peftlab", "adapter_dtype": "float32"}),
    ("lora_fullsize", {"section": "fullsize", "method": "lora", "library": "peftlab", "adapter_dtype": "float32"}),
)
GPUS = {"H100": "NVIDIA H100", "H200": "NVIDIA H200"}  # names of cards, and how the files' GPUs begin


class Timed(NamedTuple):
    """A measured step: what was run, its seconds (the median over processes), and the file and section."""

    card: str
    shape: str
    method: str
    r: int
    batch: int
    sequence: int
    checkpointing: bool
    seconds: float
    source: str


@cache
def timed() -> tuple[Timed, ...]:
    """Return all steps that were timed, the preferred source of each first."""
    found = []
    for file, conditions in SOURCES:
        measured = results(file)
        gpu = str(measured.provenance["gpu"])
        card = next(name for name, words in GPUS.items() if gpu.startswith(words))
        for row in measured.where(seconds=bool, **conditions):
            words = f"{file}, {row['section']}" + (f": rung {row['rung']}" if "rung" in row else "")
            found.append(
                Timed(card, row["shape"], row["method"], row["r"], row["batch"], row["sequence"],
                      row["checkpointing"], row["seconds"], words)
            )  # fmt: skip
    return tuple(found)


def time_of(
    card: str, shape: str, method: str, chosen: Mapping[str, Any], batch: int, sequence: int, checkpointing: bool
) -> Timed | None:
    """Return the measured step that is this one, or None: then the time is not measured."""
    if chosen.get("targets") != "all-linear":
        return None
    wanted = (card, shape, method, chosen.get("r"), batch, sequence, checkpointing)
    return next((one for one in timed() if one[:7] == wanted), None)
