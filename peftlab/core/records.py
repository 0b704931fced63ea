"""Record what a model with adapters must remember about itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from peftlab.core.hooks import Activity
from peftlab.core.interface import Config
from peftlab.errors import PeftLabError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Record:
    """Hold what `attach` noted about a model, so that `detach` can restore it.

    Attributes:
        activity: which adapters run.
        configs: each adapter's config, by name.
        trainable: whether each adapter trains when it is active.
        base_requires_grad: the base's `requires_grad` flags before the first adapter.
        attributes: attributes of modules that were changed: (path, name, value before).
        backup: copies of the base's weights while the model is merged, by path and name.
    """

    activity: Activity = field(default_factory=Activity)
    configs: dict[str, Config] = field(default_factory=dict)
    trainable: dict[str, bool] = field(default_factory=dict)
    base_requires_grad: dict[str, bool] = field(default_factory=dict)
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)
    backup: dict[str, dict[str, list[torch.Tensor]]] = field(default_factory=dict)


def wrappings(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model, then what the wrappers of `torch.compile` and DistributedDataParallel hold, outermost first."""
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        held = getattr(inner, "_orig_mod", None)
        if held is None and type(inner).__name__ in ("DistributedDataParallel", "DataParallel"):
            held = inner.module
        inner = held


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of `torch.compile` and DistributedDataParallel."""
    return list(wrappings(model))[-1]


def as_transformer(model: nn.Module) -> PreTrainedModel:
    """Type a model as transformers' own, whose methods `nn.Module` does not declare. It stays as it is."""
    return cast("PreTrainedModel", model)


def record_of(root: nn.Module) -> Record | None:
    """Return what `attach` noted on this very module, or None."""
    return root.__dict__.get("_peftlab")


def require_adapter(root: nn.Module, name: str) -> Record:
    """Return the record of a model that has this adapter; otherwise raise an error that names the adapters it has."""
    record = record_of(root)
    if record is None:
        raise PeftLabError(f"No adapter is attached to this model, so there is no {name!r}.")
    if name not in record.configs:
        there = ", ".join(repr(other) for other in record.configs)
        raise PeftLabError(f"There is no adapter {name!r}.{did_you_mean(str(name), record.configs)} Attached: {there}.")
    return record


def tensor_at(host: nn.Module, name: str) -> torch.Tensor | None:
    """Return the parameter or buffer with this name, which may lie deeper (`dense.weight`); None if there is none."""
    inner, _, name = name.rpartition(".")
    return getattr(host.get_submodule(inner), name, None)


def own_tensor(host: nn.Module, name: str) -> torch.Tensor:
    """Return a parameter or buffer that the host must have. The name may lie deeper (`dense.weight`)."""
    inner, _, name = name.rpartition(".")
    return getattr(host.get_submodule(inner), name)


def device_and_dtype_for(host: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype for a part of this host: the host's, but float32 beside 16-bit or quantised
    weights.
    """
    own = getattr(host, "weight", None)
    tensor = own if isinstance(own, torch.Tensor) else next(host.parameters(), torch.empty(0))
    wide = tensor.is_floating_point() and tensor.dtype in (torch.float32, torch.float64)
    return tensor.device, tensor.dtype if wide else torch.float32
