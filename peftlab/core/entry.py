"""Check, when a model is called, that everything that was attached to it still runs.

- A host that was replaced since takes its parts with it, and the model then runs without them. So each call of the
  model compares the objects on the way to every part with those that were there before.
- A weight that is read past its module's call makes a part on that module do nothing. Where no copy of the model could
  show this at `attach`, the model's own first pass is watched.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch
from torch import nn

from peftlab.core.calls import can_be_noted, noted, observed
from peftlab.core.forward import Entered, Forward, found_in, give_back
from peftlab.core.hooks import ENTERED, Activity, adapters_on
from peftlab.core.records import Record, check_hosts, in_flat_pieces, marks_of, record_of
from peftlab.errors import PeftLabError, some

OURS = "_peftlab_forward"  # where a guarded module keeps its `Forward`, whatever stands in the place of its forward


def guard(host: nn.Module, path: str, activity: Activity) -> None:
    """Let a module's calls, and direct calls of its forward, pass through here."""
    if _enter not in host._forward_pre_hooks.values():
        host.__dict__["forward"] = host.__dict__[OURS] = Forward(host, path, activity, _enter)
        host.register_forward_pre_hook(_enter, with_kwargs=True)
        host.register_forward_hook(_leave, always_call=True)


def unguard(host: nn.Module) -> None:
    """Undo `guard`."""
    for key in [key for key, hook in host._forward_pre_hooks.items() if hook is _enter]:
        del host._forward_pre_hooks[key]
        host._forward_pre_hooks_with_kwargs.pop(key, None)
    for key in [key for key, hook in host._forward_hooks.items() if hook is _leave]:
        del host._forward_hooks[key]
        host._forward_hooks_always_called.pop(key, None)
    host.__dict__.pop(OURS, None)
    give_back(host)


def _enter(host: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    record = record_of(host)
    watch = None
    if record is not None and not torch.compiler.is_compiling():
        if record.activity.enabled:
            check_unchanged(host, record)
        if record.unseen and can_be_noted(host):
            watch = FirstPass(host, record)
    if found_in(host) is None:  # others have put their own forward there, which takes no more inputs
        (record.activity if record is not None else adapters_on(host).activity).unsure = True
        vars(host)[OURS].entered[get_ident()] = Entered(host, watch)
        return args, kwargs
    return args, {**kwargs, ENTERED: Entered(host, watch)}


def _leave(host: nn.Module, args: tuple, output: Any) -> None:
    """Take the mark of a call away, if the forward of others did not come to ours."""
    if not torch.compiler.is_compiling():  # nothing is marked there, and this would break the graph
        vars(host)[OURS].entered.pop(get_ident(), None)


def check_unchanged(root: nn.Module, record: Record) -> None:
    """Refuse to run a model whose parts are no longer all there.

    This looks up some entries of dicts, about seven for a host. Only if one differs is the model looked at closely.
    """
    for table, key, value in record.marks:
        if table.get(key) is not value:
            break
    else:
        if record.marks:
            return
    if not hasattr(root, "_is_replica") and not in_flat_pieces(root):
        check_hosts(root)
        record.marks = marks_of(root)


class FirstPass:
    """Watch a model while its forward runs, until one pass has shown enough."""

    def __init__(self, root: nn.Module, record: Record) -> None:
        self.root, self.record = root, record

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what the forward returns.

        Raises:
            PeftLabError: it read the weights of a host without calling the host, or, in training, called no host.
        """
        record = self.record
        with noted(self.root) as seen:
            seen.called.add("")
            seen.running[""] += 1
            result = forward(*args, **kwargs)
        lost = sorted(record.unseen & seen.unreached())
        if lost:
            raise PeftLabError(
                f"{type(self.root).__name__} reads the weights of {some(lost)} without calling these modules, so the "
                "adapter there does not run. Detach the adapter. Then attach one that leaves these modules out "
                '(target_modules, exclude_modules, modules_to_save, and bias="none").'
            )
        active = {path for name in record.activity.weights for path in record.placed.get(name, ())}
        idle = bool(active) and active <= record.unseen - seen.called
        # Layers may be left out by chance, but not in the evaluated pass of the copy, which did not call them either.
        if idle and self.root.training and torch.is_grad_enabled() and observed(self.root) is not None:
            raise PeftLabError(
                f"{type(self.root).__name__} did not call {some(sorted(active))} in this pass, so nothing of the "
                "adapter would train. Detach it, and attach one to modules that the model uses with these inputs."
            )
        record.past |= seen.past
        record.unseen = record.unseen if idle else frozenset()
        return result
