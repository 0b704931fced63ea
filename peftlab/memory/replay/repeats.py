"""Blocks of a decoder that are like others: what another block did to memory is copied, instead of being replayed.

Most blocks of a model are alike. Each does the same as the one before it, on top of what that one left. So of the
blocks of one kind only the first three and the last two are replayed. With ten blocks of one kind:

    forward     0 1 2 3 4 5 6 7 8 9     3 to 7 copy what 2 did
    backward    9 8 7 6 5 4 3 2 1 0     7 to 3 copy what 8 did

The blocks at the ends are no models for the others. The first one's input is held by the model, and it may need no
gradient; then the second one is the first to keep the rotary tables, which all blocks share. The last one's gradient
comes from the head.

A copied block has no tensors. Its input stands for its output, which is as large.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from peftlab.memory.counting.decoders import Decoder
from peftlab.memory.replay.nets import Net
from peftlab.memory.replay.sharding import signal
from peftlab.memory.replay.tape import Memory, Tensor

FIRST, LAST = 3, 2  # so many blocks of a kind are replayed at either end


class Pass:
    """What one block does to memory in one pass, forward or backward: from the making of this object to `end`."""

    def __init__(self, memory: Memory):
        self.memory, self.before = memory, memory.cut()
        self.start, self.flops, self.written = memory.now.copy(), memory.flops, memory.written

    def end(self) -> None:
        """Note what was allocated, and what is left of it."""
        memory = self.memory
        self.within = memory.cut()
        memory.add(self.before)
        memory.add(self.within)
        self.left = memory.more_than(self.start)
        self.flops, self.written = memory.flops - self.flops, memory.written - self.written

    def copy(self) -> None:
        """Do the same on top of what is allocated now."""
        memory = self.memory
        memory.add(self.within.on_top_of(memory.more_than(self.start), memory.moment))
        memory.change(self.left)
        memory.flops += self.flops
        memory.written += self.written


class Kind:
    """Blocks that are alike: their paths, and what two of them did."""

    forward: Pass
    likeness: tuple  # of the input of that block
    backward: Pass
    casts: dict[str, int]  # by kind, the bytes of casts that are freed when the forward pass is over
    gradients: int  # bytes of a block's gradients
    moved: list[bool]  # of each parameter of a block: whether it gets a gradient

    def __init__(self, blocks: list[str]):
        self.copies = frozenset(blocks[FIRST:-LAST])
        self.model_forward, self.model_backward = blocks[FIRST - 1], blocks[-LAST]


class Repeats:
    """The blocks of a decoder. `around` replays a block, or copies another one.

    Blocks are of one kind if they have equal layers, equal tensors of the method, and equal settings.
    """

    def __init__(self, net: Net, d: Decoder):
        self.net, self.memory = net, net.memory
        contents: dict[str, list[tuple]] = {}
        for block, own in net.groups.items():
            contents[block] = [(path, one.shape, one.bytes, one.needs_grad) for path, one in own]
        for path in net.quantised:
            block = net.block_of(path)
            contents.setdefault(block, []).append((path[len(block) :], net.weight_size(path)))
        alike: dict[tuple, list[str]] = {}
        for i in range(d.layers):
            block = d.block(i)
            settings = i in d.sliding, i in d.unrotated, net.recipe.recomputes(block)
            alike.setdefault((settings, *contents[block]), []).append(block)
        self.kinds: dict[str, Kind] = {}  # by block; kinds of which no block is copied are left out
        for blocks in alike.values():
            if len(blocks) > FIRST + LAST:
                self.kinds |= dict.fromkeys(blocks, Kind(blocks))

    def around(self, block: str, run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        """Run a block, or copy another one."""
        if block not in self.kinds:
            return run(*inputs)
        (x,), kind = inputs, self.kinds[block]
        if block in kind.copies and likeness(x) == kind.likeness:
            return self.copy(block, kind, x)
        if block == kind.model_forward:
            return self.forward(block, kind, run, x)
        if block == kind.model_backward:
            output = run(signal(x, lambda: self.end_backward(block, kind)))
            return signal(output, lambda: self.start_backward(kind))
        return run(x)

    def copy(self, block: str, kind: Kind, x: Tensor) -> Tensor:
        """Copy a forward pass, and let the backward pass copy one when it comes here."""
        kind.forward.copy()
        self.hold_casts(block, kind)
        return signal(x, lambda: self.copy_backward(block, kind))

    def forward(self, block: str, kind: Kind, run: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Run the forward pass that others copy."""
        kind.forward, kind.likeness, references = Pass(self.memory), likeness(x), count_references(x)
        output = run(x)
        held = self.memory.now.copy()
        for _, one in self.net.groups.get(block, []):
            self.net.casts.pop(one, None)
        kind.casts = {name: held[name] - size for name, size in self.memory.now.items()}
        kind.forward.end()
        self.hold_casts(block, kind)
        if count_references(x) == references:  # the block keeps nothing of its input, which is freed when it returns
            kind.forward.left[x.storage.kind] -= x.storage.size
        return output

    def hold_casts(self, block: str, kind: Kind) -> None:
        """Hold as many bytes as a block's casts until the forward pass is over."""
        for name, size in kind.casts.items():
            if size:
                self.net.casts[f"{block}{name}"] = self.memory.hold(name, size)

    def start_backward(self, kind: Kind) -> None:
        """Start to note the backward pass that others copy."""
        kind.backward = Pass(self.memory)

    def end_backward(self, block: str, kind: Kind) -> None:
        """Note what the backward pass did, and which parameters have a gradient now."""
        kind.backward.end()
        gradients = [one.grad for _, one in self.net.groups.get(block, [])]
        kind.moved = [one is not None for one in gradients]
        kind.gradients = sum(storage.size for storage in {one.storage for one in gradients if one is not None})
        kind.backward.left["gradients"] -= kind.gradients

    def copy_backward(self, block: str, kind: Kind) -> None:
        """Copy a backward pass. One tensor stands for all gradients of the block."""
        kind.backward.copy()
        gradients = self.memory.hold("gradients", kind.gradients)
        for (_, one), moved in zip(self.net.groups.get(block, []), kind.moved, strict=True):
            if moved:
                one.grad = gradients


def count_references(x: Tensor) -> int:
    """Count what refers to a tensor or to its bytes."""
    return sys.getrefcount(x) + sys.getrefcount(x.storage)


def likeness(x: Tensor) -> tuple:
    """Return what two tensors must share for one to stand for the other."""
    return x.shape, x.bytes, x.storage.kind, x.needs_grad
