"""One of several GPUs: what DistributedDataParallel and fully sharded data parallelism add to a step, and take away.

DDP copies gradients into buckets, which are as large as all gradients together. FSDP2 (`fully_shard` from
`torch.distributed.fsdp` on each block, then on the model) keeps 1/N of every parameter, gradient and state, as ZeRO's
stage 3 does (Rajbhandari et al., 2019, arXiv:1910.02054, section 5.3). Around a block's forward and backward pass its
parameters are whole:

    forward    gather block i into a flat buffer, copy out, let go of the buffer of i - 1, run, let go of the copy
    backward   gather block i - 1 while block i runs; then copy the gradients of i into one buffer, which lives until
               those of i - 1 follow, and keep 1/N of its sum

What is in no block (embeddings, the last norm, the head) is whole from the start of the forward pass to the end.
"""

from __future__ import annotations

from collections.abc import Callable

from peftlab.memory.replay.nets import Net
from peftlab.memory.replay.tape import Gradients, Parameter, Tensor, record


class Sharding:
    """The parameters of a model in shards; `around` runs a block with its own made whole."""

    def __init__(self, net: Net, gpus: int):
        self.net, self.gpus = net, gpus
        self.whole: dict[str, Tensor] = {}  # by the prefix of a block; "" is what is in none
        self.flat: tuple[str, Tensor] | None = None
        self.reduced: Tensor | None = None
        self.order: list[str] = []  # blocks, as the forward pass came to them
        self.groups: dict[str, list[Parameter]] = {}

    def group(self, prefix: str) -> list[Parameter]:
        """The parameters of a block."""
        if not self.groups:
            for path, parameter in self.net.everything():
                self.groups.setdefault(self.net.block_of(path), []).append(parameter)
        return self.groups.get(prefix, [])

    def buffer(self, prefix: str) -> Tensor:
        """As many bytes as a block's parameters have."""
        packed = sum(
            codes[0].elements for path, codes in self.net.quantised.items() if self.net.block_of(path) == prefix
        )
        size = sum(parameter.elements * parameter.bytes for parameter in self.group(prefix)) + packed
        return Tensor(self.net.memory, (size,), 1)

    def start(self) -> None:
        """Before the forward pass."""
        self.order.clear()
        self.gather("")

    def gather(self, prefix: str) -> None:
        """A block made whole, from what was gathered ahead or from a new buffer; the last one's lives until then."""
        before = self.flat  # lives as long as this name: until the copies are made
        if before is None or before[0] != prefix:
            self.flat = (prefix, self.buffer(prefix))
        self.whole[prefix] = self.buffer(prefix)

    def around(self, prefix: str, run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        """A block's forward pass, and signals for its backward pass."""
        first = signal(inputs[0], lambda: self.let_go(prefix))
        self.order.append(prefix)
        self.gather(prefix)
        output = run(first, *inputs[1:])
        del self.whole[prefix]
        return signal(output, lambda: self.before_backward(prefix))

    def before_backward(self, prefix: str) -> None:
        """A block made whole again, and the one before it gathered ahead."""
        self.gather(prefix)
        place = self.order.index(prefix)
        self.flat = (self.order[place - 1], self.buffer(self.order[place - 1])) if place else None

    def let_go(self, prefix: str) -> None:
        """After a block's backward pass: its parameters go, its gradients are summed and become shards."""
        self.whole.pop(prefix, None)
        parameters = [one for one in self.group(prefix) if one.needs_grad and one.grad is not None]
        if not parameters:
            return
        self.reduced = None
        size = sum(one.elements * one.bytes for one in parameters)
        self.reduced = Tensor(self.net.memory, (size,), 1)
        for one in parameters:
            one.grad = None
        shard = Tensor(self.net.memory, (-(-size // self.gpus),), 1, "gradients")
        for one in parameters:
            one.grad = shard

    def finish(self) -> None:
        """After the backward pass: a first block whose input needs no gradient gives no signal; and what is in none."""
        for prefix in [*reversed(self.order), ""]:
            if prefix in self.whole:
                self.let_go(prefix)
        self.flat = self.reduced = None


def signal(x: Tensor, call: Callable[[], None]) -> Tensor:
    """The same tensor; `call` is called when the backward pass comes to it."""

    def apply(g: Tensor) -> Gradients:
        call()
        return (g,)

    output = x.view(*x.shape)
    output.node = None
    return record(output, [x], apply)
