"""Compute with 4-bit weights: by the reference in plain PyTorch, or by kernels of Triton or bitsandbytes.

All give equal numbers.

A backend turns a weight into codes and codes into a weight. A new backend is a class with these methods and an entry in
`BACKENDS`; `choose` asks each, in this order, whether it can.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlab.checks import one_of
from peftlab.core.triton_check import why_no_triton
from peftlab.errors import PeftLabError
from peftlab.optional import available, require
from peftlab.quantization import blockwise
from peftlab.quantization.blockwise import SCALE_BLOCK, Quantized, QuantState
from peftlab.quantization.codebooks import dynamic_book

AUTO = "auto"
ZEROS = 0x77  # a byte with the code of zero twice, in NF4


class Reference:
    """Compute in plain PyTorch: every format, block size and device."""

    name = "reference"

    def cannot(self, format: str, block_size: int, device: torch.device) -> str | None:
        """Return why this backend cannot compute with such weights on that device; None if it can."""
        return None

    def quantize(self, weight: Tensor, format: str, block_size: int, double_quant: bool, name: str) -> Quantized:
        """Return a weight as codes.

        Raises:
            PeftLabError: a value is not finite.
        """
        return blockwise.quantize(weight, format, block_size=block_size, double_quant=double_quant, name=name)

    def dequantize(self, packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
        """Return the weight that codes stand for, in the state's shape."""
        return blockwise.dequantize(packed, state, dtype)

    def dequantize_into(self, out: Tensor, packed: Tensor, state: QuantState) -> Tensor:
        """Write the weight that codes stand for into `out`, whose rows may be apart, and return `out`."""
        return out.copy_(self.dequantize(packed, state, out.dtype))

    def linear(self, x: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None) -> Tensor:
        """Return x W^T + b without a gradient, x: (..., in). The dequantised weight lives for this product only."""
        return F.linear(x, self.dequantize(packed, state, x.dtype), bias)


