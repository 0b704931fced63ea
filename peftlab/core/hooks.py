"""Let an adapter act on a module through one child and two hooks.

An adapter can change a module's inputs *before* its call and its output *after* it. Both are forward hooks, and they
find their parts in the module's child `peftlab`. Nothing is wrapped, so classes, the module tree and the base's
parameter names stay as they were. To detach is to remove the child and the hooks. The hooks are plain functions of the
module that they stand on. So after a `deepcopy` of the model they look into the copy's child.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from peftlab.core.interface import Part
from peftlab.core.parameters import Coded, Value, coded, run_with, stand_in, step_aside
from peftlab.errors import PeftLabError

CHILD = "peftlab"
# The input by which a call of a module tells its `Forward` that the hooks have run.
ENTERED = "_peftlab_entered"


class Activity:
    """Hold which adapters of one model run. All its hosts share this object, so one assignment switches all of them.

    Attributes:
        weights: {adapter name: weight} of the mixture in use; empty means the base model alone.
        rows: one adapter name (or None for the base) for each row of the batch. If set, it replaces `weights`.
        enabled: False inside `disabled`.
        merged: whether the base's weights already hold the mixture.
        text_positions: if True, position_ids passed by the caller are kept and shifted by the prompt's length (they do
            not count padding). If False, as in Hugging Face peft, they are dropped and the model numbers the positions
            itself, padding included.
        text_begins: whether the running call reads the beginning of a text. A later step of a generation does not: the
            cache already holds the beginning and the prompt. The prompt on the model sets this for the prompts on its
            layers.
        saving_known: whether the person knows that `save_pretrained` leaves the adapters out.
        inside: (thread, path) of each module with a `Forward` that is running. Several threads may use one model.
        unsure: whether `inside` may lack a running module: a compiled one, or one whose `forward` others have replaced.
    """

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}
        self.rows: tuple[str | None, ...] | None = None
        self.enabled = True
        self.merged = False
        self.text_positions = False
        self.text_begins = True
        self.saving_known = False
        self.inside: set[tuple[int, str]] = set()
        self.unsure = False

    @property
    def running(self) -> bool:
        """Say whether adapters act at all: they are neither disabled nor merged into the weights."""
        return self.enabled and not self.merged


class Adapters(nn.ModuleDict):
    """Hold the parts of a host: {adapter name: {part name: part}}."""

    def __init__(self, activity: Activity) -> None:
        super().__init__()
        self.activity = activity

    def parts_of(self, adapter: str) -> dict[str, Part]:
        """Return {part name: part} of one adapter on this host."""
        mine = self[adapter]
        assert isinstance(mine, nn.ModuleDict)
        return {name: part for name, part in mine.items() if isinstance(part, Part)}

    def forward(self, x: Any) -> Any:
        """Return the input unchanged. An `nn.Sequential` calls all its children, and this is one of them."""
        return x


def adapters_on(host: nn.Module) -> Adapters:
    """Return the child of a module that carries parts."""
    child = host._modules[CHILD]
    assert isinstance(child, Adapters)
    return child


def place(host: nn.Module, activity: Activity, adapter: str, part_name: str, part: Part) -> None:
    """Put a part on a host, with the hooks that it needs."""
    if CHILD not in host._modules:
        host.add_module(CHILD, Adapters(activity))
    parts = adapters_on(host)
    if adapter not in parts:
        parts[adapter] = nn.ModuleDict()
    mine = parts[adapter]
    assert isinstance(mine, nn.ModuleDict)
    mine[part_name] = part
    # If no part on a host has a `before`, the host gets no hook for it; the same holds for `after`.
    if part.overrides("before") and _before not in host._forward_pre_hooks.values():
        host.register_forward_pre_hook(_before, with_kwargs=True)
    if part.overrides("after") and _after not in host._forward_hooks.values():
        host.register_forward_hook(_after, with_kwargs=True)
    if part.parameter is not None:
        stand_in(host, run_host)


def remove(host: nn.Module, adapter: str | None = None) -> None:
    """Take one adapter (or all) off a host. With the last adapter, the child and the hooks go too."""
    if CHILD not in host._modules:
        return
    parts = adapters_on(host)
    if adapter is None:
        parts.clear()
    elif adapter in parts:
        del parts[adapter]
    if not parts:
        del host._modules[CHILD]
        step_aside(host)
        flags = (host._forward_pre_hooks_with_kwargs, host._forward_hooks_with_kwargs)
        for (table, keys), with_kwargs in zip(hook_keys(host), flags, strict=True):
            for key in keys:
                del table[key]
                with_kwargs.pop(key, None)


def hook_keys(host: nn.Module) -> list[tuple[dict[int, Callable], list[int]]]:
    """Return the tables of hooks before and after a host's call, each with the keys of ours in it."""
    tables: tuple[tuple[dict, Callable], ...] = ((host._forward_pre_hooks, _before), (host._forward_hooks, _after))
    return [(table, [key for key, value in table.items() if value is hook]) for table, hook in tables]


