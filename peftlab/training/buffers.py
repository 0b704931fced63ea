"""A model's persistent buffers: copies for a failed step, and those that a checkpoint must hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftlab.core.interface import Part

SMALL_BUFFER = 65_536  # elements; a larger buffer of the base is stored only if torch has seen a write to it


class Buffers:
    """A model's persistent buffers. Training changes them without gradients, as it does running statistics."""

    def __init__(self, model: nn.Module):
        self._all: dict[str, Tensor] = {}
        self._adapters: set[str] = set()  # names of buffers that belong to parts of adapters
        for prefix, module in model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    full = f"{prefix}.{name}" if prefix else name
                    self._all[full] = buffer
                    if isinstance(module, Part):
                        self._adapters.add(full)
        self._versions = {name: _version(buffer) for name, buffer in self._all.items()}

    def hold(self) -> dict[str, Tensor]:
        """Return copies of the small buffers, to `restore` if a step fails."""
        return {name: buffer.clone() for name, buffer in self._all.items() if buffer.numel() <= SMALL_BUFFER}

    def restore(self, values: dict[str, Tensor]) -> None:
        """Copy these values into the buffers with the same names."""
        with torch.no_grad():
            for name, value in values.items():
                self._all[name].copy_(value)

    def to_store(self) -> dict[str, Tensor]:
        """Return the buffers that a checkpoint must hold: all small ones, adapters', and those that were written to.

        The large buffers of a 4-bit base, for example, never change. An adapter's are made when it is attached, from
        random numbers perhaps.
        """
        return {
            name: buffer
            for name, buffer in self._all.items()
            if buffer.numel() <= SMALL_BUFFER or name in self._adapters or _version(buffer) != self._versions[name]
        }


def _version(tensor: Tensor) -> int:
    """Return how many in-place writes torch has counted. Batch norm's own kernel is not counted."""
    return -1 if tensor.is_inference() else tensor._version
