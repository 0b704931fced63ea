"""Quantise a weight W in blocks to four bits, pack the codes, dequantise them, and quantise the scales again.

    c = max over the block of |w|                       one scale per block of 64 weights, float32
    i = the code whose value q_i is nearest to w / c    four bits per weight, two codes in a byte
    w ~ q_i c                                           W: n weights,  i: (n,),  c: (ceil(n / 64),)

Paper: Dettmers et al., *QLoRA: Efficient Finetuning of Quantized LLMs*, 2023, arXiv:2305.14314, sections 2 and 3.
Book: section 3.3, "Blocks and scales"; also 3.5, "Scales cost bits, too".

On a CPU, codes, scales and dequantised values are equal to bitsandbytes 0.50 in every bit. On CUDA its kernels are
built with fast mathematics. They differ from its own CPU code for a few float32 weights in a hundred million, and not
for bf16 or fp16. Scales are quantised to the nearest code on CUDA, and to the code of a fine bin on the CPU. FP4 codes
follow another rule on CUDA; it is met except for weights on a boundary between two codes. The reference follows the
device that it runs on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from peftlab.checks import checked, whole
from peftlab.errors import PeftLabError
from peftlab.quantization.codebooks import (
    BINS,
    boundaries,
    check_format,
    dynamic_bins,
    dynamic_book,
    pairs,
)

SCALE_BLOCK = 256  # so many scales share one scale in double quantisation
SMALLEST = 1e-38  # a block of zeros is divided by this instead of by zero
# Where one of FP4's magnitudes ends and the next begins: 1/24 of 1/16, 2 + 1/16, 5, 7, 10, 14 and 20, in the decimals
# of the source of bitsandbytes' CUDA kernel. Then the codes of the magnitudes 0, 1/16, 2, 3, 4, 6, 8 and 12.
FP4_BOUNDS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
FP4_ORDER = (0, 1, 6, 7, 4, 5, 2, 3)
CHUNK = 1 << 22  # weights quantised at a time, so that the work space stays small and in the cache


def _absmax(values: Tensor, block_size: int) -> Tensor:
    """Return the largest magnitude of each block. A last, shorter block has its own."""
    whole = values.numel() // block_size * block_size
    # c = max over the block of |w|
    absmax = values[:whole].view(-1, block_size).abs().amax(1)
    if whole < values.numel():
        # bitsandbytes never stores a zero for a short block
        absmax = torch.cat([absmax, values[whole:].abs().amax().clamp(min=SMALLEST).view(1)])
    return absmax


def _codes(values: Tensor, absmax: Tensor, block_size: int, format: str) -> Tensor:
    """Return the nearest code of each value over its block's scale, uint8.

    If the number of values is odd, the code of zero is added.
    """
    bounds, order = boundaries(format, values.device)
    whole = values.numel() // block_size * block_size
    # w / c as w (1 / c), as bitsandbytes does: a quotient differs in the last bit, and then some codes differ
    reciprocal = 1 / absmax[: whole // block_size].clamp(min=SMALLEST)
    scaled = (values[:whole].view(-1, block_size) * reciprocal[:, None]).view(-1)
    if whole < values.numel():  # for a short block bitsandbytes divides on a CPU
        last = values[whole:]
        scaled = torch.cat([scaled, last * (1 / absmax[-1]) if values.is_cuda else last / absmax[-1]])
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))  # fill the last byte with a zero
    scaled.clamp_(-1, 1)
    if format == "fp4" and scaled.is_cuda:
        return signed_codes(scaled)
    # i = the code whose value q_i is nearest to w / c
    index = torch.bucketize(scaled, bounds, out_int32=True)
    return index.to(torch.uint8) if format != "fp4" else order[index]


def _pack(codes: Tensor) -> Tensor:
    """Return two codes per byte, the first in the high four bits."""
    return (codes[::2] << 4) | codes[1::2]


def dequantize(packed: Tensor, state: QuantState, dtype: torch.dtype | None = None) -> Tensor:
    """Return the weight that packed codes stand for, in the state's shape, in its dtype or another."""
    if packed.dtype != torch.uint8 or packed.numel() != (math.prod(state.shape) + 1) // 2:
        raise PeftLabError(
            f"packed must be uint8 codes, two in a byte, for a weight {tuple(state.shape)}; found {packed.dtype} "
            f"{tuple(packed.shape)}."
        )
    # one look-up per byte gives both values q_i; as one number of 8 bytes they are copied several times as fast
    both = pairs(state.format, packed.device).view(torch.int64).view(-1)
    values = both.index_select(0, packed.view(-1).int()).view(torch.float32)
    values = values[: math.prod(state.shape)]
    # w = q_i c
    return _scaled(values, state.scales(), state.block_size).to(dtype or state.dtype).view(state.shape)


