"""Block-wise 4-bit quantisation in plain PyTorch: quantise, pack, dequantise, and quantise the scales again.

Dettmers et al., *QLoRA: Efficient Finetuning of Quantized LLMs*, 2023, arXiv:2305.14314, sections 2 and 3.

    c = max over the block of |w|                       one scale a block of 64, float32
    i = the code whose value q_i is nearest to w / c    four bits a weight, two of them in a byte
    w ~ q_i c

Codes, scales and dequantised values are equal to bitsandbytes 0.50 in every bit on a CPU. On CUDA its kernels are
built with fast mathematics and differ from its own CPU code for a few float32 weights in a hundred million, and not for
bf16 or fp16; scales are quantised to the nearest code there, and to that of a fine bin on the CPU; and FP4 codes follow
another rule, which is met but for weights on a boundary between two codes. The reference follows the device that it
runs on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peftlab.checks import whole
from peftlab.errors import PeftLabError
from peftlab.quantization.codebooks import (
    BINS,
    boundaries,
    check_format,
    dynamic_bins,
    dynamic_book,
    pairs,
)

SCALE_BLOCK = 256  # scales that share a scale of their own in double quantisation
SMALLEST = 1e-38  # an all-zero block is divided by this
CHUNK = 1 << 22  # weights quantised at a time: the work space then stays small, and in the cache


@dataclass(frozen=True)
class QuantState:
    """What four-bit codes stand for.

    Attributes:
        absmax: the blocks' scales, (blocks,): float32, or after double quantisation uint8 codes of `dynamic_map`.
        shape, dtype: of the weight that was quantised.
        block_size: weights that share a scale.
        format: `"nf4"`, `"fp4"` or `"int4"`.
        nested_absmax: with double quantisation, a scale for each 256 scales, float32; else None.
        offset: the mean scale, taken off before they were quantised, a float32 scalar; else None.
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
        """Whether the scales are quantised too."""
        return self.nested_absmax is not None

    def scales(self) -> Tensor:
        """The blocks' scales as numbers, (blocks,) float32."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        # c = d[code] c2 + mean(c): each 256 scales share one c2
        values = dynamic_book(self.absmax.device)[self.absmax.int()]
        return _scaled(values, self.nested_absmax, SCALE_BLOCK).add_(self.offset)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors among the attributes, by name."""
        named = {"absmax": self.absmax, "nested_absmax": self.nested_absmax, "offset": self.offset}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def with_tensors(self, tensors: dict[str, Tensor]) -> QuantState:
        """The same with other tensors, on another device for example."""
        named: dict[str, Any] = {**tensors}
        return replace(self, **named)


