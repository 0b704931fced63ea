"""What this machine can run: `peftlab doctor`.

`examine` returns a plain dict, which a program can read (`--json`). `render` makes a page for a person. One table lists
what each chapter needs; a new chapter adds its line.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

from peftlab import __version__
from peftlab.assets.cache import asset_folder, cache_folder, fault
from peftlab.assets.catalogue import catalogue
from peftlab.catalogue import METHODS
from peftlab.commands import machine
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.memory.cards import largest_estimate
from peftlab.memory.estimate import estimate
from peftlab.memory.units import format_both, format_bytes
from peftlab.optional import PACKAGES, load

# The package does nothing without these. A test compares the versions with the lower bounds in pyproject.toml.
ESSENTIAL = {
    "torch": "2.6",
    "transformers": "5.0",
    "tokenizers": "0.20",
    "safetensors": "0.4.3",
    "datasets": "3.0",
    "numpy": "1.26",
    "gguf": "0.16",
}
PYTHON = (3, 11)
# {set of versions: {package: version}}, written by tools/other_versions.py when all tests have passed with them
TESTED: dict[str, dict[str, str]] = json.loads(files("peftlab").joinpath("tested.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Chapter:
    """What a chapter needs: main memory in bytes at its peak, models and data, optional packages."""

    number: int
    title: str
    assets: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    memory: int = 0


CHAPTERS = (
    Chapter(0, "Start here", packages=("matplotlib",), memory=1_000_000_000),
    Chapter(1, "What full fine-tuning costs", ("smollm2-135m",), ("matplotlib", "ipywidgets"), 5_000_000_000),
    Chapter(2, "LoRA", ("smollm2-135m", "news"), ("peft", "matplotlib", "ipywidgets"), 4_000_000_000),
    Chapter(3, "QLoRA and NF4", ("minilm", "smollm2-135m", "news"), ("bitsandbytes", "matplotlib"), 5_000_000_000),
    Chapter(4, "Prompts and prefixes", ("smollm2-135m", "news"), ("peft", "matplotlib"), 4_000_000_000),
    Chapter(5, "Adapters", ("minilm", "reviews", "news"), ("peft", "matplotlib"), 2_000_000_000),
    Chapter(6, "IA3 and BitFit", ("minilm", "smollm2-135m", "reviews"), ("peft", "matplotlib"), 4_000_000_000),
    Chapter(7, "The LoRA family", ("smollm2-135m", "news"), ("peft", "matplotlib"), 3_000_000_000),
    Chapter(8, "Choosing a method", ("minilm", "smollm2-135m", "reviews", "news"),
            ("matplotlib", "sacrebleu", "scipy"), 6_000_000_000),
    Chapter(9, "Training recipes", ("smollm2-135m",), ("matplotlib",), 5_000_000_000),
)

SIZES = ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-2-70b")
WAYS = ("full", "lora", "qlora")


def examine(verify: bool = False, names: Sequence[str] = ()) -> dict[str, Any]:
    """Examine the machine. Sizes are in bytes.

    Args:
        verify: hash every file of the cache again, and do not trust the note of an earlier check. What is not in the
            cache is then a fault.
        names: models, data sets, packages and chapters (by number) that must be there; what is missing is a fault.

    Returns:
        A dict with `python`, `system`, `packages`, `tested` (the versions of each package that all tests passed
        with), `devices`, `four_bit`, `sizes` (for each CUDA GPU and model, the methods of which a step of 512
        tokens fits), `cache`, `assets`, `chapters` and three lists of sentences: `problems` (nothing works
        until they are mended), `faults` (what was asked for is missing, or what is in the cache is damaged) and
        `notes`.

    Raises:
        PeftLabError: one of the names is nothing that the doctor knows.
    """
    _check_names(names)
    problems: list[str] = []
    notes: list[str] = []
    packages = {name: _version(name) for name in (*ESSENTIAL, *PACKAGES)}
    if sys.version_info < PYTHON:
        problems.append(
            f"Python {platform.python_version()} is too old; peftlab needs {PYTHON[0]}.{PYTHON[1]} or newer."
        )
    for name, least in ESSENTIAL.items():
        version = packages[name]
        if version is None:
            problems.append(f"{name} is not installed: pip install '{name}>={least}'.")
        elif older(version, least):
            problems.append(f"{name} {version} is too old: pip install --upgrade '{name}>={least}'.")
    for name, (least, use, _) in PACKAGES.items():
        version = packages[name]
        if version is None:
            notes.append(f"{name} is not installed ({use}): pip install '{name}>={least}'.")
        elif older(version, least):
            notes.append(f"{name} {version} is older than {least} ({use}): pip install --upgrade '{name}'.")
    # a package that is new here was not there in every set's last run
    tested = {name: sorted({row[name] for row in TESTED.values() if name in row}, key=_order) for name in packages}
    for name, version in packages.items():
        if version is not None and _order(tested[name][-1]) < _order(version):
            notes.append(
                f"{name} {version} is newer than every version that peftlab was tested with (the newest is "
                f"{tested[name][-1]}). It may well work. If a result looks wrong, try that version first."
            )
    devices = _devices(packages, problems, notes)
    total, free = machine.memory()
    cache = _cache(problems)
    assets = {name: _asset(name, entry, verify) for name, entry in catalogue().items()}
    chapters = [_chapter(chapter, packages, assets, cache, total, problems) for chapter in CHAPTERS]
    faults = [
        f"{name} in the cache is damaged ({asset['fault']}): peftlab fetch {name}."
        for name, asset in assets.items()
        if asset["state"] == "damaged"
    ]
    faults += _lacking(names or (tuple(assets) if verify else ()), packages, assets, chapters)
    return {
        "peftlab": __version__,
        "python": platform.python_version(),
        "system": {
            "platform": platform.platform(),
            "machine": platform.machine(),
            "processor": machine.processor(),
            "cores": machine.cores(),
            "memory": total,
            "memory_free": free,
        },
        "packages": packages,
        "tested": tested,
        "devices": devices,
        "four_bit": _four_bit(packages, devices),
        "sizes": {device["name"]: _sizes(device["memory"]) for device in devices if _is_cuda(device)},
        "cache": cache,
        "assets": assets,
        "chapters": chapters,
        "problems": problems,
        "faults": faults,
        "notes": notes,
    }


def _check_names(names: Sequence[str]) -> None:
    known = (*catalogue(), *ESSENTIAL, *PACKAGES, *(str(chapter.number) for chapter in CHAPTERS))
    for name in names:
        if name not in known:
            raise PeftLabError(f"The doctor knows no {name!r}.{did_you_mean(name, known)} It knows {', '.join(known)}.")


def _lacking(
    names: Sequence[str],
    packages: dict[str, str | None],
    assets: dict[str, dict[str, Any]],
    chapters: list[dict[str, Any]],
) -> list[str]:
    """What of the things asked for is not there; a damaged one is told elsewhere."""
    faults = []
    for name in names:
        if name in assets and assets[name]["state"] == "not fetched":
            faults.append(f"{name} is not in the cache: peftlab fetch {name}.")
        elif name in packages and (reason := load(name)[1]):
            faults.append(f"{name} {reason}.")
        elif name not in assets and name not in packages:
            (chapter,) = (chapter for chapter in chapters if str(chapter["number"]) == name)
            faults += [f"Chapter {name} is missing {what}." for what in chapter["missing"]]
            faults += _lacking([*chapter["fetches"], *chapter["packages"]], packages, assets, chapters)
    return list(dict.fromkeys(faults))


def _devices(packages: dict[str, str | None], problems: list[str], notes: list[str]) -> list[dict[str, Any]]:
    if packages["torch"] is None:
        return []
    try:
        found = machine.devices()
    except Exception as error:  # a broken installation can raise any error; report it in words, never as a traceback
        problems.append(f"torch is installed but cannot be imported ({type(error).__name__}: {one_line(error)}).")
        return []
    if not any(device["name"].startswith("cuda") for device in found) and machine.unused_gpu():
        build = "is built for the CPU only" if "+cpu" in packages["torch"] else "does not see it"
        notes.append(f"There seems to be an NVIDIA GPU, but torch {packages['torch']} {build}: see pytorch.org.")
    return found


def _is_cuda(device: dict[str, Any]) -> bool:
    return device["name"].startswith("cuda") and device["memory"] is not None


def _sizes(room: int) -> dict[str, list[str]]:
    """Return, by model, the methods whose step fits: 1 x 512 tokens, bf16, r = 16 on all linear layers."""
    most = largest_estimate(room)
    return {shape: [method for method in WAYS if _peak(shape, method) <= most] for shape in SIZES}


@functools.cache  # the same on every device
def _peak(shape: str, method: str) -> int:
    lora: dict[str, Any] = {"r": 16, "targets": "all-linear"} if METHODS[method].takes("r") else {}
    return estimate(shape, method, checkpointing=True, **lora).peak_bytes


def _four_bit(packages: dict[str, str | None], devices: list[dict[str, Any]]) -> dict[str, Any]:
    """Say on which devices a frozen base can be held in four bits."""
    version = packages["bitsandbytes"]
    usable = version is not None and not older(version, PACKAGES["bitsandbytes"][0])
    places = [device["name"] for device in devices if device["name"] == "cpu" or device["name"].startswith("cuda")]
    return {"bitsandbytes": version, "devices": places if usable else []}


def _cache(problems: list[str]) -> dict[str, Any]:
    folder = cache_folder()
    place: Path = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    writable = place.is_dir() and os.access(place, os.W_OK)
    if not writable and not any(asset_folder(name, entry).is_dir() for name, entry in catalogue().items()):
        problems.append(f"The cache folder {folder} cannot be written: set PEFTLAB_CACHE to a folder of yours.")
    return {"folder": str(folder), "writable": writable, "free": machine.disk_free(folder)}


def _asset(name: str, entry: dict[str, Any], verify: bool) -> dict[str, Any]:
    found = fault(asset_folder(name, entry), entry, thorough=verify)
    state = "ready" if found is None else found if found == "not fetched" else "damaged"
    return {
        "state": state,
        "fault": found if state == "damaged" else None,
        "bytes": sum(file["bytes"] for file in entry["files"].values()),
        "download": entry["wheel_bytes"],
    }


def _chapter(
    chapter: Chapter,
    packages: dict[str, str | None],
    assets: dict[str, dict[str, Any]],
    cache: dict[str, Any],
    total: int | None,
    problems: list[str],
) -> dict[str, Any]:
    """Say whether a chapter runs here, what is missing, and what it will fetch itself."""
    missing = ["what is named under problems"] if problems else []
    missing += [f"the package {name}" for name in chapter.packages if packages[name] is None]
    bring = [name for name in chapter.assets if assets[name]["state"] != "ready"]
    download = sum(assets[name]["download"] for name in bring)
    if bring and not cache["writable"]:
        missing.append(f"a cache folder that can be written, for {', '.join(bring)}")
    needed = sum(2 * assets[name]["download"] + assets[name]["bytes"] for name in bring)
    if bring and cache["free"] is not None and cache["free"] < needed:
        missing.append(f"{format_bytes(needed - cache['free'])} more of disk space, for {', '.join(bring)}")
    if total is not None and total < chapter.memory:
        missing.append(f"{format_bytes(chapter.memory)} of memory (here: {format_bytes(total)})")
    return {
        "number": chapter.number,
        "title": chapter.title,
        "runs": not missing,
        "missing": missing,
        "packages": list(chapter.packages),
        "fetches": bring,
        "download": download,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _order(version: str) -> Any:
    """Return the sorting key of a version. One that cannot be read comes first."""
    from packaging.version import InvalidVersion, Version

    try:
        return Version(Version(version).public)  # without the mark of a local build, such as +cpu
    except InvalidVersion:
        return Version("0")


def older(version: str, least: str) -> bool:
    from packaging.version import InvalidVersion, Version

    try:
        # A nightly build of 2.6 ("2.6.0.dev20250101") counts as 2.6.
        return Version(Version(version).base_version) < Version(least)
    except InvalidVersion:
        return False


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def render(report: dict[str, Any]) -> str:
    """Return the report as a page of text."""
    system = report["system"]
    lines = [f"peftlab {report['peftlab']} on Python {report['python']}", ""]
    lines += [
        f"System    {system['platform']}",
        f"CPU       {system['processor']}, {system['cores']} cores",
        f"Memory    {_size(system['memory'])}, {_size(system['memory_free'])} free",
        "",
        "Packages",
    ]
    for name, version in report["packages"].items():
        told = version or "not installed"
        lines.append(f"  {name:<14}{told:<16}tested with {', '.join(report['tested'][name])}")
    lines += ["", "Devices"]
    for device in report["devices"]:
        dtypes = [
            name if how == "native" else f"{name} (slow)" for name, how in device["dtypes"].items() if how != "no"
        ]
        lines.append(f"  {device['name']:<14}{device['model']}, {_size(device['memory'])}: {', '.join(dtypes)}")
    places = report["four_bit"]["devices"]
    lines.append(
        f"  {'4-bit bases':<14}{'on ' + ', '.join(places) if places else 'no: bitsandbytes is missing or too old'}"
    )
    for device, sizes in report["sizes"].items():
        lines += ["", f"A training step of 512 tokens with checkpointing that fits on {device}"]
        lines += [f"  {shape:<14}{', '.join(methods) or 'none'}" for shape, methods in sizes.items()]
    cache = report["cache"]
    free = "" if cache["free"] is None else f", {format_bytes(cache['free'])} free on its disk"
    lines += ["", f"Models and data in {cache['folder']}{free}"]
    for name, asset in report["assets"].items():
        more = f" (download {format_bytes(asset['download'])})" if asset["state"] == "not fetched" else ""
        lines.append(f"  {name:<14}{asset['fault'] or asset['state']}, {format_bytes(asset['bytes'])}{more}")
    lines += ["", "Chapters"]
    titles = [f"{c['number']} {c['title']}" if c["number"] else c["title"] for c in report["chapters"]]
    width = max(map(len, titles)) + 2
    for name, chapter in zip(titles, report["chapters"], strict=True):
        told = "runs here" if chapter["runs"] else "is missing " + "; ".join(chapter["missing"])
        if chapter["runs"] and chapter["fetches"]:
            told += f"; it first brings {', '.join(chapter['fetches'])} ({format_bytes(chapter['download'])})"
        lines.append(f"  {name:<{width}}{told}")
    for kind in ("problems", "faults", "notes"):
        if report[kind]:
            lines += ["", kind.capitalize(), *(f"  {sentence}" for sentence in report[kind])]
    if not report["problems"] and not report["faults"]:
        lines += ["", "Nothing essential is missing."]
    return "\n".join(lines)


def _size(size: int | None) -> str:
    return "unknown" if size is None else format_both(size)
