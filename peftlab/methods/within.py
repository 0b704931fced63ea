"""Notice that a prompt on a model is passed by: a module inside the model runs, and the model itself was not called."""

from __future__ import annotations

from collections.abc import Iterator
from threading import get_ident

import torch
from torch import nn

from peftlab.core.hooks import adapters_on
from peftlab.core.interface import Part, Placement
from peftlab.errors import PeftLabError
from peftlab.methods.states import blocks
from peftlab.methods.virtual import path_of


class Within(Part):
    """Refuse to run inside a model whose own call was passed by, for then its prompt did not enter.

    That happens when somebody calls a `forward` that was taken from the model before `attach`, or the forward of its
    class, or a module inside it.

    Attributes:
        outer: the path of the module that has the prompt.
    """

    def __init__(self, outer: str, compatibility_key: str | None) -> None:
        super().__init__()
        self.outer, self.compatibility_key = outer, compatibility_key

    def before(self, host: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Return the inputs as they are."""
        activity = adapters_on(host).activity
        if torch.compiler.is_compiling() or activity.unsure or (get_ident(), self.outer) in activity.inside:
            return args, kwargs
        if torch._C._current_graph_task_id() != -1:  # a checkpointed block runs again in the backward pass
            return args, kwargs
        raise PeftLabError(
            f"{type(host).__name__} was called, but not the model that holds it and has {self.compatibility_key}, so "
            "these would do nothing. Call the model, or model.forward. (A forward that was taken from the model before "
            "attach must be taken again.) For the base alone, call it inside `with disabled(model)`."
        )


def within(
    model: nn.Module, outer: str, stack: nn.Module, name: str, compatibility_key: str | None
) -> Iterator[Placement]:
    """Yield a `Within` on the module that holds a stack's blocks, or on the first block if the stack holds them.

    The innermost such module is sure to be called: OPT's head calls `model.decoder`, and passes `model` by.
    """
    found = blocks(stack)
    if found:
        at = path_of(stack, found[0]).rpartition(".")[0]
        while at and type(stack.get_submodule(at)).forward is nn.Module.forward:  # a list is never called
            at = at.rpartition(".")[0]
        inner = stack.get_submodule(at) if at else found[0]
        yield Placement(path_of(model, inner), name + "_within", Within(outer, compatibility_key))
