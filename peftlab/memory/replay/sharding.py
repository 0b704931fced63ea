"""A step on one of several GPUs, under DistributedDataParallel (DDP) or fully sharded data parallelism (FSDP).

DDP copies gradients into buckets, which are as large as all gradients together.

FSDP2 (`fully_shard` from `torch.distributed.fsdp`, called on each block and then on the model) stores only 1/N of each
parameter, gradient and optimiser state on each GPU, as ZeRO's stage 3 does (Rajbhandari et al., 2019, arXiv:1910.02054,
section 5.3). Before a block runs, forward or backward, its parameters are gathered:

    forward    1. gather block i into a flat buffer
               2. copy the parameters out of it, and free the buffer of block i - 1
               3. run the block, and free the copies
    backward   1. gather block i - 1 ahead, while block i runs
               2. copy the gradients of block i into one buffer, sum it over the GPUs, and keep 1/N of the sum
               3. free that buffer when the gradients of block i - 1 follow

Parameters outside the blocks (embeddings, the last norm, the head) stay gathered from the start of the forward pass to
the end of the backward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from peftlab.memory.replay.nets import Net
from peftlab.memory.replay.tape import Gradients, Parameter, Tensor, record


class Sharding:
    """The parameters of a model in shards. `around` gathers the parameters of a block and runs it."""

    def __init__(self, net: Net, gpus: int):
        self.net, self.gpus = net, gpus
        self.whole: dict[str, Tensor] = {}  # {prefix of a block: its gathered parameters}; "" is outside the blocks
        self.flat: tuple[str, Tensor] | None = None  # (prefix, buffer) of the block gathered last, or ahead
        self.reduced: Tensor | None = None  # the buffer of the gradients summed last
        self.order: list[str] = []  # the blocks in the order in which the forward pass ran them
        self.sizes: dict[str, int] = {}  # {prefix: bytes of a block's parameters, and of its codes}
        self.codes: Counter[str] = Counter()  # the bytes of each block's weights in four bits
        for path, codes in net.quantised.items():
            self.codes[net.block_of(path)] += codes[0].elements

    def group(self, prefix: str) -> list[Parameter]:
        """Return the parameters of a block."""
        return [parameter for _, parameter in self.net.groups.get(prefix, [])]

    def buffer(self, prefix: str) -> Tensor:
        """Allocate a buffer as large as a block's parameters."""
        if prefix not in self.sizes:
            size = sum(parameter.elements * parameter.bytes for parameter in self.group(prefix))
            self.sizes[prefix] = size + self.codes[prefix]
        return Tensor(self.net.memory, (self.sizes[prefix],), 1)

    def start(self) -> None:
        """Gather what lies outside the blocks. Runs before the forward pass."""
        self.order.clear()
        self.gather("")

    def gather(self, prefix: str) -> None:
        """All-gather a block's parameters, into a new buffer unless the block was gathered ahead.

        The previous block's buffer is freed only once the copies are made.
        """
        before = self.flat  # this name keeps the previous buffer alive until the copies are made
        if before is None or before[0] != prefix:
            self.flat = (prefix, self.buffer(prefix))
        self.whole[prefix] = self.buffer(prefix)

    def around(self, prefix: str, run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        """Run a block's forward pass, with signals for its backward pass."""
        first = signal(inputs[0], lambda: self.let_go(prefix))
        self.order.append(prefix)
        self.gather(prefix)
        output = run(first, *inputs[1:])
        del self.whole[prefix]
        return signal(output, lambda: self.before_backward(prefix))

    def before_backward(self, prefix: str) -> None:
        """Gather a block again, and the block before it ahead. Runs before the block's backward pass."""
        self.gather(prefix)
        place = self.order.index(prefix)
        self.flat = (self.order[place - 1], self.buffer(self.order[place - 1])) if place else None

    def let_go(self, prefix: str) -> None:
        """Free a block's parameters, and sum its gradients and keep a shard of them. Runs after its backward pass."""
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
        """Let go of what is still gathered. Runs after the backward pass.

        This is what lies outside the blocks, and the first block if its input needs no gradient: then it got no signal.
        """
        for prefix in [*reversed(self.order), ""]:
            if prefix in self.whole:
                self.let_go(prefix)
        self.flat = self.reduced = None


def signal(x: Tensor, call: Callable[[], None]) -> Tensor:
    """Return the same tensor, and let the backward pass call `call` when it reaches it."""

    def apply(g: Tensor) -> Gradients:
        call()
        return (g,)

    output = x.view(*x.shape)
    output.node = None
    return record(output, [x], apply)
