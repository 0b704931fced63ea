"""Processes of one test that work together: none leaves before all are done, and one that hangs says where.

A process wound down beside gloo's threads hung now and then, on a busy machine; that is no part of what is tested.
"""

import faulthandler
import os
import subprocess
import sys
from pathlib import Path

from patience import HUNG_SECONDS

HERE = Path(__file__).parent


def run(*workers: list, **environment: str) -> None:
    """Runs Python with each worker's arguments, all at once; each is to call `arrive` and, at its end, `leave`."""
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    processes = [subprocess.Popen([sys.executable, *map(str, worker)], env=env, **pipe) for worker in workers]
    try:
        assert [process.stdout.readline() for process in processes] == ["done\n"] * len(processes)
        assert [process.communicate(timeout=HUNG_SECONDS) and process.returncode for process in processes] == [0] * len(
            processes
        )
    finally:
        for process in processes:
            process.kill()


def arrive() -> None:
    """Called first: should the process hang, it ends with the stack of each of its threads on stderr."""
    faulthandler.dump_traceback_later(HUNG_SECONDS, exit=True)


def leave() -> None:
    """Called last: waits until all the others are done, then ends at once."""
    print("done", flush=True)
    sys.stdin.read()
    os._exit(0)
