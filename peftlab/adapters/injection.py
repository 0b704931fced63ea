"""Attach, detach and count adapters on a model.

The model is changed in place and keeps its class. See DESIGN.md for why hooks and not wrappers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from peftlab.adapters.activation import activate, disabled, refresh_requires_grad
from peftlab.adapters.vocabulary import shorten, with_new_tokens
from peftlab.catalogue import METHODS
from peftlab.checks import checked, one_of, shown
from peftlab.core.calls import observed, passed_weights
from peftlab.core.entry import guard, unguard
from peftlab.core.hooks import CHILD, Activity, Adapters, adapters_on, hosts, place, plain, remove
from peftlab.core.interface import Config, Placement
from peftlab.core.records import (
    Record,
    check_hosts,
    device_and_dtype_for,
    hosts_now,
    own_tensor,
    record_of,
    require_adapter,
    unwrap,
)
from peftlab.core.rehearsal import rehearse
from peftlab.core.sharding import refuse_sharded
from peftlab.core.targets import ALL_LINEAR, heads
from peftlab.errors import PeftLabError, out_of_memory, some, warn
from peftlab.patterns import bounded
from peftlab.quantization.marks import restore_transformers_attributes, set_transformers_attributes
from peftlab.quantization.weights import restore_parameter, unpack

ADAPTER_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OVERFLOW = re.compile("overflow|too large|too big")  # in torch's words for a size beyond 64 bits


class ParameterCount(NamedTuple):
    """Say how many parameters a model has and how many of them train.

    Attributes:
        trainable: how many parameters train.
        total: how many there are; a 4-bit weight counts as the matrix it stands for.
        percent: 100 trainable / total.
    """

    trainable: int
    total: int
    percent: float

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters train ({self.percent:.4f}%)"


@checked("name")
def attach(
    model: nn.Module,
    config: Config,
    name: str = "default",
    *,
    adapter_dtype: torch.dtype | str | None = None,
    data: Any = None,
) -> nn.Module:
    """Attach an adapter, freeze the base, and make the new adapter the active one.

    Args:
        model: any `nn.Module`, for example a transformers model; it is changed in place.
        config: what to attach, for example `LoRAConfig(r=8, alpha=16)`.
        name: the adapter's name; letters, digits, `_` and `-`.
        adapter_dtype: the dtype of the adapter's parameters. By default it is that of the layer, and float32 on a
            half-precision or quantised layer, as in Hugging Face peft: an optimiser's small steps vanish in 16 bits.
            With `"bf16"` (or `torch.bfloat16`) nothing has to be cast between a bfloat16 base and the adapter, and
            `train` keeps float32 masters of it; in a loop of your own, `peftlab.training.masters` has them.
        data: what an adapter starts from that starts from data: for `LoRAConfig(init="eva")` batches, as the model is
            called with (`[{"input_ids": ..., "attention_mask": ..., "labels": ...}, ...]`).

    Returns:
        The same model.

    Raises:
        PeftLabError: a name is used twice, a target matches nothing, the model is merged, or a value is out of range.
            The model is then as it was.

    >>> model = pl.attach(model, pl.LoRAConfig(r=8, target_modules=["q_proj", "v_proj"]))
    >>> print(pl.count_parameters(model))
    896 of 6,608 parameters train (13.5593%)
    """
    root = unwrap(model)
    config = with_new_tokens(root, config)
    check_config(config)
    check_new(root, name)
    with disabled(root):
        config, starts = config.start_from(root, data)
    placements, unseen = prepare(root, name, config, adapter_dtype)
    settle(root, placements)
    with torch.no_grad():
        for path, _, part in placements:
            for own, value in starts.get(path, {}).items():
                part.get_parameter(own).copy_(value)
    add(root, name, config, placements, unseen, trainable=True)
    return model


def prepare(
    root: nn.Module,
    name: str,
    config: Config,
    adapter_dtype: torch.dtype | str | None,
    check: Callable[[Placement], None] | None = None,
) -> tuple[list[Placement], frozenset[str]]:
    """Build all parts of an adapter, with their devices and dtypes, and leave the model unchanged.

    `check` gets each part before the next one is built, and may refuse it. Returns the placements, and the hosts of
    which it is not known that the model calls them.
    """
    check_config(config)
    if isinstance(adapter_dtype, str):
        adapter_dtype = ADAPTER_DTYPES[one_of("adapter_dtype", adapter_dtype, ADAPTER_DTYPES)]
    if adapter_dtype is not None and not (isinstance(adapter_dtype, torch.dtype) and adapter_dtype.is_floating_point):
        raise PeftLabError(f"adapter_dtype is {adapter_dtype!r}; give a floating dtype such as torch.float32.")
    check_new(root, name)
    placements = []
    try:
        with bounded():
            for placement in config.parts(root):
                if check is not None:
                    check(placement)
                placements.append(placement)
    except (MemoryError, OverflowError, RuntimeError, TypeError) as error:
        if out_of_memory(error) is None and not OVERFLOW.search(str(error)):
            raise
        raise PeftLabError(
            f"The parts of this adapter are too large for the memory: {shown(config)}. Choose smaller sizes."
        ) from error
    check_copies(root, config, placements)
    placements, unseen = within_reach(root, config, placements)
    placements = rehearsed(root, config, placements, unseen)
    for path, _, part in placements:
        host = root.get_submodule(path)
        device, dtype = device_and_dtype_for(host)
        part.to(device=device, dtype=adapter_dtype or dtype)
        part.train(host.training)
    return placements, unseen


def check_config(config: Any) -> None:
    """Refuse what is no config."""
    if not isinstance(config, Config) or isinstance(config, type):
        known = ", ".join(dict.fromkeys(row.config_name for row in METHODS.values() if row.config_name))
        raise PeftLabError(f"The config is {config!r}; make one of {known}.")


def check_new(root: nn.Module, name: str) -> None:
    """Refuse a name that is in use, and a model that can take no adapter now."""
    record = record_of(root)
    check_hosts(root)
    check_name(name)
    refuse_sharded(root, "attach cannot divide a new adapter with it", "Attach first, then call fully_shard.")
    if record and name in record.configs:
        raise PeftLabError(f"An adapter named {name!r} is attached already; detach it first, or use another name.")
    if record and record.activity.merged:
        raise PeftLabError("The model is merged; call unmerge(model) before attaching another adapter.")
    for path, host in hosts(root):
        if record is None or adapters_on(host).activity is not record.activity:
            raise PeftLabError(
                f"{path or 'The model'} carries adapters that were attached through another module. "
                "Attach and detach through the same model."
            )


def check_copies(root: nn.Module, config: Config, placements: list[Placement]) -> None:
    """Require a copy of each module that is to train in full, since a head left untrained would not be noticed.

    A method's own `parts` yields these copies, and whoever writes a method may forget it.
    """
    copied = [placement.path for placement in placements if placement.kind == "copy"]
    for path in heads(root, config):
        if not any(one == path or one.startswith(path + ".") for one in copied):
            raise PeftLabError(
                f"{path} is to train in full, as modules_to_save or task_type asks, but {type(config).__name__}.parts "
                "yields no copy of it. End that method with `yield from trained_copies(model, self)`, which "
                "peftlab.methods.parts has."
            )


def check_name(name: str) -> None:
    """Refuse what cannot name an adapter: it becomes a part of paths in the model, and of a folder's path."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(Adapters(Activity()), name):
        raise PeftLabError(f"{shown(name)} cannot name an adapter; use letters, digits, '_' and '-'.")


