"""Processes for tests. They are forked from one warm process, because each would need seconds to import torch.

The warm process belongs to one pytest worker and imports `warm` once. Mark tests that start children `@one_worker`, so
that no other worker needs a warm process too. Where a system cannot fork, every child is a fresh process instead.
"""

import contextlib
import faulthandler
import functools
import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import pytest
from patience import HUNG_SECONDS

HERE = Path(__file__).parent
one_worker = pytest.mark.xdist_group("children")


@functools.cache
def context():
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


class Child:
    """A process that calls a function of a module; the arguments and what it returns can be pickled."""

    def __init__(self, function, *arguments):
        self.pipe, theirs = context().Pipe()
        self.process = context().Process(target=work, args=(theirs, function, arguments))
        self.process.start()
        theirs.close()

    def result(self):
        """What the function returned, as soon as it has. The process stays until `status` is called."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise AssertionError(f"the process ended with {self.status()}; its stderr says why") from None

    def status(self) -> int:
        """The exit status once the process has ended: 0, 1 after an exception, or minus the signal that killed it."""
        self.pipe.close()
        self.process.join(HUNG_SECONDS)
        return self.process.exitcode

    def kill(self):
        self.process.kill()


def work(pipe, function, arguments):
    """Calls the function, sends what it returns and waits until the parent lets go.

    A process that hangs ends with the stack of each of its threads on stderr. One that wound down beside gloo's threads
    hung now and then on a busy machine. So it ends at once, without cleaning up.
    """
    faulthandler.dump_traceback_later(HUNG_SECONDS, exit=True)
    result = function(*arguments)
    with contextlib.suppress(EOFError, OSError):  # the parent closed its end: it wants no result, or it has all
        pipe.send(result)
        pipe.recv()
    os._exit(0)


def together(*calls):
    """Make several calls (function, arguments) at once, each in a process of its own, and return what they returned.

    No process leaves before all are done.
    """
    children = [Child(function, *arguments) for function, *arguments in calls]
    try:
        results = [child.result() for child in children]
        assert [child.status() for child in children] == [0] * len(children)
        return results
    finally:
        for child in children:
            child.kill()
