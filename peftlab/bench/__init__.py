"""Measurements that take too long for a notebook: `peftlab bench TOPIC --out FILE`.

A topic is a module here with `points()` (dicts that say what to measure, in order) and `measure(point) -> list[dict]`
(rows). Finished points are kept in FILE.partial, so a killed run continues where it stopped.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import peftlab
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.kit import measurements
from peftlab.progress import Bar

TOPICS = ("memory", "lora", "qlora", "prompts", "adapters", "parallel", "circulating")
BEGINNING = b'{"gpu": '  # of FILE.partial
LIBRARIES = ("torch", "transformers", "peft", "peftlab", "bitsandbytes", "triton")


def run(topic: str, out: str | os.PathLike, *, only: Iterable[str] | None = None, jobs: int = 1) -> Path:
    """Measure a topic on this machine and write its results file, with provenance.

    Args:
        topic: what to measure.
        out: the file to write. FILE.partial beside it keeps finished points until all are done.
        only: the sections of the topic to measure; `None` for all.
        jobs: the number of processes for points that are not timed. Timed points always run alone, after the others.

    Raises:
        PeftLabError: an unknown topic or section (with near matches), a folder that does not exist, or a FILE.partial
            from another machine or other versions. Or some points failed: then all others are measured first, and the
            same command tries the failed ones again.
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

    here = provenance()
    partial = Partial(out.with_name(out.name + ".partial"), here)
    todo = [point for point in points if key(point) not in partial.done]
    failed: list[str] = []
    with Bar(len(points), f"bench {topic}", unit="point", initial=len(points) - len(todo)) as bar:
        for point, rows in measured(module, todo, jobs):
            if isinstance(rows, Exception):
                failed.append(f"{key(point)}: {type(rows).__name__}: {rows}")
            else:
                partial.add(point, rows)
            bar.update(note=point["section"])
    if failed:
        told = "\n".join(failed)
        raise PeftLabError(f"{len(failed)} of {len(points)} points failed; {partial.file} keeps the others.\n{told}")
    rows = [row for point in points for row in partial.done[key(point)]]
    measurements.write(out, topic, here, rows)
    partial.file.unlink(missing_ok=True)
    return out


def measured(module: Any, points: list[dict], jobs: int) -> Iterator[tuple[dict, list[dict] | Exception]]:
    """Yield (point, rows): first the points that may share the machine, then each timed point alone.

    Points that share the machine are spread over its cores and GPUs. A point that fails yields its exception, so that
    one out-of-memory error does not waste the hour that the others took.
    """
    shared = [point for point in points if not point.get("timed")] if jobs > 1 else []
    if shared:
        context = multiprocessing.get_context("spawn")
        begun = context.Value("i", 0)
        with ProcessPoolExecutor(jobs, context, initializer=take_share, initargs=(begun, jobs)) as pool:
            futures = {pool.submit(module.measure, point): point for point in shared}
            for future in as_completed(futures):
                error = future.exception()
                yield futures[future], error if isinstance(error, Exception) else future.result()
    for point in points:
        if point not in shared:
            try:
                rows = module.measure(point)
            except Exception as error:
                error.__traceback__ = None  # its frames hold what the point had allocated
                rows = error
            yield point, rows


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


def key(point: dict) -> str:
    """Return a point as text, by which a later run recognises it."""
    return json.dumps(point, sort_keys=True)


class Partial:
    """FILE.partial: a first line that says where it was measured, then `[key, rows]` for each finished point."""

    def __init__(self, file: Path, here: dict[str, Any]) -> None:
        """Read the points that an earlier run finished. Ignore a line that a kill cut short.

        Raises:
            PeftLabError: the points in it were measured on another machine or with other versions than `here`.
        """
        self.file, self.done = file, {}
        self.head = {name: here[name] for name in ("gpu", "cpu", "versions")}
        first, *lines = list(self._lines()) or [None]
        if first is None:
            begun = file.read_bytes() if file.is_file() else b""
            if not (begun.startswith(BEGINNING) or BEGINNING.startswith(begun)):
                raise PeftLabError(f"{file} holds no points of a bench. Move it away, or use another --out.")
            file.unlink(missing_ok=True)  # killed before its first line was whole
            return
        before = first if isinstance(first, dict) else {}
        changed = [name for name in self.head if before.get(name) != self.head[name]]
        if changed:
            told = "; ".join(f"{name} was {before.get(name)}, is now {self.head[name]}" for name in changed)
            raise PeftLabError(
                f"{file} holds points that were measured elsewhere or with other versions ({told}). "
                "Delete it to start again, or use another --out."
            )
        self.done = dict(lines)

    def add(self, point: dict, rows: list[dict]) -> None:
        """Keep a finished point. It is on the disk when this returns."""
        self.done[key(point)] = rows
        content = self.file.read_bytes() if self.file.is_file() else b""
        lines = [[key(point), rows]] if content else [self.head, [key(point), rows]]
        # If a kill cut the last line short, begin a new one. Otherwise this point would be lost with it.
        broken = "\n" if content and not content.endswith(b"\n") else ""
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(broken + "".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

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
