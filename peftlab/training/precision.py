"""The precision that a device computes in during training."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from peftlab.checks import one_of
from peftlab.errors import PeftLabError

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(wish: str, device: torch.device, model: nn.Module | None = None) -> str:
    """Return `"fp32"`, `"bf16"` or `"fp16"` for a device; `"auto"` chooses what suits the device and the model.

    A CPU computes in the model's own dtype, without autocast. A GPU that computes in bf16 gets bf16 autocast. Another
    one, such as a T4, gets fp16 autocast with a loss scale. `torch.cuda.is_bf16_supported()` alone cannot tell them
    apart: it is true on a T4, which only emulates bf16. A model with weights in float64 computes without autocast. It
    would leave them as they are, and a product of float64 and 16 bits is an error.

    Raises:
        PeftLabError: an unknown precision, or one that the device or the model does not have.
    """
    one_of("precision", wish, ("auto", *AUTOCAST))
    parameters = () if model is None else model.named_parameters()
    wide = next((name for name, p in parameters if p.ndim > 1 and p.dtype == torch.float64), None)
    if wide is not None:
        if wish in ("auto", "fp32"):
            return "fp32"
        raise PeftLabError(
            f"precision={wish!r} computes in 16 bits by autocast, which leaves float64 as it is. {wide} is float64. "
            "Use precision='fp32', in which each module computes in its own dtype, or load the model in float32."
        )
    real_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if wish == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if real_bf16 else "fp16"
    if wish == "bf16" and not real_bf16:
        name = torch.cuda.get_device_name(device)
        raise PeftLabError(f"{name} only emulates bf16, slowly; use precision='fp16' or 'auto'.")
    if wish == "fp16" and device.type != "cuda":
        raise PeftLabError(f"precision='fp16' needs a CUDA GPU, and the model is on {device}; use 'fp32' or 'bf16'.")
    return wish


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return the autocast of this precision. Under `"fp32"` each module computes in its own dtype, even in half."""
    dtype = AUTOCAST[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def check_trainable_dtypes(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse parameters to train that are on the meta device or float16.

    In float16 their updates are about 1e-4 of a weight, so rounding removes them. And torch cannot undo a loss scale on
    their gradients: it raises "Attempting to unscale FP16 gradients".
    """
    named = list(parameters)
    empty = [name for name, parameter in named if parameter.is_meta]
    if empty:
        raise PeftLabError(
            f"{len(empty)} trainable parameters are on the meta device and have no values (first: {empty[0]}). Load "
            "the model on a real device, such as cpu or cuda."
        )
    half = [name for name, parameter in named if parameter.dtype == torch.float16]
    if half:
        raise PeftLabError(
            f"{len(half)} trainable parameters are float16 (first: {half[0]}), in which updates are lost. Keep them in "
            "float32: attach the adapter with adapter_dtype=torch.float32 (the base may stay float16), or load the "
            "model with dtype=torch.float32 and let precision='fp16' do the casting."
        )
