"""Mixtures of experts as transformers computes them by default: `experts_implementation="grouped_mm"`.

Every token is copied once for each expert that it takes, the copies are sorted by expert, and one kernel multiplies
each group by its expert's matrix. The replay assumes this implementation; the others allocate differently.
"""

from __future__ import annotations

from collections.abc import Callable

from peftlab.memory.counting.decoders import Decoder
from peftlab.memory.replay import ops, products, views
from peftlab.memory.replay.nets import Net
from peftlab.memory.replay.tape import Tensor

QUANTISED_BLOCK = 64  # weights with one scale
LARGEST = 2**31  # so many weights bitsandbytes' kernels can count


def mixture(
    net: Net, d: Decoder, at: str, x: Tensor, activate: Callable[[Tensor], Tensor],
    mlp: Callable[[str, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """Replay the experts of one block."""
    e = d.experts
    assert e is not None
    shape = x.shape
    tokens = shape[0] * shape[1]
    flat = x.view(tokens, shape[2])
    shared = mlp(f"{at}{e.shared_name}.", flat) if e.shared and e.shared_first else None
    shares = route(net, d, at + e.router, flat)
    mixed = experts(net, d, at + "experts.", flat, shares, activate)
    if e.shared:
        if shared is None:
            shared = mlp(f"{at}{e.shared_name}.", flat)
        if e.shared_gate:
            shared = ops.mul(shared, ops.from_result(net.linear(at + e.shared_gate, flat)))
        mixed = ops.add(mixed, shared)
    return mixed.view(*shape)


def route(net: Net, d: Decoder, path: str, flat: Tensor) -> Tensor:
    """Replay the router, and return the shares of the chosen experts, (tokens, per token)."""
    e = d.experts
    assert e is not None
    logits = net.linear(path, flat)
    if e.choose_first:  # gpt-oss: the softmax is taken of the chosen scores alone
        return ops.from_result(ops.chosen(logits, e.per_token))
    scores = ops.from_result(ops.cast(logits, ops.FLOAT32))
    shares = ops.chosen(scores, e.per_token)
    if e.normalised:
        shares = ops.add_in_place(shares, shares.detach())
    return shares if e.wide_shares else ops.cast(shares, flat.bytes)


def experts(
    net: Net, d: Decoder, at: str, flat: Tensor, shares: Tensor, activate: Callable[[Tensor], Tensor]
) -> Tensor:
    """Replay all experts of a block in grouped products, and return their weighed sum for each token."""
    e = d.experts
    assert e is not None
    tokens, hidden = flat.shape
    rows = tokens * e.per_token
    order = [flat.new((rows,), ops.INT64) for _ in range(4)]  # the experts, sorted, the permutation, its inverse

    def bias(name: str) -> Tensor | None:
        """Return the bias of each row's expert."""
        if not e.bias:
            return None
        own = net.weights[at + name]
        return ops.rows_of(own.view(e.count, own.elements // e.count), rows, order[0])

    taken = ops.rows_of(flat, rows, order[0])
    weights = ops.rows_of(shares.view(rows, 1), rows, order[1])
    up, again = weight_of(net, at + "gate_up_proj")
    biases = bias("gate_up_proj_bias")  # the name keeps these rows alive until those of the next product are there
    both = products.grouped_product(taken, up, again)
    if biases is not None:
        both = ops.add_in_place(both, biases)
    if e.choose_first:
        inner = clamped_gate(both)
    else:
        gate, other = views.halves(both)
        inner = ops.mul(activate(gate), other)
        del gate, other
    del both
    down, again = weight_of(net, at + "down_proj")
    biases = bias("down_proj_bias")
    both = products.grouped_product(inner, down, again)
    del inner
    if biases is not None:
        both = ops.add_in_place(both, biases)
    weighed = ops.mul(both, weights)
    del both
    weighed = ops.rows_of(weighed, rows, order[2])
    total = views.sum_groups(weighed, tokens)
    return ops.cast(total, flat.bytes)


def weight_of(net: Net, path: str) -> tuple[Tensor, Callable[[], Tensor] | None]:
    """Return the matrices of all experts at a path as the block reads them, and how they are made again, if they are.

    peftlab makes a changed or a 4-bit weight again in the backward pass. Under checkpointing, and in Hugging Face peft,
    it is kept until then.
    """

    def make() -> Tensor:
        stored = unpacked(net, path) if path in net.quantised else net.weights[path]
        return net.parameters_with_more[path](stored) if path in net.parameters_with_more else stored

    def again() -> Tensor:
        with net.memory.graph(False):
            return make()

    changed = path in net.quantised or path in net.parameters_with_more
    remade = changed and net.recipe.library == "peftlab" and not net.recipe.recomputes(net.block_of(path))
    return make(), again if remade else None


def unpacked(net: Net, path: str) -> Tensor:
    """Replay the dequantising of all experts: first the scales of their blocks, then the weights.

    Experts that do not fill whole blocks are dequantised one by one and then joined, and so are those that
    bitsandbytes cannot count together.
    """
    module, like = net.modules[path], net.quantised[path][0]
    size, bytes = (module.outputs, module.inputs), 2 if net.recipe.autocast else net.recipe.weight_bytes
    elements = module.outputs * module.inputs
    if elements % QUANTISED_BLOCK or module.experts * elements >= LARGEST:
        each = [like.new(size, bytes) for _ in range(module.experts)]
        return like.new((module.experts, *size), bytes) if each else like
    blocks = module.experts * elements // QUANTISED_BLOCK
    codes = like.new((blocks,), 4)  # as whole numbers, which look up the scales
    scales = like.new((blocks,), ops.FLOAT32)
    del codes
    nested = like.new((blocks,), ops.FLOAT32)  # the scales of the scales, one for each
    del nested
    weight = like.new((module.experts, *size), bytes)
    del scales
    return weight


def clamped_gate(both: Tensor) -> Tensor:
    """Replay gpt-oss' gate: (up + 1) gate sigmoid(1.702 gate), of clamped halves."""
    gate, up = views.halves(both)
    gate, up = ops.clamped(gate), ops.clamped(up)
    glu = ops.mul(gate, ops.from_result(ops.scale(gate)))
    return ops.mul(ops.shift(up), glu)
