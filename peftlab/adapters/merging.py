"""Merge the active adapters into the base's weights, and take them out again.

    W' = W + sum over adapters of weight (W_adapter - W),    for LoRA W_adapter - W = s B A,  W: (out, in)

Paper: Hu et al., 2021, arXiv:2106.09685, section 4.1: "no additional inference latency".
Book: section 2.14, "Merging"; for 4-bit weights section 3.11, "Merging".

The update and the sum are computed in float64 (float32 on mps, which has no float64) and rounded once to the base's
dtype. In bf16 this rounding can be large compared with a small update. The report says how much of the update is lost.

An update is merged into a 4-bit weight only when asked for. There it is rounded to one of sixteen values per block of
64. If it is much smaller than the distance between two of them, it is lost, or becomes noise of its own size.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftlab.adapters.activation import refresh_requires_grad
from peftlab.adapters.injection import detach, restore_base
from peftlab.adapters.vocabulary import keep_rows
from peftlab.checks import checked
from peftlab.core.calls import observed
from peftlab.core.hooks import CHILD, Activity, adapters_on, base_modules, hosts
from peftlab.core.interface import Part
from peftlab.core.records import Record, check_hosts, own_tensor, record_of, tensor_at, unwrap
from peftlab.core.sharding import Processes
from peftlab.errors import PeftLabError
from peftlab.methods.parts import widened
from peftlab.quantization.weights import is_quantized, keep, store


class MergeReport(NamedTuple):
    """Say what merging did.

    Attributes:
        modules: the number of modules whose weights changed.
        relative_error: the share of the update that was lost by rounding to the base's dtype, or by quantising the sum
            again: the largest over modules of |stored - exact| / |exact - W|. At 1 the error is as large as the update.
        by_module: the same for each module, by path.
    """

    modules: int
    relative_error: float
    by_module: dict[str, float]

    def __str__(self) -> str:
        return f"merged {self.modules} modules; rounding lost at most {self.relative_error:.2g} of an update"


@checked()
@torch.no_grad()
def merge(model: nn.Module, *, unload: bool = False, requantize: bool = False) -> MergeReport:
    """Fold the active adapters into the base's weights, in place.

    If `fully_shard` has divided the model, call this in every process; each changes its pieces.

    Args:
        model: a model with active adapters.
        unload: also detach all adapters, and keep no copy of the weights: what remains is a plain model to ship.
            Otherwise a copy of each changed weight is kept, so that `unmerge` restores the base bit for bit. The copies
            need as much memory as the changed weights.
        requantize: also merge into 4-bit weights, by quantising the sum again. Read the report's error. To lose less,
            call `dequantize_model` first and merge into 16 or 32 bits.

    Raises:
        PeftLabError: the model is merged already; the adapters are disabled; none is active; each row has its own; the
            method cannot be merged; a weight is shared with another module, or quantised (without `requantize`). The
            model is then as it was.

    >>> model = pl.attach(model, pl.LoRAConfig(r=4, init="random"))
    >>> report = pl.merge(model)
    >>> report.modules, report.relative_error < 1e-5
    (4, True)
    """
    root = unwrap(model)
    record = record_of(root)
    if record is None:
        raise PeftLabError("No adapter is attached to this model, so there is nothing to merge.")
    check_hosts(root)
    check(root, record, requantize)
    Processes(root).meet("merge")
    errors: dict[str, float] = {}
    try:
        for path, host in hosts(root):
            for name, value in merged_parameters(host, record.activity, record.backup.get(path, ())).items():
                tensor = check_target(path, name, host)
                before, kept = widened(tensor), keep(tensor)
                for one in (path, *check_sharing(root, record, path, name, value)):
                    record.backup.setdefault(one, {})[name] = kept
                store(tensor, value, f"{path}.{name}")
                if not torch.isfinite(tensor).all():
                    raise PeftLabError(
                        f"Merging would make {path}.{name} infinite or not a number in {tensor.dtype}. "
                        "Look at the adapter's values, or merge in a wider dtype."
                    )
                errors[path] = max(errors.get(path, 0.0), rounding_error(tensor, value, before))
    except BaseException:  # merge all or nothing, also if memory runs out or Ctrl-C is pressed
        restore_base(root, record)
        raise
    record.activity.merged = True
    refresh_requires_grad(root, record)
    if unload:
        record.activity.merged = False  # so that detach leaves the merged weights
        record.backup.clear()
        keep_rows(root)
        for name in list(record.configs):
            detach(root, name)
    return MergeReport(len(errors), max(errors.values()), errors)


@checked()
def unmerge(model: nn.Module) -> None:
    """Restore the base's own weights, bit for bit, and let the adapters run beside them again.

    Raises:
        PeftLabError: the model is not merged.

    >>> before = model.lm_head.weight.clone()
    >>> model = pl.attach(model, pl.LoRAConfig(r=4, init="random", target_modules=["lm_head"]))
    >>> report = pl.merge(model)
    >>> pl.unmerge(model)
    >>> torch.equal(model.lm_head.weight, before)
    True
    """
    root = unwrap(model)
    record = record_of(root)
    if record is None or not record.activity.merged:
        raise PeftLabError("The model is not merged, so there is nothing to unmerge.")
    check_hosts(root)
    restore_base(root, record)


def merged_parameters(host: nn.Module, activity: Activity, merged: Container[str] = ()) -> dict[str, Tensor]:
    """Return the host's parameters with the active mixture folded in, before rounding to the host's dtype.

    Those in `merged` are left out: they are shared with another host, with which they were merged.
    """
    changed: dict[str, list[tuple[float, Tensor]]] = {}
    for _, weight, part in active_parts(host, activity):
        for name, value in part.merged(host).items():
            if name not in merged:
                changed.setdefault(name, []).append((weight, value))
    result = {}
    for name, values in changed.items():
        if len(values) == 1 and values[0][0] == 1:
            result[name] = values[0][1]
            continue
        base = widened(own_tensor(host, name))
        result[name] = base + sum(weight * (value - base) for weight, value in values)
    return result


def active_parts(host: nn.Module, activity: Activity) -> Iterator[tuple[str, float, Part]]:
    """Yield (adapter name, weight, part) for the parts of a host that run."""
    for name, weight in activity.weights.items():
        if name in adapters_on(host):
            for part in adapters_on(host).parts_of(name).values():
                yield name, weight, part


def rounding_error(stored: Tensor, exact: Tensor, before: Tensor) -> float:
    """Return |stored - exact| / |exact - before|, or 0 if nothing changed. `before` is widened already."""
    stored, exact = widened(stored), widened(exact)
    change = (exact - before).norm().item()
    return (stored - exact).norm().item() / change if change else 0.0


def check(root: nn.Module, record: Record, requantize: bool) -> None:
    """Refuse what can be known to fail before anything is computed."""
    activity = record.activity
    if activity.merged:
        raise PeftLabError("The model is merged already; merging twice would add the update twice.")
    if not activity.enabled:
        raise PeftLabError("The adapters are disabled here; merge outside the block `with disabled(model)`.")
    if activity.rows is not None:
        raise PeftLabError("Each row has its own adapter; activate one adapter or one mixture before merging.")
    if not activity.weights:
        raise PeftLabError("No adapter is active; call activate(model, name) before merging.")
    calls = observed(root)
    past = record.past | (calls.past if calls is not None else frozenset())
    for path, host in hosts(root):
        check_mixture(path, host, activity)
        for name, _, part in active_parts(host, activity):
            if path in past:
                raise PeftLabError(
                    f"{type(root).__name__} also reads the weight of {path} without calling it, and there the adapter "
                    "does not run, so a merge would change more than the adapter does. Keep the adapter apart."
                )
            if not part.overrides("merged"):
                kind = record.configs[name].method
                raise PeftLabError(
                    f"Adapter {name!r} ({kind}) changes more than weights and cannot be merged; keep it attached."
                )
            for parameter_name, parameter in host.named_parameters():  # a module trained in full may hold others
                if is_quantized(parameter) and not requantize:
                    raise PeftLabError(
                        f"{path}.{parameter_name} is held in four bits, where much of a small update is lost. Call "
                        "dequantize_model(model) first and merge into weights of full precision. Or call merge(model, "
                        "requantize=True), and read the error in its report."
                    )
                # 8-bit floats are numbers of a code, whose scale lies beside them
                plain = parameter.is_floating_point() and parameter.dtype.itemsize > 1
                if not is_quantized(parameter) and not plain:
                    raise PeftLabError(
                        f"{path}.{parameter_name} is quantised to {parameter.dtype}, and nothing can be merged into "
                        "such weights here. Load the base in 16 or 32 bits."
                    )


def check_mixture(path: str, host: nn.Module, activity: Activity) -> None:
    """Refuse a mixture in which one adapter changes what a host reads, and another one works on that.

    There W' x is not what the mixture computes: the second adapter works on what the first has changed.
    """
    here = [(name, own, part) for name in activity.weights if name in adapters_on(host)
            for own, part in adapters_on(host).parts_of(name).items()]  # fmt: skip
    first = next((name for name, _, part in here if part.overrides("before")), None)
    others = (name for name, own, part in here if name != first and own != "bias" and part.overrides("after"))
    second = next(others, None)
    if first is not None and second is not None:
        raise PeftLabError(
            f"In this mixture adapter {first!r} changes the input of {path}, and {second!r} works on the changed "
            "input, which no merged weight does. Keep the mixture attached, or merge one of the adapters alone."
        )


def check_target(path: str, name: str, host: nn.Module) -> Tensor:
    """Refuse a parameter that does not exist, or that the host computes anew from others (a parametrization)."""
    tensor = tensor_at(host, name)
    if tensor is None:
        raise PeftLabError(
            f"{path}.{name} does not exist, so no update can be merged into it; keep the adapter attached."
        )
    inner, _, last = name.rpartition(".")
    owner = host.get_submodule(inner)
    if last not in owner._parameters and last not in owner._buffers:
        raise PeftLabError(
            f"{path}.{name} is computed from other parameters at each call (torch's parametrize, weight norm say), so "
            "nothing can be merged into it. Keep the adapter attached, or remove the parametrization before attaching."
        )
    return tensor


def check_sharing(root: nn.Module, record: Record, path: str, name: str, value: Tensor) -> list[str]:
    """Return the other modules that have this parameter (tied weights), if the adapters make the same of it there.

    Trained rows of a tied embedding stand on the head too, for example. Otherwise a merge is refused.
    """
    tensor = tensor_at(root.get_submodule(path), name)
    sharing = [
        (other, own)
        for other, module in base_modules(root).items()
        for own, parameter in module._parameters.items()
        if parameter is tensor and f"{other}.{own}" != f"{path}.{name}"
    ]
    for other, own in sharing:
        host = root.get_submodule(other)
        there = merged_parameters(host, record.activity).get(own) if CHILD in host._modules else None
        if own != name or there is None or not torch.equal(there, value):
            raise PeftLabError(
                f"{path}.{name} is shared with another module, {other} (tied weights), which a merge would change as "
                "well. Keep the adapter attached: save it with save_adapter and load it beside the base. (Loading the "
                "base untied does not help: a tied checkpoint holds no head, so the head would get random weights.)"
            )
    return [other for other, _ in sharing]
