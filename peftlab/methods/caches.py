"""Find the cache in a model's call, and say how much of the text it holds already.

A prompt or a prefix enters a generation once, with the first tokens. At every later step it is in the cache, and adding
it again would give wrong text. So the cache must be found. transformers 5.24 renamed its argument from
`past_key_values` to `cache`, and some models had names of their own before. A cache is therefore found by any of these
names or, under an unknown name, by what it can do. If it cannot be found, or if the call does not fit what the cache
holds, there is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from peftlab.errors import PeftLabError

# The names of the cache in the forward methods of transformers: since version 5.24; before it; before it in Mamba;
# before version 5 in GPT-J.
NAMES = ("cache", "past_key_values", "cache_params", "layer_past")


def cache_argument(module: nn.Module) -> str | None:
    """Return the name under which a module's forward takes a cache; None if it takes none."""
    parameters = inspect.signature(type(module).forward).parameters
    return next((name for name in NAMES if name in parameters), None)


def cache_name(model: nn.Module) -> str | None:
    """Return the name under which a model's call hands a cache to its layers; None if no layer takes one.

    A model with a head need not name it itself: BERT's classifier passes on what it does not know.
    """
    return next(filter(None, map(cache_argument, model.modules())), None)


def is_cache(value: Any) -> bool:
    """Say whether a value acts as a cache of transformers."""
    return hasattr(value, "get_seq_length")


def cache_in(values: Iterable[Any]) -> Any:
    """Return the cache among some inputs, whatever the argument is called; None if there is none."""
    return next((value for value in values if is_cache(value)), None)


def given_cache(kwargs: Mapping[str, Any]) -> Any:
    """Return the cache that a call was given; None if it was given none.

    Raises:
        PeftLabError: the cache has no room for virtual tokens: its length is fixed, or it is an old tuple.
    """
    named = next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)
    cache = cache_in(kwargs.values()) if named is None else named
    if cache is None:
        return None
    if not is_cache(cache) or (getattr(cache, "is_compileable", False) and not only_states(cache)):
        raise PeftLabError(
            f"The cache is a {type(cache).__name__}, which has no room for virtual tokens. Generate with a dynamic "
            "cache (cache_implementation='dynamic', the default)."
        )
    return cache


def only_states(cache: Any) -> bool:
    """Say whether a cache holds states of a fixed size (Mamba's) and no keys and values, so that it has no length."""
    layers = getattr(cache, "layers", None) or []
    return bool(layers) and not any(hasattr(layer, "keys") for layer in layers)


def begins(cache: Any, tokens: int, mask: Any, count: int) -> bool:
    """Say whether a call reads the beginning of a text, so that `count` virtual tokens belong in front of it.

    Args:
        cache: what `given_cache` found.
        tokens: how many tokens the call reads.
        mask: its attention mask (b, t) without the virtual tokens, or None. It covers all tokens read so far.
        count: the number of virtual tokens.

    Raises:
        PeftLabError: the mask covers more or fewer tokens than the cache and the call hold together. That happens when
            the model keeps its cache where we do not look for it, and when a cache was filled without the prompt.
    """
    if cache is not None and only_states(cache):
        if cache.has_previous_state():
            return False
        held = 0
    else:
        held = 0 if cache is None else cache.get_seq_length()
    before = held - count if held else 0  # tokens of the text that the cache holds
    if mask is not None and getattr(mask, "ndim", 0) == 2 and mask.shape[1] != before + tokens:
        where = f"a cache of {held} positions" if held else "no filled cache"
        raise PeftLabError(
            f"This call reads {tokens} tokens with {where}, but its attention mask covers {mask.shape[1]} tokens; with "
            f"{count} virtual tokens it should cover {before + tokens}. If you generate step by step, fill the cache "
            "with the adapter active and pass the mask of the whole text. If model.generate() made this call, this "
            "release of transformers passes its cache in a way that peftlab does not know: generate with "
            "use_cache=False, and please report it."
        )
    return held == 0


def require_cache_argument(model: nn.Module) -> None:
    """Refuse a model that generates text but takes no cache under a known name.

    Such a model would read its prompt again at each step.

    Raises:
        PeftLabError: the model is such a model.
    """
    generates = getattr(model, "can_generate", None)
    if generates is None or not generates() or cache_argument(model) is not None:
        return
    parameters = inspect.signature(type(model).forward).parameters
    if "input_ids" not in parameters:  # a wrapper that passes everything on; its cache is found by what it can do
        return
    raise PeftLabError(
        f"{type(model).__name__}.forward takes no cache under a name that peftlab knows ({', '.join(NAMES)}); it takes "
        f"{', '.join(name for name in parameters if name != 'self')}. A prompt would be read again at each generated "
        "token, and the text would be wrong. Use lora, ia3 or adapters with this model."
    )