@dataclass
class Quantized:
    """A quantised tensor: `packed`, (ceil(n / 2), 1) uint8, and what its codes stand for."""

    packed: Tensor
    state: QuantState

    @property
    def absmax(self) -> Tensor:
        """The scales as stored: float32, or uint8 after double quantisation."""
        return self.state.absmax

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight that the codes stand for."""
        return self.state.shape

    @property
    def codes(self) -> Tensor:
        """One code a weight, (n,) uint8."""
        both = torch.stack([self.packed.flatten() >> 4, self.packed.flatten() & 15], dim=1)
        return both.flatten()[: math.prod(self.shape)]

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of all scales."""
        return self.packed.nbytes + sum(tensor.nbytes for tensor in self.state.tensors().values())

    @property
    def bits_per_parameter(self) -> float:
        """Bits a weight, with its share of the scales: 4 + 32/64 = 4.5, or 4 + 8/64 + 32/(64 x 256) = 4.127."""
        return 8 * self.nbytes / math.prod(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that the codes stand for, in its own dtype or another: q_i c, rounded once from float32."""
        return dequantize(self.packed, self.state, dtype)


def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = True, *, name: str = "weight") -> Quantized:
    """Quantises a tensor to NF4: `quantize` with its first and best-known format."""
    return quantize(weight, "nf4", block_size=block_size, double_quant=double_quant, name=name)


@torch.no_grad()
def quantize(
    weight: Tensor, format: str = "nf4", *, block_size: int = 64, double_quant: bool = True, name: str = "weight"
) -> Quantized:
    """Quantises a tensor of any shape, row by row, in blocks that may reach over the ends of rows.

    Args:
        weight: float32, bfloat16 or float16 (float64 is rounded to float32 first).
        format: `"nf4"`, `"fp4"` or `"int4"`.
        block_size: a power of two from 2 on; 64 in QLoRA. The last block may be shorter.
        double_quant: quantise the scales too, to 8 bits.
        name: what to call the tensor in an error.

    Raises:
        PeftLabError: a value that is not finite, an unknown format, a block size or dtype that cannot be.
    """
    check_format(format)
    block_size = whole("block_size", block_size, least=2, usual="64, always a power of two")
    if block_size.bit_count() > 1:
        raise PeftLabError(f"block_size must be a power of two, 32 to 4096 in bitsandbytes, not {block_size}.")
    if not weight.is_floating_point() or weight.numel() == 0:
        kind = f"{tuple(weight.shape)} of {weight.dtype}"
        raise PeftLabError(f"{name} is {kind}; only floating weights can be quantised.")
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
    # maxima carry NaN and infinity along, so one look at the scales is a look at every weight
    if not torch.isfinite(absmax).all():
        wrong = int((~torch.isfinite(flat)).sum())
        raise PeftLabError(
            f"{name} holds {wrong} values that are NaN or infinite; its blocks would be quantised to nonsense. Look at "
            "how the weight was trained or loaded."
        )
    state = QuantState(absmax, weight.shape, weight.dtype, block_size, format)
    state = quantize_scales(state) if double_quant else state
    if state.offset is not None and not torch.isfinite(state.offset):
        raise PeftLabError(
            f"{name} holds values so large that the mean of its scales overflows. Quantise it with double_quant=False."
        )
    return Quantized(packed, state)


def _absmax(values: Tensor, block_size: int) -> Tensor:
    """The largest magnitude of each block; a last, shorter block has one of its own."""
    whole = values.numel() // block_size * block_size
    absmax = values[:whole].view(-1, block_size).abs().amax(1)
    if whole < values.numel():
        # bitsandbytes never stores a zero for a short block
        absmax = torch.cat([absmax, values[whole:].abs().amax().clamp(min=SMALLEST).view(1)])
    return absmax


def _codes(values: Tensor, absmax: Tensor, block_size: int, format: str) -> Tensor:
    """The nearest code of each value over its block's scale, uint8; an odd number of them ends in a zero's."""
    bounds, order = boundaries(format, values.device)
    whole = values.numel() // block_size * block_size
    # the reciprocal and then a product, not a quotient: the two differ in the last bit, and codes follow
    reciprocal = 1 / absmax[: whole // block_size].clamp(min=SMALLEST)
    scaled = (values[:whole].view(-1, block_size) * reciprocal[:, None]).view(-1)
    if whole < values.numel():  # but for a short block bitsandbytes divides, on a CPU
        last = values[whole:]
        scaled = torch.cat([scaled, last * (1 / absmax[-1]) if values.is_cuda else last / absmax[-1]])
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))  # half a byte would be left: it holds a zero
    scaled.clamp_(-1, 1)
    if format == "fp4" and scaled.is_cuda:
        return signed_codes(scaled)
    index = torch.bucketize(scaled, bounds, out_int32=True)
    return index.to(torch.uint8) if format != "fp4" else order[index]


def signed_codes(scaled: Tensor) -> Tensor:
    """FP4 codes in the manner of bitsandbytes' CUDA kernel: by magnitude, and then the sign's bit.

    Its CPU code looks among the signed values instead. The two differ where a value rounds to zero, which has two
    codes, and in the last digits of a boundary that the kernel's source writes in decimals; what they stand for is
    the same but for values within 4e-7 of a boundary. With 16-bit weights, which often lie on one, one byte in some
    ten thousand is still another than the kernel's (measured on an H100), as near to the weight as this one.
    """
    # 1/24 of 1/16, 2 + 1/16, 5, 7, 10, 14 and 20, as written there, and the codes of 0, 1/16, 2, 3, 4, 6, 8, 12
    bounds = scaled.new_tensor([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333])
    order = torch.tensor([0, 1, 6, 7, 4, 5, 2, 3], dtype=torch.uint8, device=scaled.device)
    return order[torch.bucketize(scaled.abs(), bounds, out_int32=True)] + 8 * (scaled < 0).to(torch.uint8)


def _pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the high four bits."""
    return (codes[::2] << 4) | codes[1::2]


def quantize_scales(state: QuantState) -> QuantState:
    """Double quantisation: the scales less their mean, in 8 bits with a scale for each 256 of them."""
    # mean(c) is taken off, because scales are all positive and the map is symmetric
    offset = state.absmax.mean()
    centred = state.absmax - offset
    nested = _blocks(centred, SCALE_BLOCK).abs().amax(1)
    scaled = centred * (1 / nested).repeat_interleave(SCALE_BLOCK)[: centred.numel()]
    return replace(state, absmax=eight_bit_codes(scaled), nested_absmax=nested, offset=offset)


def eight_bit_codes(scaled: Tensor) -> Tensor:
    """Codes of `dynamic_map` for values in [-1, 1], (n,) uint8: the nearest on CUDA, that of a fine bin on the CPU."""
    if scaled.is_cuda:
        book = dynamic_book(scaled.device)
        return torch.bucketize(scaled, (book[:-1] + book[1:]) / 2, out_int32=True).to(torch.uint8)
    # int(z + 0.5) rounds to the nearest of 65,536 bins; that bin's code is then taken
    bins = ((scaled + 1) * 0.5 * (BINS - 1) + 0.5).nan_to_num_(0).long().clamp_(0, BINS - 1)
    return dynamic_bins(scaled.device)[bins]


def dequantize(packed: Tensor, state: QuantState, dtype: torch.dtype | None = None) -> Tensor:
    """The weight that packed codes stand for, of the state's shape, in its dtype or another."""
    # one look-up a byte gives both values
    values = pairs(state.format, packed.device)[packed.view(-1).int()].view(-1)
    values = values[: math.prod(state.shape)]
    # w = q_i c
    return _scaled(values, state.scales(), state.block_size).to(dtype or state.dtype).view(state.shape)


def _scaled(values: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """Each block of `values`, (n,), times its scale, in place."""
    whole = values.numel() // block_size
    values[: whole * block_size].view(-1, block_size).mul_(scales[:whole, None])
    values[whole * block_size :].mul_(scales[-1])
    return values


def _blocks(values: Tensor, block_size: int) -> Tensor:
    """Values in rows of a block each; a last, shorter one is filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -values.numel() % block_size)).view(-1, block_size)
