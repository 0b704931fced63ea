"""What a model's forward pass can depend on besides numbers, as one value that can be compared.

A pass of a copy of a model (`peftlab.core.calls`) takes longer than everything else that `attach` does. Two models of
one structure give the same, so it is run once for both: for a second adapter, and for the same base loaded again. The
copy takes as long again, so the model itself is read first (`before_copy`), where its structure decides the copy's.

The value says too much rather than too little. Where an attribute is not understood, there is no value at all.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Hashable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.core.hooks import CHILD

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, Enum)
EXACTLY = frozenset({type(None), bool, int, float, str})  # the commonest of these, found without asking for subclasses
SEQUENCES, TABLES, SETS = (list, tuple), (dict, OrderedDict), (set, frozenset)
EMPTY = frozenset({*SEQUENCES, *TABLES, *SETS})
HOOKS = frozenset(name for name in vars(nn.Module()) if "_hooks" in name)  # the tables that a copy has empty
# What a copy has in another form than the model: adapters, and modules that are offloaded or compiled.
CHANGED = frozenset({"_peftlab", "_hf_hook"})
CHILDREN = frozenset({CHILD, "_orig_mod"})


class Unknown(Exception):
    """An attribute whose part in a forward pass cannot be told."""


def structure_of(model: nn.Module, before_copy: bool = False) -> Hashable | None:
    """Return a value that is equal for two models that run in the same way, their numbers aside; None where unknown.

    It has the classes of all modules, their forward methods, their attributes, the settings of the config, and the
    shapes and dtypes of all tensors, with those that are one. It holds no tensor, no module and nothing that has one.

    With `before_copy` the value tells what a copy without numbers and hooks will be, of a model that has no adapter and
    holds all of its weights as numbers. Other models have none.

    >>> from peftlab.core.structure import structure_of
    >>> a, b = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    >>> structure_of(a) == structure_of(b), structure_of(a) == structure_of(torch.nn.Linear(2, 4))
    (True, False)
    """
    reading = _Reading(model, before_copy)
    try:
        return tuple(reading.module(path, module) for path, module in model.named_modules(remove_duplicate=False))
    except (Unknown, RecursionError):
        return None


class _Reading:
    """One reading of a model. Modules and tensors are told by the place where they come first."""

    def __init__(self, model: nn.Module, before_copy: bool) -> None:
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.tensors: dict[int, int] = {}
        self.objects: dict[int, tuple[int, Any]] = {}  # a number; kept, so that its id is its own
        self.open: set[int] = set()
        self.before_copy = before_copy

    def module(self, path: str, module: nn.Module) -> Hashable:
        if self.paths[id(module)] != path:  # one that stands in a second place
            return path, self.paths[id(module)]
        own = vars(module)
        kind = type(module)
        if self.before_copy:
            if not (CHANGED.isdisjoint(own) and CHILDREN.isdisjoint(module._modules)):
                raise Unknown
            own = {name: value for name, value in own.items() if name not in HOOKS or not isinstance(value, dict)}
        return path, kind, kind.forward, tuple([(name, self.value(own[name])) for name in own if name != "_modules"])

    def value(self, value: Any) -> Hashable:
        kind = type(value)
        if kind in EXACTLY:
            return kind, value
        if kind in EMPTY and not value:  # as most are: eight of each module are for hooks
            return kind, ()
        if isinstance(value, PLAIN) or isinstance(value, type):
            return kind, value
        if isinstance(value, Tensor):
            if self.before_copy and (kind not in (nn.Parameter, Tensor) or hasattr(value, "quant_state")):
                raise Unknown  # it may hold codes; the copy of such a module is another one
            number = self.tensors.setdefault(id(value), len(self.tensors))
            return kind, number, value.shape, value.dtype, value.device.type
        if isinstance(value, nn.Module):
            if id(value) not in self.paths:
                raise Unknown
            return kind, self.paths[id(value)]
        if isinstance(value, types.FunctionType) and value.__closure__ is None and not vars(value):
            return value
        if isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, (types.ModuleType, type(None))):
            return value
        if isinstance(value, types.MethodType):
            return kind, self.value(value.__func__), self.value(value.__self__)
        return kind, self.inside(value)

    def inside(self, value: Any) -> Hashable:
        """What a collection holds, or an object that is nothing but its attributes."""
        if id(value) in self.open:
            raise Unknown
        if id(value) in self.objects:  # a config stands in most modules of a model
            return self.objects[id(value)][0]
        self.open.add(id(value))
        try:
            found = self.parts(value)
        finally:
            self.open.discard(id(value))
        self.objects[id(value)] = len(self.objects), value
        return found

    def parts(self, value: Any) -> Hashable:
        """The same of one that was not met before."""
        if type(value) in SEQUENCES:
            return tuple(map(self.value, value))
        if type(value) in TABLES:
            return tuple([(self.value(key), self.value(one)) for key, one in value.items()])
        if type(value) in SETS:
            return frozenset(map(self.value, value))
        if hasattr(value, "__dict__") and type(value).__basicsize__ == _Bare.__basicsize__:
            return self.inside(vars(value))
        raise Unknown


class _Bare:
    """Objects without slots and without a base written in C are of this size: all that they hold are attributes."""
