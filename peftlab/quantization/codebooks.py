"""Compute the sixteen values that four bits can name, in each format, and the 256 that the scales can take.

    NF4:    q_i = Q(p_i) / max Q,    Q(p) = sqrt(2) erfinv(2p - 1),    q: (16,)

Paper: for NF4, Dettmers et al., *QLoRA*, 2023, arXiv:2305.14314, section 3 and appendix E; for the dynamic 8-bit map,
Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, 2021, arXiv:2110.02861, section 1.3.
Book: section 3.2, "Sixteen values from quantiles".

The tables are computed, not typed, and equal to those of bitsandbytes in every bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor

from peftlab.checks import one_of

BINS = 65_536
CPU = torch.device("cpu")


def made_once(make: Callable) -> Callable:
    """Keep a table that was made once. It is made on the CPU in float32, whatever defaults are set at the moment."""

    @cache
    @wraps(make)
    def kept(*arguments: object, **named: object) -> object:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
                return make(*arguments, **named)
        finally:
            torch.set_default_dtype(dtype)

    return kept


def normal_quantiles() -> Tensor:
    """Return NF4: sixteen quantiles of the standard normal distribution, (16,) float32, ascending from -1 to 1.

    Weights of a trained layer are close to normal. Seven values lie below zero and eight above, so that zero itself is
    one of them. A padded or pruned weight then stays exactly zero. The values are not used equally often: a block's
    scale stretches the table beyond the quantiles that it was made from, so the values near zero are used more.
    """
    # The quantile at 1 is infinite, so the table stops at the mean of 31/32 and 29/30.
    offset = 0.9677083
    positive = quantile(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -quantile(torch.linspace(offset, 0.5, 8)[:-1])
    values = torch.cat([negative, torch.zeros(1), positive]).sort().values
    # q_i = Q(p_i) / max Q: the largest becomes 1, the smallest -1
    return values / values.max()


def quantile(p: Tensor) -> Tensor:
    """Return the standard normal's quantile function, Q(p) = sqrt(2) erfinv(2p - 1), as float32 from float64."""
    return (2**0.5 * torch.erfinv(2 * p.double() - 1)).float()


def four_bit_floats() -> Tensor:
    """Return the FP4 of bitsandbytes, (16,) float32 in the order of their bit patterns.

    The seven magnitudes above zero are 1/16, 2, 3, 4, 6, 8 and 12, each divided by 12. This is not the E2M1 of the OCP
    standard, which has 1 in the place of 1/16: so this table has almost nothing between zero and 2/12, where most
    weights are. Zero occurs twice, with either sign, so fifteen values are distinct.
    """
    magnitudes = torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3])
    return torch.cat([magnitudes, -magnitudes]) / 12


def four_bit_integers() -> Tensor:
    """Return INT4: the whole numbers -7 to 7, divided by 7, (16,) float32, ascending. The last one occurs twice."""
    return torch.cat([torch.arange(-7, 8), torch.tensor([7])]) / 7


def dynamic_map() -> Tensor:
    """Return the 8-bit dynamic map, (256,) float32 ascending in [-1, 1], for the scales in double quantisation.

    Each value is a power of ten, 10^0 to 10^-6, times a fraction in (0.1, 1). The smaller the power, the fewer bits are
    left for the fraction, from six down to none. The map covers seven orders of magnitude, with a relative step below
    2% at the top.
    """
    values = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1)
        middles = 10 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values))


FORMATS = {"nf4": normal_quantiles, "fp4": four_bit_floats, "int4": four_bit_integers}


def check_format(name: str) -> None:
    """Refuse a name that is no format, with near matches."""
    one_of("format", name, FORMATS)


@made_once
def code_book(name: str, device: torch.device = CPU) -> Tensor:
    """Return the values of a format, (16,) float32, by code. A code stands for its value times its block's scale."""
    check_format(name)
    return FORMATS[name]().to(device)


@made_once
def pairs(name: str, device: torch.device = CPU) -> Tensor:
    """Return the two values that each byte stands for, (256, 2) float32. The first lies in the high four bits."""
    book = code_book(name, device)
    byte = torch.arange(256, device=device)
    return torch.stack([book[byte >> 4], book[byte & 15]], dim=1)


@made_once
def boundaries(name: str, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Return where one code ends and the next begins, (15,) float32, and the codes by ascending value, (16,) uint8."""
    order = torch.argsort(code_book(name), stable=True)
    ascending = code_book(name)[order]
    # half-way between two neighbours; a value on the boundary gets the lower code
    return ((ascending[:-1] + ascending[1:]) / 2).to(device), order.to(torch.uint8).to(device)


@made_once
def dynamic_book(device: torch.device = CPU) -> Tensor:
    """Return `dynamic_map` on a device."""
    return dynamic_map().to(device)


@made_once
def dynamic_bins(device: torch.device = CPU) -> Tensor:
    """Return the code of each of 65,536 bins of [-1, 1], (65536,) uint8, as in the table of bitsandbytes' CPU kernel.

    A bin's code is the one nearest to the bin's middle. So within a bin the nearest code is not always the one given.
    """
    book = dynamic_map().double()
    middles = torch.arange(BINS, dtype=torch.float64) / (BINS - 1) * 2 - 1
    right = torch.searchsorted(book, middles).clamp(1, 255)
    nearer_left = middles - book[right - 1] <= book[right] - middles
    return (right - nearer_left.long()).to(torch.uint8).to(device)
