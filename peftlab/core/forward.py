"""Let a direct call of `model.forward(...)` run what stands on the model.

torch runs hooks when a module is called, and skips them when its `forward` is called. Some libraries call
`model.forward(...)` (sentence-transformers does), and a prompt on the model would then do nothing. So while adapters
are attached, the model's `forward` is a `Forward`, which runs our hooks itself in a direct call.

A call of the module comes to this object too, after the hooks, which must not run twice. So the hook that `entry.guard`
sets adds one named input to such a call, and `Forward` takes it out again. Where others have put a forward of their own
in front of it (TRL does), that forward might not take the input. Then the hook leaves the mark here instead.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from types import MethodType
from typing import Any

import torch
from torch import nn

from peftlab.core.hooks import ENTERED, Activity, run_parts


class Entered:
    """Mark a call whose hooks have run.

    Attributes:
        host: the module that was called. (In a replica of DataParallel it is not the one that `Forward` knows.)
        watch: what runs a function and watches the model meanwhile, or None.
    """

    def __init__(self, host: nn.Module, watch: Callable[..., Any] | None) -> None:
        self.host, self.watch = host, watch


class Forward:
    """Stand for a module's `forward` while adapters are attached. (A class, since a bound method cannot be pickled.)

    Attributes:
        host: the module.
        path: its path.
        activity: that of the model's adapters.
        enter: the hook that marks a call of the module.
        own: a `forward` that the module had as an attribute of its own, or None.
        entered: {thread: mark} of calls of the module that are under way behind a forward of others.
    """

    def __init__(self, host: nn.Module, path: str, activity: Activity, enter: Callable[..., Any]) -> None:
        self.host, self.path, self.activity, self.enter = host, path, activity, enter
        self.own: Callable[..., Any] | None = vars(host).get("forward")
        self.entered: dict[int, Entered] = {}
        self.__name__ = "forward"

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """Return the module's own forward. `inspect.signature` reads it."""
        return MethodType(type(self.host).forward, self.host) if self.own is None else self.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward; in a direct call, with what stands on the module."""
        if args and args[0] is self.host:  # accelerate binds what it finds here to the model a second time
            args = args[1:]
        entered = kwargs.pop(ENTERED, None) or self.entered.pop(get_ident(), None)
        if entered is None:
            enter = self.enter
            if enter not in self.host._forward_pre_hooks.values():  # after detaching, others may still hold this object
                return self.__wrapped__(*args, **kwargs)
            args, kwargs = enter(self.host, args, kwargs)
            kwargs = {ENTERED: self.entered.pop(get_ident(), None), **kwargs}
            return run_parts(self.host, self, args, kwargs)
        if torch.compiler.is_compiling():
            self.activity.unsure = True
            return self.run(entered.host, *args, **kwargs)
        here, inside = (get_ident(), self.path), self.activity.inside
        outermost = here not in inside
        inside.add(here)
        try:
            if entered.watch is None:
                return self.run(entered.host, *args, **kwargs)
            return entered.watch(self.run, entered.host, *args, **kwargs)
        finally:
            if outermost:
                inside.discard(here)

    def run(self, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the own forward of the module, or of its replica."""
        return type(host).forward(host, *args, **kwargs) if self.own is None else self.own(*args, **kwargs)


def found_in(host: nn.Module) -> Forward | None:
    """Return the `Forward` of a module, also below what others (accelerate, say) have put around it since."""
    forward = vars(host).get("forward")
    while forward is not None and not isinstance(forward, Forward):
        forward = getattr(forward, "__func__", None) or getattr(forward, "__wrapped__", None)
    return forward


def give_back(host: nn.Module) -> None:
    """Give a module its own forward back, unless others have put something around ours, which then only passes on."""
    forward = vars(host).get("forward")
    forward = getattr(forward, "__func__", forward)
    if isinstance(forward, Forward):
        if forward.own is None:
            del host.__dict__["forward"]
        else:
            host.__dict__["forward"] = forward.own
