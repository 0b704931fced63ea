"""Compute how far the memory estimate is from each run that a GPU measured: peftlab/memory/measured.json.

Run it after a change to the memory estimate, or when a results file has new runs: a test says so. It takes half a
minute.

    .venv/bin/python tools/memory_errors.py
"""

import inspect
import json
from typing import Any

from peftlab.bench import experts
from peftlab.bench.family_runs import arguments_of
from peftlab.files import write_atomically
from peftlab.kit.measurements import results
from peftlab.memory import estimate
from peftlab.memory.measured import FILE, described, settings_of, sizes_of

TOPICS = ("memory", "memory_families", "memory_methods", "memory_optimizers", "experts", "parallel")
MEANS = 8  # bytes for each number that AdaLoRA trains: running means, which the measured loop did not make


def runs(topic: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return (the arguments of `estimate`, row) of each run of a results file."""
    found = results(topic)
    release = found.provenance["versions"]["transformers"]
    return [({**_arguments(topic, row), "transformers": release}, row) for row in found
            if row["section"] not in ("context", "timeline")]  # fmt: skip


def words_of(run: dict[str, Any]) -> tuple[str, ...]:
    """Return what a run is, in words."""
    kept = inspect.signature(described).parameters
    return described(**{name: value for name, value in run.items() if name in kept})


def error_of(topic: str, run: dict[str, Any], row: dict[str, Any]) -> float:
    """Return the error of the estimate for one run."""
    said = estimate(**run)
    means = MEANS * said.trainable if topic == "memory_methods" and run["method"] == "adalora" else 0
    return (said.peak_bytes - means) / row["peak_bytes"] - 1


def _arguments(topic: str, row: dict[str, Any]) -> dict[str, Any]:
    if topic == "experts":
        targets, _ = experts.TARGETS[row["targets"]]
        kept = ("r", "batch", "sequence", "checkpointing", "library")
        return {
            "shape": experts.SHAPE, "method": "qlora" if row["four_bit"] else "lora", "autocast": True,
            "optimizer": "adamw-fused", "targets": targets["target_modules"] or None,
            "target_parameters": targets.get("target_parameters"), **{name: row[name] for name in kept},
        }  # fmt: skip
    return arguments_of(row) | {name: row[name] for name in ("gpus", "parallel") if name in row}


def content() -> dict[str, Any]:
    """Return what the file holds: each word once, and of each run the numbers of its words and the error."""
    words: dict[str, int] = {}
    files = {}
    for topic in TOPICS:
        files[topic] = [
            [*(words.setdefault(word, len(words)) for word in words_of(run)), round(error_of(topic, run, row), 5)]
            for run, row in runs(topic)
        ]
    return {"words": list(words), **reach(), "files": files}


def reach() -> dict[str, Any]:
    """Return between which sizes all measured runs lie, and the values of their settings."""
    sizes: dict[str, list[int]] = {}
    settings: dict[str, list[Any]] = {}
    for topic in TOPICS:
        for run, row in runs(topic):
            for name, size in sizes_of(**run, peak_bytes=row["peak_bytes"]).items():
                lowest, highest = sizes.get(name, (size, size))
                sizes[name] = [min(lowest, size), max(highest, size)]
            rest = {name: value for name, value in run.items() if name != "shape"}
            for name, value in settings_of(**rest).items():
                if value not in (values := settings.setdefault(name, [])):
                    values.append(value)
    return {"sizes": sizes, "settings": settings}


def main() -> None:
    """Write the file."""
    text = json.dumps(content(), separators=(",", ":")).replace("],[", "],\n[")
    write_atomically(FILE, (text + "\n").encode())
    print(FILE.name)


if __name__ == "__main__":
    main()
