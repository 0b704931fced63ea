"""What PyTorch's operations do to memory: the output, what is kept for the backward pass, the gradients.

A function has the name of its counterpart in torch, if there is one. Comments point out where PyTorch allocates more
than one expects. b is the batch, s the length, h the width.
"""

from __future__ import annotations

from peftlab.memory.replay.tape import Gradients, Parameter, Tensor, record

FLOAT32 = 4
INT64 = 8
BOOL = 1


def cast(x: Tensor, bytes: int) -> Tensor:
    """Replay x.to(dtype): nothing happens if x has this dtype."""
    if x.bytes == bytes:
        return x
    before = x.bytes
    return record(x.new(bytes=bytes), [x], lambda g: (g.new(bytes=before),))


def copy(x: Tensor, bytes: int | None = None) -> Tensor:
    """Make a new tensor whose gradient passes unchanged, as clone and contiguous do. The copy may be wider."""
    before = x.bytes
    return record(x.new(bytes=bytes), [x], lambda g: (fit(g, before),))


def fit(gradient: Tensor, bytes: int) -> Tensor:
    """Cast a gradient to the dtype of its tensor, as the engine does."""
    return gradient if gradient.bytes == bytes else gradient.new(bytes=bytes)


def add(a: Tensor, b: Tensor) -> Tensor:
    """Replay a + b of one shape, in the wider dtype. Nothing is kept, and both get the same gradient."""
    pairs = (a.bytes, a.needs_grad), (b.bytes, b.needs_grad)
    output = a.new(bytes=max(a.bytes, b.bytes))
    return record(output, [a, b], lambda g: tuple(fit(g, n) if m else None for n, m in pairs))


def add_broadcast(x: Tensor, b: Tensor) -> Tensor:
    """Replay x + b where b has a batch of one: the gradient of b is summed over the batch."""
    shape = b.shape
    needs = x.needs_grad, b.needs_grad
    summed = shape != x.shape
    output = x.new(bytes=max(x.bytes, b.bytes))
    return record(
        output, [x, b], lambda g: (g if needs[0] else None, (g.new(shape) if summed else g) if needs[1] else None)
    )


def scale(x: Tensor) -> Tensor:
    """Replay x times a Python number, or -x. Nothing is kept."""
    return record(x.new(), [x], lambda g: (g.new(),))


def shift(x: Tensor) -> Tensor:
    """Replay x plus a Python number: the gradient passes unchanged."""
    return record(x.new(), [x], lambda g: (g,))


def mul(a: Tensor, b: Tensor) -> Tensor:
    """Replay a * b of one shape. The gradient of each needs the other."""
    kept = {"a": a if b.needs_grad else None, "b": b if a.needs_grad else None}
    output = a.new(bytes=max(a.bytes, b.bytes))
    sizes = a.bytes, b.bytes

    def apply(g: Tensor) -> Gradients:
        of_a = fit(g.new(), sizes[0]) if kept["b"] is not None else None
        return of_a, fit(g.new(), sizes[1]) if kept["a"] is not None else None

    return record(output, [a, b], apply, [one for one in kept.values() if one is not None])


def mul_broadcast(x: Tensor, b: Tensor) -> Tensor:
    """Replay x * b where b is broadcast over x: the gradient of b is computed at the size of x, then summed."""
    kept = {"x": x if b.needs_grad else None, "b": b if x.needs_grad else None}
    output = x.new(bytes=max(x.bytes, b.bytes))
    sizes, shape = (x.bytes, b.bytes), b.shape

    def apply(g: Tensor) -> Gradients:
        of_x = fit(g.new(), sizes[0]) if kept["b"] is not None else None
        if kept["x"] is None:
            return of_x, None
        whole = g.new()
        return of_x, fit(whole.new(shape), sizes[1])

    return record(output, [x, b], apply, [one for one in kept.values() if one is not None])


