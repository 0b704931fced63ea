"""What a model's forward pass can depend on besides numbers, as one value that can be compared.

A pass of a copy of a model (`peftlab.core.calls`) takes longer than everything else that `attach` does. Two models of
one structure give the same, so it is run once for both: for a second adapter, and for the same base loaded again.

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

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, Enum)
EXACTLY = frozenset({type(None), bool, int, float, str})  # the commonest of these, found without asking for subclasses
SEQUENCES, TABLES, SETS = (list, tuple), (dict, OrderedDict), (set, frozenset)


class Unknown(Exception):
    """An attribute whose part in a forward pass cannot be told."""


def structure_of(model: nn.Module) -> Hashable | None:
    """Return a value that is equal for two models that run in the same way, their numbers aside; None where unknown.

    It has the classes of all modules, their forward methods, their attributes, the settings of the config, and the
    shapes and dtypes of all tensors, with those that are one. It holds no tensor, no module and nothing that has one.

    >>> from peftlab.core.structure import structure_of
    >>> a, b = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    >>> structure_of(a) == structure_of(b), structure_of(a) == structure_of(torch.nn.Linear(2, 4))
    (True, False)
    """
    reading = _Reading(model)
    try:
        return tuple(reading.module(path, module) for path, module in model.named_modules(remove_duplicate=False))
    except (Unknown, RecursionError):
        return None


class _Reading:
    """One reading of a model. Modules and tensors are told by the place where they come first."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.tensors: dict[int, int] = {}
        self.open: set[int] = set()

    def module(self, path: str, module: nn.Module) -> Hashable:
        if self.paths[id(module)] != path:  # one that stands in a second place
            return path, self.paths[id(module)]
        own = vars(module).items()
        kind = type(module)
        return path, kind, kind.forward, tuple((name, self.value(value)) for name, value in own if name != "_modules")

    def value(self, value: Any) -> Hashable:
        kind = type(value)
        if kind in EXACTLY:
            return kind, value
        if kind in TABLES and not value:  # as most are: eight of each module are for hooks
            return kind, ()
        if isinstance(value, PLAIN) or isinstance(value, type):
            return kind, value
        if isinstance(value, Tensor):
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
        self.open.add(id(value))
        try:
            if type(value) in SEQUENCES:
                return tuple(map(self.value, value))
            if type(value) in TABLES:
                return tuple((self.value(key), self.value(one)) for key, one in value.items())
            if type(value) in SETS:
                return frozenset(map(self.value, value))
            if hasattr(value, "__dict__") and type(value).__basicsize__ == _Bare.__basicsize__:
                return self.inside(vars(value))
            raise Unknown
        finally:
            self.open.discard(id(value))


class _Bare:
    """Objects without slots and without a base written in C are of this size: all that they hold are attributes."""
