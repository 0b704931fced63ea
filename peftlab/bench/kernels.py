"""The time of a 4-bit step: what the GPU's kernels do, forward passes, and the bandwidth of kernels."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.bench.fullsize import timed, vocabulary_of
from peftlab.quantization import blockwise
from peftlab.quantization.backends import choose

Row = dict[str, Any]
KINDS = (
    ("dequantise the weights", ("dequantize_blockwise", "dequantizeblockwise", "kdequantize")),
    ("matrix products", ("gemm", "cutlass", "nvjet", "xmma", "matmul", "cublas")),
    ("attention", ("flash", "fmha", "attention")),
    ("optimiser", ("adam", "multi_tensor")),
)


def kind_of(kernel: str) -> str:
    """Say what a CUDA kernel does, from its name."""
    name = kernel.lower()
    for kind, marks in KINDS:
        if any(mark in name for mark in marks):
            return kind
    return "copies" if "memcpy" in name or "memset" in name else "everything else"


def profile_of(step: Callable[[], None]) -> list[Row]:
    """Return one step's GPU seconds by what the kernels do, and the step's time without the profiler."""
    alone = statistics.median(timed(step, repeats=3, warm_up=2))
    spent: dict[str, list[float]] = {}
    for kernel, seconds in kernels_of(step):
        spent.setdefault(kind_of(kernel), []).append(seconds)
    return [
        {"what": kind, "kernels": len(times), "gpu_seconds": sum(times), "seconds": alone}
        for kind, times in sorted(spent.items())
    ]


def kernels_of(step: Callable[[], None]) -> list[tuple[str, float]]:
    """Return the name and seconds of each kernel that the GPU runs in one step; none without a GPU."""
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        step()
        return []
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
        step()
        torch.cuda.synchronize()
    on_gpu = (event for event in recorded.events() if str(event.device_type).endswith("CUDA"))
    return [(event.name, event.device_time_total / 1e6) for event in on_gpu]


@torch.no_grad()
def forward_passes(model: nn.Module, device: torch.device) -> Iterator[Row]:
    """Measure one forward pass in bf16 over 1 and over 512 tokens: its time, and the GPU's part of it.

    This is what a quantised base costs when it answers.
    """
    model.eval()
    for count in (1, 512):
        tokens = torch.randint(vocabulary_of(model), (1, count), device=device)

        def answer(tokens: torch.Tensor = tokens) -> None:
            model(input_ids=tokens)

        times = timed(answer, repeats=10, warm_up=3)
        yield {
            "tokens": count, "seconds": statistics.median(times), "seconds_spread": max(times) - min(times),
            "gpu_seconds": sum(seconds for _, seconds in kernels_of(answer)),
        }  # fmt: skip


def bandwidths(point: Row, device: torch.device) -> Iterator[Row]:
    """Compare the bandwidth of quantising and dequantising with a copy: bytes read and written per median time."""
    weight = torch.randn(point["rows"], point["columns"], dtype=torch.bfloat16, device=device)
    held = pl.quantize_nf4(weight)
    theirs, reference = (choose(name, "nf4", 64, device) for name in ("bitsandbytes", "reference"))
    four = held.packed.nbytes
    target = torch.empty_like(weight)
    flat = held.packed.view(-1)
    scales = held.state.scales()
    ops, shape = torch.ops.bitsandbytes, list(weight.shape)
    whole = four + scales.nbytes + weight.nbytes  # codes, their scales in float32, and the weight
    work = {
        "copy": (2 * weight.nbytes, lambda: target.copy_(weight)),
        "quantise, bitsandbytes": (whole, lambda: ops.quantize_4bit.default(weight, 64, "nf4", torch.uint8)),
        "dequantise, bitsandbytes": (
            whole, lambda: ops.dequantize_4bit.default(flat, scales, 64, "nf4", shape, weight.dtype)),
        "scales and weights, bitsandbytes": (
            held.nbytes + weight.nbytes, lambda: theirs.dequantize(held.packed, held.state, weight.dtype)),
        "quantise, reference": (whole, lambda: blockwise.quantize(weight, double_quant=False)),
        "dequantise, reference": (
            held.nbytes + weight.nbytes, lambda: reference.dequantize(held.packed, held.state, weight.dtype)),
    }  # fmt: skip
    for what, (moved, call) in work.items():
        seconds = events(call, repeats=4 if "reference" in what else 30)
        yield {"what": what, "moved_bytes": moved, "seconds": seconds, "bytes_per_second": moved / seconds}


def events(call: Callable[[], Any], repeats: int) -> float:
    """Return a call's median seconds by the GPU's clock, after three calls. The cache is overwritten in between."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)
