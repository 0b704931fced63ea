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


def run_with(values: Mapping[str, Value], host: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
    """Run a module's forward while these of its parameters have other values."""
    made = {name: value.make() for name, value in values.items()}
    hidden = vars(host)
    if taken := [name for name in made if name in hidden]:
        raise PeftLabError(
            f"{type(host).__name__} is running in another thread with an adapter on its parameter {taken[0]!r}. Two "
            "runs of one module at a time would read each other's weights; run one after the other."
        )
    try:
        hidden.update(made)
        with _remade(made, values):
            return forward(*args, **kwargs)
    finally:
        for name in made:
            hidden.pop(name, None)


class Remade:
    """Make a value again for the backward pass, and hold it until the last of the tensors that lie in it was asked for.

    A loop over the experts asks for each by itself, and a product of all of them asks once.
    """

    def __init__(self, value: Value, storage: int, dtype: torch.dtype) -> None:
        self.value, self.storage, self.dtype = value, storage, dtype
        self.versions = _versions(value)
        self.tensors = self.asked = 0
        self.made: Tensor | None = None

    def pack(self, tensor: Tensor) -> Lying:
        """Return what stands for a tensor that lies in the value."""
        self.tensors += 1
        return Lying(self, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    @torch.no_grad()
    def unpack(self, lying: Lying) -> Tensor:
        """Return the tensor."""
        if _versions(self.value) != self.versions:
            raise RuntimeError(
                "A parameter of a module with experts, or of an adapter on it, has been modified by an inplace "
                "operation between the forward and the backward pass; run the forward pass again."
            )
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
def _remade(made: Mapping[str, Tensor], values: Mapping[str, Value]) -> Iterator[None]:
    """Let autograd keep a note in the place of each tensor that lies in a value."""
    # The hooks of checkpointing keep no tensor until it runs the module again. Hooks here would go before them.
    if (
        not made
        or not torch.is_grad_enabled()
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    ):
        yield
        return
    every = [Remade(values[name], tensor.untyped_storage()._cdata, tensor.dtype) for name, tensor in made.items()]

    def pack(tensor: Tensor) -> Tensor | Lying:
        storage = tensor.untyped_storage()._cdata
        own = next((one for one in every if one.storage == storage and one.dtype == tensor.dtype), None)
        return tensor if own is None else own.pack(tensor)

    def unpack(kept: Tensor | Lying) -> Tensor:
        return kept.remade.unpack(kept) if isinstance(kept, Lying) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _versions(value: Value) -> tuple[int, ...]:
    """Return how often each source was written to. Tensors of `torch.inference_mode` do not count it."""
    return tuple(0 if source.is_inference() else source._version for source in value.sources)
