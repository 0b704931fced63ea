"""Times of a GPU's steps, from several fresh processes: the clock in three of them, the kernels' own time in one more.

The medians of two processes can lie further apart than the steps within one process. So `bench.run` measures every
timed point in `PROCESSES` processes, one after the other. In each of them the points take turns, in every second one in
reverse order (A B C, C B A, A B C).
One last process reads with torch's profiler how long the GPU's kernels were busy. It is a process of its own, because
a profiler that was on once makes later steps of its process slower.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from peftlab.errors import PeftLabError

Row = dict[str, Any]
PROCESSES = 3  # that read the clock
NOT_MEASURED = ("timed", "alone")  # of a point: they say how it is measured, not what
_profiles = False  # whether this process reads the kernels' own time


def begin(profiles: bool) -> None:
    """Say what this process reads: the clock, or the kernels' own time."""
    global _profiles
    _profiles = profiles


def profiling() -> bool:
    """Whether this process reads the kernels' own time, and not the clock."""
    return _profiles


def named(point: Row, rows: Iterable[Row]) -> list[Row]:
    """Return rows that also say what was measured."""
    told = {name: value for name, value in point.items() if name not in NOT_MEASURED}
    return [{**told, **row} for row in rows]


# ------------------------------------------------------------------------------------------------- in one process


def clock(step: Callable[[], Any], repeats: int = 5, warm_up: int = 2, prefix: str = "", details: bool = False) -> Row:
    """Measure a step as this process does. The peak of memory is counted from the warm-up on.

    Returns:
        a row with `seconds` (the median on the clock), `repeats`, and `busy_seconds` (in which at least one kernel of a
        single step ran). What this process does not measure is None. A prefix is put before the names. `details` adds
        those of `row_of`.
    """
    if profiling():
        timed(step, repeats=0, warm_up=warm_up)
        row = row_of([], kernels_of(step), repeats)
    else:
        row = row_of(timed(step, repeats, warm_up), [], repeats)
    names = row if details else ("seconds", "busy_seconds", "repeats")
    return {f"{prefix}{name}": row[name] for name in names}


def row_of(times: list[float], kernels: list[Kernel], repeats: int) -> Row:
    """Return the row of a step from its times on the clock, or from its kernels.

    Beside what `clock` tells: `fastest_step` and `slowest_step`, in seconds, and `kernels`, how many there are.
    """
    return {
        "seconds": statistics.median(times) if times else None,
        "busy_seconds": busy(kernels),
        "repeats": repeats,
        "fastest_step": min(times, default=None),
        "slowest_step": max(times, default=None),
        "kernels": len(kernels) or None,
    }


def timed(step: Callable[[], Any], repeats: int, warm_up: int) -> list[float]:
    """Return the seconds of each repeat, after a warm-up. The peak of memory is counted from the warm-up on."""
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(warm_up):
        step()
    times = []
    for _ in range(repeats):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return times


class BetweenCalls:
    """A training loop's callback: it reads the clock, or the kernels, between two of its calls after a warm-up."""

    def __init__(self, warm_up: int, repeats: int) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        self.warm_up, self.repeats, self.marks = warm_up, repeats, list[float]()
        self.wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        profiles = profiling() and torch.cuda.is_available()
        self.recorded = profile(activities=[ProfilerActivity.CUDA], acc_events=True) if profiles else None

    def __call__(self, *_: Any) -> None:
        """Note that a step has ended."""
        self.wait()
        self.marks.append(time.perf_counter())
        if self.recorded is not None and len(self.marks) == self.warm_up:
            self.recorded.start()
        elif self.recorded is not None and len(self.marks) == self.warm_up + 1:
            self.recorded.stop()

    def row(self) -> Row:
        """Return the row of the steps after the warm-up."""
        if profiling():
            return row_of([], kernels_in(self.recorded) if self.recorded is not None else [], self.repeats)
        spent = zip(self.marks[self.warm_up - 1 :], self.marks[self.warm_up :], strict=False)
        return row_of([after - before for before, after in spent], [], self.repeats)


class Kernel(NamedTuple):
    """What the GPU ran, from when to when, in seconds."""

    name: str
    start: float
    end: float


def kernels_of(step: Callable[[], Any]) -> list[Kernel]:
    """Return each kernel that the GPU runs in one step, copies among them; none without a GPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        step()
        return []
    torch.cuda.synchronize()  # the warm-up's kernels do not count
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
        step()
        torch.cuda.synchronize()
    return kernels_in(recorded)


def kernels_in(recorded: Any) -> list[Kernel]:
    """Return the GPU's kernels in a finished profile of torch."""
    return [
        Kernel(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in recorded.events()
        if str(event.device_type).endswith("CUDA") and not event.is_user_annotation
    ]


def busy(kernels: Iterable[Kernel]) -> float | None:
    """Return the seconds in which at least one kernel ran: kernels that overlap count once. None without kernels."""
    total, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        total += max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return total if until > float("-inf") else None


# --------------------------------------------------------------------------------------------- of several processes


def together(processes: list[list[Row]]) -> list[Row]:
    """Make one list of the rows that several processes measured of one point.

    A process without rows had nothing to measure. A time becomes the median of the processes' medians. Beside it stand
    `seconds_1`, `seconds_2` and so on, one of each process, and `seconds_least` and `seconds_most`. `processes` counts
    the processes. The same holds for a `ratio` of two times. Of other numbers that differ, a whole number becomes the
    largest one, and a fraction the median.

    Raises:
        PeftLabError: the processes measured different things.
    """
    found = [rows for rows in processes if rows]
    if len({len(rows) for rows in found}) > 1:
        raise PeftLabError(f"the processes measured {', '.join(str(len(rows)) for rows in found)} rows of one point.")
    return [_one(rows) for rows in zip(*found, strict=True)]


def _one(rows: tuple[Row, ...]) -> Row:
    row: Row = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if row.get(name) is not None]
        if name.endswith("seconds") or name == "ratio":
            row |= _spread(name, values)
            if len(values) > 1:
                row["processes"] = len(values)
        elif len({repr(value) for value in values}) <= 1:
            row[name] = values[0] if values else None
        elif name == "skipped":  # why something could not be measured may differ
            row[name] = "; ".join(dict.fromkeys(values))
        elif all(isinstance(value, int) for value in values):
            row[name] = max(values)
        elif all(isinstance(value, (int, float)) for value in values):
            row[name] = statistics.median(values)
        else:
            raise PeftLabError(f"the processes do not agree in {name!r}: {', '.join(map(repr, values))}.")
    return row


def _spread(name: str, values: list[float]) -> Row:
    spread: Row = {name: statistics.median(values) if values else None}
    if len(values) > 1:
        spread |= {f"{name}_{number}": value for number, value in enumerate(values, 1)}
        spread |= {f"{name}_least": min(values), f"{name}_most": max(values)}
    return spread
