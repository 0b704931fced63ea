"""A training step replayed without numbers: tensors that have a size and a life, and nothing else.

The peak of a step is the largest sum of tensors alive at one moment, so it is found by living through the step. An
operation here does what PyTorch's does to memory: it allocates its output, keeps for the backward pass what its
gradient needs, and in the backward pass allocates the gradients and lets go. A tensor is alive as long as something
refers to it, as in PyTorch, and for the same reason: Python and C++ count references alike.

The rules are those of PyTorch's autograd engine: nodes run in the reverse order of their creation; what a node kept is
released as soon as it has run; a second gradient for the same tensor is added in place where nothing else holds the
first; a parameter takes its gradient over without a copy.
"""

from __future__ import annotations

import heapq
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

KINDS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "workspace")
BLOCK = 512  # the caching allocator hands out multiples of this many bytes


class Memory:
    """What is allocated now, by kind, and the moment at which it was most."""

    def __init__(self) -> None:
        self.now = dict.fromkeys(KINDS, 0)
        self.total = self.peak = 0
        self.at_peak = dict(self.now)
        self.moment = self.peak_moment = "start"
        self.default = "workspace"
        self.flops = 0  # of matrix products, two for each multiplication and addition
        self.recording = True  # whether operations build the graph, as under torch.enable_grad
        self.order = itertools.count()
        self.history: list[tuple[str, int]] | None = None  # (where in the step, bytes) after each allocation

    def change(self, kind: str, size: int) -> None:
        """Adds or takes away some bytes."""
        self.now[kind] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak, self.peak_moment = self.total, dict(self.now), self.moment
        if size > 0 and self.history is not None:
            self.history.append((self.moment, self.total))

    @contextmanager
    def kind(self, kind: str) -> Iterator[None]:
        """What is allocated meanwhile is of this kind."""
        before, self.default = self.default, kind
        try:
            yield
        finally:
            self.default = before

    @contextmanager
    def graph(self, recording: bool) -> Iterator[None]:
        """As torch.enable_grad or torch.no_grad."""
        before, self.recording = self.recording, recording
        try:
            yield
        finally:
            self.recording = before


