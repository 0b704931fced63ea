"""How many blocks a run must compute again in the backward pass, so that its step just fits the GPU.

    peak(k) with its margin <= memory,    the smallest such k    k: the blocks computed again, the first ones

Computing a block again costs a third more of its time, and keeping its activations costs memory. So as many blocks keep
theirs as there is room for. `peftlab.memory` estimates the peak for each k, with its measured margin. The blocks that
are computed again are the first ones: the backward pass begins at the last block, and the memory is fullest then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftlab.catalogue import METHODS, Method
from peftlab.core.checkpointing import blocks_of
from peftlab.core.records import record_of, unwrap
from peftlab.errors import PeftLabError
from peftlab.memory.cards import blocks_to_recompute, largest_estimate
from peftlab.memory.counting.shapes import load_shape
from peftlab.memory.counting.totals import count
from peftlab.memory.units import format_bytes
from peftlab.quantization.linear import Linear4bit
from peftlab.settings import Settings
from peftlab.training.chunked import CHUNK_BYTES, kernel_on
from peftlab.training.masters import need_masters

ATTENTIONS = {"sdpa": "sdpa", "eager": "eager", "flash_attention_2": "sdpa", "flash_attention_3": "sdpa"}


def choose_blocks(
    model: nn.Module, settings: Settings, device: torch.device, lengths: Sequence[int] | None, chunked: bool
) -> tuple[bool | int, str]:
    """Return (`checkpointing` for a run that asks for `"fit"`, the words of its report).

    Args:
        lengths: of the examples, in tokens; the longest decides.
        chunked: whether the loss is computed in chunks.
    """
    try:
        if device.type != "cuda":
            raise PeftLabError(f"the model is on {device.type}")
        if settings.compile:
            raise PeftLabError("what a compiled step keeps is not known")
        if model is not unwrap(model):
            raise PeftLabError(f"the model is wrapped in a {type(model).__name__}")
        if not lengths:
            raise PeftLabError("how long the examples are is not known")
        blocks = len(blocks_of(model))
        if not blocks:
            raise PeftLabError(f"{type(model).__name__} cannot compute some blocks again and keep others")
        run = described(model, settings, max(lengths), chunked)
        # the estimate counts a chunk of logits without a float32 copy
        copied = CHUNK_BYTES if chunked and kernel_on(device) is None else 0
        room = largest_estimate(memory_of(device) - copied)
        found = blocks_to_recompute(room, **run)
    except PeftLabError as reason:
        return True, f"every block is computed again: {reason}"
    if found is None:
        return True, f"every block is computed again, and even so the estimate is more than {format_bytes(room)}"
    told = f"{found} of {blocks} blocks are computed again, for an estimate within {format_bytes(room)}"
    return (found if found else False), told


def described(model: nn.Module, settings: Settings, sequence: int, chunked: bool) -> dict[str, Any]:
    """Return a run as arguments of `peftlab.memory.estimate`.

    Raises:
        PeftLabError: the estimator does not know the model or what it trains.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        raise PeftLabError(f"{type(model).__name__} has no config")
    method, options = _method(model)
    shape = load_shape(config.to_dict())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    counted = count(shape, method, **options).trainable
    found = sum(p.numel() for p in trained.values())
    if counted != found:
        raise PeftLabError(f"{found:,} parameters train, and {counted:,} are counted for {method}")
    frozen = [p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    kinds = frozen or [p.dtype for p in trained.values()]
    wide = max(kinds, key=kinds.count) == torch.float32
    autocast = settings.precision in ("bf16", "fp16")
    optimizer = {"adamw": "adamw-fused"}.get(settings.optimizer, settings.optimizer)
    return options | {
        "shape": shape,
        "method": method,
        "four_bit": in_four_bits(model),
        "batch": settings.batch_size,
        "sequence": sequence,
        "precision": ("mixed" if autocast else "fp32") if wide else "bf16",
        "optimizer": optimizer,
        "autocast": autocast,
        "adapter_precision": "fp32" if {p.dtype for p in trained.values()} == {torch.float32} else "bf16",
        "masters": need_masters(trained),
        "attention": ATTENTIONS.get(str(getattr(config, "_attn_implementation", "sdpa")), "eager"),
        "library": "peftlab",
        "chunked_loss": chunked,
    }


def _method(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return the name of a model's method, and its options for the estimator."""
    record = record_of(model)
    four_bit = in_four_bits(model)
    if record is None or not record.configs:
        if four_bit or not all(p.requires_grad for p in model.parameters()):
            raise PeftLabError("no adapter is attached, and not everything trains")
        return "full", {}
    if len(record.configs) > 1:
        raise PeftLabError("several adapters are attached")
    (config,) = record.configs.values()
    rows = {name: row for name, row in METHODS.items() if _is_of(config, row)}
    if not rows:
        raise PeftLabError(f"what a {type(config).__name__} keeps is not known")
    name = next((name for name, row in rows.items() if row.four_bit == four_bit), next(iter(rows)))
    return name, _options(config, rows[name])


def in_four_bits(model: nn.Module) -> bool:
    """Say whether layers of the model are held in four bits."""
    return any(isinstance(module, Linear4bit) for module in model.modules())


def _is_of(config: Any, row: Method) -> bool:
    if row.config is None or row.config.rpartition(":")[2] != type(config).__name__:
        return False
    return row.tensors is not None and all(getattr(config, name, value) == value for name, value in row.fixed.items())


def _options(config: Any, row: Method) -> dict[str, Any]:
    found = {}
    for option in row.options:
        if option.counted and hasattr(config, option.config_field):
            value = getattr(config, option.config_field)
            found[option.name] = tuple(value) if isinstance(value, (list, set)) else value
    return {name: value for name, value in found.items() if value is not None}


def memory_of(device: torch.device) -> int:
    """Return the bytes of a GPU that this process may fill: what is free, what torch holds, within its own limit."""
    free, total = torch.cuda.mem_get_info(device)
    limit = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    return min(int(limit * total), free + torch.cuda.memory_reserved(device))
