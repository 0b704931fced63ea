"""Run one block of a Llama-like decoder forward and backward, with every derivative written out.

    n1 = norm(x)              q, k, v = rotate(W_qkv n1)
    o  = attention(q, k, v)
    h  = x + W_o o
    n2 = norm(h)              g, p = W_gate n2, W_up n2
    y  = h + W_down (silu(g) p)

The backward pass reads these lines from the last to the first. Only attention is differentiated by torch, whose kernel
has a derivative of its own. W stands for the frozen weight with its LoRA (see `groups`), x and y for (M, H) with M
tokens and H the hidden size. What the backward pass needs is either kept or computed again from x. Norms and SwiGLU are
always computed again: that costs less than keeping them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlab.fast import GROUPS, BlockParts, Sizes
from peftlab.fast.groups import Group


class Rows(NamedTuple):
    """What all blocks need to know of a batch of b rows of s tokens.

    Attributes:
        cos, sin, sin_back: (b or 1, s, 1, head_dim / 2), of the angles by which each pair of numbers is turned; -sin.
        masks: {window: (b, 1, s, s)}, which tokens attend to which; None where only the order decides.
    """

    b: int
    s: int
    cos: Tensor
    sin: Tensor
    sin_back: Tensor
    masks: dict[int | None, Tensor | None]


@dataclass
class Kept:
    """What the backward pass reads. The last two are made again if they are None."""

    qkv: Tensor | None  # before the rotation; only for the norms of q and k
    leaves: tuple[Tensor, Tensor, Tensor]
    o: Tensor
    h: Tensor
    gate_up: Any
    n1: Tensor | None = None
    n2: Tensor | None = None


class Block:
    """One block: its groups of linears, its norms' weights, and its attention's window (None: no limit).

    Args:
        like: a tensor with the device and the dtype of the products.
    """

    def __init__(self, parts: BlockParts, sizes: Sizes, pieces: SimpleNamespace, like: Tensor) -> None:
        self.groups = {name: Group(parts.groups[name], like) for name in GROUPS}
        self.qkv, self.o, self.gate_up, self.down = self.groups.values()
        norms = parts.norms.items()
        self.norms = {name: None if norm is None else norm.get_parameter("weight").detach() for name, norm in norms}
        self.window, self.sizes, self.pieces = parts.window, sizes, pieces
        self.trains = any(group.r for group in self.groups.values())

    # -- forward -------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, rows: Rows, keep: bool) -> tuple[Tensor, Kept | None]:
        """Return the block's output and, with `keep`, what the backward pass reads."""
        kept = self._up_to_gate(x, rows, graph=keep)
        kept.n1 = kept.n2 = None
        inner = self.down.k
        act = self.down.inputs(len(x))
        self.pieces.swiglu_into(act[:, :inner], kept.gate_up[:, :inner], kept.gate_up[:, inner : 2 * inner])
        y = self.down.forward(act)
        out = torch.empty_like(x)
        self.pieces.add_into(out, kept.h, y)
        return out, kept if keep else None

    def _up_to_gate(self, x: Tensor, rows: Rows, graph: bool) -> Kept:
        """The block up to g and p."""
        m, hidden, sizes = len(x), x.shape[1], self.sizes
        n1 = self.qkv.inputs(m)
        self.pieces.norm_into(n1[:, :hidden], x, self.norms["input"], sizes.eps)
        product = self.qkv.forward(n1)
        before, q, k, v = self._rotated(product.view(rows.b, rows.s, -1, sizes.head_dim), rows)
        del product
        leaves, o = self._attention(q, k, v, rows, graph)
        flat_o = self.o.inputs(m)
        self.pieces.copy_into(flat_o[:, : self.o.k], o.detach().transpose(1, 2).reshape(m, self.o.k))
        y = self.o.forward(flat_o)
        h, n2 = torch.empty_like(x), self.gate_up.inputs(m)
        self.pieces.add_norm_into(h, n2[:, :hidden], x, y, self.norms["post"], sizes.eps)
        gate_up = self.gate_up.outputs(m)
        self.gate_up.forward(n2, out=gate_up[:, : self.gate_up.n])
        return Kept(before, leaves, o, h, gate_up, n1[:, :hidden], n2[:, :hidden])

    def _rotated(self, qkv: Tensor, rows: Rows) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """Return qkv, if the backward pass needs it, and q, k, v, each (b, s, heads, d). Without norms, in place."""
        sizes, pieces = self.sizes, self.pieces
        q, k, v = qkv.split(sizes.split, 2)
        before, turned = None, qkv[:, :, : -sizes.kv_heads]
        if self.norms["q"] is not None:
            before, turned = qkv, torch.empty_like(turned, memory_format=torch.contiguous_format)
            for x, y, name in zip((q, k), turned.split(sizes.split[:2], 2), "qk", strict=True):
                pieces.norm_into(y, x, self.norms[name], sizes.eps)
        pieces.rotate_into(turned, turned, rows.cos, rows.sin)
        return before, *turned.split(sizes.split[:2], 2), v

    def _rotated_back(self, out: Tensor, qkv: Tensor | None, grads: tuple[Tensor, ...], rows: Rows) -> None:
        """Write the gradient of qkv into `out`, (b, s, heads + 2 kv_heads, d)."""
        sizes, pieces = self.sizes, self.pieces
        places = out.split(sizes.split, 2)
        pieces.copy_into(places[2], grads[2])
        for index, name in enumerate("qk"):
            place, grad = places[index], grads[index]
            if qkv is None:
                pieces.rotate_into(place, grad, rows.cos, rows.sin_back)
                continue
            pieces.rotate_into(grad, grad, rows.cos, rows.sin_back)
            x = qkv.split(sizes.split, 2)[index]
            pieces.norm_back_into(place, None, None, x, self.norms[name], grad, sizes.eps)

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, graph: bool
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """softmax(q k^T / sqrt(d)) v; with `graph` so that torch can differentiate it. Returns (q, k, v) and o."""
        sizes, mask = self.sizes, rows.masks[self.window]
        q, k, v = (t.transpose(1, 2).detach().requires_grad_(graph) for t in (q, k, v))
        leaves = q, k, v
        grouped, kernel = sizes.heads != sizes.kv_heads, q.device.type == "cuda" and mask is None
        with torch.set_grad_enabled(graph):
            if grouped and not kernel:
                # only the kernel without a mask shares keys and values among the queries of a group
                k, v = (t.repeat_interleave(sizes.heads // sizes.kv_heads, dim=1) for t in (k, v))
            o = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped and kernel
            )
        return leaves, o

    # -- backward ------------------------------------------------------------------------------------------------

    def room(self, like: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return room for a gradient dy of the stream, for [dy | du] of `group`, and dy in that if it is another.

        The stream between the blocks may have another dtype than the products.
        """
        du = group.outputs(len(like))
        if like.dtype == du.dtype:
            return du[:, : group.n], du, None
        return torch.empty_like(like), du, du[:, : group.n]

    def backward(
        self, x: Tensor, dy: Tensor, dydu: Tensor, rows: Rows, kept: Kept | None, beneath: Group | None
    ) -> tuple[Tensor, Tensor] | None:
        """Add the gradients of this block's LoRA; return dx and, for the group `beneath`, [dx | .].

        Args:
            dy, dydu: the gradient of the block's output, and [dy | .] for its down projection.
            beneath: the down projection of the block below; None if nothing there is trained.
        """
        if kept is None:
            kept = self._up_to_gate(x, rows, graph=True)
        m, sizes, pieces, inner = len(x), self.sizes, self.pieces, self.down.k
        gate_up, kept.gate_up = kept.gate_up, None
        # y = h + W_down act,  act = silu(g) p
        act = self.down.back(self.down.low(dydu))
        pieces.swiglu_back_(gate_up[:, :inner], gate_up[:, inner : 2 * inner], act)  # now (dg, dp) and act itself
        self.down.gradients(dydu, act)
        del act
        if beneath is None and not (self.gate_up.r or self.o.r or self.qkv.r):
            return None
        # g, p = W_gate_up n2,  n2 = norm(h)
        dn = self.gate_up.back(self.gate_up.low(gate_up))
        self._gradients_of_normed(self.gate_up, gate_up, kept.n2, kept.h, "post")
        del gate_up
        kept.n2 = None
        if beneath is None and not (self.o.r or self.qkv.r):
            return None
        dh, dhdu, copy = self.room(x, self.o)
        pieces.norm_back_into(dh, copy, dy, kept.h, self.norms["post"], dn, sizes.eps)
        # h = x + W_o o
        do = self.o.back(self.o.low(dhdu)).view(rows.b, rows.s, sizes.heads, sizes.head_dim).transpose(1, 2)
        self.o.gradients(dhdu, kept.o.detach().transpose(1, 2).reshape(m, self.o.k))
        if beneath is None and not self.qkv.r:
            return None
        dq, dk, dv = (t.transpose(1, 2) for t in torch.autograd.grad(kept.o, kept.leaves, do))
        del kept.o, kept.leaves, do, dn
        # q, k, v = rotate(W_qkv n1),  n1 = norm(x)
        dqkv = self.qkv.outputs(m)
        place = dqkv[:, : self.qkv.n].unflatten(0, (rows.b, rows.s)).unflatten(2, (-1, sizes.head_dim))
        self._rotated_back(place, kept.qkv, (dq, dk, dv), rows)
        del dq, dk, dv, place
        self.qkv.low(dqkv)
        self._gradients_of_normed(self.qkv, dqkv, kept.n1, x, "input")
        if beneath is None:
            return None
        dn = self.qkv.back(dqkv)
        dx, dxdu, copy = self.room(x, beneath)
        pieces.norm_back_into(dx, copy, dh, x, self.norms["input"], dn, sizes.eps)
        return dx, dxdu

    def _gradients_of_normed(self, group: Group, dydu: Tensor, n: Tensor | None, x: Tensor, name: str) -> None:
        """Add the gradients of a group that reads n = norm(x), which is computed again if it was not kept."""
        if not group.r:
            return
        if n is None:
            n = group.inputs(len(x))[:, : group.k]
            self.pieces.norm_into(n, x, self.norms[name], self.sizes.eps)
        group.gradients(dydu, n)