def _scaled(values: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """Multiply each block of `values`, (n,), by its scale, in place."""
    whole = values.numel() // block_size
    values[: whole * block_size].view(-1, block_size).mul_(scales[:whole, None])
    values[whole * block_size :].mul_(scales[-1])
    return values


def quantize_scales(state: QuantState) -> QuantState:
    """Quantise the scales too, in 8 bits: double quantisation.

        c ~ d[code] c2 + mean(c),    c: (blocks,),  c2: (ceil(blocks / 256),),  d: the 256 values of `dynamic_map`
    """
    # c - mean(c): scales are all positive, but the map is symmetric
    offset = state.absmax.mean()
    centred = state.absmax - offset
    nested = _blocks(centred, SCALE_BLOCK).abs().amax(1)
    scaled = centred * (1 / nested).repeat_interleave(SCALE_BLOCK)[: centred.numel()]
    return replace(state, absmax=eight_bit_codes(scaled), nested_absmax=nested, offset=offset)


def eight_bit_codes(scaled: Tensor) -> Tensor:
    """Return codes of `dynamic_map` for values in [-1, 1], (n,) uint8.

    On CUDA it is the nearest code, on the CPU the code of a fine bin.
    """
    if scaled.is_cuda:
        return nearest_eight_bit_codes(scaled)
    # int(z + 0.5) rounds to the nearest of 65,536 bins, and the code is that bin's
    bins = ((scaled + 1) * 0.5 * (BINS - 1) + 0.5).nan_to_num_(0).long().clamp_(0, BINS - 1)
    return dynamic_bins(scaled.device)[bins]


@checked("block_size")
def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = True, *, name: str = "weight") -> Quantized:
    """Quantise a tensor to NF4, the format of QLoRA. The arguments are those of `quantize`.

    >>> q = pl.quantize_nf4(model.lm_head.weight)
    >>> q.packed.shape, q.absmax.shape  # 512 weights: two codes per byte, one scale per 64 weights
    (torch.Size([256, 1]), torch.Size([8]))
    >>> q.dequantize().shape
    torch.Size([32, 16])
    """
    return quantize(weight, "nf4", block_size=block_size, double_quant=double_quant, name=name)


