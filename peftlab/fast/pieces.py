"""Compute what lies between the products of a block: norms, rotary positions, SwiGLU, the loss, and their derivatives.

Each piece reads and writes every number once, so on a GPU it takes as long as the memory does. torch.compile makes one
kernel of each; without it the same lines run one operation at a time. Results go into buffers that are given, because a
product wants them with room beside them (see `groups`). 16-bit numbers are computed in float32 and rounded once.

Notation: x is an input, w a norm's weight, and `dy` the loss's derivative by y.
"""

from __future__ import annotations

import functools
from importlib import import_module
from types import SimpleNamespace

import torch
from torch import Tensor

from peftlab.optional import available


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


def rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """out = x turned by its positions. x, out: (b, s, heads, d), which may be the same.

    With -sin instead of sin it turns back, which is the derivative. cos, sin: (b or 1, s, 1, d / 2).
    """
    # y_1 = x_1 cos - x_2 sin,   y_2 = x_2 cos + x_1 sin     with the halves x_1, x_2 of a head
    (one, two), c, s = wide(x).chunk(2, -1), wide(cos), wide(sin)
    out.copy_(torch.cat([one * c - two * s, two * c + one * s], -1))


def copy_into(out: Tensor, x: Tensor) -> None:
    """out = x."""
    out.copy_(x)


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
    # nll = -log p_label with log p = z - log sum exp(z),   dnll/dz = p - onehot(label)
    learned, label = (labels != -100)[:, None], labels.clamp(min=0)[:, None]
    log_p = torch.log_softmax(wide(logits), -1)
    nll = torch.where(learned, -log_p.gather(1, label), 0.0)
    p, factor = log_p.exp(), torch.where(learned, scale, 0.0).to(log_p.dtype)
    if p.device.type == "cpu":
        p = p.scatter_add_(1, label, -torch.ones_like(nll))
    else:  # a compiler writes this on the way, without a tensor of ones
        p = p - (torch.arange(p.shape[1], device=p.device)[None] == label).to(p.dtype)
    logits.copy_(p * factor)
    return nll.sum()


PIECES = (copy_into, norm_into, add_norm_into, add_into, norm_back_into, rotate_into, swiglu_into, swiglu_back_,
          cross_entropy_)  # fmt: skip


@functools.cache
def _compiled() -> SimpleNamespace:
    """The pieces for a GPU. Two of them run once, because a compiler may be missing that is only now looked for."""
    kernels = import_module("peftlab.fast.kernels")  # it imports Triton, which a machine without a GPU need not have
    compiled = {piece.__name__: torch.compile(piece) for piece in PIECES}
    pieces = SimpleNamespace(**{**compiled, "rotate_into": kernels.rotate_into})
    x = torch.zeros(1, 2, 2, 64, device="cuda")
    pieces.copy_into(x, torch.zeros_like(x))
    pieces.rotate_into(x, x, x[:, :, :1, :32], x[:, :, :1, :32])
    return pieces


def pieces_for(device: torch.device, dtype: torch.dtype) -> tuple[SimpleNamespace, str]:
    """Return the pieces by name for a device, and how they run, in words for the run's report."""
    reason = ""
    if device.type != "cuda":
        reason = "on a CPU that takes longer than it saves"
    elif dtype == torch.float64:
        reason = "float64 is for comparisons"
    elif available("triton") is None:
        reason = "triton is not installed"
    else:
        try:
            return _compiled(), "its pieces are compiled"
        except Exception as error:  # whatever a compiler that is missing or too old raises
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return SimpleNamespace(**{piece.__name__: piece for piece in PIECES}), f"its pieces are not compiled: {reason}"
