"""What a device computes in while it trains, and gradient checkpointing that leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from ..errors import PeftLabError
from ..records import unwrap

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(wish: str, device: torch.device) -> str:
    """``"fp32"``, ``"bf16"`` or ``"fp16"`` for a device; ``"auto"`` asks the device what it has.

    A CPU computes in the model's own dtype, without autocast. A GPU with real bf16 gets bf16 autocast. One without, a
    T4 for example, gets fp16 autocast with a loss scale; ``torch.cuda.is_bf16_supported()`` alone says yes there,
    because it counts emulation.

    Raises:
        PeftLabError: no such precision, or one that the device cannot do.
    """
    if wish != "auto" and wish not in AUTOCAST:
        raise PeftLabError(f"precision is 'auto', 'fp32', 'bf16' or 'fp16', not {wish!r}.")
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
    """Autocast of this precision; under ``"fp32"`` everything computes in the dtype it has (half stays half)."""
    dtype = AUTOCAST[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def check_trainable_dtypes(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse float16 parameters to train.

    Their updates, about 1e-4 of a weight, round to nothing, and a loss scale cannot be taken off their gradients: torch
    says "Attempting to unscale FP16 gradients".
    """
    half = [name for name, parameter in parameters if parameter.dtype == torch.float16]
    if half:
        raise PeftLabError(
            f"{len(half)} trainable parameters are float16 (first: {half[0]}), in which updates are lost. Keep them in "
            "float32: attach the adapter with adapter_dtype=torch.float32 (the base may stay float16), or load the "
            "model with dtype=torch.float32 and let precision='fp16' do the casting."
        )


@contextmanager
def memory_settings(model: nn.Module, checkpointing: bool | str) -> Iterator[None]:
    """Training's memory settings for a while: no key-value cache, and gradient checkpointing if asked for.

    Args:
        checkpointing: True for the non-reentrant kind; ``"reentrant"`` for the older one, whose layers learn nothing
            under a frozen embedding unless its output is made to require gradients, which is done here. A model whose
            checkpointing is on already keeps its own kind.

    Raises:
        PeftLabError: the model offers no checkpointing.
    """
    core = unwrap(model)
    config = getattr(core, "config", None)
    cache = getattr(config, "use_cache", None)
    if cache is not None:
        config.use_cache = False  # a cache of keys and values serves generation alone, and checkpointing forbids it
    switched = bool(checkpointing) and not any(getattr(m, "gradient_checkpointing", False) for m in core.modules())
    reentrant = checkpointing == "reentrant"
    required_before = _inputs_require_gradients(core)
    try:
        if switched:
            switch_checkpointing(core, "enable", {"use_reentrant": reentrant})
            # Only the reentrant kind needs inputs that require gradients. transformers asks for them in both, and the
            # backward pass would then run through every frozen layer below the first adapter.
            if not required_before:
                _require_input_gradients(core, reentrant)
        yield
    finally:
        if cache is not None:
            config.use_cache = cache
        if switched and any(getattr(m, "gradient_checkpointing", False) for m in core.modules()):
            switch_checkpointing(core, "disable")
            if not required_before:
                _require_input_gradients(core, False)


def _inputs_require_gradients(model: nn.Module) -> bool:
    return bool(getattr(model, "_require_grads_hooks", None) or getattr(model, "_require_grads_hook", None))


def _require_input_gradients(model: nn.Module, wanted: bool) -> None:
    if wanted and not _inputs_require_gradients(model):
        model.enable_input_require_grads()
    elif not wanted and _inputs_require_gradients(model):
        model.disable_input_require_grads()


def switch_checkpointing(model: nn.Module, verb: str, *arguments: dict) -> None:
    # newer transformers call it activation checkpointing and warn about the old names
    for name in (f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}"):
        if hasattr(model, name):
            try:
                return getattr(model, name)(*arguments)
            except ValueError as error:
                raise PeftLabError(f"{type(model).__name__} cannot checkpoint gradients: {error}") from error
    raise PeftLabError(
        f"{type(model).__name__} offers no gradient checkpointing (it is no transformers model); pass "
        "checkpointing=False and call torch.utils.checkpoint in its forward."
    )
