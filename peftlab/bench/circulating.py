"""The figures in circulation for full fine-tuning at 7B, each measured as it counts: `peftlab bench circulating`.

Each point is a run of two steps like those of `bench memory`, at the shape of Llama-2-7B, with one sequence of 512
tokens and checkpointing. The points differ in what they hold for each parameter. The largest needs a GPU of more than
109 GB.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from peftlab.bench import memory
from peftlab.errors import PeftLabError
from peftlab.optional import require

SHAPE = "llama-2-7b"
# {what is held for each parameter: (bytes, precision, optimiser)}
CONVENTIONS = {
    "bf16 weights, gradients and states": (8, "bf16", "adamw"),
    "bf16 weights and gradients, float32 states": (12, "bf16", "adamw32bit"),
    "float32 weights, gradients and states, computing in bf16": (16, "mixed", "adamw"),
}


def points(shape: str = SHAPE) -> Iterator[dict[str, Any]]:
    """Yield one run for each convention, the smallest first."""
    for held, (each, precision, optimizer) in CONVENTIONS.items():
        run = memory.run(shape, "full", precision=precision, optimizer=optimizer, checkpointing=True)
        yield {**run, "section": "circulating", "held": held, "bytes_each": each}


def measure(point: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure one point, and return its row."""
    if not torch.cuda.is_available():
        raise PeftLabError("bench circulating measures a GPU's memory and needs a CUDA GPU.")
    try:
        steps = prepared(point, torch.device("cuda"))
        torch.cuda.reset_peak_memory_stats()
        memory.steps(steps, 2)
        peak = torch.cuda.max_memory_allocated()
        del steps
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return [{**point, "peak_bytes": peak}]


def prepared(point: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the parts of a step of this point."""
    model, batch = memory.build(point, device)
    return memory.phases(model, optimizer_of(point["optimizer"], memory.trained(model)), batch, memory.autocast(point))


def optimizer_of(name: str, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimiser. PyTorch's AdamW gives its states the weights' precision; bitsandbytes' keeps float32."""
    if name == "adamw32bit":
        return require("bitsandbytes").optim.AdamW32bit(trained, lr=1e-5)
    return memory.optimizer_of(name, trained)
