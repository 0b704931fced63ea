"""What a model with adapters remembers about itself, and what it tells transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftlab.errors import PeftLabError, did_you_mean
from peftlab.hooks import Activity, is_adapter_name
from peftlab.quantization.weights import REPACKS, spared


@dataclass
class Record:
    """What `attach` noted about a model, so that `detach` can give it back."""

    activity: Activity = field(default_factory=Activity)
    configs: dict[str, Any] = field(default_factory=dict)
    trainable: dict[str, bool] = field(default_factory=dict)
    base_requires_grad: dict[str, bool] = field(default_factory=dict)
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)
    backup: dict[str, dict[str, list[torch.Tensor]]] = field(default_factory=dict)


def wrappings(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the model, then what torch.compile's and DistributedDataParallel's wrappers hold, outermost first."""
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        held = getattr(inner, "_orig_mod", None)
        if held is None and type(inner).__name__ in ("DistributedDataParallel", "DataParallel"):
            held = inner.module
        inner = held


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    return list(wrappings(model))[-1]


def record_of(root: nn.Module) -> Record | None:
    """What `attach` noted on this very module."""
    return root.__dict__.get("_peftlab")


def known(root: nn.Module, name: str) -> Record:
    """The record of a model that has this adapter, or the error that names those it has."""
    record = record_of(root)
    if record is None:
        raise PeftLabError(f"No adapter is attached to this model, so there is no {name!r}.")
    if name not in record.configs:
        there = ", ".join(repr(other) for other in record.configs)
        raise PeftLabError(f"There is no adapter {name!r}.{did_you_mean(str(name), record.configs)} Attached: {there}.")
    return record


def tensor_at(host: nn.Module, name: str) -> torch.Tensor | None:
    """The parameter or buffer with this name, which may lie deeper (`dense.weight`); None without one."""
    inner, _, name = name.rpartition(".")
    return getattr(host.get_submodule(inner), name, None)


def home(host: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a part of this host lives: its device, and its dtype (float32 beside 16-bit or quantised weights)."""
    own = getattr(host, "weight", None)
    tensor = own if isinstance(own, torch.Tensor) else next(host.parameters(), torch.empty(0))
    wide = tensor.is_floating_point() and tensor.dtype in (torch.float32, torch.float64)
    return tensor.device, tensor.dtype if wide else torch.float32


def tell_transformers(root: nn.Module, record: Record) -> None:
    """Keeps transformers and bitsandbytes working on an attached model, with the attributes that they read for that.

    `_keys_to_ignore_on_save`: `save_pretrained` of the model, or of one inside it, then holds no adapter keys.
    `is_quantized`: `Trainer` refuses "purely quantized models"; with an adapter the model is none, but the mark by
    which it would know (`_hf_peft_config_loaded`) also makes `save_pretrained` look for peft's own layers.
    `support_avx512bf16_for_cpu`: a 4-bit layer that has it repacks its weight at the first forward pass in eval mode,
    after which nothing passes a gradient through it and nothing can be merged into it.
    """
    untell_transformers(root, record)
    for path, layer in spared(root):
        record.attributes.append((path, REPACKS, layer.__dict__.get(REPACKS, _ABSENT)))
        setattr(layer, REPACKS, False)
    ours = [name for name, _ in (*root.named_parameters(), *root.named_buffers()) if is_adapter_name(name)]
    for path, module in root.named_modules():
        if not hasattr(module, "save_pretrained"):
            continue
        prefix = path + "." if path else ""
        mine = {name.removeprefix(prefix) for name in ours if name.startswith(prefix)}
        changes = {"_keys_to_ignore_on_save": set(getattr(module, "_keys_to_ignore_on_save", None) or ()) | mine}
        if getattr(module, "is_quantized", False):
            changes["is_quantized"] = False
        for attribute, value in changes.items():
            record.attributes.append((path, attribute, module.__dict__.get(attribute, _ABSENT)))
            setattr(module, attribute, value)


def untell_transformers(root: nn.Module, record: Record) -> None:
    """Gives back the attributes as they were before the last `tell_transformers`."""
    for path, attribute, value in record.attributes:
        module = unwrap(root.get_submodule(path))  # it may have been compiled since
        if value is _ABSENT:
            delattr(module, attribute)
        else:
            setattr(module, attribute, value)
    record.attributes.clear()


# A class, so that a deep copy of a model still finds it to be the same object.
class _ABSENT:
    pass