class BitsAndBytes(Reference):
    """Compute with bitsandbytes' kernels on CUDA and on the CPU.

    Its layers are not used, because on some CPUs they repack weights.
    """

    name = "bitsandbytes"
    block_sizes = (32, 64, 128, 256, 512, 1024, 2048, 4096)

    def cannot(self, format: str, block_size: int, device: torch.device) -> str | None:
        if available("bitsandbytes") is None:
            return "it is not installed (pip install bitsandbytes)"
        if format not in ("nf4", "fp4"):
            return f"it has no format {format!r}"
        if block_size not in self.block_sizes:
            return f"it has no block size {block_size}; it has {', '.join(map(str, self.block_sizes))}"
        if device.type not in ("cuda", "cpu", "meta"):
            return f"it does not run on {device.type} here"
        return None

    def quantize(self, weight: Tensor, format: str, block_size: int, double_quant: bool, name: str) -> Quantized:
        if not weight.is_cuda or weight.dtype == torch.float64:  # on a CPU the reference is faster
            return super().quantize(weight, format, block_size, double_quant, name)
        if not torch.isfinite(weight).all():  # the kernel's maxima ignore NaN
            return super().quantize(weight, format, block_size, double_quant, name)  # this raises
        packed, theirs = require("bitsandbytes").functional.quantize_4bit(
            weight.detach(), blocksize=block_size, quant_type=format, compress_statistics=double_quant
        )
        if format == "nf4":
            code_zeros(packed, weight, block_size)
        return Quantized(packed, from_bitsandbytes(theirs))

    def dequantize(self, packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
        size, block_size = math.prod(state.shape), state.block_size
        # bitsandbytes' AVX-512 code uses wrong scales for rows that end inside a block. For odd sizes and large blocks
        # it goes through torch.compile. So it gets one row per block here, and the reference does the other cases.
        on_cpu = packed.device.type == "cpu"
        if dtype == torch.float64 or (on_cpu and (size % block_size or block_size >= 2048)):
            return super().dequantize(packed, state, dtype)
        shape = (size // block_size, block_size) if on_cpu else tuple(state.shape)
        ops = torch.ops.bitsandbytes
        scales = state.absmax
        if state.nested:
            book = dynamic_book(packed.device)
            scales = ops.dequantize_blockwise.default(scales, state.nested_absmax, book, SCALE_BLOCK, torch.float32)
            scales.add_(state.offset)
        return ops.dequantize_4bit.default(packed, scales, block_size, state.format, shape, dtype).view(state.shape)

    def linear(self, x: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None) -> Tensor:
        fused = x.is_cuda and x.dtype != torch.float64 and state.shape[1] % state.block_size == 0
        if not fused or not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
            return super().linear(x, packed, state, bias)
        # For a few tokens the kernel multiplies by the codes, for more it dequantises first. It chooses by itself.
        nested = (state.nested_absmax, state.absmax, dynamic_book(x.device), state.offset)
        first, *more = nested if state.nested else (state.absmax, None, None, None)
        return torch.ops.bitsandbytes.gemm_4bit.default(
            x, packed, list(state.shape), first, state.block_size, state.format, bias=bias,
            absmax_8bit=more[0], absmax_code=more[1], absmax_offset=more[2],
        )  # fmt: skip


@torch.no_grad()
def code_zeros(packed: Tensor, weight: Tensor, block_size: int) -> None:
    """Write the code of zero into blocks that hold only zeros, in place.

    bitsandbytes' CUDA kernel divides such a block by its largest value, which is zero, and writes the code of -1.
    Without double quantisation the scale is zero, so the values are zero again. With it the scale comes back as a small
    number instead, and so do the values.
    """
    flat, size = weight.detach().reshape(-1), block_size // 2
    whole = flat.numel() // block_size
    empty = ~flat[: whole * block_size].view(whole, block_size).any(1)
    packed[: whole * size].view(whole, size)[empty] = ZEROS
    if not flat[whole * block_size :].any():
        packed[whole * size :] = ZEROS


class Triton(Reference):
    """Compute with this package's own kernels, `peftlab.quantization.triton_kernels`, on CUDA.

    bitsandbytes' kernel multiplies a few tokens by the codes as they are. Such products are left to it if it is there.
    """

    name = "triton"
    few = 2  # tokens; from four on dequantising first takes no longer (measured on an H200)

    def cannot(self, format: str, block_size: int, device: torch.device) -> str | None:
        if device.type == "cuda" and block_size not in BitsAndBytes.block_sizes:
            return f"it has no block size {block_size}; it has {', '.join(map(str, BitsAndBytes.block_sizes))}"
        return why_no_triton(device)

    def quantize(self, weight: Tensor, format: str, block_size: int, double_quant: bool, name: str) -> Quantized:
        if not weight.is_cuda or not weight.is_floating_point() or not weight.numel():
            return super().quantize(weight, format, block_size, double_quant, name)
        flat = weight.detach().reshape(-1)
        flat = flat.float() if flat.dtype == torch.float64 else flat
        packed, absmax = kernels().quantize(flat, format, block_size)
        state = QuantState(absmax, weight.shape, weight.dtype, block_size, format)
        if double_quant:
            codes, nested, offset = kernels().quantize_scales(absmax)
            state = replace(state, absmax=codes, nested_absmax=nested, offset=offset)
        if not torch.isfinite(absmax if state.offset is None else state.offset).all():
            return super().quantize(weight, format, block_size, double_quant, name)  # this raises
        return Quantized(packed, state)

    def dequantize(self, packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
        if not packed.is_cuda or dtype == torch.float64:
            return super().dequantize(packed, state, dtype)
        return kernels().dequantize(packed, state, torch.empty(state.shape, dtype=dtype, device=packed.device))

    def dequantize_into(self, out: Tensor, packed: Tensor, state: QuantState) -> Tensor:
        plain = out.is_contiguous() or (out.ndim == 2 and out.stride(1) == 1 and out.stride(0) >= out.shape[1])
        if not packed.is_cuda or out.dtype == torch.float64 or not plain:
            return super().dequantize_into(out, packed, state)
        return kernels().dequantize(packed, state, out)

    def linear(self, x: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None) -> Tensor:
        fused, few = BACKENDS[BitsAndBytes.name], math.prod(x.shape[:-1]) <= self.few
        if few and fused.cannot(state.format, state.block_size, x.device) is None:
            return fused.linear(x, packed, state, bias)
        return super().linear(x, packed, state, bias)


@cache
def kernels() -> Any:
    """Return the module of the Triton kernels. It imports Triton, which a machine without a GPU need not have."""
    return import_module("peftlab.quantization.triton_kernels")


BACKENDS = {backend.name: backend for backend in (Triton(), BitsAndBytes(), Reference())}


def check_backend(name: str, format: str, block_size: int, device: torch.device) -> None:
    """Refuse a backend that does not exist, or that cannot do what is asked."""
    one_of("backend", name, (AUTO, *BACKENDS))
    reason = None if name == AUTO else BACKENDS[name].cannot(format, block_size, device)
    if reason:
        raise PeftLabError(f"backend={name!r} cannot be used: {reason}. Give backend='auto' to choose one that can.")


@cache
def choose(name: str, format: str, block_size: int, device: torch.device) -> Reference:
    """Return the backend of that name; for `"auto"` the first that can compute this.

    A layer asks at each call, since it may move between devices.
    """
    if name != AUTO:
        check_backend(name, format, block_size, device)  # this also imports it
        return BACKENDS[name]
    return next(b for b in BACKENDS.values() if b.cannot(format, block_size, device) is None)


def from_bitsandbytes(theirs: Any) -> QuantState:
    """Return bitsandbytes' record of a quantised weight as a `QuantState`. The tensors are shared, not copied."""
    nested = theirs.state2 if theirs.nested else None
    return QuantState(
        theirs.absmax, theirs.shape, theirs.dtype, theirs.blocksize, theirs.quant_type,
        nested_absmax=None if nested is None else nested.absmax, offset=theirs.offset if nested is not None else None,
    )  # fmt: skip
