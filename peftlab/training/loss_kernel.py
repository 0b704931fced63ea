"""Turn the logits of a chunk into the gradient of their cross-entropy, in their place and in one pass, with Triton.

    log p = z - log sum over v of exp z_v,    dL/dz = p - onehot

In PyTorch this is a dozen kernels, and float32 copies of the logits. That costs twice: a GPU's memory, and the time of
the host that launches kernels, for which a small model's step waits. This file imports Triton, so it is imported only
where that is installed and a GPU is there (`chunked.kernel_on`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits that a program reads at a time
LOWEST = tl.constexpr(-3.0e38)  # a maximum of nothing; minus infinity less minus infinity would be no number


def into_gradient(z: Tensor, labels: Tensor, log_p: Tensor) -> Tensor:
    """Do what `chunked.into_gradient` does, for logits in 16 or 32 bits, and return z.

    z: (rows, V), contiguous, written over. labels: (rows,) int64. log_p: (rows, 1) float32, gets the logarithms of the
    labels' probabilities.
    """
    with torch.cuda.device_of(z):
        _into_gradient[len(z),](z, labels, log_p, z.shape[1], BLOCK, num_warps=8)
    return z


@triton.jit
def _into_gradient(
    z: tl.tensor, labels: tl.tensor, log_p: tl.tensor, V: tl.tensor, BLOCK: tl.constexpr
) -> None:  # fmt: skip
    """Do one row. The first loop finds log sum exp z, the second writes the gradient."""
    row = tl.program_id(0).to(tl.int64)
    label, column, at = tl.load(labels + row), tl.arange(0, BLOCK), z + row * V
    own = tl.load(at + label).to(tl.float32)
    # each column of the block has a maximum and a sum of its own, which are put together at the end
    most, total = tl.full((BLOCK,), LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(at + start + column, start + column < V, other=float("-inf")).to(tl.float32)
        # sum exp(x - m') = sum exp(x - m) exp(m - m')
        larger = tl.maximum(most, x)
        total = total * tl.exp(most - larger) + tl.exp(x - larger)
        most = larger
    top = tl.max(most, 0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(most - top), 0))
    tl.store(log_p + row, own - log_sum)
    for start in range(0, V, BLOCK):
        inside = start + column < V
        x = tl.load(at + start + column, inside, other=0.0).to(tl.float32)
        p = tl.exp(x - log_sum)
        gradient = tl.where(start + column == label, p - 1, p)
        tl.store(at + start + column, gradient.to(z.dtype.element_ty), inside)
