"""A model's persistent buffers: copies for a failed step, and what a checkpoint must hold of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SMALL_BUFFER = 65_536  # elements; a larger buffer is stored only when torch saw it written to


class Buffers:
    """A model's persistent buffers: what training changes without a gradient, such as running statistics."""

    def __init__(self, model: nn.Module):
        self._all: dict[str, Tensor] = {}
        for prefix, module in model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    self._all[f"{prefix}.{name}" if prefix else name] = buffer
        self._versions = {name: _version(buffer) for name, buffer in self._all.items()}

    def hold(self) -> dict[str, Tensor]:
        """Copies of the small ones, for `restore` when a step fails."""
        return {name: buffer.clone() for name, buffer in self._all.items() if buffer.numel() <= SMALL_BUFFER}

    def restore(self, values: dict[str, Tensor]) -> None:
        """Copy values into the buffers of these names."""
        with torch.no_grad():
            for name, value in values.items():
                self._all[name].copy_(value)

    def to_store(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: the small ones, and of the large ones (a 4-bit base, say) those written to."""
        return {
            name: buffer
            for name, buffer in self._all.items()
            if buffer.numel() <= SMALL_BUFFER or _version(buffer) != self._versions[name]
        }


def _version(tensor: Tensor) -> int:
    """How often torch saw the tensor written to in place (batch norm's own kernel does not say)."""
    return -1 if tensor.is_inference() else tensor._version
