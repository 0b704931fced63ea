"""Measurements that take too long for a notebook: `peftlab bench TOPIC --out FILE`.

A topic is a module here with `points()` (dicts that say what to measure, in order) and `measure(point) -> list[dict]`
(rows). Points are measured in processes of their own, in three parts:

1. points that may share the machine, in `jobs` processes;
2. points with `alone`, one after the other in one process;
3. points with `timed`, in several fresh processes (see `timing`). The timed points of a section are one comparison: in
   each process they take turns, in every second one from the last to the first.

A topic may also have `follow_up(rows) -> list[dict]`: the points that follow from the rows found so far, for example
more seeds at the rate that was best. It is asked again after each point, and what follows is measured next. It is only
asked about points that may share the machine.

Finished points are kept in FILE.partial, so a killed run continues where it stopped, also on another host with the same
GPU and the same versions. Each row names its run: the host and the day. A comparison is always of one run.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import multiprocessing
import os
import platform
import secrets
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import peftlab
from peftlab.bench import timing
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.kit import measurements
from peftlab.progress import Bar

TOPICS = (
    "memory", "lora", "family", "regret", "comparison", "qlora", "prompts", "adapters", "experts", "parallel",
    "circulating", "recipes", "speed", "beyond",
)  # fmt: skip
BEGINNING = b'{"gpu": '  # of FILE.partial
FORM = 2  # of FILE.partial
LIBRARIES = ("torch", "transformers", "peft", "peftlab", "bitsandbytes", "triton", "unsloth", "trl")
KERNELS = timing.PROCESSES + 1  # the number of the process that reads the kernels' own time

Point = dict[str, Any]
Rows = list[dict[str, Any]]


def run(topic: str, out: str | os.PathLike, *, only: Iterable[str] | None = None, jobs: int = 1) -> Path:
    """Measure a topic on this machine and write its results file, with provenance.

    Args:
        topic: what to measure.
        out: the file to write. FILE.partial beside it keeps finished points until all are done.
        only: the sections of the topic to measure; `None` for all.
        jobs: the number of processes for points that may share the machine. The others run after them.

    Raises:
        PeftLabError: an unknown topic or section (with near matches), a folder that does not exist, or a FILE.partial
            of another GPU or other versions. Or some points failed: then all others are measured first, and the same
            command tries the failed ones again.
    """
    if topic not in TOPICS:
        raise PeftLabError(f"There is no bench {topic!r}; there is {', '.join(TOPICS)}.{did_you_mean(topic, TOPICS)}")
    out = Path(out)
    if not out.parent.is_dir():
        raise PeftLabError(f"The folder {str(out.parent)!r} does not exist; make it first.")
    if out.is_dir() or (out.exists() and not _is_results(out)):
        raise PeftLabError(f"{out} is there and holds no results of a bench; --out would overwrite it. Give another.")
    module = import_module(f"peftlab.bench.{topic}")
    points = list(module.points())
    sections = list(dict.fromkeys(point["section"] for point in points))
    only = tuple(only or ())  # it is read more than once
    for section in only:
        if section not in sections:
            hint = did_you_mean(section, sections)
            raise PeftLabError(f"bench {topic} has no section {section!r}; it has {', '.join(sections)}.{hint}")
    points = [point for point in points if not only or point["section"] in only]

    partial = Partial(out.with_name(out.name + ".partial"), provenance())
    every = units(followed(module, points, partial))
    todo = [unit for unit in every if not partial.has(unit, every)]
    failed: dict[str, str] = {}

    def more() -> list[Unit]:
        """Return what follows from what is done now, and is not done itself."""
        new = followed(module, points, partial)[len(points) :]
        return [unit for unit in units(new) if not partial.has(unit, [])]

    with Bar(len(every), f"bench {topic}", unit="part", initial=len(every) - len(todo)) as bar:
        for unit, found in measured(module, todo, jobs, more):
            errors = {key(p): e for p, e in zip(unit.points, found, strict=True) if isinstance(e, Exception)}
            failed |= {name: f"{name}: {type(error).__name__}: {error}" for name, error in errors.items()}
            if not errors:
                partial.add(unit, found)
            bar.update(note=unit.section)
    if failed:
        told = "\n".join(failed.values())
        raise PeftLabError(f"{len(failed)} of {len(points)} points failed; {partial.file} keeps the others.\n{told}")
    points = followed(module, points, partial)
    rows = list(partial.rows(points, units(points)))
    measurements.write(out, topic, partial.provenance(rows), rows)
    partial.file.unlink(missing_ok=True)
    return out


class Unit(NamedTuple):
    """What is measured and kept as a whole: one point, or the timed points of a section in one process."""

    points: tuple[Point, ...]
    process: int | None  # its number; None for a point that is not timed

    @property
    def section(self) -> str:
        """The section of all its points."""
        return self.points[0]["section"]

    @property
    def name(self) -> str:
        """A text by which a later run recognises it."""
        return key(self.points[0]) if self.process is None else key({"process": self.process, "of": self.points})


def units(points: list[Point]) -> list[Unit]:
    """Return all units in the order of measuring: points that are not timed, then process after process."""
    timed: dict[str, list[Point]] = {}
    for point in points:
        if point.get("timed"):
            timed.setdefault(point["section"], []).append(point)
    return [
        *(Unit((point,), None) for point in points if not point.get("timed")),
        *(Unit(tuple(those), process) for process in range(1, KERNELS + 1) for those in timed.values()),
    ]


def followed(module: Any, points: list[Point], partial: Partial) -> list[Point]:
    """Return the points, and behind them those that follow from the rows that are there now."""
    follow_up = getattr(module, "follow_up", None)
    every, known = list(points), {key(point) for point in points}
    while follow_up is not None:
        new = [point for point in follow_up(partial.found(every)) if key(point) not in known]
        if not new:
            break
        every += new
        known |= {key(point) for point in new}
    return every


def measured(
    module: Any, todo: list[Unit], jobs: int, more: Callable[[], list[Unit]]
) -> Iterator[tuple[Unit, list[Rows | Exception]]]:
    """Yield (unit, what came of each of its points): first what may share the machine, then each other point alone.

    `more()` is asked after each unit that may share the machine; what it returns is measured before the others.
    A point that fails yields its exception, so that one out-of-memory error does not waste the hour that the others
    took. A comparison in which a point failed is not measured in further processes.
    """
    context = multiprocessing.get_context("spawn")
    for alone in (False, True):
        waiting = [u for u in todo if u.process is None and bool(u.points[0].get("alone")) == alone]
        workers = 1 if alone else jobs
        if waiting:
            begun = context.Value("i", 0)
            with ProcessPoolExecutor(workers, context, initializer=take_share, initargs=(begun, workers)) as pool:
                if alone:
                    yield from one_by_one(pool, module, waiting)
                else:
                    yield from side_by_side(pool, module, waiting, workers, more)
    broken: set[str] = set()
    for process in range(1, KERNELS + 1):
        waiting = [unit for unit in todo if unit.process == process and unit.section not in broken]
        if waiting:
            with ProcessPoolExecutor(1, context, initializer=timing.begin, initargs=(process == KERNELS,)) as pool:
                for unit, found in one_by_one(pool, module, waiting):
                    broken |= {unit.section for each in found if isinstance(each, Exception)}
                    yield unit, found


def one_by_one(pool: Executor, module: Any, waiting: list[Unit]) -> Iterator[tuple[Unit, list[Rows | Exception]]]:
    """Measure all points in turn, in one process. In every second process the timed points come in reverse order.

    So no point always follows the same one, or always runs on a card that has just grown warm.
    """
    for unit in waiting:
        turn = -1 if unit.process is not None and unit.process % 2 == 0 else 1
        found = [outcome(pool.submit, module.measure, point) for point in unit.points[::turn]]
        yield unit, found[::turn]


def side_by_side(
    pool: Executor, module: Any, waiting: list[Unit], workers: int, more: Callable[[], list[Unit]]
) -> Iterator[tuple[Unit, list[Rows | Exception]]]:
    """Measure units of one point each, so many at once. What `more()` adds comes next."""
    waiting, running, known = list(waiting), dict[Future, Unit](), {unit.name for unit in waiting}
    while waiting or running:
        while waiting and len(running) < workers:
            unit = waiting.pop(0)
            try:
                running[pool.submit(module.measure, unit.points[0])] = unit
            except BrokenExecutor as error:  # a process was killed, for example for its memory
                yield unit, [error]
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), [outcome(lambda future: future, future)]
            new = [unit for unit in more() if unit.name not in known]
            waiting[:0] = new
            known |= {unit.name for unit in new}


def outcome(submit: Callable[..., Future], *arguments: Any) -> Rows | Exception:
    """Return the rows of a point, or the exception that it ended in."""
    try:
        return submit(*arguments).result()
    except Exception as error:
        return error


def take_share(begun: Any, jobs: int) -> None:
    """Give a process its share of the machine: a part of the cores, and the next GPU.

    `begun` counts the processes. Without a share, each would start as many threads as there are cores.
    """
    import torch

    with begun.get_lock():
        number = begun.value
        begun.value += 1
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def key(point: Any) -> str:
    """Return a point as text, by which a later run recognises it."""
    return json.dumps(point, sort_keys=True)


class Partial:
    """FILE.partial: a first line that says what it was measured with, then a line for each run and each finished unit.

    A run is one host on one day. Units of several runs may lie in one file, but a comparison needs its units of all
    processes from one run.
    """

    def __init__(self, file: Path, here: dict[str, Any]) -> None:
        """Read the units that earlier runs finished. Ignore a line that a kill cut short.

        Raises:
            PeftLabError: the units in it were measured on another GPU or with other versions than `here`.
        """
        self.file, self.here = file, here
        self.done: dict[str, dict[str, list[Any]]] = {}  # by the unit's name, then by run
        self.runs: dict[str, dict[str, Any]] = {}
        self.head = {"gpu": here["gpu"], "versions": here["versions"], "form": FORM}
        now = {name: here[name] for name in measurements.RUN}
        first, *lines = list(self._lines()) or [None]
        if first is None:
            begun = file.read_bytes() if file.is_file() else b""
            if not (begun.startswith(BEGINNING) or BEGINNING.startswith(begun)):
                raise PeftLabError(f"{file} holds no points of a bench. Move it away, or use another --out.")
            file.unlink(missing_ok=True)  # killed before its first line was whole
        elif first != self.head:
            before = first if isinstance(first, dict) else {}
            changed = [name for name in self.head if before.get(name) != self.head[name]]
            told = "; ".join(f"{name} was {before.get(name)}, is now {self.head[name]}" for name in changed)
            raise PeftLabError(
                f"{file} holds points that were measured on another GPU or with other versions ({told}). "
                "Delete it to start again, or use another --out."
            )
        for line in lines:
            self.runs[line["run"]] = line["of"]
            self.done.setdefault(line["name"], {})[line["run"]] = line["found"]
        same = [run for run, told in self.runs.items() if told == now]
        self.run = same[0] if same else secrets.token_hex(3)
        self.runs[self.run] = now

    def has(self, unit: Unit, every: list[Unit]) -> bool:
        """Whether a unit need not be measured: it was in this run, or its whole comparison was in another one."""
        if unit.process is None:
            return unit.name in self.done
        return self.run in self.done.get(unit.name, {}) or self._run_of(unit, every) is not None

    def add(self, unit: Unit, found: list[Any]) -> None:
        """Keep what came of a unit's points. It is on the disk when this returns."""
        self.done.setdefault(unit.name, {})[self.run] = found
        content = self.file.read_bytes() if self.file.is_file() else b""
        line = {"run": self.run, "of": self.runs[self.run], "name": unit.name, "found": found}
        lines = [line] if content else [self.head, line]
        # If a kill cut the last line short, begin a new one. Otherwise this unit would be lost with it.
        broken = "\n" if content and not content.endswith(b"\n") else ""
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(broken + "".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def rows(self, points: list[Point], every: list[Unit]) -> Iterator[dict[str, Any]]:
        """Yield the rows of all points, in the order of the points. Each names its run."""
        for point in points:
            unit = next(unit for unit in every if point in unit.points)
            if unit.process is None:
                run, (rows,) = next(iter(self.done[unit.name].items()))
            else:
                run, place = self._run_of(unit, every) or self.run, unit.points.index(point)
                found = [self.done[same.name][run] for same in every if same.points == unit.points]
                rows = timing.together([each[place] for each in found])
            yield from ({**row, "run": run} for row in rows)

    def found(self, points: list[Point]) -> Rows:
        """Return the rows of those points that are done and not timed, in the order of the points."""
        kept = [self.done[key(point)] for point in points if not point.get("timed") and key(point) in self.done]
        return [row for runs in kept for row in next(iter(runs.values()))[0]]

    def provenance(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return where rows come from: the GPU, the versions, the command, and each run with its host and its day."""
        used = {run: self.runs[run] for run in dict.fromkeys(row["run"] for row in rows)}
        return {
            "gpu": self.here["gpu"],
            "cpu": " or ".join(dict.fromkeys(run["cpu"] for run in used.values())),
            "versions": self.here["versions"],
            "date": max(run["date"] for run in used.values()),
            "command": self.here["command"],
            "runs": used,
        }

    def _run_of(self, unit: Unit, every: list[Unit]) -> str | None:
        """Return the run that measured a comparison in all processes, if there is one."""
        found = [set(self.done.get(same.name, {})) for same in every if same.points == unit.points]
        return min(set.intersection(*found), default=None)

    def _lines(self) -> Iterator[Any]:
        if self.file.is_file():
            for line in self.file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    continue


def _is_results(file: Path) -> bool:
    """Whether a file is a results file or empty, so that a new measurement may replace it."""
    try:
        if not file.stat().st_size:
            return True
        return {"topic", "provenance", "rows"} <= json.loads(file.read_text(encoding="utf-8")).keys()
    except (OSError, ValueError, AttributeError):
        return False


def provenance() -> dict[str, Any]:
    """Return the machine, the versions, the date and the command as it was typed."""
    import torch

    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            if library == "peftlab":  # run from a checkout
                versions[library] = peftlab.__version__
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": processor(),
        "host": host(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["peftlab", *sys.argv[1:]]),
    }


def processor() -> str:
    """Return the processor's name and number of cores."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {os.cpu_count()} cores"


def host() -> str:
    """Return a mark that tells this computer, since it was started, from others. It does not give its name away."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    marks = [platform.node(), boot.read_text().strip() if boot.is_file() else ""]
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()[:8]
