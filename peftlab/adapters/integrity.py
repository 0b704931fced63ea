"""Check whether an adapter's files are whole, belong together and belong to this base: by sums and samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.core.hooks import base_modules
from peftlab.core.records import record_of
from peftlab.errors import PeftLabError


def check_integrity(
    config_file: Path, file: Path, fields: Mapping, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Compare the files with the sums saved in them, if there are any, and refuse values that are not finite."""
    if "peftlab_tensors" in metadata and metadata["peftlab_tensors"] != digest(tensors):
        raise PeftLabError(
            f"{file} was changed after it was saved: its SHA-256 sum differs. Save or download the adapter again."
        )
    if "peftlab_config" in metadata and metadata["peftlab_config"] != config_digest(fields):
        raise PeftLabError(
            f"{config_file} and {file.name} were not saved together: a save was interrupted, or the config edited. "
            "Save the adapter again."
        )
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise PeftLabError(f"{key} in {file} holds values that are not finite; use another checkpoint.")


def base_sample(root: nn.Module, paths: Iterable[str], copied: Iterable[str] = ()) -> dict[str, list[float]]:
    """Return a few of the base's weights, to recognise it by: 8 numbers of each of 8 adapted modules.

    An adapter on the model itself adapts all modules. Some adapted modules hold no matrix: a whole block does not, nor
    does a norm, whose weights are often ones. If none holds one, modules are taken from the whole model. Modules
    replaced by a trained copy (`copied`) are skipped: a task head gets new random weights at every load, so it cannot
    identify the base.
    """
    copied = tuple(copied)
    paths = {path for path in paths if not _within(path, copied)}
    matrices = {path for path, module in base_modules(root).items() if _matrix(module) and not _within(path, copied)}
    return weights_at(root, paths & matrices or matrices)


def weights_at(root: nn.Module, paths: Iterable[str]) -> dict[str, list[float]]:
    """Return the first 8 weights of the first 8 of these modules."""
    sample = {}
    for path in sorted(paths)[:8]:
        weight = base_tensor(root, path, "weight")
        # A quantised weight is skipped: its packed codes cannot be compared with the same weight in another dtype.
        if weight is not None and weight.is_floating_point() and weight.device.type != "meta":
            sample[path] = weight.detach().flatten()[:8].float().tolist()
    return sample


def _matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() > 1


def _within(path: str, others: Iterable[str]) -> bool:
    return any(path == other or path.startswith(other + ".") for other in others)


def base_tensor(root: nn.Module, path: str, name: str) -> Tensor | None:
    """Return a parameter of the base as it is without adapters, also while the model is merged."""
    record = record_of(root)
    kept = record.backup.get(path, {}) if record else {}
    # the copy of a quantised weight starts with its codes
    value = kept[name][0] if name in kept else getattr(root.get_submodule(path), name, None)
    return value if isinstance(value, Tensor) else None


def check_base(root: nn.Module, folder: Path, metadata: Mapping[str, str], model_name: str) -> None:
    """Compare the base with the sample saved beside the adapter, up to the rounding of 16-bit dtypes."""
    try:
        saved = {path: torch.tensor(values) for path, values in json.loads(metadata.get("peftlab_base", "{}")).items()}
    except (ValueError, TypeError, AttributeError):
        raise PeftLabError(
            f"The sample of the base's weights in {folder} is damaged; save the adapter again."
        ) from None
    modules = base_modules(root)
    for path, values in weights_at(root, (path for path in saved if path in modules)).items():
        expected, found = saved[path], torch.tensor(values)
        # bf16 keeps 8 bits: two roundings of one number differ by less than 1%
        if expected.shape == found.shape and not torch.allclose(expected, found, rtol=0.01, atol=1e-6):
            raise PeftLabError(
                f"The adapter in {folder} was trained on another base: the weights of {path} differ. "
                f"This model is {model_name!r}; load the base that the adapter was trained on."
            )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 sum of names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def config_digest(fields: Mapping[str, Any]) -> str:
    """Return the SHA-256 sum of the fields that decide what the adapter computes.

    The path of its base, for example, may change freely.
    """
    free = ("base_model_name_or_path", "inference_mode", "revision", "peft_version")
    decisive = {name: value for name, value in fields.items() if name not in free}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
