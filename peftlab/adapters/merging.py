"""Merging: the active adapters folded into the base's weights, and taken out again.

    W' = W + sum over adapters of weight (W_adapter - W),    for LoRA W_adapter - W = s B A

(Hu et al., 2021, arXiv:2106.09685, section 4.1: "no additional inference latency".) The update and the sum are
computed in float64 (float32 on mps, which has none) and rounded once to the base's dtype. In bf16 that rounding is not
small beside a small update; the report says how much of it is lost.

Into a 4-bit weight an update is merged only when asked for: there it is rounded to one of sixteen values a block of
64, and an update much smaller than the distance between two of them is lost, or becomes noise of its own size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftlab.adapters.injection import detach, refresh_requires_grad, restore_base
from peftlab.core.calls import observed
from peftlab.core.hooks import CHILD, Activity, hosts
from peftlab.core.interface import Part
from peftlab.core.records import Record, check_hosts, record_of, tensor_at, unwrap
from peftlab.errors import PeftLabError
from peftlab.methods.parts import widened
from peftlab.quantization.weights import is_quantized, keep, store


class MergeReport(NamedTuple):
    """What merging did.

    Attributes:
        modules: number of modules whose weights changed.
        relative_error: the largest over modules of |stored - exact| / |exact - W|: the share of the update that
            rounding to the base's dtype, or quantising the sum again, lost. At 1 the error is as large as the update.
        by_module: the same for each module, by path.
    """

    modules: int
    relative_error: float
    by_module: dict[str, float]

    def __str__(self) -> str:
        return f"merged {self.modules} modules; rounding lost at most {self.relative_error:.2g} of an update"


@torch.no_grad()
def merge(model: nn.Module, *, unload: bool = False, requantize: bool = False) -> MergeReport:
    """Folds the active adapters into the base's weights, in place.

    Args:
        model: a model with active adapters.
        unload: also detach all adapters, and keep no copy of the weights: what remains is a plain model to ship.
            Otherwise a copy of each changed weight is kept, so that `unmerge` restores the base bit for bit; it
            costs as much memory as the changed weights.
        requantize: merge into 4-bit weights, too, by quantising the sum again. Read the report's error; to lose nothing
            more, `dequantize_model` first and merge into 16 or 32 bits.

    Raises:
        PeftLabError: already merged, disabled, no active adapter, an adapter for each row, a method that cannot be
            merged, a weight that is quantised (without `requantize`) or shared with another module. The model is then
            as it was.
    """
    root = unwrap(model)
    record = record_of(root)
    if record is None:
        raise PeftLabError("No adapter is attached to this model, so there is nothing to merge.")
    check_hosts(root)
    check(root, record, requantize)
    uses = Counter(id(tensor) for module in root.modules() for tensor in module.parameters(recurse=False))
    errors: dict[str, float] = {}
    try:
        for path, host in hosts(root):
            for name, value in merged_parameters(host, record.activity).items():
                tensor = tensor_at(host, name)
                check_target(path, name, tensor, uses)
                before = widened(tensor)
                record.backup.setdefault(path, {})[name] = keep(tensor)
                store(tensor, value, f"{path}.{name}")
                if not torch.isfinite(tensor).all():
                    raise PeftLabError(
                        f"Merging would make {path}.{name} infinite or not a number in {tensor.dtype}. "
                        "Look at the adapter's values, or merge in a wider dtype."
                    )
                errors[path] = max(errors.get(path, 0.0), rounding_error(tensor, value, before))
    except BaseException:  # out of memory or Ctrl-C half-way too: all or nothing
        restore_base(root, record)
        raise
    record.activity.merged = True
    refresh_requires_grad(root, record)
    if unload:
        record.activity.merged = False  # detach must leave the merged weights
        record.backup.clear()
        for name in list(record.configs):
            detach(root, name)
    return MergeReport(len(errors), max(errors.values(), default=0.0), errors)


def unmerge(model: nn.Module) -> None:
    """Gives the base its own weights back, bit for bit, and lets the adapters run beside it again.

    Raises:
        PeftLabError: the model is not merged.
    """
    root = unwrap(model)
    record = record_of(root)
    if record is None or not record.activity.merged:
        raise PeftLabError("The model is not merged, so there is nothing to unmerge.")
    check_hosts(root)
    restore_base(root, record)


def merged_parameters(host: nn.Module, activity: Activity) -> dict[str, Tensor]:
    """The host's parameters with the active mixture folded in, before rounding to the host's dtype."""
    changed: dict[str, list[tuple[float, Tensor]]] = {}
    for _, weight, part in active_parts(host, activity):
        for name, value in part.merged(host).items():
            changed.setdefault(name, []).append((weight, value))
    result = {}
    for name, values in changed.items():
        if len(values) == 1 and values[0][0] == 1:
            result[name] = values[0][1]
            continue
        base = widened(tensor_at(host, name))
        result[name] = base + sum(weight * (value - base) for weight, value in values)
    return result


def active_parts(host: nn.Module, activity: Activity) -> Iterator[tuple[str, float, Part]]:
    """Yields (adapter name, weight, part) for the parts of a host that run."""
    for name, weight in activity.weights.items():
        if name in host._modules[CHILD]:
            for part in host._modules[CHILD][name].values():
                yield name, weight, part


def rounding_error(stored: Tensor, exact: Tensor, before: Tensor) -> float:
    """|stored - exact| / |exact - before|; 0 where nothing changed. `before` is widened already."""
    stored, exact = widened(stored), widened(exact)
    change = (exact - before).norm().item()
    return (stored - exact).norm().item() / change if change else 0.0


def check(root: nn.Module, record: Record, requantize: bool) -> None:
    """Refuses what can be told before anything is computed."""
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
    past = calls.past if calls is not None else frozenset()
    for path, host in hosts(root):
        for name, _, part in active_parts(host, activity):
            if path in past:
                raise PeftLabError(
                    f"{type(root).__name__} also reads the weight of {path} without calling it, and there the adapter "
                    "does not run, so a merge would change more than the adapter does. Keep the adapter apart."
                )
            if not part.overrides("merged"):
                kind = record.configs[name].method
                raise PeftLabError(f"Adapter {name!r} ({kind}) changes more than weights and cannot be merged.")
            for parameter_name, parameter in host.named_parameters(recurse=False):
                if is_quantized(parameter) and not requantize:
                    raise PeftLabError(
                        f"{path}.{parameter_name} is held in four bits, where much of a small update is lost. Call "
                        "dequantize_model(model) first and merge into whole weights; or merge(model, "
                        "requantize=True), and read its error."
                    )
                if not is_quantized(parameter) and not parameter.is_floating_point():
                    raise PeftLabError(
                        f"{path}.{parameter_name} is quantised to {parameter.dtype}, into which nothing can be merged "
                        "here; load the base in 16 or 32 bits."
                    )


def check_target(path: str, name: str, tensor: Tensor | None, uses: Counter) -> None:
    """Refuses a parameter that is not there or that another module reads as well."""
    if tensor is None:
        raise PeftLabError(f"{path}.{name} is not there, so no update can be merged into it.")
    if uses[id(tensor)] > 1:
        raise PeftLabError(
            f"{path}.{name} is shared with another module (tied weights), which a merge would change as well. "
            "Keep the adapter apart: save it with save_adapter and load it beside the base. (Loading the base untied "
            "does not help: a tied checkpoint holds no head, so the head would get random weights.)"
        )