def within_reach(
    root: nn.Module, config: Config, placements: list[Placement]
) -> tuple[list[Placement], frozenset[str]]:
    """Leave out parts, or refuse them, that would never run because the model reads their host's weight past it.

    What a rule chose ("all-linear", or a method's default) is left out with a warning; what was named is refused.
    Returns the other placements, and those of their hosts that the copy of the model did not call. (The model's own
    first pass is then watched.)
    """
    calls = observed(root)
    unreached = calls.unreached if calls is not None else frozenset()
    reached = {id(part) for path, _, part in placements if path not in unreached}  # one may stand on tied modules
    lost = list(dict.fromkeys(path for path, _, part in placements if path in unreached and id(part) not in reached))
    left = without(
        config,
        placements,
        lost,
        f"{type(root).__name__} reads the weights of {some(lost)} without calling these modules, so an adapter there "
        "would never run.",
        'Name other modules in target_modules (target_parameters, modules_to_save), and use bias="none".',
    )
    past = [path for path, name, _ in left if name == "rows" and calls is not None and path in calls.past]
    if past:
        raise PeftLabError(
            f"{type(root).__name__} also reads the weight of {some(past)} without calling it, and there the trained "
            "rows would not take part. Train the whole model's embeddings, or leave trainable_tokens out."
        )
    passed = passed_weights(root)
    doubtful = [path for path in dict.fromkeys(path for path, _, _ in left) if path in passed]
    if doubtful:
        warn(
            f"In training, fused kernels of {type(root).__name__} read the weights of {some(doubtful)} without calling "
            "these modules. Where such kernels are installed, an adapter there does not run; leave these modules out.",
        )
    unseen = frozenset(path for path, _, _ in left) - (calls.called if calls is not None else frozenset())
    return left, unseen - unreached


