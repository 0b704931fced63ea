"""Record what a model with adapters must remember about itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from peftlab.core.hooks import CHILD, Activity, adapters_on, base_modules, hook_keys, hosts
from peftlab.core.interface import Config, Placement
from peftlab.core.parameters import running_in
from peftlab.core.sharding import give_up_gathered
from peftlab.errors import PeftLabError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLAT = "FullyShardedDataParallel"


@dataclass(frozen=True)
class Host:
    """How a host was when an adapter was placed on it.

    Attributes:
        parts: the names of the adapter's parts there.
        hooks: how many hooks run them, and whether its forward does.
        shape: its sizes, where it is a linear layer or an embedding.
        tied: the other modules that have its weight.
        on_meta: whether the parts have no numbers.
    """

    parts: tuple[str, ...]
    hooks: int
    shape: tuple[int, ...]
    tied: tuple[str, ...]
    on_meta: bool


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
        without_rows: modules that do not have the batch first; None until an adapter for each row is asked for.
        placed: {adapter: {path: its host}}, by which `check_hosts` sees that the base has changed since.
        marks: what `marks_of` returned, by which a call of the model sees in microseconds that nothing has changed.
        unseen: hosts of which no pass has shown yet that the model calls them where it reads their weight.
        chosen: {adapter: (its config as it was given, the config that was chosen for the last run)}.
        past: modules whose weight the model's own first pass read without calling them.
    """

    activity: Activity = field(default_factory=Activity)
    configs: dict[str, Config] = field(default_factory=dict)
    trainable: dict[str, bool] = field(default_factory=dict)
    base_requires_grad: dict[str, bool] = field(default_factory=dict)
    attributes: list[tuple[str, str, Any]] = field(default_factory=list)
    backup: dict[str, dict[str, list[torch.Tensor]]] = field(default_factory=dict)
    without_rows: frozenset[str] | None = None
    placed: dict[str, dict[str, Host]] = field(default_factory=dict)
    marks: list[tuple[dict, Any, Any]] = field(default_factory=list, repr=False, compare=False)
    unseen: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    chosen: dict[str, tuple[Any, Any]] = field(default_factory=dict, repr=False)
    past: set[str] = field(default_factory=set, repr=False, compare=False)


