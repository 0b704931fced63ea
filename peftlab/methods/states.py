"""Inside a transformers model: its blocks, its attention modules, and what they compute for a few tokens."""

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
    """The sizes of a model's keys and values: blocks, key/value heads in each, and the width of a head."""

    layers: int
    heads: int
    width: int


def attention_of(model: nn.Module) -> Attention:
    """The sizes of the keys and values of a model that reads on (of the decoder, where there is an encoder apart).

    Raises:
        PeftLabError: layers of different sizes, or a config that does not tell them.
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
    if is_encoder_decoder(model):
        layers = first("num_decoder_layers", "decoder_layers", "num_hidden_layers")
        heads = first("decoder_attention_heads", "num_heads", "num_attention_heads")
    else:
        layers = first("num_hidden_layers")
        heads = first("num_key_value_heads", "num_attention_heads")
        if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
            heads = 1
    queries, hidden = first("decoder_attention_heads", "num_attention_heads"), first("hidden_size", "d_model")
    width = first("head_dim", "d_kv") or (hidden // queries if hidden and queries else None)
    if not (layers and heads and width):
        raise PeftLabError(f"The config of {type(model).__name__} does not tell its layers, heads and width.")
    return Attention(layers, heads, width)


def blocks(stack: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a stack: the outermost list of as many modules as its config has layers, if any."""
    layers = getattr(stack.config, "num_hidden_layers", None) or getattr(stack.config, "num_layers", None)
    lists = {path: m for path, m in base_modules(stack).items() if isinstance(m, nn.ModuleList) and len(m) == layers}
    return list(lists[min(lists, key=lambda path: path.count("."))]) if lists else []


def attentions(stack: nn.Module) -> dict[int, str]:
    """The paths of the self-attention modules that take a cache, by layer; cross-attention comes after in a block."""
    found: dict[int, str] = {}
    for path, module in base_modules(stack).items():
        index = getattr(module, "layer_idx", None)
        innermost = cache_argument(module) and not any(cache_argument(child) for child in module.children())
        if isinstance(index, int) and innermost:
            found.setdefault(index, path)
    return found


def states_of(model: nn.Module, stack: nn.Module, found: list[nn.Module], tokens: Tensor) -> list[Tensor]:
    """What enters each block when the base reads some tokens alone: tensors (n, d)."""
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
    """The keys and values that the base computes for some tokens alone: (n, 2 L k), as a prefix is stored.

    An encoder-decoder's decoder has them as its own beginning, and reads them through its encoder as well.
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
    # (2 L, heads, n, width) -> (n, 2 L, heads, width)
    return torch.stack(pairs).permute(2, 0, 1, 3).flatten(1).detach().clone()


def new_cache(model: nn.Module, whole: bool = False) -> Any:
    """An empty cache of the kind that the model's decoder takes; a whole one keeps what has left a sliding window."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    if is_encoder_decoder(model):
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    whole_config = as_transformer(model).config
    config = whole_config.get_text_config() if hasattr(whole_config, "get_text_config") else whole_config
    # the config tells which layers see only a window; an encoder's cache has no such layers
    return DynamicCache(config=config) if getattr(config, "sliding_window", None) and not whole else DynamicCache()


def only_attention(model: nn.Module) -> bool:
    """Say whether every layer keeps keys and values; those of Mamba and its like keep states instead.

    The config says so in most models. Where it does not, the kind of the layers of an empty cache does.
    """
    from transformers.cache_utils import DynamicCache

    config = as_transformer(model).config.get_text_config(decoder=True)
    named = (getattr(config, name, None) for name in ("layer_types", "layers_block_type", "block_types"))
    if not all("attention" in kind and "linear" not in kind for kinds in named for kind in kinds or ()):
        return False
    return all(hasattr(layer, "keys") for layer in DynamicCache(config=config).layers)


def windows(model: nn.Module) -> dict[int, int]:
    """The layers that see only a window of the text, and how wide it is."""
    layers = own_cache(new_cache(model)).layers
    return {index: layer.sliding_window for index, layer in enumerate(layers) if getattr(layer, "is_sliding", False)}


def own_cache(cache: Any) -> Any:
    """The part of a cache that self-attention uses."""
    return getattr(cache, "self_attention_cache", cache)


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """The base alone, in eval mode and without gradients."""
    with base_alone(model), mode(model, False), torch.no_grad():
        yield
