"""Attention as PyTorch computes it: in one fused kernel or in separate operations."""

from __future__ import annotations

from dataclasses import dataclass

from peftlab.memory.replay import ops, views
from peftlab.memory.replay.tape import Gradients, Tensor, record


@dataclass(frozen=True)
class Style:
    """How the attention of a model works when it is not fused."""

    causal: bool = True
    wide_softmax: bool = True  # whether the softmax is always in float32
    dropout: float = 0.0
    fusible: bool = True  # whether a fused kernel accepts its bias
    capped: bool = False  # whether scores are capped by a tanh
    by_head: bool = False  # whether queries lie head by head; the fused kernel's output then does, too, and is copied
    wide_scores: bool = False  # whether the scores are computed in float32


def packed_attention(x: Tensor, heads: int) -> Tensor:
    """Replay flash_attention of queries, keys and values that are views of one tensor (b, s, 3 h). Return (b, s, h).

    One cat joins their three gradients.
    """
    batch, length, three = x.shape
    output = x.new((batch, length, three // 3))
    sums = x.new((batch, heads, length), ops.FLOAT32)
    flops = 4 * batch * length * length * three // 3
    x.memory.flops += flops

    def apply(g: Tensor, kept: tuple = (x, output.detach(), sums)) -> Gradients:
        g.memory.flops += 5 * flops // 2
        parts = [g.new() for _ in range(3)]
        whole = g.new((batch, length, three))
        del parts
        return (whole,)

    return record(output, [x], apply, [x, output, sums])


def split(x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return three views of a tensor. Their gradients go into one tensor, allocated with the first of them."""
    whole = x.shape

    def part(first: bool) -> Tensor:
        view = x.view(*shape)
        view.node = None
        return record(view, [x], lambda g: (g.new(whole) if first else g,))

    return part(False), part(False), part(True)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Replay the fused kernel: it keeps q, k, v, the output, a bias or mask, and each row's log-sum-exp (float32).

    q: (b, heads, s, d); k, v: (b, groups, s, d).
    """
    batch, heads, length, _ = q.shape
    flops = 4 * q.elements * k.shape[2]  # q k^T and the product with v; the backward pass has five such products
    q.memory.flops += flops
    output = q.new()
    sums = q.new((batch, heads, length), ops.FLOAT32)
    kept = [q, k, v, output.detach(), sums] + ([bias] if bias is not None else [])
    needs = [x.needs_grad for x in (q, k, v)]
    of_bias = bias is not None and bias.needs_grad
    inputs = [q, k, v] + ([bias] if bias is not None and of_bias else [])

    def apply(g: Tensor, kept: list = kept) -> Gradients:
        g.memory.flops += 5 * flops // 2
        gradients = [x.new() if need else None for x, need in zip(kept, needs, strict=False)]
        return gradients + ([kept[-1].new()] if of_bias else [])

    return record(output, inputs, apply, kept)


def math_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, style: Style) -> Tensor:
    """Replay `scaled_dot_product_attention` without a fused kernel: separate operations in float32.

    The scores are kept for the backward pass. The scaled copies of queries and keys replace the originals.
    """
    batch, heads, length, width = q.shape
    narrow, shared = q.bytes, k.shape[1] == heads
    wide = [ops.cast(x, ops.FLOAT32) for x in (q, k, v)]
    q = ops.scale(wide[0])
    mask = q.new((length, k.shape[2])) if bias is None and style.causal else bias
    # Grouped heads are repeated by repeat_interleave, to new tensors that live to the end. A single head that is not
    # declared as a group is repeated by the products, and bmm copies transposed views.
    repeated = not shared and style.fusible
    k, v = (repeat(x, heads) if repeated else x for x in wide[1:])
    scaled = ops.scale(k)
    keys = scaled if repeated else ops.copy(scaled) if shared else repeat(scaled, heads)
    scores = matmul(ops.copy(q), keys, (batch, heads, length, k.shape[2]))
    del scaled, keys
    if bias is not None and mask is not None:
        scores = ops.add_in_place(scores, mask)
    weights = ops.safe_softmax(scores)
    del scores
    weights = ops.dropout(weights, style.dropout)
    values = v if repeated else ops.copy(v) if shared else repeat(v, heads)
    mixed = ops.cast(matmul(weights, values, (batch, heads, length, width)), narrow)
    del q, k, v, wide, weights, values
    return ops.copy(mixed)


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, style: Style, sinks: Tensor | None = None
) -> Tensor:
    """Replay softmax(q k^T / sqrt d + mask) v in separate operations, with several (b, heads, s, s) scores at once.

    Args:
        sinks: a logit for each head, which is joined to the scores. Their maximum is then subtracted.
    """
    batch, heads, length, width = q.shape
    if k.shape[1] != heads:
        alone = batch == k.shape[1] == 1  # one group of one example is repeated as a view
        k, v = (views.expand(x, (1, heads, *x.shape[2:])) if alone else repeat(x, heads) for x in (k, v))
    if style.wide_scores:
        q, k = ops.cast(q, ops.FLOAT32), ops.cast(k, ops.FLOAT32)
    scores = ops.scale(matmul(q, k, (batch, heads, length, k.shape[2])))
    if style.capped:
        scores = ops.scale(scores)
        scores = ops.from_result(scores)
        scores = ops.scale(scores)
    if bias is not None:
        scores = ops.add_broadcast(scores, bias)
    if style.causal:
        scores = ops.shift(scores)  # a mask is added
    if sinks is not None:
        return with_sinks(scores, sinks, v, style, (batch, heads, length, width))
    if style.wide_softmax:
        wide = ops.cast(scores, ops.FLOAT32)
        del scores
        weights = ops.cast(ops.from_result(wide), v.bytes)
        del wide
    else:
        weights = ops.cast(ops.from_result(scores), v.bytes)
        del scores
    weights = ops.dropout(weights, style.dropout)
    return ops.copy(matmul(weights, v, (batch, heads, length, width)))


def with_sinks(scores: Tensor, sinks: Tensor, v: Tensor, style: Style, shape: tuple[int, ...]) -> Tensor:
    """Replay gpt-oss' attention from the scores on: a column of sinks is joined to them and left out again."""
    wider = (*scores.shape[:-1], scores.shape[-1] + 1)
    joined = views.joined_column(scores, sinks, wider)
    joined = ops.minus_largest(joined)
    weights = views.part(ops.from_result(joined), scores.shape)
    weights = ops.dropout(weights, style.dropout)
    return ops.copy(matmul(weights, v, shape))


def repeat(x: Tensor, heads: int) -> Tensor:
    """Replay repeat_kv: a copy with as many heads as the queries have. Its gradient is summed over the groups."""
    shape = x.shape
    return record(x.new((shape[0], heads, *shape[2:])), [x], lambda g: (g.new(shape),))


def spread(x: Tensor, heads: int) -> Tensor:
    """Replay repeat_kv for the fused kernel: one group of heads becomes a view, several are copied."""
    if x.shape[1] == heads:
        return x
    return repeat(x, heads) if x.shape[1] > 1 else views.expand(x, x.shape)


def matmul(a: Tensor, b: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Replay a @ b of two activations: the gradient of each needs the other."""
    sizes = a.shape, b.shape
    needs = a.needs_grad, b.needs_grad
    flops = 2 * a.elements * shape[-1]
    a.memory.flops += flops

    def apply(g: Tensor, kept: tuple = (a if needs[1] else None, b if needs[0] else None)) -> Gradients:
        g.memory.flops += flops * sum(needs)
        return tuple(g.new(size) if need else None for size, need in zip(sizes, needs, strict=True))

    return record(a.new(shape), [a, b], apply, [one for one, need in ((a, needs[1]), (b, needs[0])) if need])
