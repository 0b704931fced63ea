"""A group of one process, for tests of what happens under torch.distributed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed

ENDED = []


@contextmanager
def one_process() -> Iterator[None]:
    """A process group that has only this process.

    The group is destroyed, but its object is kept. Otherwise a DistributedDataParallel model that a test still holds
    would be the last to own it. Its end then waits, with Python's lock in its hands, for a thread of the group that may
    be waiting for this lock: once in many runs the test never ended.
    """
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    ENDED.append(distributed.group.WORLD)
    try:
        yield
    finally:
        distributed.destroy_process_group()
