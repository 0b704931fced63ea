"""The fast path's step: LoRA on a Llama-like decoder, with the forward and the backward pass written by hand.

A plain step spends most of a GPU's time on casts, copies and small kernels between the large products. This one gives
the same loss and gradients (`tests/unit/test_fast.py` holds it to 1e-9 in float64) and does little else but the
products. It knows no run and no settings: it takes the parts of a model, `Decoder`, and a batch, and computes the
gradient. In the order in which they are best read:

- `groups`: LoRA as extra columns and rows of the frozen weight, and all that is trained as one flat tensor;
- `pieces`: what lies between the products, each one kernel; `kernels` has the one that is written in Triton;
- `layer`: one block forward and backward;
- `step`: the whole model, with the loss made in chunks, and the step as one CUDA graph for each shape of a batch.

Which models, runs and batches it takes is said in `peftlab.training.eligible` and `peftlab.training.fast_path`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from peftlab.core.records import placed, record_of
from peftlab.methods.lora import LoRALinear

# The linear layers of a block that read the same input: {group: (the module that holds them, their names)}
GROUPS = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "o": ("self_attn", ("o_proj",)),
    "gate_up": ("mlp", ("gate_proj", "up_proj")),
    "down": ("mlp", ("down_proj",)),
}


class Refused(Exception):
    """The reason why the fast path cannot take a model, a run or a batch."""


class Sizes(NamedTuple):
    """Heads of queries, heads of keys and values, numbers in a head, and the norms' epsilon."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float

    @property
    def split(self) -> list[int]:
        """Return how many heads q, k and v have, side by side."""
        return [self.heads, self.kv_heads, self.kv_heads]


@dataclass(frozen=True)
class BlockParts:
    """One block: {group: [(linear, its LoRA or None)]}, {norm: module or None}, and the attention's window."""

    groups: dict[str, list[tuple[nn.Linear, LoRALinear | None]]]
    norms: dict[str, nn.Module | None]
    window: int | None


@dataclass(frozen=True)
class Decoder:
    """The parts of a model that the fast path computes with."""

    embedding: nn.Embedding
    blocks: list[BlockParts]
    norm: nn.Module
    rotary: nn.Module
    head: nn.Linear
    sizes: Sizes


def loras_of(model: nn.Module) -> dict[str, LoRALinear]:
    """Return {path of a linear layer: its LoRA} of the one adapter that runs.

    Raises:
        Refused: something else runs or trains, or less than this LoRA does.
    """
    record = record_of(model)
    if record is None:
        raise Refused("no adapter is attached")
    activity = record.activity
    if not activity.running:
        raise Refused("its adapters are merged or disabled")
    if activity.rows is not None or list(activity.weights.values()) != [1.0]:
        raise Refused("not one adapter of weight 1 is active but a mixture, several or none")
    (name,) = activity.weights
    found: dict[str, LoRALinear] = {}
    for path, _, part in placed(model, name):
        if type(part) is not LoRALinear:
            where = path or "the model"
            raise Refused(f"{name!r} has a {type(part).__name__} on {where}, and LoRA on linear layers is computed")
        if not path.endswith(tuple(one for _, names in GROUPS.values() for one in names)):
            raise Refused(f"{name!r} adapts {path}, which is none of the seven projections of a block")
        if part.dropout:
            raise Refused(f"{name!r} has dropout, {part.dropout}")
        if part.lora_B_bias is not None:
            raise Refused(f"{name!r} has lora_bias")
        found[path] = part
    mine = {id(p): p for lora in found.values() for p in (lora.lora_A, lora.lora_B)}
    more = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in mine]
    if more:
        raise Refused(f"{len(more)} parameters train that are no LoRA on the seven projections; the first is {more[0]}")
    frozen = sum(not p.requires_grad for p in mine.values())
    if frozen:
        raise Refused(f"{frozen} matrices of its LoRA are frozen")
    kinds = {p.dtype for p in mine.values()}
    if len(kinds) > 1:
        raise Refused(f"its LoRA has matrices of several dtypes: {', '.join(sorted(map(str, kinds)))}")
    if kinds & {torch.bfloat16, torch.float16}:
        raise Refused(f"its LoRA is in {next(iter(kinds))}; in float32 this path keeps a 16-bit copy by itself")
    return found
