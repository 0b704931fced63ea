"""Switch gradient checkpointing on for a while, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from peftlab.core.records import as_transformer, unwrap
from peftlab.errors import PeftLabError

LAYER = "GradientCheckpointingLayer"  # transformers' class of blocks that are computed again one by one


@contextmanager
def memory_settings(model: nn.Module, checkpointing: bool | str | int) -> Iterator[None]:
    """Set the model up for training inside the block: no key-value cache, and gradient checkpointing if asked for.

    Args:
        checkpointing: True for the non-reentrant kind; `"reentrant"` for the older one. Under a frozen embedding the
            layers of the older kind learn nothing unless the embedding's output requires gradients, so this turns that
            on. A number computes so many blocks again, the first ones; the others keep their activations. A model
            whose checkpointing is on already keeps its own kind.

    Raises:
        PeftLabError: the model offers no checkpointing, or not for some of its blocks, or it has fewer.
    """
    core = unwrap(model)
    config: Any = getattr(core, "config", None)
    cache = getattr(config, "use_cache", None)
    if cache is not None:
        config.use_cache = False  # the key-value cache helps only generation, and checkpointing forbids it
    switched = bool(checkpointing) and not any(getattr(m, "gradient_checkpointing", False) for m in core.modules())
    reentrant = checkpointing == "reentrant"
    kept = [] if isinstance(checkpointing, (bool, str)) else _blocks_after(core, checkpointing)
    required_before = _inputs_require_gradients(core)
    try:
        if switched:
            switch_checkpointing(core, "enable", {"use_reentrant": reentrant})
            for block in kept:
                vars(block)["gradient_checkpointing"] = False
            # Only the reentrant kind needs inputs that require gradients. transformers turns that on for both kinds,
            # and then the backward pass also runs through every frozen layer below the first adapter.
            if not required_before:
                set_input_gradients(core, reentrant)
        yield
    finally:
        if cache is not None:
            config.use_cache = cache
        if switched and any(getattr(m, "gradient_checkpointing", False) for m in core.modules()):
            switch_checkpointing(core, "disable")
            if not required_before:
                set_input_gradients(core, False)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that transformers can compute again one by one, in their order; none for an older model."""
    return [m for m in model.modules() if any(one.__name__ == LAYER for one in type(m).__mro__)]


def _blocks_after(model: nn.Module, count: int) -> list[nn.Module]:
    blocks = blocks_of(model)
    if count > len(blocks):
        raise PeftLabError(
            f"checkpointing={count}, and {type(model).__name__} has {len(blocks)} blocks that can be computed again "
            "one by one. Pass True for all there is."
        )
    return blocks[count:]


def switch_checkpointing(model: nn.Module, verb: str, *arguments: dict) -> None:
    # newer versions of transformers call it activation checkpointing and warn about the old name
    for name in (f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}"):
        if hasattr(model, name):
            try:
                return getattr(model, name)(*arguments)
            except ValueError as error:
                raise PeftLabError(f"{type(model).__name__} cannot checkpoint gradients: {error}") from error
    raise PeftLabError(
        f"{type(model).__name__} offers no gradient checkpointing (it is no transformers model). Pass "
        "checkpointing=False and call torch.utils.checkpoint in its forward."
    )


def _inputs_require_gradients(model: nn.Module) -> bool:
    return bool(getattr(model, "_require_grads_hooks", None) or getattr(model, "_require_grads_hook", None))


def set_input_gradients(model: nn.Module, wanted: bool) -> None:
    """Turn the gradients of a transformers model's embedded inputs on or off, unless they are so already."""
    if wanted and not _inputs_require_gradients(model):
        as_transformer(model).enable_input_require_grads()
    elif not wanted and _inputs_require_gradients(model):
        as_transformer(model).disable_input_require_grads()
