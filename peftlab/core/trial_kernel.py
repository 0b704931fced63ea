"""The smallest kernel, to find out whether Triton works. It imports Triton, so `triton_check` imports it by name."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def run_on(device: torch.device) -> None:
    """Run a kernel that adds one to a number on the device."""
    x = torch.zeros(1, device=device)
    with torch.cuda.device_of(x):
        _add_one[1,](x)


@triton.jit
def _add_one(x: tl.tensor) -> None:
    tl.store(x, tl.load(x) + 1)