def without(config: Config, placements: list[Placement], lost: list[str], what: str, instead: str) -> list[Placement]:
    """Return the placements that are not on these hosts. Hosts that were named, not found by a rule, are refused."""
    left = [placement for placement in placements if placement.path not in lost]
    if lost:
        targets = getattr(config, "target_modules", ())
        by_rule = targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR)
        copied = any(placement.kind == "copy" for placement in placements if placement.path in lost)
        if not by_rule or copied or not left:
            raise PeftLabError(f"{what} {instead}")
        warn(f"{what} They are left out.")
    return left


def rehearsed(root: nn.Module, config: Config, placements: list[Placement], unseen: frozenset[str]) -> list[Placement]:
    """Leave out parts, or refuse them, that cannot run on their hosts. Refuse an adapter of which nothing trains."""
    shown_by = rehearse(root, placements)
    if shown_by is None:
        return placements
    method, kind = type(config).__name__, type(root).__name__
    for error in shown_by.failed.values():
        if isinstance(error, PeftLabError):
            raise error
    if "" in shown_by.failed:
        error = shown_by.failed[""]
        raise PeftLabError(
            f"{kind} does not run with this {method} ({type(error).__name__}: {first_line(error)}). Use another "
            "method, or name other modules."
        )
    paths = list(dict.fromkeys(path for path, _, _ in placements))
    if not shown_by.trains and not unseen.issuperset(paths):  # what was not called may be, with other inputs
        raise PeftLabError(
            f"Nothing of this {method} would train: no gradient flows from the output of {kind} back to the adapter on "
            f"{some(paths)}. Name other modules."
        )
    lost = list(shown_by.failed)
    one = next(iter(shown_by.failed.items()), None)
    what = ""
    if one is not None:
        path, error = one
        host = type(root.get_submodule(path)).__name__
        what = (
            f"{method} cannot stand on {some(lost)}: with it the forward of a {host} fails "
            f"({type(error).__name__}: {first_line(error)})."
        )
    return without(config, placements, lost, what, "Name other modules, or leave these out (exclude_modules).")


def first_line(error: Exception) -> str:
    """Return the first line of an error's text."""
    return next(iter(str(error).strip().splitlines()), "")[:200]


@torch.no_grad()
def settle(root: nn.Module, placements: list[Placement]) -> None:
    """Let prepared parts compute what depends on the base's weights.

    Weights that bitsandbytes repacked are unpacked first.
    """
    repaired = sum(unpack(module) for module in root.modules())
    if repaired:
        warn(
            f"bitsandbytes had repacked {repaired} 4-bit weights for inference on this CPU and rounded their scales "
            "to bf16. They are unpacked again, but the rounding stays. To have them exact, attach before the first "
            "forward pass in eval mode.",
        )
    for path, _, part in placements:
        part.settle(root.get_submodule(path))