@checked("block_size")
@torch.no_grad()
def quantize(
    weight: Tensor, format: str = "nf4", *, block_size: int = 64, double_quant: bool = True, name: str = "weight"
) -> Quantized:
    """Quantise a tensor of any shape, row by row, in blocks that may run on into the next row.

    Args:
        weight: float32, bfloat16 or float16 (float64 is rounded to float32 first).
        format: `"nf4"`, `"fp4"` or `"int4"`.
        block_size: a power of two, at least 2; 64 in QLoRA. The last block may be shorter.
        double_quant: quantise the scales too, to 8 bits.
        name: what to call the tensor in an error.

    Raises:
        PeftLabError: a value is not finite, the format is unknown, or the block size or dtype is not allowed.

    >>> weight = model.lm_head.weight.detach()
    >>> q = pl.quantize(weight, "int4", double_quant=False)
    >>> q.bits_per_parameter  # four bits per code, and 32 bits of scale for 64 of them
    4.5
    >>> (q.dequantize() - weight).abs().max() < weight.abs().max() / 12  # int4 has steps of 1/7
    tensor(True)
    """
    check_format(format)
    block_size = check_block_size(block_size)
    if not weight.is_floating_point() or weight.numel() == 0:
        kind = f"{tuple(weight.shape)} of {weight.dtype}"
        raise PeftLabError(f"{name} is {kind}; only floating weights that are not empty can be quantised.")
    flat = weight.detach().reshape(-1)
    packed = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(flat.numel() // -block_size), dtype=torch.float32, device=flat.device)
    chunk = max(CHUNK, block_size) if flat.device.type == "cpu" else 16 * CHUNK
    for start in range(0, flat.numel(), chunk):
        values = flat[start : start + chunk].float()
        blocks = slice(start // block_size, -((start + values.numel()) // -block_size))
        absmax[blocks] = _absmax(values, block_size)
        codes = _codes(values, absmax[blocks], block_size, format)
        packed[start // 2 : (start + values.numel() + 1) // 2, 0] = _pack(codes)
    # the largest of a block with NaN or infinity is NaN or infinite, so checking the scales checks every weight
    if not torch.isfinite(absmax).all():
        wrong = int((~torch.isfinite(flat)).sum())
        raise PeftLabError(
            f"{name} holds {wrong} values that are NaN or infinite, and their blocks cannot be quantised. Look at how "
            "the weight was trained or loaded."
        )
    state = QuantState(absmax, weight.shape, weight.dtype, block_size, format)
    state = quantize_scales(state) if double_quant else state
    if state.offset is not None and not torch.isfinite(state.offset):
        raise PeftLabError(
            f"{name} holds values so large that the mean of its scales overflows. Quantise it with double_quant=False."
        )
    return Quantized(packed, state)


@dataclass(frozen=True)
class QuantState:
    """Say what four-bit codes stand for.

    Attributes:
        absmax: the blocks' scales, (blocks,): float32, or after double quantisation uint8 codes of `dynamic_map`.
        shape, dtype: those of the weight that was quantised.
        block_size: the number of weights that share a scale.
        format: `"nf4"`, `"fp4"` or `"int4"`.
        nested_absmax: with double quantisation, one float32 scale for each 256 scales; else None.
        offset: with double quantisation, the mean of the scales, which is subtracted before they are quantised, a
            float32 scalar; else None.
    """

    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    block_size: int
    format: str
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None

    @property
    def nested(self) -> bool:
        """Say whether the scales are quantised too."""
        return self.nested_absmax is not None

    def scales(self) -> Tensor:
        """Return the blocks' scales as numbers, (blocks,) float32."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        # c = d[code] c2 + mean(c): each 256 scales share one c2
        values = dynamic_book(self.absmax.device)[self.absmax.int()]
        return _scaled(values, self.nested_absmax, SCALE_BLOCK).add_(self.offset)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors among the attributes, by name."""
        named = {"absmax": self.absmax, "nested_absmax": self.nested_absmax, "offset": self.offset}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        """Return the same state with other tensors, on another device for example."""
        named: dict[str, Any] = {**tensors}
        return replace(self, **named)


@dataclass
class Quantized:
    """Hold a quantised tensor: its packed codes, and what they stand for.

    Attributes:
        packed: (ceil(n / 2), 1) uint8.
        state: the scales, the format and the shape.

    >>> q = pl.quantize_nf4(torch.linspace(-1, 1, 128), double_quant=False)
    >>> q.codes[:3], q.absmax, q.nbytes
    (tensor([0, 0, 0], dtype=torch.uint8), tensor([1., 1.]), 72)
    """

    packed: Tensor
    state: QuantState

    @property
    def absmax(self) -> Tensor:
        """Return the scales as stored: float32, or uint8 after double quantisation."""
        return self.state.absmax

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the weight that the codes stand for."""
        return self.state.shape

    @property
    def codes(self) -> Tensor:
        """Return one code per weight, (n,) uint8."""
        both = torch.stack([self.packed.flatten() >> 4, self.packed.flatten() & 15], dim=1)
        return both.flatten()[: math.prod(self.shape)]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the codes and of all scales."""
        return self.packed.nbytes + sum(tensor.nbytes for tensor in self.state.tensors().values())

    @property
    def bits_per_parameter(self) -> float:
        """Return the bits per weight, with its share of the scales.

        In blocks of 64 that is 4 + 32/64 = 4.5, or with double quantisation 4 + 8/64 + 32/(64 x 256) = 4.127.
        """
        return 8 * self.nbytes / math.prod(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight that the codes stand for, q_i c, rounded once from float32 to its own dtype or another."""
        return dequantize(self.packed, self.state, dtype)


def signed_codes(scaled: Tensor) -> Tensor:
    """Return FP4 codes as bitsandbytes' CUDA kernel does: by magnitude, then the sign's bit.

    Its CPU code looks among the signed values instead. The two differ where a value rounds to zero, which has two
    codes. They also differ in the last digits of a boundary, which the kernel's source writes in decimals; the values
    that the codes stand for are equal except within 4e-7 of a boundary. 16-bit weights often lie on a boundary. There
    about one byte in ten thousand still differs from the kernel's (measured on an H100), and is as near to the weight.
    """
    bounds = scaled.new_tensor(FP4_BOUNDS)
    order = torch.tensor(FP4_ORDER, dtype=torch.uint8, device=scaled.device)
    return order[torch.bucketize(scaled.abs(), bounds, out_int32=True)] + 8 * (scaled < 0).to(torch.uint8)


def nearest_eight_bit_codes(scaled: Tensor) -> Tensor:
    """Return the nearest code of `dynamic_map` for each value, as bitsandbytes' CUDA kernel does."""
    book = dynamic_book(scaled.device)
    return torch.bucketize(scaled, (book[:-1] + book[1:]) / 2, out_int32=True).to(torch.uint8)


def check_block_size(block_size: int) -> int:
    """Return the size of a block, a power of two."""
    block_size = whole("block_size", block_size, least=2, usual="64, always a power of two")
    if block_size.bit_count() > 1:
        raise PeftLabError(f"block_size must be a power of two, 32 to 4096 in bitsandbytes, not {block_size}.")
    return block_size


def _blocks(values: Tensor, block_size: int) -> Tensor:
    """Return values in rows of one block each. A last, shorter one is filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -values.numel() % block_size)).view(-1, block_size)
