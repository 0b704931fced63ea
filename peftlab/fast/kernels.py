"""Turn heads by their positions in one pass over memory, with Triton.

torch.compile would write the turned heads to a new tensor and copy them back: it does not know that the halves of a
head lie apart. This file imports Triton, so it is imported only where that is installed and a GPU is there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 32  # of a token, per program


def rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Do what `pieces.rotate_into` does. x, out: (b, s, heads, d), the same or apart, with any strides but the last."""
    b, s, heads, d = x.shape
    grid = (b * s, triton.cdiv(heads, HEADS))
    turned = 0 if len(cos) == 1 else cos.stride(0)
    with torch.cuda.device_of(x):
        _rotate[grid](
            out, x, cos, sin, *out.stride()[:3], *x.stride()[:3], turned, cos.stride(1), s, heads, d // 2,
            HEADS, triton.next_power_of_2(d // 2),
        )  # fmt: skip


@triton.jit
def _rotate(
    out: tl.tensor, x: tl.tensor, cos: tl.tensor, sin: tl.tensor, out_b: tl.tensor, out_s: tl.tensor, out_h: tl.tensor,
    x_b: tl.tensor, x_s: tl.tensor, x_h: tl.tensor, cos_b: tl.tensor, cos_s: tl.tensor, s: tl.tensor, heads: tl.tensor,
    half: tl.tensor, HEADS: tl.constexpr, HALF: tl.constexpr,
) -> None:  # fmt: skip
    """Turn up to HEADS heads of one token."""
    row = tl.program_id(0).to(tl.int64)
    b, place = row // s, row % s
    head, i = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (i < half)
    c = tl.load(cos + b * cos_b + place * cos_s + i, i < half, other=0.0).to(tl.float32)
    n = tl.load(sin + b * cos_b + place * cos_s + i, i < half, other=0.0).to(tl.float32)
    at = x + b * x_b + place * x_s + head * x_h + i
    one = tl.load(at, inside, other=0.0).to(tl.float32)
    two = tl.load(at + half, inside, other=0.0).to(tl.float32)
    # y_1 = x_1 cos - x_2 sin,   y_2 = x_2 cos + x_1 sin
    to = out + b * out_b + place * out_s + head * out_h + i
    tl.store(to, (one * c - two * n).to(out.dtype.element_ty), inside)
    tl.store(to + half, (two * c + one * n).to(out.dtype.element_ty), inside)
