"""Look inside a transformers model: find its blocks and attention modules, and what they compute for a few tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftlab.core.hooks import base_alone, base_modules
from peftlab.core.modes import mode
from peftlab.core.records import as_transformer
from peftlab.errors import PeftLabError
from peftlab.methods.caches import cache_argument, cache_name
from peftlab.methods.virtual import is_encoder_decoder


class Attention(NamedTuple):
    """Hold the sizes of a model's keys and values: blocks, key/value heads in each, and the width of a head."""

    layers: int
    heads: int
    width: int


def attention_of(model: nn.Module) -> Attention:
    """Return the sizes of a model's keys and values (of its decoder's, in an encoder-decoder).

    Raises:
        PeftLabError: layers have different sizes, or the config does not say them.
    """
    whole = as_transformer(model).config
    config = whole.get_text_config() if hasattr(whole, "get_text_config") else whole

    def first(*names: str) -> int | None:
        return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)

    if any(config.to_dict().get(name) for name in ("per_layer_config", "global_head_dim")):
        raise PeftLabError(
            f"The layers of {type(model).__name__} have keys and values of different sizes, so there is no one prefix "
            "for them. Use prompt tuning, or lora."
        )
    if first("qk_nope_head_dim") is not None:
        raise PeftLabError(
            f"{type(model).__name__} makes keys and values of different widths from one narrow vector, so there is no "
            "one prefix for them. Use prompt tuning, or lora."
        )
    if is_encoder_decoder(model):
        layers = first("num_decoder_layers", "decoder_layers", "num_hidden_layers")
        heads = first("decoder_attention_heads", "num_heads", "num_attention_heads")
    else:
        layers = first("decoder_layers", "num_hidden_layers")  # a decoder alone may have the config of both halves
        heads = first("num_key_value_heads", "decoder_attention_heads", "num_attention_heads")
        if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
            heads = 1
    queries, hidden = first("decoder_attention_heads", "num_attention_heads"), first("hidden_size", "d_model")
    width = first("head_dim", "d_kv") or (hidden // queries if hidden and queries else None)
    if not (layers and heads and width):
        raise PeftLabError(
            f"The config of {type(model).__name__} does not say how many layers and heads it has and how wide they "
            "are. Use prompt tuning, or lora."
        )
    return Attention(layers, heads, width)


def blocks(stack: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks of a stack, or [] if none are found.

    They are the outermost list with as many modules as the config has layers.
    """
    layers = getattr(stack.config, "num_hidden_layers", None) or getattr(stack.config, "num_layers", None)
    lists = {path: m for path, m in base_modules(stack).items() if isinstance(m, nn.ModuleList) and len(m) == layers}
    return list(lists[min(lists, key=lambda path: path.count("."))]) if lists else []


def attentions(stack: nn.Module) -> dict[int, str]:
    """Return {layer: path of its self-attention module that takes a cache}.

    In a block, cross-attention comes after self-attention, so the first module found is the one.
    """
    found: dict[int, str] = {}
    for path, module in base_modules(stack).items():
        index = getattr(module, "layer_idx", None)
        innermost = cache_argument(module) and not any(cache_argument(child) for child in module.children())
        if isinstance(index, int) and innermost:
            found.setdefault(index, path)
    return found


def states_of(model: nn.Module, stack: nn.Module, found: list[nn.Module], tokens: Tensor) -> list[Tensor]:
    """Return what enters each block when the base alone reads some tokens: tensors (n, d)."""
    seen: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach().clone()), prepend=True)
        for block in found
    ]
    try:
        with quietly(model):
            stack(input_ids=tokens[None])
    finally:
        for handle in handles:
            handle.remove()
    return seen


def keys_and_values(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the keys and values that the base alone computes for some tokens: (n, 2 L k), as a prefix is stored.

    In an encoder-decoder both halves read the tokens: the encoder as its text, the decoder as the beginning of its
    answer.
    """
    cache = new_cache(model, whole=True)
    name = cache_name(model)
    assert name is not None  # a model that takes no cache has been refused
    inputs: dict[str, Any] = {"input_ids": tokens[None], name: cache}
    if is_encoder_decoder(model):
        inputs["decoder_input_ids"] = tokens[None]
    with quietly(model):
        model(**inputs)
    layers = own_cache(cache).layers
    pairs = [tensor[0] for layer in layers for tensor in (layer.keys, layer.values)]
    if len({pair.shape for pair in pairs}) > 1:
        raise PeftLabError(
            f"The keys and values of {type(model).__name__} have different sizes, so there is no one prefix for them. "
            "Use prompt tuning, or lora."
        )
    # (2 L, heads, n, width) -> (n, 2 L, heads, width)
    return torch.stack(pairs).permute(2, 0, 1, 3).flatten(1).detach().clone()


def new_cache(model: nn.Module, whole: bool = False) -> Any:
    """Return an empty cache of the kind that the model's decoder takes.

    Args:
        whole: also keep the tokens that a sliding window has passed.
    """
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    if is_encoder_decoder(model):
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    whole_config = as_transformer(model).config
    config = whole_config.get_text_config() if hasattr(whole_config, "get_text_config") else whole_config
    # the config says which layers see only a window; an encoder's cache has no such layers
    return DynamicCache(config=config) if getattr(config, "sliding_window", None) and not whole else DynamicCache()


def only_attention(model: nn.Module) -> bool:
    """Say whether every layer keeps keys and values. Layers such as Mamba's keep states instead.

    In most models the config says so. If it does not, the kind of the layers of an empty cache does.
    """
    from transformers.cache_utils import DynamicCache

    config = as_transformer(model).config.get_text_config(decoder=True)
    named = (getattr(config, name, None) for name in ("layer_types", "layers_block_type", "block_types"))
    if not all("attention" in kind and "linear" not in kind for kinds in named for kind in kinds or ()):
        return False
    return all(hasattr(layer, "keys") for layer in DynamicCache(config=config).layers)


def windows(model: nn.Module) -> dict[int, int]:
    """Return {layer: width of its window} for the layers that see only a window of the text."""
    layers = own_cache(new_cache(model)).layers
    return {index: layer.sliding_window for index, layer in enumerate(layers) if getattr(layer, "is_sliding", False)}


def own_cache(cache: Any) -> Any:
    """Return the part of a cache that self-attention uses."""
    return getattr(cache, "self_attention_cache", cache)


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Run the base alone inside the block, in eval mode and without gradients."""
    with base_alone(model), mode(model, False), torch.no_grad():
        yield
