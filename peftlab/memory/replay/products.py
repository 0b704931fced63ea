"""What matrix products and look-ups in tables do to memory: linear layers, 4-bit ones, experts, embeddings."""

from __future__ import annotations

from collections.abc import Callable

from peftlab.memory.replay import ops
from peftlab.memory.replay.tape import Gradients, Parameter, Tensor, record


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Replay x W^T + b. It keeps x only for the gradient of W, and W only for that of x."""
    trains, size, width = weight.needs_grad, weight.shape, weight.bytes
    held = x if trains else None, weight if x.needs_grad else None
    needs, shape, bytes = x.needs_grad, x.shape, x.bytes
    output = x.new((*shape[:-1], size[0]))
    flops = 2 * x.elements * size[0]
    x.memory.flops += flops

    def apply(g: Tensor, kept: tuple[Tensor | None, ...] = held) -> Gradients:
        g.memory.flops += flops * (needs + trains)
        of_bias = g.new(bias.shape) if bias is not None and bias.needs_grad else None
        of_x = g.new(shape, bytes).viewed() if needs else None  # the product flattens (b, s, h)
        of_weight = g.new(size, width).viewed() if trains else None  # it is transposed
        return of_x, of_weight, of_bias

    edges = [x, weight, x.detach() if bias is None else bias]  # a detached tensor has no gradient
    return record(output, edges, apply, [x] if trains else [])


def frozen_linear(x: Tensor, outputs: int) -> Tensor:
    """Replay x times an existing frozen matrix. Nothing is kept."""
    shape, bytes, flops = x.shape, x.bytes, 2 * x.elements * outputs
    x.memory.flops += flops

    def apply(g: Tensor) -> Gradients:
        g.memory.flops += flops
        return (g.new(shape, bytes).viewed(),)

    return record(x.new((*shape[:-1], outputs)), [x], apply, [])


def quantised_linear(
    x: Tensor, outputs: int, inputs: int, compute: int, bias: Tensor | None = None, ours: bool = False
) -> Tensor:
    """Replay bitsandbytes' Linear4bit. Each pass unpacks the weight and the scales of its blocks, then frees them.

    bitsandbytes casts the result to the dtype of x. And it sums the gradient of a bias over the examples first, which
    gives a tensor of (s, out), and then over the places.

    Args:
        compute: the bytes of the dtype in which it computes.
        ours: whether it is peftlab's layer, which does neither.
    """
    before = x.bytes
    x = ops.cast(x, compute)
    shape, needs = x.shape, x.needs_grad
    bias = None if bias is None else ops.cast(bias, compute)
    trains = bias is not None and bias.needs_grad

    def unpacked(like: Tensor) -> tuple[Tensor, Tensor]:
        scales = like.new((-(-outputs * inputs // 64),), ops.FLOAT32)
        return scales, like.new((outputs, inputs), compute)

    flops = 2 * x.elements * outputs
    x.memory.flops += flops

    def apply(g: Tensor) -> Gradients:
        summed = g.new(g.shape[1:]) if trains and not ours else None
        result = None
        if needs:
            g.memory.flops += flops
            held = unpacked(g)
            result = g.new(shape)
            del held
        of_bias = g.new((outputs,)) if trains else None
        del summed
        return result, of_bias

    held = unpacked(x)
    result = record(x.new((*shape[:-1], outputs)), [x, x.detach() if bias is None else bias], apply)
    del held
    return result if ours else ops.cast(result, before)


def embedding(ids: Tensor, weight: Parameter) -> Tensor:
    """Replay an embedding: rows of a table. The table's gradient is dense."""
    output = weight.new((*ids.shape, weight.shape[1]))

    def apply(g: Tensor, kept: Tensor = ids) -> Gradients:
        return (g.new(weight.shape),)

    return record(output, [weight], apply, [])


def embedding_rows(ids: Tensor, table: Parameter) -> Tensor:
    """Replay the lookup of columns of a table (r, V), as rows of its transpose. The gradient is dense."""
    output = table.new((*ids.shape, table.shape[0]))

    def apply(g: Tensor, kept: Tensor = ids) -> Gradients:
        return (g.new(table.shape, table.bytes),)

    return record(output, [table], apply, [])


