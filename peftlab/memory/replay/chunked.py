"""What the loss in chunks does to memory on a GPU with Triton: `peftlab.training.chunked`, line by line."""

from __future__ import annotations

from peftlab.errors import PeftLabError
from peftlab.memory.replay import ops
from peftlab.memory.replay.nets import Net
from peftlab.memory.replay.tape import Gradients, Tensor, record

CHUNK_BYTES, LEAST = 1 << 28, 256  # of a chunk's logits, and its fewest rows; a test holds them to those of the loss


def chunked_loss(net: Net, hidden: Tensor) -> Tensor:
    """Return the loss of hidden states (b, s, h), of which every position but the last has a label."""
    if "lm_head" in net.layers:
        raise PeftLabError(
            f"{net.shape.name}: the method changes the head (lm_head), so its loss is not computed in chunks. Leave "
            "chunked_loss out."
        )
    weight, bias, layout = net.weights["lm_head"], net.biases.get("lm_head"), net.shape.layout
    count, width, vocabulary = net.recipe.batch * (net.recipe.sequence - 1), hidden.shape[-1], weight.shape[0]
    rows = _rows(hidden, count)
    compute = 2 if net.autocast else hidden.bytes
    wide = max(compute, ops.FLOAT32)
    h = rows if rows.bytes == compute else rows.new(bytes=compute)
    w = weight if weight.bytes == compute else weight.new(bytes=compute)
    kept = [
        hidden.new(one.shape, size) if one.needs_grad else None
        for one, size in ((rows, rows.bytes), (weight, wide), *([(bias, wide)] if bias is not None else []))
    ]
    capped = layout is not None and layout.capped_logits
    for at in range(0, count, step := chunk_rows(count, vocabulary, wide if capped else compute)):
        size = min(step, count - at)
        z = hidden.new((size, vocabulary), compute)
        if capped:  # otherwise a kernel makes the gradient in its place
            z = z if compute == wide else z.new(bytes=wide)  # the narrow one is freed when the wide one is made
            square = z.new()
            slope = z.new()
            del square, slope
        dz = z if z.bytes == compute else z.new(bytes=compute)
        products = 1 + sum(one is not None for one in kept[:2])
        net.memory.flops += products * 2 * size * width * vocabulary
        # dL/dh is written straight into its rows, unless the product has another size
        part = hidden.new((size, width), compute) if kept[0] is not None and rows.bytes != compute else None
        del part
        part = hidden.new(weight.shape, compute) if kept[1] is not None else None
        del z, dz, part
    del h, w
    loss = hidden.new((1,), wide)
    sizes = [rows.bytes, weight.bytes, *([bias.bytes] if bias is not None else [])]

    def apply(g: Tensor) -> Gradients:
        return [None if one is None else ops.fit(one.new(), size) for one, size in zip(kept, sizes, strict=True)]

    inputs = [rows, weight, *([bias] if bias is not None else [])]
    return record(loss, inputs, apply, [one for one in kept if one is not None])


def _rows(hidden: Tensor, count: int) -> Tensor:
    """Replay index_select: the gradient is added into zeros of the whole size."""
    whole, kept = hidden.shape, Tensor(hidden.memory, (count,), ops.INT64)

    def apply(g: Tensor, kept: Tensor = kept) -> Gradients:
        return (g.new(whole),)

    return record(hidden.new((count, whole[-1])), [hidden], apply, [kept])


def chunk_rows(count: int, vocabulary: int, itemsize: int) -> int:
    """Return how many of `count` positions a chunk has, with logits of so many bytes."""
    most = max(LEAST, CHUNK_BYTES // (vocabulary * itemsize))
    return max(1, -(-count // max(1, -(-count // most))))
