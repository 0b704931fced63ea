"""Sums over a folder's tensors and config, kept in the metadata of its safetensors file: is it whole, does it belong?

Adapter folders and 4-bit folders carry the same sums. Hugging Face's libraries pass over them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftlab.errors import PeftLabError

TENSORS, CONFIG, REST = "peftlab_tensors", "peftlab_config", "peftlab_metadata"


def with_sums(
    tensors: Mapping[str, Tensor], fields: Mapping[str, Any], metadata: Mapping[str, str], free: Iterable[str] = ()
) -> dict[str, str]:
    """Return a file's metadata with the sums of its tensors, of the config beside it and of the metadata itself.

    Args:
        free: fields of the config that may be edited later.
    """
    sums = {TENSORS: digest(tensors), CONFIG: config_digest(fields, free)}
    return {**metadata, **sums, REST: config_digest({**metadata, **sums})}


def check_sums(
    config_file: Path,
    file: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    free: Iterable[str] = (),
    codes: Iterable[str] = (),
) -> bool:
    """Compare with the sums that were saved, and refuses values that are not finite; says whether there were sums.

    Args:
        free: fields of the config that may be edited.
        codes: tensors that hold codes, whatever their dtype says.

    Raises:
        PeftLabError: the file was changed, it and the config were not saved together, or a value is not finite.
    """
    changed = f"{file} was changed after it was saved: its SHA-256 sum differs. Fetch it or save it again."
    there = metadata.keys() & {TENSORS, CONFIG, REST}
    if there and not {TENSORS, CONFIG} <= there:
        raise PeftLabError(changed)
    if there and metadata[TENSORS] != digest(tensors):
        raise PeftLabError(changed)
    if there and metadata[CONFIG] != config_digest(fields, free):
        raise PeftLabError(
            f"{config_file} and {file.name} were not saved together: one was copied from elsewhere, or the config "
            "edited. Save both again."
        )
    if REST in there and metadata[REST] != config_digest({n: v for n, v in metadata.items() if n != REST}):
        raise PeftLabError(changed)
    for key in tensors.keys() - {*codes}:
        tensor = tensors[key]
        if tensor.is_floating_point() and not finite(tensor):
            raise PeftLabError(f"{key} in {file} holds values that are not finite.")
    return bool(there)


def finite(tensor: Tensor) -> bool:
    """Say whether a floating tensor holds neither NaN nor infinity; eight-bit floats are looked at as float32."""
    return bool(torch.isfinite(tensor if tensor.itemsize > 1 else tensor.float()).all())


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 sum of names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def config_digest(fields: Mapping[str, Any], free: Iterable[str] = ()) -> str:
    """Return the SHA-256 sum of a config's fields but for the `free` ones, which may be edited."""
    free = set(free)
    decisive = {name: value for name, value in fields.items() if name not in free}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