class Storage:
    """Allocated bytes; given back when the last tensor on them goes."""

    __slots__ = ("kind", "memory", "size")

    def __init__(self, memory: Memory, size: int, kind: str):
        self.memory, self.size, self.kind = memory, -(-size // BLOCK) * BLOCK, kind
        memory.change(kind, self.size)

    def __del__(self) -> None:
        self.memory.change(self.kind, -self.size)

    def mark(self, kind: str) -> None:
        """From now on these bytes are of another kind."""
        if kind != self.kind:
            self.memory.now[self.kind] -= self.size
            self.memory.now[kind] += self.size
            self.kind = kind


class Tensor:
    """A shape, a size per element, the storage, and the node that made it (None: nothing to differentiate)."""

    __slots__ = ("base", "bytes", "node", "shape", "storage")
    base: Storage | None
    node: Node | Leaf | None

    def __init__(self, memory: Memory, shape: Sequence[int], bytes: int, kind: str | None = None, shards: int = 1):
        self.shape, self.bytes, self.node, self.base = tuple(shape), bytes, None, None
        self.storage = Storage(memory, -(-math.prod(self.shape) // shards) * bytes, kind or memory.default)

    @property
    def memory(self) -> Memory:
        return self.storage.memory

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def needs_grad(self) -> bool:
        return self.node is not None

    def new(self, shape: Sequence[int] | None = None, bytes: int | None = None) -> Tensor:
        """Another tensor, by default like this one."""
        return Tensor(self.memory, self.shape if shape is None else shape, bytes or self.bytes)

    def view(self, *shape: int) -> Tensor:
        """The same bytes under another shape; gradients pass as they are."""
        other = object.__new__(Tensor)
        other.shape, other.bytes, other.node, other.storage = shape, self.bytes, self.node, self.storage
        other.base = None
        return other

    def viewed(self) -> Tensor:
        """The gradient of a view, which is itself a view: it holds its storage twice, so nothing is added in place."""
        self.base = self.storage
        return self

    def detach(self) -> Tensor:
        """The same bytes, outside the graph."""
        other = self.view(*self.shape)
        other.node = None
        return other


class Parameter(Tensor):
    """A leaf. Its gradient, once there, stays until `grad` is set to None. Of several shards this process holds one."""

    __slots__ = ("grad", "held")
    grad: Tensor | None

    def __init__(
        self, memory: Memory, shape: Sequence[int], bytes: int, kind: str = "weights", trains: bool = False,
        shards: int = 1,
    ):  # fmt: skip
        super().__init__(memory, shape, bytes, kind, shards)
        self.grad = None
        self.held = -(-self.elements // shards)  # elements of the shard
        self.node = Leaf(self) if trains else None


def leaf(x: Tensor) -> Tensor:
    """x.requires_grad_(True): the tensor becomes a leaf, which keeps a gradient of its own."""
    if x.needs_grad:
        return x
    keeper = object.__new__(Parameter)
    keeper.shape, keeper.bytes, keeper.storage, keeper.base, keeper.grad = x.shape, x.bytes, x.storage, None, None
    output = x.detach()
    output.node = Leaf(keeper)
    return output


class Node:
    """An operation in the graph: where its gradients go, and how they are computed."""

    __slots__ = ("apply", "edges", "order")
    apply: Callable[[Tensor], Gradients] | None

    def __init__(self, memory: Memory, edges: Sequence[Node | Leaf | None], apply: Callable[..., Gradients]):
        self.edges, self.apply, self.order = tuple(edges), apply, next(memory.order)


class Leaf:
    """The end of an edge: takes a gradient over. `into` is the parameter, or a list that collects."""

    __slots__ = ("into",)

    def __init__(self, into: Parameter | list):
        self.into = into

    def take(self, gradient: Tensor) -> None:
        if isinstance(self.into, list):
            if not self.into:  # what comes later is added in place
                self.into.append(gradient)
        elif self.into.grad is None:
            gradient.storage.mark("gradients")
            self.into.grad = gradient.detach()


Gradients = Sequence[Tensor | None]  # one for each input


def record(
    output: Tensor, inputs: Sequence[Tensor], apply: Callable[..., Gradients], saved: Sequence[Tensor] = ()
) -> Tensor:
    """Puts an operation into the graph: `apply(gradient)` returns one gradient (or None) for each input.

    `saved` are the tensors among those that `apply` refers to which count as activations; `apply` holds them.
    """
    if output.memory.recording and any(one.node is not None for one in inputs):
        output.node = Node(output.memory, [one.node for one in inputs], apply)
        for one in saved:
            if one.storage.kind == "workspace":
                one.storage.mark("activations")
    return output


def backward(root: Node | Leaf | None, gradients: list[Tensor]) -> None:
    """The backward pass from one node. Takes its gradient out of the list, and gives up the graph on the way."""
    assert isinstance(root, Node)  # a loss is the output of an operation
    waiting = _uses(root)
    buffers: dict[Node, Tensor] = {root: gradients.pop()}
    ready = [(-root.order, root)]
    while ready:
        _, node = heapq.heappop(ready)
        assert node.apply is not None  # a node runs once
        results = list(node.apply(buffers.pop(node)))
        node.apply = None
        for edge in node.edges:
            arrived = results.pop(0)
            if isinstance(edge, Node):
                if arrived is not None:
                    _accumulate(buffers, edge, arrived)
                waiting[edge] -= 1
                if not waiting[edge]:
                    heapq.heappush(ready, (-edge.order, edge))
            elif edge is not None and arrived is not None:
                edge.take(arrived)
        arrived = None


def _uses(root: Node) -> dict[Node, int]:
    """How many gradients each node waits for."""
    uses: dict[Node, int] = {root: 0}
    stack = [root]
    while stack:
        for edge in stack.pop().edges:
            if isinstance(edge, Node):
                if edge not in uses:
                    uses[edge] = 0
                    stack.append(edge)
                uses[edge] += 1
    return uses


def _accumulate(buffers: dict[Node, Tensor], node: Node, arrived: Tensor) -> None:
    before = buffers.get(node)
    if before is None:
        buffers[node] = arrived
    # Alone: the storage is known to this tensor only, and the tensor to the buffer, this function and the count itself.
    elif sys.getrefcount(before.storage) > 2 or sys.getrefcount(before) > 3:
        buffers[node] = before.new()


def checkpoint(function: Callable[..., Tensor], inputs: Sequence[Tensor], trains: bool) -> Tensor:
    """Gradient checkpointing, non-reentrant: only the inputs are kept; the function runs again in the backward pass.

    `trains`: whether the function has trainable parameters of its own.
    """
    memory = inputs[0].memory
    if not memory.recording or not (trains or any(x.needs_grad for x in inputs)):
        return function(*inputs)
    with memory.graph(False):
        output = function(*(x.detach() for x in inputs))

    def apply(gradient: Tensor) -> list[Tensor | None]:
        box = [gradient]
        del gradient
        collected: list[list[Tensor]] = [[] for _ in inputs]
        again = [x.detach() for x in inputs]
        for x, copy, into in zip(inputs, again, collected, strict=True):
            copy.node = Leaf(into) if x.needs_grad else None
        node = function(*again).node
        del again, x, copy
        backward(node, box)
        return [into[0] if into else None for into in collected]

    output.node = Node(memory, [x.node for x in inputs], apply)
    for x in inputs:
        if x.storage.kind == "workspace":
            x.storage.mark("activations")
    return output