def grouped_product(x: Tensor, weight: Tensor, again: Callable[[], Tensor] | None = None) -> Tensor:
    """Replay grouped_mm of rows (n, inputs), sorted by expert, and weights (experts, outputs, inputs).

    Args:
        again: makes the weight once more for the backward pass. None: the weight is kept until then.
    """
    x = ops.cast(x, weight.bytes)
    size, outputs = weight.shape, weight.shape[1]
    keeps, needs, shape = weight.needs_grad, x.needs_grad, x.shape
    kept_weight = weight if needs and again is None else None
    flops = 2 * x.elements * outputs
    x.memory.flops += flops

    def apply(g: Tensor, kept: tuple = (x if keeps else None, kept_weight)) -> Gradients:
        g.memory.flops += flops * (needs + keeps)
        made = again() if again is not None and needs else None
        of_x = g.new(shape) if needs else None
        of_weight = g.new(size) if keeps else None
        del made
        return of_x, of_weight

    saved = [x] * keeps
    if kept_weight is not None and not isinstance(weight, Parameter):
        saved.append(weight)
    return record(x.new((x.shape[0], outputs)), [x, weight], apply, saved)


def folded(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Replay baddbmm: a frozen weight plus the products of two stacks of factors, which are kept."""
    sizes = a.shape, b.shape

    def apply(g: Tensor, kept: tuple = (a, b)) -> Gradients:
        return g.new(sizes[0]), g.new(sizes[1])

    return record(weight.new(), [a, b], apply, [a, b])


def outer(a: Tensor, b: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Replay B A of two parameters, each of which is kept for the gradient of the other."""
    sizes = a.shape, b.shape

    def apply(g: Tensor, kept: tuple = (a, b)) -> Gradients:
        return g.new(sizes[0]), g.new(sizes[1])

    return record(a.new(shape), [a, b], apply, [])


def rotations(weight: Tensor, shape: tuple[int, ...], autocast: bool) -> Tensor:
    """Replay OFT's I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4 of skew-symmetric Q. Each power is kept for the next one."""
    size, upper = weight.shape, weight.new(shape)
    q = weight.new(shape)
    del upper
    if autocast:  # each product casts both of its factors anew
        kept = [q.new(bytes=2) for _ in range(6)]
    else:
        kept = [q, q.new(), q.new()]
    last = q.new()

    def apply(g: Tensor, kept: list = kept) -> Gradients:
        held = [g.new() for _ in range(3)]
        whole = g.new()
        del held
        return (whole.new(size),)

    output = record(last.new(), [weight], apply, kept)
    del last
    return output


def turned(x: Tensor, rotations: Tensor) -> Tensor:
    """Replay the product of each piece of x with its rotation. Both are kept."""
    size = rotations.shape

    def apply(g: Tensor, kept: tuple = (x, rotations)) -> Gradients:
        return g.new() if kept[0].needs_grad else None, g.new(size)

    return record(x.new(), [x, rotations], apply, [x, rotations])


def kronecker(a: Tensor, b: Tensor, shape: tuple[int, ...], by_blocks: bool) -> Tensor:
    """Replay torch.kron: one product of views, which are kept. The gradient of each is summed from the whole size.

    Args:
        by_blocks: whether the gradients are products with one copy of the whole, as in peftlab's LoKr.
    """
    sizes = a.shape, b.shape

    def apply(g: Tensor, kept: tuple = (a, b)) -> Gradients:
        if not by_blocks:
            return g.new(), g.new()
        blocks = g.new()
        gradients = g.new(sizes[0]), g.new(sizes[1])
        del blocks
        return gradients

    return record(a.new(shape), [a, b], apply, [a, b], fits=by_blocks)


def hadamard(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, bytes: int) -> Tensor:
    """Replay peft's own function of (A1 B1) * (A2 B2) s: it keeps the four factors, and multiplies them out again.

    Its backward pass does so in the dtype of the factors, also where autocast made the product of `bytes`.
    """
    size, factors = (a1.shape[0], b1.shape[1]), (a1, b1, a2, b2)

    def apply(g: Tensor, kept: tuple = factors) -> Gradients:
        scaled = g.new()
        product = kept[0].new(size)
        one = kept[0].new(size)
        del product
        grads = [one.new(factor.shape) for factor in kept[:2]]
        product = kept[0].new(size)
        other = kept[0].new(size)
        del product, one, scaled
        return *grads, *(other.new(factor.shape) for factor in kept[2:])

    held = [a1.new(size, bytes), a1.new(size, bytes)]
    held = [a1.new(size, bytes)]
    output = a1.new(size, bytes)
    del held
    return record(output, factors, apply, factors)
