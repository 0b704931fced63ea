"""One run in several processes: what each of them does of a batch, and what they must agree on.

A model wrapped in DistributedDataParallel averages its gradients over the processes. Everything else a run needs is
here, and in a single process each of these is the identity.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from peftlab.core.records import wrappings


class Ranks:
    """The processes that train one model: `rank` of `world`, and `first` on the one that writes."""

    def __init__(self, model: nn.Module):
        self.model = next((one for one in wrappings(model) if isinstance(one, DistributedDataParallel)), None)
        self.rank = distributed.get_rank() if self.model is not None else 0
        self.world = distributed.get_world_size() if self.model is not None else 1
        self.first = self.rank == 0

    def share(self, items: list) -> tuple[list, bool]:
        """This process's items of a batch, and whether they count: one left without any repeats the first, for
        every process must take part in the averaging, and counts it as nothing."""
        mine = items[self.rank :: self.world]
        return (mine, True) if mine else (items[:1], False)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, of a value that needs no gradient."""
        value = value.detach().clone()
        if self.world > 1:
            distributed.all_reduce(value)
        return value

    def agree(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.world == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Go on when every process is here."""
        if self.world > 1:
            distributed.barrier()

    def unsynchronised(self, last: bool) -> AbstractContextManager:
        """Gradients are averaged once, in the last part of an accumulated batch."""
        return nullcontext() if last or self.model is None else self.model.no_sync()
