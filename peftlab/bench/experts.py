"""What LoRA on a mixture of experts costs: `peftlab bench experts`, on one GPU.

A few blocks of Mixtral 8x7B's shape with random weights. Memory and time do not depend on what the weights are, and
they grow with the number of blocks. What a rank on the experts buys in quality cannot be shown with random weights.

Points: LoRA on the attention alone, on the experts alone, and on "all-linear" (attention, router and experts). In
Hugging Face peft and here; in 16 bits, and here also in 4 bits (peft 0.21 with bitsandbytes leaves fused experts in 16
bits); with and without gradient checkpointing. The rank is chosen so that about equally many parameters train.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.bench.fullsize import step_of
from peftlab.bench.models import gpu_for, held, lent, vocabulary_of
from peftlab.bench.timing import named
from peftlab.optional import require

Row = dict[str, Any]
SHAPE = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
# {what is adapted: (the config's fields, the rank)}. Per block, an adapter has 26,624 r parameters on the attention and
# 409,600 r on the eight experts. "all-linear" has 702,472 r: its fused gate and up have rank 2 r, and the router is in.
TARGETS: dict[str, tuple[Row, int]] = {
    "attention": ({"target_modules": ATTENTION}, 104),
    "experts": ({"target_modules": [], "target_parameters": EXPERTS}, 7),
    "all-linear": ({"target_modules": "all-linear"}, 4),
}


def points() -> Iterator[Row]:
    """Yield the runs in 16 bits first, so that each process makes each model once."""
    for four_bit, checkpointing, targets in product((False, True), (False, True), TARGETS):
        for library in ("peftlab",) if four_bit else ("peft", "peftlab"):
            if checkpointing and targets == "attention":
                continue
            yield {
                "section": "experts", "timed": True, "shape": SHAPE, "targets": targets, "r": TARGETS[targets][1],
                "library": library, "four_bit": four_bit, "batch": 2, "sequence": 1024,
                "checkpointing": checkpointing,
            }  # fmt: skip


def measure(point: Row, device: torch.device | None = None) -> list[Row]:
    """Measure one point: a training step's peak memory and time in bf16 autocast, with fused AdamW."""
    device = gpu_for(point, "a mixture of experts") if device is None else device
    with held(point["shape"], device, point["four_bit"], make=mixture) as model:
        torch.manual_seed(0)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        with lent(model, with_adapter, point) as wrapped:
            tokens = torch.randint(vocabulary_of(model), (point["batch"], point["sequence"]), device=device)
            row = step_of(wrapped, {"input_ids": tokens, "labels": tokens})
    told = {**point, "shape": "mixtral-8x7b", "layers": point["shape"]["num_hidden_layers"]}
    return named(told, [{"base_bytes": weights, **row}])


@torch.no_grad()
def mixture(shape: Row, device: torch.device, four_bit: bool) -> nn.Module:
    """Make the shape with random weights in bf16 on the device; with `four_bit`, its layers and experts in NF4."""
    import transformers

    config = transformers.AutoConfig.for_model(**shape)
    config.use_cache = False
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return (pl.quantize_model(model) if four_bit else model).requires_grad_(False)


def with_adapter(model: nn.Module, point: Row) -> nn.Module:
    """Return the model as the point's library adapts it."""
    targets, r = TARGETS[point["targets"]][0], point["r"]
    if point["library"] == "peft":
        peft = require("peft")

        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in targets.items()}
        return peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=2 * r, **lists))
    return pl.attach(model, pl.LoRAConfig(r=r, alpha=2 * r, **targets))