def move(host: nn.Module, new: nn.Module) -> None:
    """Move all parts of a host onto the module that takes its place. Nothing else of the host is moved."""
    if CHILD not in host._modules:
        return
    parts = adapters_on(host)
    for adapter in parts:
        for part_name, part in parts.parts_of(adapter).items():
            place(new, parts.activity, adapter, part_name, part)


def _before(host: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    inputs = args, kwargs
    parts = adapters_on(host)
    prompts = prompt_parts(parts, parts.activity) if parts.activity.running else {}
    if prompts:  # one adapter's parts run for all of them: they insert the active prompt, a mixture of their prompts
        for part in filter(_is_prompt, parts.parts_of(next(iter(prompts))).values()):
            inputs = part.before(host, *inputs)

    def change(mine: list[Part], inputs: tuple, base: tuple) -> tuple:
        for part in mine:
            inputs = part.before(host, *inputs)
        return inputs

    changed = _apply(parts, inputs, inputs, change, lambda part: part.overrides("before") and not _is_prompt(part))
    return inputs if changed is None and prompts else changed


def _after(host: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    if ENTERED in kwargs:
        kwargs = {name: value for name, value in kwargs.items() if name != ENTERED}

    def change(mine: list[Part], inputs: tuple, output: Any) -> Any:
        args, kwargs = inputs
        result = output
        for part in mine:
            result = part.after(host, args, kwargs, result, output)
        return result

    return _apply(adapters_on(host), (args, kwargs), output, change, lambda part: part.overrides("after"))


def run_parts(host: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
    """Run a module's forward between our hooks, as a call of the module does."""
    (_, before), (_, after) = hook_keys(host)
    changed = _before(host, args, kwargs) if before else None
    args, kwargs = (args, kwargs) if changed is None else changed
    output = forward(*args, **kwargs)
    changed = _after(host, args, kwargs, output) if after else None
    return output if changed is None else changed


def run_host(host: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
    """Run a module's forward with the values that the active parts give its parameters, and its codes decoded."""
    parts = adapters_on(host) if CHILD in host._modules else None
    activity = parts.activity if parts is not None else Activity()
    # 4-bit codes are read in the dtype that the module computes in
    floating = (leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor))
    x = next((leaf for leaf in floating if leaf.is_floating_point()), torch.empty(0))
    kind = x.device.type
    cast = kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if cast else x.dtype
    del x  # `surroundings` lives until the backward pass, and must not keep the input alive

    def surroundings() -> AbstractContextManager:
        """Autocast as it is now, for a value that is made again in the backward pass."""
        return nullcontext() if kind == "meta" else torch.autocast(kind, dtype if cast else None, enabled=cast)

    def run(active: list[tuple[float, Part]], inputs: tuple) -> Any:
        return run_with(_values(host, active, dtype, surroundings), host, forward, *inputs)

    mine: dict[str, list[Part]] = {}
    if parts is not None and activity.running:
        names = activity.weights if activity.rows is None else [name for name in activity.rows if name is not None]
        here = {name: parts.parts_of(name).values() for name in names if name in parts}
        mine = {name: [part for part in of if part.parameter is not None] for name, of in here.items()}
    if activity.rows is not None and any(mine.values()):

        def change(chosen: list[Part], inputs: tuple, _: Any) -> Any:
            return run([(1.0, part) for part in chosen], inputs)

        return _by_rows(mine, activity.rows, (args, kwargs), run([], (args, kwargs)), change, everything=True)
    weighted = [(activity.weights[name], part) for name, of in mine.items() for part in of]
    return run(weighted, (args, kwargs))


def _values(
    host: nn.Module,
    active: list[tuple[float, Part]],
    dtype: torch.dtype,
    surroundings: Callable[[], AbstractContextManager],
) -> dict[str, Value]:
    """Return how the values are made of those of a host's parameters that have another one than the stored."""
    held = coded(host)
    names = dict.fromkeys([*held, *(part.parameter for _, part in active if part.parameter is not None)])

    def value(name: str) -> Value:
        parameter = host._parameters[name]
        assert parameter is not None
        mine = [(weight, part) for weight, part in active if part.parameter == name]

        def make() -> Tensor:
            stored = parameter.dense(dtype) if isinstance(parameter, Coded) else parameter
            with surroundings():
                if len(mine) == 1 and mine[0][0] == 1:
                    return mine[0][1].value(stored)
                # W = W0 + sum over adapters of weight (W_adapter - W0)
                changes = (weight * (part.value(stored) - stored) for weight, part in mine)
                return sum(changes, start=stored)

        return Value(make, (parameter, *(own for _, part in mine for own in part.parameters())))

    return {name: value(name) for name in names}


def _is_prompt(part: Part) -> bool:
    return part.compatibility_key is not None


def prompt_parts(parts: Adapters, activity: Activity) -> dict[str, Part]:
    """Return {adapter: its part here that makes the input longer}, for the adapters that `activity` names."""
    names = activity.weights if activity.rows is None else [name for name in activity.rows if name is not None]
    there = ((name, part) for name in dict.fromkeys(names) if name in parts for part in parts.parts_of(name).values())
    return {name: part for name, part in there if _is_prompt(part)}


def active_prompt(host: nn.Module, batch: int) -> Tensor:
    """Return the prompt for each row of a batch, (batch, n, width), as the active adapters on a host make it.

    It is the weighted sum of their prompts. If each row has its own adapter, it is that adapter's prompt.
    """
    parts = adapters_on(host)
    activity = parts.activity
    made = {name: part.make_prompt(host) for name, part in prompt_parts(parts, activity).items()}
    if activity.rows is not None:
        order: list[str | None] = list(made)
        repeat = _repeat(activity.rows, batch)
        stacked = torch.stack(list(made.values()))
        return stacked[[order.index(name) for name in activity.rows for _ in range(repeat)]]
    # P = sum over adapters of weight P_adapter. The base has no prompt, so whole prompts are summed, not changes.
    first, *others = (tensor * activity.weights[name] for name, tensor in made.items())
    return sum(others, start=first).expand(batch, -1, -1)


def _apply(
    parts: Adapters, inputs: tuple, base: Any, change: Callable[[list, tuple, Any], Any], acts: Callable[..., bool]
) -> Any:
    """Run the active adapters of a host on `base` (its inputs, or its output) and mix their results.

    Return None, which leaves `base` as it is, if no adapter is active here.
    """
    activity = parts.activity
    if not activity.running:
        return None
    names = activity.weights if activity.rows is None else {name for name in activity.rows if name is not None}
    mine = {name: [part for part in parts.parts_of(name).values() if acts(part)] for name in names if name in parts}
    if activity.rows is not None:
        return _by_rows(mine, activity.rows, inputs, base, change)
    here = [(name, weight) for name, weight in activity.weights.items() if mine.get(name)]
    if not here:
        return None
    if len(here) == 1 and here[0][1] == 1:
        return change(mine[here[0][0]], inputs, base)
    # y = y0 + sum over adapters of weight (y_adapter - y0)
    changed = [(weight, change(mine[name], inputs, base)) for name, weight in here]
    return _combine(base, changed, lambda y0, ys: sum((w * (y - y0) for w, y in ys), start=y0).to(y0.dtype))


def _by_rows(
    mine: dict[str, list],
    rows: tuple[str | None, ...],
    inputs: tuple,
    base: Any,
    change: Callable,
    everything: bool = False,
) -> Any:
    """Give each row of the batch the adapter named for it: y[i] = y_{adapter of i}[i].

    With `everything`, whole numbers are taken from the adapter too: a router returns which experts it chose.
    """
    batch = next(t for t in tree_flatten(inputs)[0] if isinstance(t, Tensor)).shape[0]
    repeat, result = _repeat(rows, batch), base
    for name in dict.fromkeys(rows):
        if name is None or not mine.get(name):
            continue
        chosen = [i * repeat + k for i, row in enumerate(rows) if row == name for k in range(repeat)]

        def take(value: Any, chosen: list[int] = chosen) -> Any:
            whole = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch
            return value[torch.tensor(chosen, device=value.device)] if whole else value

        def put(y0: Tensor, ys: list[tuple[float, Tensor]], chosen: list[int] = chosen) -> Tensor:
            if y0.dim() == 0 or y0.shape[0] != batch:
                return y0
            return y0.index_copy(0, torch.tensor(chosen, device=y0.device), ys[0][1].to(y0.dtype))

        part = change(mine[name], tree_map(take, inputs), tree_map(take, base))
        result = _combine(result, [(1.0, part)], put, everything)
    return result


def _repeat(rows: tuple[str | None, ...], batch: int) -> int:
    """Return how many neighbouring rows of the batch belong to each name.

    They are the beams, returned sequences or flattened tokens of one text.
    """
    if batch % len(rows):
        raise PeftLabError(
            f"activate was given {len(rows)} names, one per row, but the batch has {batch} rows. "
            "Give as many names as the batch has rows. (If it has as many, this layer does not have the batch as its "
            "first dimension; activate one adapter for the whole batch there.)"
        )
    return batch // len(rows)


def _combine(
    base: Any, changed: list[tuple[float, Any]], how: Callable[[Tensor, list], Tensor], everything: bool = False
) -> Any:
    """Combine results of the same structure, tensor by tensor. Anything but a floating tensor stays as in the base.

    With `everything`, other tensors are combined too.
    """
    leaves, spec = tree_flatten(base)
    columns = [(weight, tree_flatten(result)[0]) for weight, result in changed]
    return tree_unflatten(
        [
            how(leaf, [(weight, column[i]) for weight, column in columns])
            if isinstance(leaf, Tensor) and (everything or leaf.is_floating_point())
            else leaf
            for i, leaf in enumerate(leaves)
        ],
        spec,
    )


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """Run no adapter of the model inside the block."""
    running = {id(adapters_on(host).activity): adapters_on(host).activity for _, host in hosts(model)}
    before = [(activity, activity.enabled) for activity in running.values()]
    try:
        for activity, _ in before:
            activity.enabled = False
        yield
    finally:
        for activity, enabled in before:
            activity.enabled = enabled


@contextmanager
def text_positions(model: nn.Module) -> Iterator[None]:
    """Keep the caller's position_ids inside the block, so that padding on the left does not move a row's prompt."""
    active = {id(adapters_on(host).activity): adapters_on(host).activity for _, host in hosts(model)}
    try:
        for activity in active.values():
            activity.text_positions = True
        yield
    finally:
        for activity in active.values():
            activity.text_positions = False


def hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that carry parts, with their paths."""
    for path, module in model.named_modules():
        if CHILD in module._modules:
            yield plain(path), module


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's own modules by path, without what adapters added. The model itself has the path ""."""
    return {plain(path): module for path, module in model.named_modules() if not is_adapter_name(path)}


def plain(path: str) -> str:
    """Return a path without the names that `torch.compile` puts into it.

    `get_submodule` finds the same module by it.
    """
    if "_orig_mod" not in path:
        return path
    return ".".join(name for name in path.split(".") if name != "_orig_mod")


def is_adapter_name(parameter_name: str) -> bool:
    """Say whether a parameter's name lies in an adapter's child."""
    return CHILD in parameter_name and CHILD in parameter_name.split(".")
