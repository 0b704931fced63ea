"""One training step, and one forward pass, of the Llama-2-7B shape with random weights: memory and time on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.bench.models import ALL_LINEAR, gpu_for, held, lent, vocabulary_of
from peftlab.bench.timing import clock, named
from peftlab.optional import require

Adapt = Callable[[nn.Module, dict[str, Any]], nn.Module]


def points() -> Iterator[dict[str, Any]]:
    """Yield training runs (full, LoRA in peft and here, 16-bit adapters), then forward passes of base and LoRA."""
    for batch, checkpointing in ((1, True), (1, False), (4, True), (4, False)):
        yield train("full", "transformers", batch, checkpointing)
        for library in ("peft", "peftlab"):
            yield train("lora", library, batch, checkpointing, r=16, adapter_dtype="float32")
    yield train("lora", "peftlab", 4, True, r=16, adapter_dtype="bfloat16")
    yield train("lora", "peftlab", 4, True, r=256, adapter_dtype="float32")
    yield {"section": "latency", "timed": True, "shape": "llama-2-7b"}


def train(method: str, library: str, batch: int, checkpointing: bool, **lora: Any) -> dict[str, Any]:
    """Describe one training step to measure."""
    return {
        "section": "fullsize", "timed": True, "shape": "llama-2-7b", "method": method, "library": library,
        "batch": batch, "sequence": 512, "checkpointing": checkpointing, **lora,
    }  # fmt: skip


def measure(point: dict[str, Any], adapt: Adapt | None = None) -> list[dict[str, Any]]:
    """Measure one point, and return its rows. `adapt(model, point)` prepares the model; by default `with_adapter`."""
    with held(point["shape"], gpu_for(point, "a 7B model")) as model:
        if point["section"] == "fullsize":
            return named(point, [training_step(model, point, adapt or with_adapter)])
        return named(point, forward_passes(model))


def training_step(model: nn.Module, point: dict[str, Any], adapt: Adapt) -> dict[str, Any]:
    """Measure a step's peak memory and time: the weights as they are, bf16 autocast, fused AdamW."""
    torch.manual_seed(0)
    with lent(model, adapt, point) as wrapped:
        device = next(model.parameters()).device
        tokens = torch.randint(vocabulary_of(model), (point["batch"], point["sequence"]), device=device)
        row = step_of(wrapped, {"input_ids": tokens, "labels": tokens})
    seconds = row["seconds"]
    return {**row, "tokens_per_second": tokens.numel() / seconds if seconds else None}


def step_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Measure a training step: how many parameters it trains, its peak, and its time."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    kind = batch["input_ids"].device.type

    def step() -> None:
        with torch.autocast(kind, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    spent = clock(step)
    return {"trainable": sum(parameter.numel() for parameter in trained), "peak_bytes": peak(), **spent}


def peak() -> int:
    """Return the most bytes that tensors held since the warm-up began; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def with_adapter(model: nn.Module, point: dict[str, Any]) -> nn.Module:
    """Return the model as the point's library prepares it: LoRA on all seven linear layers, or all weights train."""
    if point["method"] == "full":
        return model.requires_grad_(True)
    if point["library"] == "peft":
        peft = require("peft")

        return peft.get_peft_model(model, peft.LoraConfig(r=point["r"], lora_alpha=32, target_modules=list(ALL_LINEAR)))
    config = pl.LoRAConfig(r=point["r"], alpha=32, target_modules=ALL_LINEAR)
    return pl.attach(model, config, adapter_dtype=getattr(torch, point["adapter_dtype"]))


@torch.no_grad()
def forward_passes(model: nn.Module, lengths: tuple[int, ...] = (1, 512)) -> Iterator[dict[str, Any]]:
    """Time one forward pass at batch 1: the base, with LoRA attached, and merged."""
    torch.manual_seed(0)
    device = next(model.parameters()).device
    model.eval()
    for state in ("base", "attached", "merged"):
        if state == "attached":
            config = pl.LoRAConfig(r=16, alpha=32, target_modules=ALL_LINEAR)
            pl.attach(model, config, adapter_dtype=torch.bfloat16)
        elif state == "merged":
            pl.merge(model, unload=True)
        for count in lengths:
            tokens = torch.randint(vocabulary_of(model), (1, count), device=device)
            yield {"state": state, "tokens": count, **clock(partial(model, input_ids=tokens), 10, 3)}
