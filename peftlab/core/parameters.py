"""Let a module run with other values for some of its parameters, and keep none of these values until the backward pass.

The experts of a mixture lie in parameters of three dimensions, (experts, out, in), that no layer of their own
multiplies by. So an adapter cannot change the input or the output of such a layer. It changes the parameter instead:
while the module runs, an attribute of the same name holds W + s B A, and hides the parameter. The same attribute holds
the numbers that 4-bit codes stand for.

Autograd would keep each such value for the backward pass: a second copy of all experts of all layers. It keeps a note
instead, by which the value is made again (`Remade`). Under gradient checkpointing the whole module runs again, and then
the values are left to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftlab.errors import PeftLabError


class Coded(nn.Parameter):
    """A parameter that is held as codes, of a module that computes with numbers. Each format is a subclass.

    Attributes:
        quant_state: what the codes stand for: among others their `shape` and `dtype`.
    """

    quant_state: Any

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the numbers that the codes stand for."""
        raise NotImplementedError


class Value(NamedTuple):
    """Say how the value of a parameter is made.

    Attributes:
        make: returns the value, equal bit for bit whenever it is called.
        sources: the tensors that it is made from. If they change before the backward pass, that is an error.
    """

    make: Callable[[], Tensor]
    sources: tuple[Tensor, ...]


class Running:
    """Stand for a module's `forward` and run it with the values that its parameters then have.

    It is a class, since a bound method cannot be pickled.

    Attributes:
        host: the module.
        how: a function (host, forward, args, kwargs) that chooses the values and runs the forward.
        own: a `forward` that the module had as an attribute of its own, or None.
    """

    def __init__(self, host: nn.Module, how: Callable[..., Any]) -> None:
        self.host, self.how = host, how
        self.own: Callable[..., Any] | None = vars(host).get("forward")
        self.__name__ = "forward"

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """Return the module's own forward. `inspect.signature` reads it."""
        return type(self.host).forward.__get__(self.host) if self.own is None else self.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with the values that its parameters then have."""
        return self.how(self.host, self.run, args, kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward as it is."""
        return type(self.host).forward(self.host, *args, **kwargs) if self.own is None else self.own(*args, **kwargs)


def running_in(host: nn.Module) -> Running | None:
    """Return the `Running` of a module, also below what others have put around it since."""
    forward = vars(host).get("forward")
    while forward is not None and not isinstance(forward, Running):
        forward = getattr(forward, "own", None) or getattr(forward, "__func__", None) or (
            getattr(forward, "__wrapped__", None)
        )  # fmt: skip
    return forward


def stand_in(host: nn.Module, how: Callable[..., Any]) -> None:
    """Let a module's forward pass through a `Running`, once."""
    if running_in(host) is None:
        host.__dict__["forward"] = Running(host, how)


def step_aside(host: nn.Module) -> None:
    """Undo `stand_in`, unless the module holds codes, or others have put something around it."""
    forward = vars(host).get("forward")
    if isinstance(forward, Running) and not coded(host):
        if forward.own is None:
            del host.__dict__["forward"]
        else:
            host.__dict__["forward"] = forward.own


def coded(host: nn.Module) -> list[str]:
    """Return the names of a module's own parameters that are held as codes."""
    return [name for name, parameter in host._parameters.items() if isinstance(parameter, Coded)]


class Table(dict[str, Any]):
    """Stand for a module's table of parameters while the module runs: other values are made when they are first read.

    Made all at once, they would be the first nodes of the module's graph. The backward pass runs these last, and would
    hold the gradient of a whole parameter until it had come through the module.
    """

    def __init__(self, own: Mapping[str, Any], values: Mapping[str, Value]) -> None:
        super().__init__(own)
        self.recipes, self.made = values, dict[str, Tensor]()

    def __getitem__(self, name: str) -> Any:
        if name not in self.recipes:
            return super().__getitem__(name)
        if name not in self.made:
            self.made[name] = self.recipes[name].make()
        return self.made[name]


def run_with(values: Mapping[str, Value], host: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
    """Run a module's forward while these of its parameters have other values."""
    own = host._parameters
    if not values:
        return forward(*args, **kwargs)
    if isinstance(own, Table):
        raise PeftLabError(
            f"{type(host).__name__} is running in another thread with other values of its parameters. Two runs of one "
            "module at a time would read each other's weights; run one after the other."
        )
    table = Table(own, values)
    try:
        if torch.compiler.is_compiling():  # which looks into tables of parameters without asking them
            vars(host).update({name: table[name] for name in values})
        else:
            host.__dict__["_parameters"] = table
        with _remade(table):
            return forward(*args, **kwargs)
    finally:
        table.made.clear()  # autograd keeps the hooks, which know the table
        host.__dict__["_parameters"] = own
        for name in values:
            vars(host).pop(name, None)


class Remade:
    """Make a value again for the backward pass, and hold it until the last of the tensors that lie in it was asked for.

    A loop over the experts asks for each by itself, and a product of all of them asks once.
    """

    def __init__(self, value: Value) -> None:
        self.value, self.versions = value, _versions(*value.sources)
        self.tensors = self.asked = 0
        self.made: Tensor | None = None

    def pack(self, tensor: Tensor) -> Lying:
        """Return what stands for a tensor that lies in the value."""
        self.tensors += 1
        return Lying(self, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    @torch.no_grad()
    def unpack(self, lying: Lying) -> Tensor:
        """Return the tensor."""
        _check_unchanged(self.versions, *self.value.sources)
        made = self.value.make() if self.made is None else self.made
        self.asked += 1
        self.made = made if self.asked % self.tensors else None
        return made.as_strided(lying.size, lying.stride, lying.offset)


class Lying(NamedTuple):
    """Say where in a value a tensor lies."""

    remade: Remade
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def _remade(table: Table) -> Iterator[None]:
    """Let autograd keep a note in the place of each tensor that lies in a value."""
    # The hooks of checkpointing keep no tensor until it runs the module again. Hooks here would go before them.
    if not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        yield
        return
    notes: dict[str, Remade] = {}

    def pack(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]] | Lying:
        storage = tensor.untyped_storage()._cdata
        for name, made in table.made.items():
            if made.untyped_storage()._cdata == storage and made.dtype == tensor.dtype:
                return notes.setdefault(name, Remade(table.recipes[name])).pack(tensor)
        return tensor, _versions(tensor)

    def unpack(kept: tuple[Tensor, tuple[int, ...]] | Lying) -> Tensor:
        if isinstance(kept, Lying):
            return kept.remade.unpack(kept)
        tensor, versions = kept
        _check_unchanged(versions, tensor)  # autograd itself checks only what it keeps without hooks
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    """Return how often each tensor was written to. Those of `torch.inference_mode` do not count it."""
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)


def _check_unchanged(versions: tuple[int, ...], *tensors: Tensor) -> None:
    if _versions(*tensors) != versions:
        raise RuntimeError(
            "A parameter of a module with experts, one of an adapter on it, or what lies between has been modified by "
            "an inplace operation between the forward and the backward pass; run the forward pass again."
        )
