"""What PyTorch's operations do to memory: the output, what is kept for the backward pass, the gradients.

Here are those that compute number by number, sums, norms and losses. Matrix products are in `products`, slices and
joins in `views`.

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


def add_scaled(a: Tensor, b: Tensor) -> Tensor:
    """Replay a + s b, with a Python number s, in one operation. The gradient of b is a tensor of its own."""
    pairs = (a.bytes, a.needs_grad), (b.bytes, b.needs_grad)
    output = a.new(bytes=max(a.bytes, b.bytes))

    def apply(g: Tensor) -> Gradients:
        of_b = fit(g.new(), pairs[1][0]) if pairs[1][1] else None
        return (fit(g, pairs[0][0]) if pairs[0][1] else None, of_b)

    return record(output, [a, b], apply)


def subtract_in_place(a: Tensor, b: Tensor) -> Tensor:
    """Replay a -= b, of one dtype. The gradient of b is a tensor of its own, -g."""
    output = a.view(*a.shape)
    output.node = None
    needs = a.needs_grad, b.needs_grad
    return record(output, [a, b], lambda g: (g if needs[0] else None, g.new() if needs[1] else None))


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
    """Replay a * b, where b may be smaller. The gradient of each needs the other, and is computed at full size."""
    kept = a if b.needs_grad else None, b if a.needs_grad else None
    output = a.new(bytes=max(a.bytes, b.bytes))

    def apply(g: Tensor, kept: tuple = kept) -> Gradients:
        return [g.new() if other is not None else None for other in reversed(kept)]

    return record(output, [a, b], apply, [one for one in kept if one is not None], fits=False)


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

    def apply(g: Tensor, kept: Tensor = constant) -> Gradients:
        return (g.new(),)

    return record(x.new(bytes=max(x.bytes, constant.bytes)), [x], apply, [constant], fits=False)


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
    return mul(x, from_result(mean_last(square(x))))


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


def add_bias(y: Tensor, bias: Tensor) -> Tensor:
    """Replay y + (b - b0) of a trained copy b of the bias b0, in the dtype of y. The gradient of b is a sum."""
    needs, size, before, bytes = y.needs_grad, bias.shape, y.bytes, bias.bytes
    change = bias.new()
    output = y.new(bytes=max(before, bytes))
    output = record(output, [y, bias], lambda g: (fit(g, before) if needs else None, g.new(size, bytes)))
    del change
    return cast(output, before)


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


def cross_entropy(logits: Tensor) -> Tensor:
    """Replay log_softmax, which keeps its output, and nll_loss. logits: (n, V), float32."""
    logged = logits.new()
    loss = logits.new((1,))

    def apply(g: Tensor, logged: Tensor = logged) -> Gradients:
        of_logged = logged.new()
        return (of_logged.new(),)

    return record(loss, [logits], apply, [logged])


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


def clamped(x: Tensor) -> Tensor:
    """Replay clamp, which keeps its input."""
    return from_input(x)


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
