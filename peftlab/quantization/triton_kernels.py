"""Dequantise and quantise four-bit weights on a GPU with Triton, each in one pass over memory.

    w = q_i c                            dequantise: a byte of codes becomes two weights
    c = max |w|,  i = #{b_k < w / c}     quantise: the same the other way;  b: (15,), the bounds between the codes

Book: section 3.3, "Blocks and scales".

Memory limits both, so there must be little work per weight. Dequantising, a thread reads four bytes and their one scale
and writes eight weights. Quantising, a code is found by one look and one comparison instead of a search among fifteen
bounds. For that the range of w / c is cut into bins of 1/16. No two bounds lie so close together, so a bin holds one
bound at most:

    i = below_k + (w / c > bound_k),     k = the bin of w / c

Codes, scales and weights equal those of `blockwise` on the same device in every bit. On an H200 dequantising NF4 moves
1.25 to 1.4 times the bytes per second of a copy (it mostly writes), and quantising as many as a copy (FP4 0.9 of it).

This file imports Triton, so it is imported only where that is installed (see `backends`).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftlab.quantization.blockwise import FP4_BOUNDS, FP4_ORDER, SCALE_BLOCK, SMALLEST, QuantState
from peftlab.quantization.codebooks import CPU, boundaries, code_book, dynamic_book, made_once

WORDS = 256  # of four bytes, per program that dequantises
WEIGHTS = 4096  # per program that quantises
SHIFT = 2.0**23 + 32  # 16 z + SHIFT has the whole number 32 + 16 z in its lowest bits: the bin of z
BINS = 64
EXACT = {"num_warps": 4, "enable_fp_fusion": False}  # a fused product and sum would round once instead of twice


def dequantize(packed: Tensor, state: QuantState, out: Tensor) -> Tensor:
    """Write the weight that codes stand for into `out`, and return it.

    Args:
        packed: (ceil(n / 2), 1) uint8.
        state: what the codes stand for.
        out: a tensor of n numbers, of float32, float16 or bfloat16. One of two dimensions may have rows that are apart
            (`out.stride(0)` more than the columns); any other is contiguous.
    """
    n = math.prod(state.shape)
    columns = 0 if out.is_contiguous() else out.shape[1]
    scales = (state.absmax, state.nested_absmax, state.offset) if state.nested else (state.absmax,) * 3
    book, dynamic = code_book(state.format, packed.device), dynamic_book(packed.device)
    with on(packed.device):
        _dequantize[triton.cdiv(n, 8 * WORDS),](
            packed, *scales, book, dynamic, out, n, packed.numel(), out.stride(0) if columns else 0, columns,
            state.block_size // 8, state.nested, WORDS, **EXACT,
        )  # fmt: skip
    return out


@triton.jit
def _dequantize(
    packed: tl.tensor, scales: tl.tensor, nested: tl.tensor, offset: tl.tensor, book: tl.tensor, dynamic: tl.tensor,
    out: tl.tensor, n: tl.tensor, n_bytes: tl.tensor, stride: tl.tensor,
    COLUMNS: tl.constexpr, WORDS_PER_BLOCK: tl.constexpr, NESTED: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    """Write the weights of WORDS words. COLUMNS is 0 where `out` is contiguous."""
    start = tl.program_id(0).to(tl.int64) * WORDS  # the program's first word
    word, left = tl.arange(0, WORDS), n - 8 * start
    byte = 4 * word[:, None] + tl.arange(0, 4)[None, :]
    codes = tl.load(packed + 4 * start + byte, byte < n_bytes - 4 * start, other=0)
    # a block has whole words, so a word has one scale
    block = (start + word) // WORDS_PER_BLOCK
    scale = tl.load(scales + block, 8 * word < left, other=0)
    if NESTED:
        # c = d[code] c2 + mean(c)
        scale = tl.load(dynamic + scale.to(tl.int32)) * tl.load(nested + block // 256, 8 * word < left, other=0.0)
        scale += tl.load(offset)
    # w = q_i c; the first of two codes is in the high four bits
    code = tl.reshape(tl.join(codes >> 4, codes & 15), (WORDS, 8)).to(tl.int32)
    w = tl.load(book + code) * scale[:, None]
    inside = 8 * word[:, None] + tl.arange(0, 8)[None, :]
    if COLUMNS:
        top = 8 * start // COLUMNS
        column = (8 * start - top * COLUMNS).to(tl.int32) + inside
        down = column // COLUMNS
        place = top * stride + down.to(tl.int64) * stride + (column - down * COLUMNS)
    else:
        place = 8 * start + inside
    tl.store(out + place, w.to(out.dtype.element_ty), inside < left)


def quantize(weight: Tensor, format: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Return a weight's codes, (ceil(n / 2), 1) uint8, and its scales, (blocks,) float32.

    A scale is NaN or infinite where a weight of its block is.

    Args:
        weight: of n numbers, contiguous, of float32, float16 or bfloat16.
    """
    n = weight.numel()
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(triton.cdiv(n, block_size), dtype=torch.float32, device=weight.device)
    blocks = max(1, WEIGHTS // block_size)
    with on(weight.device):
        _quantize[triton.cdiv(absmax.numel(), blocks),](
            weight, bins(format, weight.device), packed, absmax, n, packed.numel(), block_size, blocks,
            format == "fp4", SMALLEST, SHIFT, **EXACT,
        )  # fmt: skip
    return packed, absmax


@triton.jit
def _larger(one: tl.tensor, other: tl.tensor) -> tl.tensor:
    """Return the larger of two numbers, and NaN if one of them is."""
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _quantize(
    weight: tl.tensor, bins: tl.tensor, packed: tl.tensor, absmax: tl.tensor, n: tl.tensor, n_bytes: tl.tensor,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, SIGNED: tl.constexpr, SMALLEST: tl.constexpr, SHIFT: tl.constexpr,
) -> None:  # fmt: skip
    """Write the codes and scales of BLOCKS blocks of SIZE weights. SIGNED: the code is of the magnitude, and a sign.

    The tiles have rows of eight weights, one for each thread, so that no number moves between threads but the maxima.
    """
    ROWS: tl.constexpr = SIZE // 8  # of a block
    start = tl.program_id(0).to(tl.int64) * BLOCKS  # the program's first block
    left = n - start * SIZE
    row, block = tl.arange(0, BLOCKS * ROWS), tl.arange(0, BLOCKS)
    inside = 8 * row[:, None] + tl.arange(0, 8)[None, :]
    w = tl.load(weight + start * SIZE + inside, inside < left, other=0.0).to(tl.float32)
    # c = max |w|
    c = tl.reduce(tl.reshape(tl.reduce(tl.abs(w), 1, _larger), (BLOCKS, ROWS)), 1, _larger)
    least = tl.maximum(c, tl.full((BLOCKS,), SMALLEST, tl.float32))
    # as in the reference, a last, shorter block stores no zero
    tl.store(absmax + start + block, tl.where((block + 1) * SIZE > left, least, c), block * SIZE < left)
    # z = w (1 / c)
    inverse = tl.broadcast_to(tl.div_rn(1.0, least)[:, None], (BLOCKS, ROWS))
    z = w * tl.reshape(inverse, (BLOCKS * ROWS,))[:, None]
    size = tl.abs(z) if SIGNED else z
    # one look: the bin's bound in the low half, the codes below and above it in the high half
    found = tl.load(bins + (tl.fma(size, 16.0, SHIFT).to(tl.int32, bitcast=True) & 63))
    bound = found.to(tl.int32).to(tl.float32, bitcast=True)
    codes = (found >> 32).to(tl.int32)
    code = tl.where(size > bound, codes >> 4, codes)
    if SIGNED:
        code = tl.where(z < 0, code | 8, code)
    high, low = tl.split(tl.reshape(code, (BLOCKS * ROWS, 4, 2)))
    byte = 4 * row[:, None] + tl.arange(0, 4)[None, :]
    both = ((high << 4) & 0xF0 | low & 0x0F).to(tl.uint8)
    tl.store(packed + start * (SIZE // 2) + byte, both, byte < n_bytes - start * (SIZE // 2))


@made_once
def bins(format: str, device: torch.device = CPU) -> Tensor:
    """Return what `_quantize` must know of each bin, (64,) int64: the bound in it, and the codes below and above it.

    A bin is what `16 z + SHIFT` rounds to. Rounding keeps the order, so all below the bound's bin are below the bound.
    """
    bounds, order = map(torch.tensor, (FP4_BOUNDS, FP4_ORDER)) if format == "fp4" else boundaries(format)
    bounds = bounds[bounds < 1]  # int4 has a code that no value reaches
    own = (bounds * 16 + SHIFT).view(torch.int32) & (BINS - 1)
    below = (own[None, :] < torch.arange(BINS)[:, None]).sum(1)  # bounds in earlier bins
    bound = torch.full((BINS,), math.inf)
    bound[own.long()] = bounds
    last = len(order) - 1
    codes = order[below].long() | order[(below + 1).clamp(max=last)].long() << 4
    return (bound.view(torch.int32).long() & 0xFFFFFFFF | codes << 32).to(device)


def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scales' own codes, (blocks,) uint8, their scales, (ceil(blocks / 256),) float32, and their mean."""
    offset = absmax.mean()
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    nested = torch.empty(triton.cdiv(absmax.numel(), SCALE_BLOCK), device=absmax.device)
    with on(absmax.device):
        _quantize_scales[nested.numel(),](
            absmax, offset, middles(absmax.device), codes, nested, absmax.numel(), SCALE_BLOCK, **EXACT
        )
    return codes, nested, offset


@triton.jit
def _quantize_scales(
    absmax: tl.tensor, offset: tl.tensor, middles: tl.tensor, codes: tl.tensor, nested: tl.tensor, n: tl.tensor,
    SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """Write the codes of SIZE scales and the scale of these."""
    start = tl.program_id(0).to(tl.int64) * SIZE
    inside = tl.arange(0, SIZE)
    there = inside < n - start
    # c - mean(c)
    centred = tl.load(absmax + start + inside, there, other=0.0) - tl.load(offset)
    most = tl.max(tl.where(there, tl.abs(centred), 0.0), 0)
    tl.store(nested + tl.program_id(0), most)
    z = centred * tl.div_rn(1.0, most)
    # the nearest of 256 values, by halving: the number of middles below z
    code = tl.zeros((SIZE,), tl.int32)
    for k in tl.static_range(8):
        code += tl.where(z <= tl.load(middles + code + (128 >> k) - 1), 0, 128 >> k)
    tl.store(codes + start + inside, code.to(tl.uint8), there)


@made_once
def middles(device: torch.device = CPU) -> Tensor:
    """Return the bounds between the codes of the dynamic map, (255,) float32."""
    book = dynamic_book(device)
    return (book[:-1] + book[1:]) / 2


def on(device: torch.device) -> torch.cuda.device:
    """Return a context in which kernels start on that device."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
