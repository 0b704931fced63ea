"""Compile a model's blocks for a run: `train(..., compile="layers")`.

torch.compile turns the many small operations of a block into few kernels. A model repeats one block, so compiling that
one is enough: it is compiled once for each shape of a batch, and all blocks run what came out. So batches are padded to
a few lengths. They are chosen from the lengths of the run's batches:

    minimise over l_1 < ... < l_k    sum over batches of min {l_i : l_i >= longest example of the batch}

Only training passes are compiled. Where a compiler fails, the blocks run as they are, and a warning and the history say
why. After the run nothing of it is left on the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from types import FunctionType
from typing import Any

import torch
from torch import nn

from peftlab.core.hooks import is_adapter_name
from peftlab.core.modes import tensors_in
from peftlab.core.records import unwrap
from peftlab.errors import warn
from peftlab.training.inputs import Inputs
from peftlab.training.schedule import DataOrder

MOST_LENGTHS = 4  # each is compiled anew, twice: the first block's input needs no gradient
MOST_SHAPES = 8  # of batches; a batch of yet another shape runs uncompiled
STEP = 8  # lengths are multiples of this
BACKEND = "inductor"
STEPS_LOOKED_AT = 500
PACKED_STEP = 64
ENOUGH = 1.05  # more lengths than these are not worth it if so many times the tokens remain


def lengths_for(longest: Sequence[int], most: int = MOST_LENGTHS, limit: int | None = None) -> tuple[int, ...]:
    """Return the few lengths to pad batches to: those that give the fewest tokens.

    Args:
        longest: the longest example of each batch, in tokens.
        most: the number of lengths; fewer if that costs at most 5% more tokens than the batches have.
        limit: the longest that the model takes.

    >>> from peftlab.training.compiling import lengths_for
    >>> lengths_for([30, 31, 32, 100, 97, 500])
    (32, 104, 504)
    """
    if not longest:
        return ()
    counts = Counter(min(-(-length // STEP) * STEP, limit or length + STEP) for length in longest)
    sizes = sorted(counts)
    # least[j]: the fewest tokens of the batches up to size j, if size j is the last of so many lengths
    below = list(accumulate(counts[size] for size in sizes))
    least = [below[j] * sizes[j] for j in range(len(sizes))]
    chosen: list[tuple[int, ...]] = [(size,) for size in sizes]
    for _ in range(1, min(most, len(sizes))):
        if least[-1] <= ENOUGH * sum(longest):
            break
        better = [
            min((least[i] + (below[j] - below[i]) * sizes[j], i) for i in range(j)) if j else (least[0], 0)
            for j in range(len(sizes))
        ]
        chosen = [(*chosen[i], sizes[j]) if j else chosen[0] for j, (_, i) in enumerate(better)]
        least = [value for value, _ in better]
    return chosen[-1]


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model repeats: modules of one class, with modules inside, in one list.

    The outermost such lists count: of a mixture's blocks, not the experts in them.
    """
    found: list[nn.Module] = []
    inside: tuple[str, ...] = ()
    for path, module in unwrap(model).named_modules():
        if is_adapter_name(path) or (inside and path.startswith(inside)):
            continue
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            kinds = Counter(type(child) for child in module)
            blocks = [child for child in module if kinds[type(child)] > 1 and any(True for _ in child.children())]
            if blocks:
                found += blocks
                inside = (*inside, f"{path}.")
    return found


class Layers:
    """The blocks of a model, compiled for a run.

    Args:
        model: None compiles nothing.

    Attributes:
        told: what is compiled, or why nothing is.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.blocks = [] if model is None else repeated_blocks(model)
        self.call: Callable[..., Any] = _call
        self.shapes: set[tuple] = set()
        self.active = False
        kinds = " and ".join(sorted({type(block).__name__ for block in self.blocks}))
        self.told = f"{len(self.blocks)} blocks ({kinds})" if self.blocks else ""
        if self.blocks:
            self.call = torch.compile(fresh(_call), backend=BACKEND, dynamic=False)
        elif model is not None:
            self._give_up(f"{type(unwrap(model)).__name__} has no list of repeated blocks")

    def failed(self, error: Exception) -> bool:
        """Say whether a compiler raised this error. Then the blocks run uncompiled from now on."""
        if not self.blocks or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            return False
        told = str(error).split("Set TORCHDYNAMO_VERBOSE")[0]  # from there on torch says how to debug torch
        self._give_up(f"{type(error).__name__}: {' '.join(told.split())[:300]}")
        return True

    def _give_up(self, reason: str) -> None:
        self.take_off()
        self.blocks, self.told = [], f"nothing: {reason}"
        warn(f"compile='layers' compiles nothing, and the run goes on without it: {reason}")

    def choose_lengths(self, inputs: Inputs, data: Sequence[Any], order: DataOrder, batch_size: int) -> None:
        """Let batches be padded to a few lengths: those that suit the first steps of the run.

        A collate of the user's own pads as it likes.
        """
        if inputs.packing:
            inputs.multiple_of = max(inputs.multiple_of, PACKED_STEP)
            self.told += f"; rows of a multiple of {inputs.multiple_of} tokens"
        elif inputs.pads_right:
            longest = []
            for step in range(min(len(order), STEPS_LOOKED_AT)):
                chosen = order.at(step)
                for at in range(0, len(chosen), batch_size):
                    rows = [data[index] for index in chosen[at : at + batch_size]]
                    longest.append(max(len(row["input_ids"]) if "input_ids" in row else 0 for row in rows))
            inputs.lengths = lengths_for([length for length in longest if length], limit=inputs.facts.positions)
            if inputs.lengths:
                self.told += f"; batches of {', '.join(map(str, inputs.lengths))} tokens"

    @contextmanager
    def on(self) -> Iterator[None]:
        """Let the training passes inside the block run compiled. After it the model is as it was."""
        if not self.blocks:
            yield
            return
        try:
            for block in self.blocks:
                block.__dict__["_compiled_call_impl"] = Compiled(self, block)
            with _room_for_shapes():
                yield
        finally:
            self.take_off()

    def take_off(self) -> None:
        for block in self.blocks:
            block.__dict__.pop("_compiled_call_impl", None)

    @contextmanager
    def batch(self, batch: Any, whole: bool) -> Iterator[None]:
        """Compute one batch. It runs compiled if its shape is known already, or there is room for one more.

        Args:
            whole: whether it has all its examples. The last one of a run may not, and one pass is not worth compiling.
        """
        if not self.blocks:
            yield
            return
        shape = tuple(tuple(tensor.shape) for tensor in tensors_in(batch))
        if whole and len(self.shapes) < MOST_SHAPES:
            self.shapes.add(shape)
        self.active = shape in self.shapes
        try:
            yield
        finally:
            self.active = False


class Compiled:
    """What torch calls in place of a block: the compiled function in training, and the block itself otherwise."""

    def __init__(self, layers: Layers, block: nn.Module) -> None:
        self.layers, self.block = layers, block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.layers.call if self.layers.active and self.block.training else _call
        return run(self.block, *args, **kwargs)


def _call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return block._call_impl(*args, **kwargs)


def fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with a code object of its own: torch keeps what it compiled there, until the code is gone."""
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


@contextmanager
def _room_for_shapes() -> Iterator[None]:
    """Let a function be compiled for more shapes than torch allows by default: all blocks share this one."""
    config: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch({name: max(8 * MOST_SHAPES, getattr(config, name))}):
        yield
