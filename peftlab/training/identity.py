"""Whether two runs are the same run: their settings, data and model.

Every checkpoint stores the identity of its run. A run continues from a checkpoint only if the identities are equal; if
not, the differences are named before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

EXAMPLES_LOOKED_AT = 1000
ELEMENTS_LOOKED_AT = 16


def run_identity(
    settings: dict[str, Any], model: nn.Module, train_data: Sequence, evaluation_data: Sequence | None
) -> dict[str, Any]:
    """Return the identity as plain values that JSON gives back unchanged."""
    trainable = {n: [str(p.dtype), *p.shape] for n, p in model.named_parameters() if p.requires_grad}
    identity = {
        "settings": settings,
        "training data": data_digest(train_data),
        "evaluation data": None if evaluation_data is None else data_digest(evaluation_data),
        "trainable parameters": trainable,
        "frozen parameters": frozen_digest(model),
    }
    return json.loads(json.dumps(identity))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return each difference as a short phrase, such as `"learning_rate was 0.001 and is 0.002"`."""
    found = []
    old, new = before.get("settings", {}), now["settings"]
    for key in sorted(set(old) | set(new)):
        if old.get(key) != new.get(key):
            found.append(f"{key} was {old.get(key)!r} and is {new.get(key)!r}")
    for key in ("training data", "evaluation data"):
        was, is_now = before.get(key), now[key]
        if was != is_now:
            counts = [0 if data is None else data["examples"] for data in (was, is_now)]
            sizes = "" if counts[0] == counts[1] else f" ({counts[0]} examples then, {counts[1]} now)"
            found.append(f"the {key} is different{sizes}")
    was, is_now = before.get("trainable parameters", {}), now["trainable parameters"]
    changed = [name for name in {**was, **is_now} if was.get(name) != is_now.get(name)]
    if changed:
        first = changed[0]
        found.append(
            f"{len(changed)} trainable parameters differ, the first being {first} "
            f"({_shape(was.get(first))} then, {_shape(is_now.get(first))} now)"
        )
    elif before.get("frozen parameters") != now["frozen parameters"]:
        found.append("the frozen base model is a different one")
    return found


def data_digest(data: Sequence) -> dict[str, Any]:
    """Return the number of examples and a hash of at most 1,000 of them, evenly spread."""
    count = len(data)
    hasher = hashlib.sha256(str(count).encode())
    for place in range(min(count, EXAMPLES_LOOKED_AT)):
        example = data[place * count // min(count, EXAMPLES_LOOKED_AT)]
        hasher.update(json.dumps(_plain(example), sort_keys=True).encode())
    return {"examples": count, "sha256": hasher.hexdigest()}


def frozen_digest(model: nn.Module) -> str:
    """Return a hash of the frozen parameters' names and shapes, and of 16 elements of each, evenly spread.

    Reading every weight of a large base may take longer than the run. Two different bases differ in these elements too.
    """
    hasher = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            flat = parameter.detach().reshape(-1)
            places = [i * flat.numel() // ELEMENTS_LOOKED_AT for i in range(min(flat.numel(), ELEMENTS_LOOKED_AT))]
            values = flat[torch.tensor(places, dtype=torch.long)].tolist()
            hasher.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {values}".encode())
    return hasher.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a tensor or an array
        return value.tolist()
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def _shape(entry: list | None) -> str:
    return "absent" if entry is None else f"{entry[0].removeprefix('torch.')} {tuple(entry[1:])}"
