"""Set train or eval mode for a while, and find where a model computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftlab.core.records import as_transformer, own_tensor, unwrap


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put the model in train or eval mode inside the block, and give every module its own mode back after it.

    One flag is not enough: an encoder may stay in eval mode while the head above it is in train mode.
    """
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


def device_of(model: nn.Module) -> torch.device:
    """Return the device that the model's inputs must be on: that of its input embedding, or of its first tensor."""
    core = unwrap(model)
    try:
        return own_tensor(as_transformer(core).get_input_embeddings(), "weight").device
    except (AttributeError, NotImplementedError):  # no transformers model, or one without an embedding
        parameter = next(core.parameters(), None)
        return (next(core.buffers(), torch.empty(0)) if parameter is None else parameter).device


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on the device, also those in mappings, lists and tuples in it.

    Mappings become dicts. What has a `to` of its own uses it, such as torch's `PackedSequence`. Other values stay as
    they are.
    """
    if isinstance(batch, torch.Tensor):
        if device.type == "cuda" and batch.device.type == "cpu":
            batch = batch.pin_memory()  # a GPU copies from pinned memory while the CPU goes on
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if hasattr(batch, "to"):
        return batch.to(device)
    if type(batch) in (list, tuple):
        return type(batch)(to_device(value, device) for value in batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    return batch


def tensors_in(batch: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a batch, also those in mappings, lists and tuples in it."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_in(value)