def mul_vector(x: Tensor, weight: Tensor) -> Tensor:
    """Replay x times a vector, such as a norm's weight: x is kept only if the weight trains."""
    kept = x if weight.needs_grad else None
    needs, bytes = x.needs_grad, x.bytes
    output = x.new(bytes=max(x.bytes, weight.bytes))

    def apply(g: Tensor, kept: Tensor | None = kept) -> Gradients:
        of_x = fit(g.new(), bytes) if needs else None
        if kept is None:
            return of_x, None
        whole = g.new()
        return of_x, fit(whole.new(weight.shape), weight.bytes)

    return record(output, [x, weight], apply, [x] if kept is not None else [])


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Replay a / b where b needs no gradient and is kept."""

    def apply(g: Tensor, kept: Tensor = b) -> Gradients:
        return (g.new(),)

    return record(a.new(), [a], apply, [b])


def divide_by_trained(x: Tensor, b: Tensor) -> Tensor:
    """Replay x / b for a scalar b with a gradient: x is kept, and the gradient of b is computed at the size of x."""
    shape = b.shape

    def apply(g: Tensor, kept: Tensor = x) -> Gradients:
        of_x = g.new()
        held = [g.new() for _ in range(3)]  # -g x / b^2
        whole = g.new()
        del held
        return of_x, whole.new(shape)

    return record(x.new(), [x, b], apply, [x])


def mul_rows(x: Tensor, column: Tensor) -> Tensor:
    """Replay x (r, n) times a column (r, 1): the gradient of each needs the other."""

    def apply(g: Tensor, kept: tuple = (x, column)) -> Gradients:
        of_x = g.new()
        whole = g.new()
        return of_x, whole.new(column.shape)

    return record(x.new(), [x, column], apply, [])


def add_in_place(x: Tensor, b: Tensor) -> Tensor:
    """Replay x += b: there is no new tensor, and x keeps its dtype. The gradient of a smaller b is summed."""
    shape, bytes = b.shape, b.bytes
    output = x.view(*x.shape)
    output.node = None
    needs = x.needs_grad, b.needs_grad

    def apply(g: Tensor) -> Gradients:
        of_b = (g if g.shape == shape else g.new(shape)) if needs[1] else None
        return g if needs[0] else None, of_b if of_b is None else fit(of_b, bytes)

    return record(output, [x, b], apply)


def mul_constant(x: Tensor, constant: Tensor) -> Tensor:
    """Replay x times a tensor that needs no gradient and is kept."""
    bytes = x.bytes
    output = x.new(bytes=max(x.bytes, constant.bytes))

    def apply(g: Tensor, kept: Tensor = constant) -> Gradients:
        return (fit(g.new(), bytes),)

    return record(output, [x], apply, [constant])


def square(x: Tensor) -> Tensor:
    """Replay x.pow(2). Its gradient, g (2 x^1), is one expression whose three factors live at the same time."""

    def apply(g: Tensor, x: Tensor = x) -> Gradients:
        power = x.new()
        twice = x.new()
        result = g.new()
        del power, twice
        return (result,)

    return record(x.new(), [x], apply, [x])


def mean_last(x: Tensor) -> Tensor:
    """Replay x.mean(-1, keepdim=True)."""
    shape = x.shape
    return record(x.new((*shape[:-1], 1)), [x], lambda g: (g.new(shape),))


def from_result(x: Tensor) -> Tensor:
    """Replay rsqrt, tanh, relu or softmax: one kernel for each pass. The gradient needs the result, which is kept."""
    output = x.new()
    result = output.detach()

    def apply(g: Tensor, kept: Tensor = result) -> Gradients:
        return (g.new(),)

    return record(output, [x], apply, [output])


def safe_softmax(x: Tensor) -> Tensor:
    """Replay the softmax that gives zeros for a row of only -inf: a softmax, a byte mask, and a choice of the two."""
    plain = x.new()
    rows = x.new(bytes=BOOL)
    output = from_result(x)
    del plain, rows
    return output


def over_its_size(x: Tensor) -> Tensor:
    """Replay x / sqrt(mean x^2 + eps) as an RMS norm computes it: a square, a mean, a root, a product."""
    return mul_broadcast(x, from_result(mean_last(square(x))))


def from_input(x: Tensor) -> Tensor:
    """Replay silu or gelu: one kernel for each pass. The gradient needs x, which is kept."""

    def apply(g: Tensor, kept: Tensor = x) -> Gradients:
        return (g.new(),)

    return record(x.new(), [x], apply, [x])


def gelu_new(x: Tensor, autocast: bool) -> Tensor:
    """Replay x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) as GPT-2 writes it: four operations keep a tensor.

    CUDA's autocast computes the power in float32, and everything after it is float32 too.
    """
    half = scale(x)
    power = square(cast(x, FLOAT32) if autocast else x)
    return mul(half, shift(from_result(scale(add(x, scale(power))))))


def bloom_gelu(x: Tensor) -> Tensor:
    """Replay BLOOM's GELU, one function of many operations that keeps only x. Its temporary tensors live together."""

    def apply(g: Tensor, kept: Tensor = x) -> Gradients:
        held = [kept.new() for _ in range(5)]  # tanh, x/2, 1 - tanh^2, and two of the polynomial
        del held
        slope = kept.new()
        result = g.new()
        del slope
        return (result,)

    held = [x.new() for _ in range(4)]  # x/2, x sqrt(2/pi), and two of the polynomial
    del held
    return record(x.new(), [x], apply, [x])