def wrappings(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model, then what torch's wrappers hold (compiled, or for several processes), outermost first."""
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        held = getattr(inner, "_orig_mod", None)
        if held is None and type(inner).__name__ in ("DistributedDataParallel", "DataParallel", FLAT):
            held = inner.module
        inner = held


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside torch's wrappers: `torch.compile`, DistributedDataParallel, FullyShardedDataParallel."""
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
    check_hosts(root)
    return record


def placed(root: nn.Module, name: str) -> list[Placement]:
    """Return the parts of an attached adapter and where they stand, in the model's order."""
    return [
        Placement(path, part_name, part)
        for path, host in hosts(root)
        if name in adapters_on(host)
        for part_name, part in adapters_on(host).parts_of(name).items()
    ]


SIZES = ("num_embeddings", "embedding_dim", "in_features", "out_features", "nx", "nf", "in_channels", "out_channels")


def sizes_of(module: nn.Module) -> tuple[int, ...]:
    """Return the sizes that a linear layer, embedding or convolution gives as attributes; empty for other modules."""
    return tuple(value for name in SIZES if isinstance(value := getattr(module, name, None), int))


def hosts_now(root: nn.Module) -> dict[str, dict[str, Host]]:
    """Return {adapter: {path: its host}}, as they are at this moment."""
    sharing: dict[int, list[str]] = {}
    for path, module in base_modules(root).items():
        weight = module._parameters.get("weight")
        if weight is not None:
            sharing.setdefault(id(weight), []).append(path)
    now: dict[str, dict[str, Host]] = {}
    for path, host in hosts(root):
        weight = host._parameters.get("weight")
        tied = tuple(other for other in sharing.get(id(weight), ()) if other != path)
        child, hooks = adapters_on(host), sum(len(keys) for _, keys in hook_keys(host))
        hooks += running_in(host) is not None
        for name in child:
            parts = child.parts_of(name)
            on_meta = any(parameter.is_meta for part in parts.values() for parameter in part.parameters())
            now.setdefault(name, {})[path] = Host(tuple(parts.keys()), hooks, sizes_of(host), tied, on_meta)
    return now


def marks_of(root: nn.Module) -> list[tuple[dict, Any, Any]]:
    """Return (table, key, value) of all that must stay where it is: each `table[key]` is this very object.

    It is the way from the model to each host, and the host's parts, hooks, sizes and weight (and what is tied to it).
    """
    marks: dict[tuple[int, Any], tuple[dict, Any, Any]] = {}
    record, modules = record_of(root), base_modules(root)
    tied = {name for placed in record.placed.values() for was in placed.values() for name in was.tied} if record else ()

    def mark(table: dict, *keys: Any) -> None:
        marks.update({(id(table), key): (table, key, table[key]) for key in keys if key in table})

    for path, host in root.named_modules():
        if CHILD not in host._modules:
            continue
        module = root
        for name in path.split(".") if path else ():
            mark(module._modules, name)
            module = module.get_submodule(name)
        mark(host._modules, CHILD)
        mark(vars(host), *SIZES)
        mark(host._parameters, "weight", *parameters_on(host))
        if running_in(host) is not None:
            mark(vars(host), "forward")
        for hooks, keys in hook_keys(host):
            mark(hooks, *keys)
    for path in tied:
        if path in modules:
            mark(modules[path]._parameters, "weight")
    return list(marks.values())


def parameters_on(host: nn.Module) -> list[str]:
    """Return the names of a host's own parameters that adapters change."""
    child = adapters_on(host)
    return [part.parameter for name in child for part in child.parts_of(name).values() if part.parameter is not None]


def in_flat_pieces(root: nn.Module) -> bool:
    """Whether FullyShardedDataParallel holds a part of the model. Its forward passes are right all the same."""
    return any(getattr(parameter, "_fsdp_flattened", False) for parameter in root.parameters())


def check_hosts(root: nn.Module) -> None:
    """Refuse to go on with a base that was changed after an adapter was attached.

    Whatever reads or changes a model's adapters calls this first. Of a sharded model they are then in pieces.

    Raises:
        PeftLabError: a host was replaced or resized, tied or untied, or its parts were moved to the meta device; or a
            part of the model is wrapped in FullyShardedDataParallel.
    """
    if in_flat_pieces(root):
        raise PeftLabError(
            f"The model is wrapped in torch's {FLAT} (FSDP1), which holds its parameters in flat pieces, and adapters "
            "cannot be counted, changed or saved there. Use fully_shard (FSDP2) in its place: attach first, then shard."
        )
    give_up_gathered(root)
    record = record_of(root)
    now = hosts_now(root) if record is not None else {}
    for name, before in record.placed.items() if record is not None else ():
        for path, was in before.items():
            host = now.get(name, {}).get(path)
            what = path or "The model"
            if host is None or host.parts != was.parts or host.hooks < was.hooks:
                change = f"{what} was replaced, and what adapter {name!r} had there is lost"
                advice = "Change the model (resize_token_embeddings, say) first and attach then."
            elif host.shape != was.shape:
                change = f"{what} was resized from {was.shape} to {host.shape}, and adapter {name!r} no longer fits it"
                advice = "Change the model (resize_token_embeddings, say) first and attach then."
            elif host.tied != was.tied:
                others = ", ".join(set(host.tied) ^ set(was.tied))
                change = f"the weight of {what} was {'tied to' if len(host.tied) > len(was.tied) else 'untied from'} "
                change += f"that of {others}, so adapter {name!r} no longer stands on the weights it was made for"
                advice = "Tie or untie the model's weights first and attach then."
            elif host.on_meta and not was.on_meta:
                change = f"what adapter {name!r} has on {what} was moved to the meta device and has no numbers there"
                advice = "Offload the model (accelerate does that) first and attach then, or leave it in memory."
            else:
                continue
            raise PeftLabError(
                f"The model was changed after the adapter was attached: {change}. Load the model again. {advice}"
            )


def tensor_at(host: nn.Module, name: str) -> torch.Tensor | None:
    """Return the parameter or buffer with this name, which may lie deeper (`dense.weight`); None if there is none."""
    inner, _, name = name.rpartition(".")
    return getattr(host.get_submodule(inner), name, None)


def own_tensor(host: nn.Module, name: str) -> torch.Tensor:
    """Return a parameter or buffer that the host must have. The name may lie deeper (`dense.weight`)."""
    inner, _, name = name.rpartition(".")
    return getattr(host.get_submodule(inner), name)


def device_and_dtype_for(host: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype for a part of this host: where it computes, and its dtype (float32 beside 16-bit or
    quantised weights).
    """
    own = getattr(host, "weight", None)
    tensor = own if isinstance(own, torch.Tensor) else next(host.parameters(), torch.empty(0))
    wide = tensor.is_floating_point() and tensor.dtype in (torch.float32, torch.float64)
    device = tensor.device
    if tensor.is_meta:  # accelerate keeps an offloaded weight elsewhere, and brings it to a device for each call
        hook = getattr(host, "_hf_hook", None)
        devices = (getattr(one, "execution_device", None) for one in (hook, *getattr(hook, "hooks", ())))
        device = next((torch.device(one) for one in devices if one is not None), device)
    return device, tensor.dtype if wide else torch.float32
