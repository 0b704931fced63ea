"""What this machine is: system, processor, memory, disk and devices. torch is imported only to ask for devices."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any


def cores() -> int:
    """Return the processor cores that this process may use, by its affinity and by a container's quota."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # no such call on macOS and Windows
        allowed = os.cpu_count() or 1
    quota = re.match(r"(\d+) (\d+)", _text("/sys/fs/cgroup/cpu.max"))
    return min(allowed, max(1, round(int(quota[1]) / int(quota[2])))) if quota else allowed


def memory() -> tuple[int | None, int | None]:
    """Return (all, free) main memory in bytes, within a container's limit; None for what the system does not tell."""
    total = free = None
    lines = dict(re.findall(r"(\w+):\s+(\d+) kB", _text("/proc/meminfo")))
    if "MemTotal" in lines:
        total, free = int(lines["MemTotal"]) * 1024, int(lines.get("MemAvailable", 0)) * 1024
    elif sys.platform == "win32":
        return _windows_memory()
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = _text("/sys/fs/cgroup/memory.max").strip(), _text("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit() and (total is None or int(limit) < total):
        total = int(limit)
        free = min(total - int(used), total if free is None else free)
    return total, free


def disk_free(folder: Path) -> int | None:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    for place in (folder, *folder.parents):
        if place.exists():
            try:
                return shutil.disk_usage(place).free
            except OSError:
                return None
    return None


def processor() -> str:
    """Return the processor's name, if the system tells it."""
    named = re.search(r"model name\s*:\s*(.+)", _text("/proc/cpuinfo"))
    return " ".join(named[1].split()) if named else platform.processor() or platform.machine()


def devices() -> list[dict[str, Any]]:
    """Return the devices that torch can compute on, the CPU first.

    Each is a dict of `name` (`"cpu"`, `"cuda:0"`, `"mps"`), `model`, `memory` and `free` (bytes, or None)
    and `dtypes`: for each dtype `"native"`, `"slow"` (computed without instructions of its own) or `"no"`.

    Raises:
        ImportError or OSError: torch cannot be imported.
    """
    import torch

    total, free = memory()
    bf16 = "native" if re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", _text("/proc/cpuinfo")) else "slow"
    found = [
        {
            "name": "cpu",
            "model": processor(),
            "memory": total,
            "free": free,
            "dtypes": {"float32": "native", "bfloat16": bf16, "float16": "slow"},
        }
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found.append(_cuda(torch, index))
    if getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available():
        dtypes = {"float32": "native", "bfloat16": "native", "float16": "native"}
        found.append({"name": "mps", "model": "Apple GPU", "memory": total, "free": free, "dtypes": dtypes})
    return found


def _cuda(torch: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    try:
        free = torch.cuda.mem_get_info(index)[0]
    except RuntimeError:  # a full GPU does not even answer
        free = None
    with torch.cuda.device(index):
        # Without including_emulation=False the answer for a T4 is yes, although it computes bf16 far slower than fp16.
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    dtypes = {"float32": "native", "bfloat16": "native" if bf16 else "slow", "float16": "native"}
    return {
        "name": f"cuda:{index}",
        "model": properties.name,
        "memory": properties.total_memory,
        "free": free,
        "dtypes": dtypes,
    }


def unused_gpu() -> bool:
    """Say whether the machine seems to have an NVIDIA GPU. Ask this if torch sees none."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _windows_memory() -> tuple[int | None, int | None]:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong)
            for name in ("total", "free", "page_total", "page_free", "virtual", "virtual_free", "extended")
        ]

    status = Status(length=ctypes.sizeof(Status))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # type: ignore[attr-defined]  # only Windows has it
        return None, None
    return status.total, status.free


def _text(path: str) -> str:
    """Return the text of a system file, or an empty string if it does not exist."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