def add(
    root: nn.Module,
    name: str,
    config: Config,
    placements: list[Placement],
    unseen: frozenset[str],
    trainable: bool,
) -> None:
    """Put settled parts in place and activate them."""
    record = record_of(root)
    if record is None:
        record = Record()
        # A plain attribute, not a module, so it is neither in the module tree nor in a state dict.
        object.__setattr__(root, "_peftlab", record)
    if not record.configs:
        for parameter_name, parameter in root.named_parameters():
            # Use the plain name, since a layer may be compiled by itself between attach and detach.
            record.base_requires_grad[plain(parameter_name)] = parameter.requires_grad
            parameter.requires_grad_(False)
    for path, part_name, part in placements:
        host = root.get_submodule(path)
        place(host, record.activity, name, part_name, part)
        if part.on_forward:
            guard(host, path, record.activity)
    guard(root, "", record.activity)
    record.unseen |= unseen
    record.marks.clear()
    record.configs[name] = config
    record.trainable[name] = trainable
    record.placed[name] = hosts_now(root).get(name, {})
    set_transformers_attributes(root, record)
    activate(root, name)


@checked()
def detach(model: nn.Module, name: str = "default") -> nn.Module:
    """Take an adapter off. After the last one the model is as it was before the first, bit for bit.

    Base weights, `requires_grad` flags, hooks and state-dict keys are all restored. A merged model is unmerged first.

    Raises:
        PeftLabError: there is no such adapter (with near matches).

    >>> model = pl.attach(model, pl.LoRAConfig(r=4))
    >>> model = pl.detach(model)
    >>> print(pl.count_parameters(model))
    5,712 of 5,712 parameters train (100.0000%)
    """
    root = unwrap(model)
    record = require_adapter(root, name)
    if record.activity.merged:
        restore_base(root, record)
    for _, host in list(hosts(root)):
        remove(host, name)
        if CHILD not in host._modules and host is not root:
            unguard(host)
    record.marks.clear()
    left = {path for other, placed in record.placed.items() if other != name for path in placed}
    record.unseen &= left
    del record.configs[name], record.trainable[name], record.placed[name]
    record.activity.weights.pop(name, None)
    if record.activity.rows and name in record.activity.rows:
        record.activity.rows = None
        refresh_requires_grad(root, record)
    restore_transformers_attributes(root, record)
    if record.configs:
        set_transformers_attributes(root, record)
    else:
        flags = record.base_requires_grad
        for parameter_name, parameter in root.named_parameters():
            parameter.requires_grad_(flags.get(plain(parameter_name), parameter.requires_grad))
        unguard(root)
        object.__delattr__(root, "_peftlab")
        shorten(root)
    return model


@checked()
def attached(model: nn.Module) -> dict[str, Config]:
    """Return {adapter name: its config}, in the order attached; empty for a plain model.

    >>> model = pl.attach(model, pl.LoRAConfig(r=4), name="mine")
    >>> {name: config.r for name, config in pl.attached(model).items()}
    {'mine': 4}
    """
    record = record_of(unwrap(model))
    return dict(record.configs) if record else {}


@checked()
def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters that train, count all of them, and give the percentage.

    Adapters are included, and tied parameters count once. A bias trained instead of the base's own is one parameter,
    not two, as in Hugging Face peft. A 4-bit weight counts as the matrix it stands for, not as its packed bytes.

    >>> model = pl.attach(model, pl.LoRAConfig(r=4, target_modules=["q_proj"]))
    >>> print(pl.count_parameters(model))
    256 of 5,968 parameters train (4.2895%)
    """
    trainable = total = 0
    root = unwrap(model)
    check_hosts(root)
    children = (adapters_on(host) for _, host in hosts(root))
    parts = (part for child in children for name in child for part in child.parts_of(name).values())
    replacing = {id(p) for part in parts if part.replaces_base_parameters for p in part.parameters()}
    for parameter in root.parameters():
        state = getattr(parameter, "quant_state", None)
        size = math.prod(state.shape) if state is not None else parameter.numel()
        total += 0 if id(parameter) in replacing else size
        trainable += size if parameter.requires_grad else 0
    return ParameterCount(trainable, total, 100 * trainable / total if total else 0.0)


def restore_base(root: nn.Module, record: Record) -> None:
    """Restore the base's own weights after a merge, from the copies kept then."""
    for path, parameters in record.backup.items():
        host = root.get_submodule(path)
        for name, kept in parameters.items():
            restore_parameter(own_tensor(host, name), kept)
    record.backup.clear()
    record.activity.merged = False
    refresh_requires_grad(root, record)
