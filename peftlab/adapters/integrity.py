"""Check whether an adapter belongs to this base, by a sample of its weights. Sums are the business of `core.sums`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from peftlab.core.hooks import base_modules
from peftlab.core.records import record_of
from peftlab.core.sharding import whole
from peftlab.errors import PeftLabError
from peftlab.foreign import parse
from peftlab.quantization.weights import dense, is_quantized

REST = "peftlab_rest"  # names in a folder's metadata the numbers of a base that was quantised together with the adapter


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
            # of a sharded weight no more than 8 columns are gathered
            sample[path] = whole(weight.detach()[..., :8]).flatten()[:8].float().tolist()
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
        sample = parse(metadata.get("peftlab_base", "{}"), "the sample")
        saved = {path: torch.tensor(values) for path, values in sample.items()}
    except (PeftLabError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError):
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


def rest_sample(root: nn.Module, paths: Iterable[str]) -> dict[str, list[float]]:
    """Return the first 8 numbers of the first 8 of these modules' weights; codes are read as the numbers they mean."""
    sample = {}
    for path in sorted(paths)[:8]:
        weight = base_tensor(root, path, "weight")
        if weight is not None and weight.device.type != "meta":
            plain = dense(weight, torch.float32) if is_quantized(weight) else whole(weight.detach())
            sample[path] = plain.flatten()[:8].float().tolist()
    return sample


def check_rest(root: nn.Module, folder: Path, metadata: Mapping[str, str]) -> list[str]:
    """Require the base that was quantised together with a LoftQ or QPiSSA adapter, and return the modules compared.

    An adapter that was not made so fits the base in any precision, and is not looked at.
    """
    try:
        sample = parse(metadata.get(REST, "{}"), "the sample")
        saved = {path: torch.tensor(values, dtype=torch.float32) for path, values in sample.items()}
    except (PeftLabError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError):
        raise PeftLabError(
            f"The sample of the quantised base in {folder} is damaged; save the adapter again."
        ) from None
    modules = base_modules(root)
    found = {path: torch.tensor(values) for path, values in rest_sample(root, saved.keys() & modules.keys()).items()}
    for path, values in found.items():
        if saved[path].shape == values.shape and not torch.allclose(saved[path], values, rtol=0.01, atol=1e-6):
            raise PeftLabError(
                f"The adapter in {folder} and its base in four bits were made together (LoftQ, QPiSSA), and the "
                f"weights of {path} are others here. Load the base that save_quantized wrote beside it, "
                "with load_quantized."
            )
    return list(found)
