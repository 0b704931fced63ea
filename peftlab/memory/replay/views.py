"""What PyTorch's slices, joins and other views do to memory: most allocate only their gradients."""

from __future__ import annotations

from peftlab.memory.replay.tape import Gradients, Tensor, record


def first_rows(x: Tensor, count: int) -> Tensor:
    """Replay x[:, :count] of (b, s, h), a view. Its gradient is copied into zeros of the whole size."""
    shape = x.shape
    if shape[1] == count:
        return x
    output = x.view(shape[0], count, shape[2])
    output.node = None
    return record(output, [x], lambda g: (g.new(shape),))


def first_of(x: Tensor) -> Tensor:
    """Replay x[:, 0], a view. Its gradient is copied into zeros of the whole size."""
    shape = x.shape
    output = x.view(shape[0], shape[-1])
    output.node = None
    return record(output, [x], lambda g: (g.new(shape),))


def part(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Replay a slice, which is a view. Its gradient is copied into zeros of the whole size."""
    whole = x.shape
    output = x.view(*shape)
    output.node = None
    return record(output, [x], lambda g: (g.new(whole),))


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Replay x.chunk(2, -1) of the last dimension: two views. Their gradients are joined in one tensor."""
    whole, shape = x.shape, (*x.shape[:-1], x.shape[-1] // 2)

    def half(first: bool) -> Tensor:
        view = x.view(*shape)
        view.node = None
        return record(view, [x], lambda g: (g.new(whole) if first else g,))

    second = half(False)
    return half(True), second


def split_heads(x: Tensor, shape: tuple[int, ...], count: int) -> list[Tensor]:
    """Replay torch.split into heads: views, whose gradients are joined in one tensor."""
    whole, pieces = x.shape, []
    for head in range(count):
        view = x.view(*shape)
        view.node = None
        pieces.append(record(view, [x], lambda g, last=head == count - 1: (g.new(whole) if last else g,)))
    return pieces


def stack_heads(pieces: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Replay torch.cat of heads. Their gradients are views of one tensor."""
    needs = [piece.needs_grad for piece in pieces]
    return record(pieces[0].new(shape), pieces, lambda g: tuple(g if need else None for need in needs))


def expand(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Replay x.expand: a view, whose gradient is summed to the size of x."""
    before = x.shape
    output = x.view(*shape)
    output.node = None
    return record(output, [x], lambda g: (g.new(before),))


def enlarge(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Replay torch.where of a mask and a smaller x: a new tensor, whose gradient is summed to the size of x."""
    before = x.shape
    return record(x.new(shape), [x], lambda g: (g.new(before),))


def cat(a: Tensor, b: Tensor, axis: int) -> Tensor:
    """Replay torch.cat of two tensors. Their gradients are views of one tensor."""
    shape = list(a.shape)
    shape[axis] += b.shape[axis]
    needs = a.needs_grad, b.needs_grad
    return record(a.new(shape), [a, b], lambda g: tuple(g if need else None for need in needs))


def joined_column(x: Tensor, column: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Replay torch.cat of x and a column that a small tensor is expanded to.

    The gradient of x is a view, and that of the small tensor a sum.
    """
    needs, small = (x.needs_grad, column.needs_grad), column.shape

    def apply(g: Tensor) -> Gradients:
        return g.viewed() if needs[0] else None, g.new(small) if needs[1] else None

    return record(x.new(shape), [x, column], apply)


def sum_groups(x: Tensor, count: int) -> Tensor:
    """Replay x.view(n, k, h).sum(1). The gradient is a view."""
    whole = x.shape
    return record(x.new((count, whole[-1])), [x], lambda g: (g.new(whole),))


def split_halves_rotated(x: Tensor) -> Tensor:
    """Replay rotate_half, cat(-x2, x1). The gradient of each slice is copied into zeros of the whole size."""
    half = (*x.shape[:-1], x.shape[-1] // 2)
    negative = x.new(half)
    output = x.new()
    del negative
    shape = x.shape

    def apply(g: Tensor) -> Gradients:
        first = g.new(shape)  # the gradient of x1; that of x2 is added to it in place
        negative = g.new(half)
        second = g.new(shape)
        del negative, second
        return (first,)

    return record(output, [x], apply)
