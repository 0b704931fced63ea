"""The parts of a run as batches. Another thread makes the next one during the backward pass.

The backward pass leaves Python alone for most of its time. So another thread can collate a batch meanwhile, send it to
the device, and look up its labels. What cannot be done there is done when the part's turn has come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from peftlab.core.modes import tensors_in
from peftlab.errors import PeftLabError, held_back, out_of_memory, warn
from peftlab.fast.step import Batch
from peftlab.training.inputs import Examples
from peftlab.training.ranks import Ranks

MOST_MOVED_AHEAD = 1 << 24  # bytes of a batch; in the backward pass memory may be nearly full


class Prepared(NamedTuple):
    """Hold the batch of a part.

    Attributes:
        batch: what the collate gave.
        fast_batch: the same as the fast path reads it; None where the plain path computes the step.
        counted: whether it counts (see `Ranks.share`).
        on_device: whether it is on the model's device already.
    """

    batch: Any
    fast_batch: Batch | None
    counted: bool
    on_device: bool


class Batches:
    """Make the batch of a part, in its turn or ahead of it.

    Args:
        data: the training examples of the run.
        collate: list of examples -> batch.
        move: puts a batch on the model's device.
        device: the model's.
        ranks: which share of a part this process takes.

    Attributes:
        read_fast: how the fast path reads a batch; None while the plain path computes the steps.
    """

    def __init__(
        self, data: Sequence[Any], collate: Callable, move: Callable[[Any], Any], device: torch.device, ranks: Ranks
    ) -> None:
        self.data, self.collate, self.move, self.device, self.ranks = data, collate, move, device, ranks
        self.read_fast: Callable[[Mapping[str, Any]], Batch | None] | None = None
        self._pool: Executor | None = None
        self._next: tuple[list[int], Future[Prepared], list[str]] | None = None

    @contextmanager
    def thread(self) -> Iterator[None]:
        """Have the other thread inside the block."""
        with ThreadPoolExecutor(1, "peftlab-batches") as self._pool:
            try:
                yield
            finally:
                self._pool, self._next = None, None

    def make(self, part: list[int]) -> Prepared:
        """Return the batch of a part, and leave it where the examples are."""
        mine, counted = self.ranks.share(part)
        batch = self.collate([self.data[index] for index in mine])
        return Prepared(batch, None if self.read_fast is None else self.read_fast(batch), counted, False)

    def begin(self, part: list[int]) -> None:
        """Let the other thread make the batch of the part that comes next.

        It does so for plain dicts in a list. Other examples may draw random numbers when they are read, and so may a
        collate of the user's own (which gets no `Examples`). The order of such draws has to stay.
        """
        if self._pool is None or not isinstance(self.data, Examples) or not self.data.same_each_time(part):
            return
        # Each thread has a current stream of its own, at first the default one. Where this thread uses another, its
        # kernels would not wait for copies on the default stream.
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        messages: list[str] = []
        self._next = part, self._pool.submit(self._make_and_move, part, stream, messages), messages

    def get(self, part: list[int]) -> Prepared:
        """Return the batch of a part, from the other thread if that has made it.

        Raises:
            PeftLabError: something is wrong with an example, or with the batch.
        """
        ahead, self._next = self._next, None
        if ahead is None:
            return self.make(part)
        made, future, messages = ahead
        fault = future.exception()  # this waits
        for message in messages:
            warn(message)
        if made != part:
            return self.make(part)
        if fault is None:
            return future.result()
        if isinstance(fault, PeftLabError) or (isinstance(fault, Exception) and out_of_memory(fault) is not None):
            # A fault in the data is raised again, now in its own step. And for what found no memory there may be some.
            return self.make(part)
        raise fault

    def _make_and_move(self, part: list[int], stream: torch.cuda.Stream | None, messages: list[str]) -> Prepared:
        """Make a batch in the other thread, and move it, with three exceptions.

        - The fast path may be recording a CUDA graph. Meanwhile no other thread may use the GPU.
        - A large batch would need memory while the backward pass needs most of it.
        - On a device that is neither a CPU nor a CUDA GPU, such as Apple's, two threads were never tried.
        """
        with held_back(messages):
            prepared = self.make(part)
        size = sum(tensor.nbytes for tensor in tensors_in(prepared.batch))
        if self.read_fast is not None or size > MOST_MOVED_AHEAD or self.device.type not in ("cpu", "cuda"):
            return prepared
        # not torch.cuda.stream(None): that would start CUDA for a model on the CPU
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            return prepared._replace(batch=self.move(prepared.batch), on_device=True)
