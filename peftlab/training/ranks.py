"""One run in several processes: which share of a batch each one computes, and what they must agree on.

A model wrapped in DistributedDataParallel averages its gradients over the processes. The rest is here. In a single
process these functions change nothing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from peftlab.core.records import wrappings


class Ranks:
    """The processes that train one model. This one has the number `rank` of `world`; the `first` one writes files."""

    def __init__(self, model: nn.Module):
        self.model = next((one for one in wrappings(model) if isinstance(one, DistributedDataParallel)), None)
        self.rank = distributed.get_rank() if self.model is not None else 0
        self.world = distributed.get_world_size() if self.model is not None else 1
        self.first = self.rank == 0

    def share(self, items: list) -> tuple[list, bool]:
        """Return this process's items of a batch, and whether they count.

        Every process must take part in the averaging. A process without items therefore repeats the batch's first item,
        and that one does not count.
        """
        mine = items[self.rank :: self.world]
        return (mine, True) if mine else (items[:1], False)

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a value over all processes, without a gradient. In a single process it is the value."""
        value = value.detach()
        if self.world > 1:
            value = value.clone()
            distributed.all_reduce(value)
        return value

    def sum_of_counts(self, count: Tensor, counted: bool, device: torch.device) -> Tensor:
        """Return the labels of all processes, those of this one only if they count.

        In a single process a count stays where it is: on the CPU it can be read without waiting for the device.
        """
        count = count if counted and count.dtype != torch.bool else count * int(counted)
        return self.sum(count.to(device) if self.world > 1 else count)

    def agree(self, value: Any) -> Any:
        """Return the first process's value in every process."""
        if self.world == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Wait until every process has come to this point."""
        if self.world > 1:
            distributed.barrier()

    def unsynchronised(self, last: bool) -> AbstractContextManager:
        """Return a context in which gradients are not averaged, except in the last part of an accumulated batch."""
        return nullcontext() if last or self.model is None else self.model.no_sync()
