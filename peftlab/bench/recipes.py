"""The measurements of the chapter on training recipes, but for the speed ladder (see `speed`).

Sections:
    tricks      what saves memory or time in a step at 7B: each trick alone, beside the same step without it
    pretrain    a small Llama from random weights: full training, low-rank updates, ReLoRA and GaLore
    policy      a policy gradient on a reward that a program checks, at three ranks
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.bench import fullsize, memory, pretraining, reward
from peftlab.bench.models import ALL_LINEAR, Row, gpu_for, held, lent, vocabulary_of
from peftlab.bench.timing import clock, named
from peftlab.training.packing import IGNORE, pack

# Tokens of eight examples of unequal length. Padded they fill 8 x 512 places, packed 2 x 896 without a gap.
LENGTHS = (512, 384, 256, 192, 160, 128, 96, 64)
# The step that each trick is measured beside: how it is made, in the words of `pl.memory.estimate`
PLAIN: Row = {
    "method": "lora", "r": 16, "targets": "all-linear", "batch": 4, "sequence": 512, "precision": "bf16",
    "autocast": True, "adapter_precision": "fp32", "attention": "sdpa", "checkpointing": False,
    "optimizer": "adamw-fused", "library": "peftlab",
}  # fmt: skip
FULL: Row = {"method": "full", "r": None, "targets": None, "batch": 1, "checkpointing": True, "library": "peft"}
TRICKS: dict[str, Row] = {
    "plain": {},
    "checkpointing": {"checkpointing": True},
    "accumulation": {"batch": 1, "parts": 4},
    "eager attention": {"attention": "eager"},
    "padded": {"batch": 8, "rows": "padded"},
    "packed": {"batch": 2, "sequence": 896, "rows": "packed"},
    "8-bit states": {"optimizer": "adamw8bit"},
    "bf16 adapters": {"autocast": False, "adapter_precision": "bf16"},
    "full": FULL,
    "full, 8-bit states": {**FULL, "optimizer": "adamw8bit"},
    "float32 weights": {"precision": "mixed"},
    "float32": {"precision": "fp32", "autocast": False},
}


def points() -> list[Row]:
    """Yield every point to measure."""
    return [*tricks(), *pretraining.points(), *reward.points()]


def tricks() -> Iterator[Row]:
    """Yield the plain step, and each trick alone. Points of one base stand together, so that it is made once."""
    for trick, changes in TRICKS.items():
        yield {"section": "tricks", "timed": True, "trick": trick, "shape": "llama-2-7b", "rows": "whole", "parts": 1,
               **PLAIN, **changes}  # fmt: skip


def measure(point: Row) -> list[Row]:
    """Measure one point, and return its rows."""
    if point["section"] != "tricks":
        return (reward if point["section"] == "policy" else pretraining).measure(point)
    dtype = torch.bfloat16 if point["precision"] == "bf16" else torch.float32
    with held(point["shape"], gpu_for(point, "a 7B model"), dtype=dtype) as model:
        return named(point, [trick(model, point)])


def trick(model: Any, point: Row) -> Row:
    """Measure one step, made as its point says: its peak of memory and its time."""
    torch.manual_seed(0)
    with lent(model, adapted, point) as ready:
        optimizer = memory.optimizer_of(point["optimizer"], memory.trained(ready))
        parts = batches(point, vocabulary_of(model), next(model.parameters()).device)

        def step() -> None:
            for batch in parts:
                with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=point["autocast"]):
                    loss = ready(**batch).loss / len(parts)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        spent = clock(step, repeats=3)
        model.set_attn_implementation("sdpa")
    tokens = sum(LENGTHS) if point["rows"] != "whole" else point["parts"] * point["batch"] * point["sequence"]
    return {"tokens": tokens, "peak_bytes": fullsize.peak(), **spent}


def adapted(model: Any, point: Row) -> nn.Module:
    """Return the model with what the point trains, and with its kind of attention."""
    model.set_attn_implementation(point["attention"])
    if point["method"] == "full":
        return model.requires_grad_(True)
    dtype = torch.bfloat16 if point["adapter_precision"] == "bf16" else torch.float32
    return pl.attach(model, pl.LoRAConfig(r=point["r"], alpha=32, target_modules=ALL_LINEAR), adapter_dtype=dtype)


def batches(point: Row, vocabulary: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Return the parts of one step's batch: whole rows of random tokens, or `LENGTHS` padded or packed."""
    if point["rows"] == "whole":
        tokens = torch.randint(vocabulary, (point["parts"], point["batch"], point["sequence"]), device=device)
        return [{"input_ids": part, "labels": part} for part in tokens]
    ids = torch.randint(vocabulary, (len(LENGTHS), max(LENGTHS)))
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORE)}
    if point["rows"] == "packed":
        batch = pack(batch)
        assert tuple(batch["input_ids"].shape) == (point["batch"], point["sequence"])
    return [{name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}]
