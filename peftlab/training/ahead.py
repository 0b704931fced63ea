"""The parts of a run as batches. Another thread makes the next one during the backward pass.

The backward pass leaves Python alone for most of its time. So another thread can collate a batch meanwhile, send it to
the device, and look up its labels. What cannot be done there is done when the part's turn has come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from peftlab.fast.step import Batch
from peftlab.training.inputs import Examples
from peftlab.training.ranks import Ranks

SMALL = 1 << 24  # bytes; a larger batch is not sent to the GPU while the one before may still be there


class Prepared(NamedTuple):
    """Hold a batch, the same as the fast path reads it, whether it counts, and whether it is on the device."""

    batch: Any
    read: Batch | None
    counted: bool
    moved: bool


class Batches:
    """Make the batch of a part, here or ahead of its turn.

    Args:
        data, collate: of the run.
        moved: puts a batch on the device.
        device: of the model.

    Attributes:
        read: how the fast path reads a batch, while it computes the steps.
    """

    def __init__(
        self, data: Sequence[Any], collate: Callable, moved: Callable[[Any], Any], device: torch.device, ranks: Ranks
    ) -> None:
        self.data, self.collate, self.moved, self.device, self.ranks = data, collate, moved, device, ranks
        self.read: Callable[[Mapping[str, Any]], Batch | None] | None = None
        self._pool: Executor | None = None
        self._next: tuple[list[int], Future[Prepared]] | None = None

    @contextmanager
    def thread(self) -> Iterator[None]:
        """Have the other thread inside the block."""
        with ThreadPoolExecutor(1, "peftlab-batches") as self._pool:
            try:
                yield
            finally:
                self._pool, self._next = None, None

    def make(self, part: list[int]) -> Prepared:
        """Return the batch of a part, where the examples are."""
        mine, counted = self.ranks.share(part)
        batch = self.collate([self.data[index] for index in mine])
        return Prepared(batch, None if self.read is None else self.read(batch), counted, False)

    def begin(self, part: list[int]) -> None:
        """Let the other thread make the batch of the part that comes next.

        It does not where an example may be another each time it is read. That may draw random numbers, and their order
        counts.
        """
        if self._pool is not None and isinstance(self.data, Examples) and self.data.keeps(part):
            # a thread begins with a stream of its own, whose copies the stream of this one would not wait for
            stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
            self._next = part, self._pool.submit(self._there, part, stream)

    def get(self, part: list[int]) -> Prepared:
        """Return what `make` gives, from the other thread if that has it."""
        ahead, self._next = self._next, None
        if ahead is not None:
            known, prepared = ahead
            fault = prepared.exception()  # this waits
            if known == part and fault is None:
                return prepared.result()
        # What was wrong there is said here, when the part's turn has come. Or it is well now: there is memory again.
        return self.make(part)

    def _there(self, part: list[int], stream: torch.cuda.Stream | None) -> Prepared:
        """Make a batch in the other thread, and put it on the device where that may be done beside other work.

        A fast step may be recording its graph, and meanwhile no other thread may use the GPU. A batch of images would
        take memory when most of it is in use. Whether two threads may use one of Apple's GPUs is not known.
        """
        prepared = self.make(part)
        tensors = (leaf for leaf in tree_leaves(prepared.batch) if isinstance(leaf, Tensor))
        if self.read is not None or self.device.type not in ("cpu", "cuda") or sum(t.nbytes for t in tensors) > SMALL:
            return prepared
        with torch.cuda.stream(stream):
            return prepared._replace(batch=self.moved(prepared.batch), moved=True)
