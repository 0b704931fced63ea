"""Whether kernels written in Triton run on a device. Those who have one ask here before they import it."""

from __future__ import annotations

from functools import cache
from importlib import import_module

import torch

from peftlab.optional import load


def why_no_triton(device: torch.device) -> str | None:
    """Return why kernels written in Triton do not run on a device; None if they do.

    >>> from peftlab.core.triton_check import why_no_triton
    >>> why_no_triton(torch.device("cpu"))
    'it runs on CUDA GPUs, not on cpu'
    """
    if device.type != "cuda":
        return f"it runs on CUDA GPUs, not on {device.type}"
    module, reason = load("triton")
    if module is None:
        return f"Triton {reason} (pip install triton; on Linux it comes with torch for CUDA)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"Triton needs a GPU of compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"
    return _why_it_fails(device)


@cache
def _why_it_fails(device: torch.device) -> str | None:
    """Try a kernel once: Triton also needs a C compiler, and often it is only here that one is missing."""
    try:
        import_module("peftlab.core.trial_kernel").run_on(device)
    except Exception as error:  # whatever a compiler that is missing or too old raises
        said = " ".join(str(error).split())[:200]
        return f"Triton is installed, but its first kernel fails: {type(error).__name__}: {said}"
    return None
