"""Compute what lies between the products of a block: norms, rotary positions, SwiGLU, the loss, and their derivatives.

Each piece reads and writes every number once, so on a GPU it takes as long as the memory does. torch.compile makes one
kernel of each; without it the same lines run one operation at a time. Results go into buffers that are given, because a
product wants them with room beside them (see `groups`). 16-bit numbers are computed in float32 and rounded once.

Notation: x is an input, w a norm's weight, and `dy` the loss's derivative by y.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from torch import Tensor

from peftlab import optional


def wide(x: Tensor) -> Tensor:
    """Return 16-bit numbers as float32, and others as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, in float32 as transformers computes it in every dtype."""
    # y = w x / rms(x),  rms(x)^2 = mean(x^2) + eps
    h = x.float()
    y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return wide(w) * y.to(wide(w).dtype)


def norm_back(x: Tensor, w: Tensor, dy: Tensor, eps: float) -> Tensor:
    """Return dL/dx of `norm`, in float32 and in the order of autograd's own operations."""
    # with r = 1 / rms(x) and g = w dy:  dx = r g - x r^3 mean(g x)
    h = x.float()
    r = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    g = (wide(dy) * wide(w)).float()
    dv = -0.5 * (g * h).sum(-1, keepdim=True) * r.pow(3)
    return g * r + dv / h.shape[-1] * (2 * h)


def norm_into(out: Tensor, x: Tensor, w: Tensor, eps: float) -> None:
    """out = norm(x)."""
    out.copy_(norm(x, w, eps))


def add_norm_into(h: Tensor, out: Tensor, x: Tensor, y: Tensor, w: Tensor, eps: float) -> None:
    """h = x + y, and out = norm(h)."""
    s = (wide(x) + wide(y)).to(h.dtype)
    h.copy_(s)
    out.copy_(norm(s, w, eps))


def add_into(out: Tensor, x: Tensor, y: Tensor) -> None:
    """out = x + y."""
    out.copy_(wide(x) + wide(y))


def norm_back_into(out: Tensor, copy: Tensor | None, dres: Tensor | None, x: Tensor, w: Tensor, dy: Tensor,
                   eps: float) -> None:  # fmt: skip
    """out = dres + norm_back(x, dy): x went into the norm, and past it. `copy` gets the same in its own dtype."""
    dx = norm_back(x, w, dy, eps).to(wide(out).dtype)
    total = dx if dres is None else wide(dres) + dx
    out.copy_(total)
    if copy is not None:
        copy.copy_(total)


def rotate_into(out: tuple[Tensor, Tensor], x: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor) -> None:
    """Turn heads by their positions; both halves of a head are given apart, (b, s, heads, d / 2), and may be `out`.

    With -sin instead of sin it turns back, which is the derivative. cos, sin: (b or 1, s, 1, d / 2).
    """
    # y_1 = x_1 cos - x_2 sin,   y_2 = x_2 cos + x_1 sin
    one, two, c, s = wide(x[0]), wide(x[1]), wide(cos), wide(sin)
    first, second = one * c - two * s, two * c + one * s
    out[0].copy_(first)
    out[1].copy_(second)


def swiglu_into(out: Tensor, gate: Tensor, up: Tensor) -> None:
    """out = silu(gate) up,  silu(z) = z sigmoid(z)."""
    out.copy_(torch.nn.functional.silu(wide(gate)) * wide(up))


def swiglu_back_(gate: Tensor, up: Tensor, d: Tensor) -> None:
    """In place: `gate` and `up` become their gradients, and `d`, the result's gradient, becomes the result."""
    # dgate = d up s (1 + gate (1 - s)),  dup = d gate s,  with s = sigmoid(gate)
    g, u, dy = wide(gate), wide(up), wide(d)
    s = torch.sigmoid(g)
    dgate, dup, result = dy * u * (s * (1 + g * (1 - s))), dy * (g * s), g * s * u
    gate.copy_(dgate)
    up.copy_(dup)
    d.copy_(result)


def cross_entropy_(logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Return the summed loss of labels other than -100. The logits (n, V) become its gradient times `scale`."""
    # nll = log sum exp(z) - z_label,   dnll/dz = softmax(z) - onehot(label)
    z = wide(logits)
    lse = torch.logsumexp(z, -1, keepdim=True)
    learned, label = (labels != -100)[:, None], labels.clamp(min=0)[:, None]
    nll = torch.where(learned, lse - z.gather(1, label), 0.0)
    hot = torch.arange(z.shape[1], device=z.device)[None] == label
    p = torch.exp(z - lse)
    logits.copy_(torch.where(learned, (p - hot.to(p.dtype)) * scale, 0.0))
    return nll.sum()


PIECES = (norm_into, add_norm_into, add_into, norm_back_into, rotate_into, swiglu_into, swiglu_back_,
          cross_entropy_)  # fmt: skip


@functools.cache
def _compiled() -> SimpleNamespace:
    return SimpleNamespace(**{piece.__name__: torch.compile(piece) for piece in PIECES})


def pieces_for(device: torch.device) -> tuple[SimpleNamespace, str]:
    """Return the pieces by name for a device, and how they run, in words for the run's report."""
    eager = SimpleNamespace(**{piece.__name__: piece for piece in PIECES})
    if device.type != "cuda":
        return eager, "its pieces are not compiled: on a CPU that takes longer than it saves"
    if optional.available("triton") is None:
        return eager, "its pieces are not compiled: triton is not installed"
    return _compiled(), "its pieces are compiled"