def dropout(x: Tensor, p: float) -> Tensor:
    """Replay dropout: it keeps its mask, one byte per element. Nothing happens at p = 0."""
    if not p:
        return x
    mask = x.new(bytes=BOOL)

    def apply(g: Tensor, kept: Tensor = mask) -> Gradients:
        return (g.new(),)

    return record(x.new(), [x], apply, [mask])


def layer_norm(x: Tensor, weight: Parameter | None, bias: Parameter | None) -> Tensor:
    """Replay LayerNorm, one kernel for each pass. It keeps x, and each row's mean and 1/deviation in float32."""
    own = [one for one in (weight, bias) if one is not None]
    output = x.new()
    rows = x.new((*x.shape[:-1], 1), FLOAT32), x.new((*x.shape[:-1], 1), FLOAT32)
    needs = x.needs_grad

    def apply(g: Tensor, kept: tuple = (x, *rows)) -> Gradients:
        of_x = kept[0].new() if needs else None
        return of_x, *(one.new() if one.needs_grad else None for one in own)

    return record(output, [x, *own], apply, [x, *rows])


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Replay x W^T + b. It keeps x only for the gradient of W."""
    kept = x if weight.needs_grad else None
    needs, shape, bytes = x.needs_grad, x.shape, x.bytes
    output = x.new((*shape[:-1], weight.shape[0]))
    flops = 2 * x.elements * weight.shape[0]
    x.memory.flops += flops

    def apply(g: Tensor, kept: Tensor | None = kept) -> Gradients:
        g.memory.flops += flops * (needs + weight.needs_grad)
        of_bias = g.new(bias.shape) if bias is not None and bias.needs_grad else None
        of_x = g.new(shape, bytes).viewed() if needs else None  # the product flattens (b, s, h)
        of_weight = g.new(weight.shape, weight.bytes).viewed() if weight.needs_grad else None  # it is transposed
        return of_x, of_weight, of_bias

    edges = [x, weight, x.detach() if bias is None else bias]  # a detached tensor has no gradient
    return record(output, edges, apply, [x] if weight.needs_grad else [])


def frozen_linear(x: Tensor, outputs: int) -> Tensor:
    """Replay x times an existing frozen matrix. Nothing is kept."""
    shape, bytes, flops = x.shape, x.bytes, 2 * x.elements * outputs
    x.memory.flops += flops

    def apply(g: Tensor) -> Gradients:
        g.memory.flops += flops
        return (g.new(shape, bytes).viewed(),)

    return record(x.new((*shape[:-1], outputs)), [x], apply, [])


def quantised_linear(x: Tensor, outputs: int, inputs: int, compute: int) -> Tensor:
    """Replay bitsandbytes' Linear4bit. Each pass unpacks the weight and the scales of its blocks, then frees them.

    Args:
        compute: the bytes of the dtype in which it computes. The result has the dtype of x.
    """
    before = x.bytes
    x = cast(x, compute)
    shape = x.shape

    def unpacked(like: Tensor) -> tuple[Tensor, Tensor]:
        scales = like.new((-(-outputs * inputs // 64),), FLOAT32)
        return scales, like.new((outputs, inputs), compute)

    flops = 2 * x.elements * outputs
    x.memory.flops += flops

    def apply(g: Tensor) -> Gradients:
        g.memory.flops += flops
        held = unpacked(g)
        result = g.new(shape)
        del held
        return (result,)

    held = unpacked(x)
    result = record(x.new((*shape[:-1], outputs)), [x], apply)
    del held
    return cast(result, before)


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


def cross_entropy(logits: Tensor) -> Tensor:
    """Replay log_softmax, which keeps its output, and nll_loss. logits: (n, V), float32."""
    logged = logits.new()
    loss = logits.new((1,))

    def apply(g: Tensor, logged: Tensor = logged) -> Gradients:
        of_logged = logged.new()
        return (of_logged.new(),)

    return record(loss, [logits], apply, [logged])


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


def mul_column(x: Tensor, column: Tensor) -> Tensor:
    """Replay x (n, h) times a column (n, 1). Each is kept for the gradient of the other."""
    return mul_broadcast(x, column)


def chosen(x: Tensor, count: int) -> Tensor:
    """Replay torch.topk along the last dimension. It keeps the places; the gradient is copied into zeros."""
    whole = x.shape
    shape = (*whole[:-1], count)
    places = x.new(shape, INT64)

    def apply(g: Tensor, kept: Tensor = places) -> Gradients:
        return (g.new(whole),)

    return record(x.new(shape), [x], apply, [places])


def rows_of(x: Tensor, count: int, index: Tensor) -> Tensor:
    """Replay x[index]: it keeps the index. The gradient is added up in zeros of the whole size."""
    whole, bytes = x.shape, x.bytes

    def apply(g: Tensor, kept: Tensor = index) -> Gradients:
        return (g.new(whole, bytes),)

    return record(x.new((count, whole[-1])), [x], apply, [index])


def grouped_product(x: Tensor, weight: Tensor) -> Tensor:
    """Replay grouped_mm of rows (n, inputs), sorted by expert, and weights (experts, outputs, inputs)."""
    x = cast(x, weight.bytes)
    experts, outputs, inputs = weight.shape
    keeps, needs, shape = weight.needs_grad, x.needs_grad, x.shape
    flops = 2 * x.elements * outputs
    x.memory.flops += flops

    def apply(g: Tensor, kept: tuple = (x if keeps else None, weight if needs else None)) -> Gradients:
        g.memory.flops += flops * (needs + keeps)
        of_x = g.new(shape) if needs else None
        return of_x, g.new(weight.shape) if keeps else None

    saved = [x] * keeps + [weight] * (needs and not isinstance(weight, Parameter))
    return record(x.new((x.shape[0], outputs)), [x, weight], apply, saved)


def sum_groups(x: Tensor, count: int) -> Tensor:
    """Replay x.view(n, k, h).sum(1). The gradient is a view."""
    whole = x.shape
    return record(x.new((count, whole[-1])), [x], lambda g: (g.new(whole),))


def clamped(x: Tensor) -> Tensor:
    """Replay clamp, which keeps its input."""
    return from_input(x)


def resized(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Replay torch.cat with a small tensor: the gradient is a view."""
    return record(x.new(shape), [x], lambda g: (g.viewed(),))


def minus_largest(x: Tensor) -> Tensor:
    """Replay x - x.max(-1, keepdim=True).values. The gradient of the maximum is copied into zeros."""
    shape = x.shape
    places = x.new((*shape[:-1], 1), INT64)

    def apply(g: Tensor, kept: Tensor = places) -> Gradients:
        whole = g.new(shape)
        return (whole,)

    return record(x.new(), [x], apply, [places])


def minus_column(x: Tensor, column: Tensor) -> Tensor:
    """Replay x - column, where the column is broadcast over x: its gradient is summed."""
    shape, needs = column.shape, (x.needs_grad, column.needs_grad)
    return record(x.new(), [x, column], lambda g: (g if needs[0] else None, g.new(shape) if needs[1] else None))


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
