"""Let a model without numbers run with what is to be attached to it, before anything is attached.

Names do not tell what a module does: a router is a linear layer that returns a choice, a block may return a list, a
model may take no embeddings. A part on such a module would fail in the first training step, or nothing would train. So
the copy that `peftlab.core.calls` runs is run once more, with copies of the parts on it. What a part cannot do there is
noted, and the pass goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from peftlab.core.calls import copied_pass, meta_copies, observed_with
from peftlab.core.entry import guard
from peftlab.core.hooks import Activity, place
from peftlab.core.interface import Placement
from peftlab.core.structure import structure_of

NAME = "rehearsed"
SHOWN: dict[Hashable, Rehearsal] = {}  # what rehearsals showed in which nothing failed
KEPT = 64


class Rehearsal(NamedTuple):
    """What a pass with the parts showed.

    Attributes:
        failed: {path of a host: the error of a part there}. The path is "" if the model itself failed.
        trains: whether anything of the parts gets a gradient.
    """

    failed: dict[str, Exception]
    trains: bool


def rehearse(root: nn.Module, placements: Iterable[Placement]) -> Rehearsal | None:
    """Return what a pass with these parts shows; None where the model alone cannot be run without numbers."""
    placements = list(placements)
    calls, inputs = observed_with(root)
    if calls is None:
        return None
    key = key_of(root, placements)
    if key is not None and key in SHOWN:
        return SHOWN[key]
    try:
        model, parts = meta_copies(root, [placement.part for placement in placements])
    except Exception:  # whatever a foreign model raises when it is copied
        return None
    activity, failed, untold, recorded = Activity(), dict[str, Exception](), list[Exception](), list[bool]()
    activity.weights = {NAME: 1.0}
    for (path, name, _), part in zip(placements, parts, strict=True):
        part.requires_grad_(True)  # as `attach` will; a copy of a table that was never trained has it False
        for own in part.frozen:
            part.get_parameter(own).requires_grad_(False)
        for method, unchanged in UNCHANGED.items():
            if part.overrides(method):
                vars(part)[method] = guarded(getattr(part, method), unchanged, path, failed, untold, recorded)
        place(model.get_submodule(path), activity, NAME, name, part)
        if part.on_forward:
            guard(model.get_submodule(path), path, activity)
    guard(model, "", activity)
    trained = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
    with copied_pass(model) as (twins, guessed):
        try:
            output = model(**inputs)
        except Exception as error:
            return None if untold or for_want_of_numbers(error) else Rehearsal({**failed, "": error}, True)
    for path, first in twins.items():
        failed |= {path + host[len(first) :]: e for host, e in failed.items() if (host + ".").startswith(first + ".")}
    # A pass in which a number was guessed proves nothing, unless parts ran and autograd recorded none of them.
    cannot_tell = failed or untold or (guessed and any(recorded or [True]))
    result = Rehearsal(failed, bool(cannot_tell) or gets_gradients(output, trained))
    if key is not None and not failed:  # an error would keep alive what it passed through
        if len(SHOWN) >= KEPT:
            SHOWN.pop(next(iter(SHOWN)))
        SHOWN[key] = result
    return result


def key_of(root: nn.Module, placements: list[Placement]) -> Hashable | None:
    """Return what decides a rehearsal: the model's structure and the parts, with their shapes. None if unknown."""
    structure = structure_of(root, before_copy=True)
    parts = tuple(
        (path, name, type(part), tuple((own, tuple(p.shape)) for own, p in part.named_parameters()))
        for path, name, part in placements
    )
    return None if structure is None else (structure, parts)


def for_want_of_numbers(error: Exception) -> bool:
    """Say whether an error comes from the meta device, and not from what runs on it."""
    return isinstance(error, NotImplementedError) or "meta" in str(error).lower()


UNCHANGED: dict[str, Callable[..., Any]] = {
    "before": lambda host, args, kwargs: (args, kwargs),
    "after": lambda host, args, kwargs, output, base: output,
    "value": lambda stored: stored,
}


def guarded(
    method: Callable[..., Any],
    unchanged: Callable[..., Any],
    path: str,
    failed: dict[str, Exception],
    untold: list[Exception],
    recorded: list[bool],
) -> Any:
    """Return a part's method that notes its error, and then leaves what it was given unchanged.

    It also notes whether autograd recorded anything: a module may compute under `no_grad`.
    """

    def run(*args: Any) -> Any:
        try:
            found = method(*args)
            graph = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(found))
            recorded.append(graph and torch.is_grad_enabled())
            return found
        except Exception as error:
            if for_want_of_numbers(error):
                untold.append(error)
            else:
                failed.setdefault(path, error)
            return unchanged(*args)

    return run


def gets_gradients(output: Any, parameters: list[nn.Parameter]) -> bool:
    """Say whether one of these parameters gets a gradient of an output."""
    leaves = [leaf for leaf in tree_leaves(dict(output) if hasattr(output, "items") else output)
              if isinstance(leaf, Tensor) and leaf.requires_grad]  # fmt: skip
    if not leaves or not parameters:
        return not parameters
    try:
        found = torch.autograd.grad([leaf.sum() for leaf in leaves], parameters, allow_unused=True)
    except Exception:  # not every operation has a backward pass without numbers
        return True
    return any(gradient is not None for gradient in found)
