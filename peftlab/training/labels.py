"""Labels whose values are known on the CPU while the batch is on a GPU.

How many labels there are, and where, decides which logits a loss needs. Asking a GPU tensor for this makes the CPU wait
until the GPU has done all its work, and then the GPU waits for the CPU. But a batch is made on the CPU, so its labels
are known there. `moved` notes them at the labels on the GPU, and `readable` finds them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftlab.core.modes import to_device

NOTED = ("labels", "start_positions", "end_positions", "attention_mask")
NOTE = "_peftlab_on_cpu"  # a tensor on the device keeps its values and its version here


def moved(batch: Any, device: torch.device) -> Any:
    """Return a batch on the device. A mapping becomes a dict whose labels remember their values on the CPU."""
    if not isinstance(batch, Mapping):
        return to_device(batch, device)
    result = to_device(dict(batch), device)
    for name in NOTED:
        here, there = batch.get(name), result.get(name)
        if isinstance(here, Tensor) and isinstance(there, Tensor) and there is not here and not there.is_inference():
            setattr(there, NOTE, (here, there._version))
    return result


def sent(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Copy tensors of one shape and dtype to the device, without waiting for it.

    To a GPU they go in one piece and from pinned memory: from other memory a copy of more than 64 KiB would wait until
    the GPU has done the work before it.
    """
    if device.type != "cuda" or any(tensor.is_cuda for tensor in tensors):
        return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)
    return torch.stack(tensors).pin_memory().to(device, non_blocking=True).unbind()


def readable(labels: Tensor) -> Tensor:
    """Return labels on the CPU if their values are known there, and if not, the labels themselves.

    Labels that were written to since are not known.
    """
    here, version = getattr(labels, NOTE, (labels, None))
    return here if version is None or version == labels._version else labels
