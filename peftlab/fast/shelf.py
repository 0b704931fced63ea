"""Keep the blocks' inputs from the forward pass to the backward pass, on the GPU or in the computer's main memory.

With checkpointing they are all that is kept of a block: 16 bits times tokens times hidden size. A copy to pinned memory
runs beside the products, on a stream of its own. One input is copied while the next block computes, and it comes back
while the block above it is run backward.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Shelf:
    """The inputs on the device, in the order of the blocks; they are taken in the opposite order."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    def put(self, x: Tensor) -> None:
        """Keep an input."""
        self.inputs.append(x)

    def take(self) -> Tensor:
        """Return the last input that is kept."""
        return self.inputs.pop()


class PinnedShelf(Shelf):
    """The inputs in pinned memory. `pinned` holds it from step to step."""

    def __init__(self, pinned: list[Tensor], side: torch.cuda.Stream) -> None:
        super().__init__()
        self.pinned, self.side = pinned, side
        self.copied: list[torch.cuda.Event] = []
        self.leaving: Tensor | None = None
        self.coming: tuple[Tensor, torch.cuda.Event] | None = None

    def put(self, x: Tensor) -> None:
        """Begin to copy an input, and let go of the one before, whose copy is done by now."""
        main, at = torch.cuda.current_stream(), len(self.copied)
        if at == len(self.pinned):
            self.pinned.append(torch.empty(x.shape, dtype=x.dtype, pin_memory=True))
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            self.pinned[at].copy_(x, non_blocking=True)
        if self.copied:
            main.wait_event(self.copied[-1])
        self.copied.append(self.side.record_event())
        self.leaving = x

    def take(self) -> Tensor:
        """Return the last input, and begin to fetch the one below it."""
        main = torch.cuda.current_stream()
        self.copied.pop()
        if self.leaving is not None:  # the topmost block's input is still here
            x, self.leaving = self.leaving, None
            main.wait_stream(self.side)
        else:
            assert self.coming is not None
            x, arrived = self.coming
            main.wait_event(arrived)
        self.coming = self._fetch(len(self.copied) - 1, like=x) if self.copied else None
        return x

    def _fetch(self, at: int, like: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        x = torch.empty_like(like)
        self.side.wait_stream(torch.cuda.current_stream())  # what had this memory before is done with it
        with torch.cuda.stream(self.side):
            x.copy_(self.pinned[at], non_blocking=True)
        return x, self.side.record_event()
