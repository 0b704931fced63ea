"""Keep a prefix working where gradient checkpointing takes the cache away.

A checkpointed layer runs again in the backward pass, which would fill a cache twice. So transformers drops the cache,
and a prefix in it would be lost; Hugging Face peft refuses to run. Here each attention module puts its share of the
prefix in front of its own keys and values. The share is made from the parameters each time the module runs.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftlab.core.hooks import active_prompt
from peftlab.core.interface import Part
from peftlab.methods.caches import NAMES, cache_argument, is_cache
from peftlab.methods.states import Attention


class Columns(Protocol):
    """Declare what a layer asks of that which makes a prefix."""

    def part(self, start: int, end: int) -> Tensor: ...


class WholePrefix(Protocol):
    """Declare what a layer asks of the part on the model, `prefix_tuning.Prefix`."""

    sizes: Attention
    count: int
    compatibility_key: str | None

    @property
    def source(self) -> Columns: ...

    def pair(self, layer: int) -> int: ...

    def laid_out(self, table: Tensor) -> Tensor: ...


class LayerPrefix(Part):
    """Put a layer's share of a prefix in front of the keys and values of its attention module.

    Attributes:
        prefix: the model's part, which owns the parameters.
        index: the layer's index.
        window: how many tokens the layer sees, or None for all.
    """

    prefix: WholePrefix

    def __init__(self, prefix: WholePrefix, index: int, window: int | None) -> None:
        super().__init__()
        self.__dict__["prefix"] = prefix  # not a child: its parameters belong to the model's part
        self.index, self.window, self.compatibility_key = index, window, prefix.compatibility_key

    def make_prompt(self, host: nn.Module) -> Tensor:
        """Return this layer's keys and values, (n, 2 k)."""
        width = 2 * self.prefix.sizes.heads * self.prefix.sizes.width
        start = self.prefix.pair(self.index) * width
        return self.prefix.source.part(start, start + width)

    def before(self, host: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Give a module that gets no cache in training one that only puts the share in front."""
        name = cache_argument(host)
        if not host.training or kwargs.get(name) is not None:
            return args, kwargs
        states = args[0] if args else kwargs["hidden_states"]
        keys, values = self.prefix.laid_out(active_prompt(host, states.shape[0]))
        if self.window is not None:  # a cache of such a layer keeps one position less than the window before a new word
            start = max(0, self.prefix.count - self.window + 1)
            keys, values = keys[:, :, start:], values[:, :, start:]
        return args, {**kwargs, name: Fixed(keys, values, self.prefix.count)}


class Fixed:
    """Act as a cache for attention: hold the same keys and values (b, heads, n, width), whatever is added."""

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        self.keys, self.values, self.length = keys, values, length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def update(self, keys: Tensor, values: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        # [P_k; K] and [P_v; V]
        return torch.cat([self.keys.to(keys.dtype), keys], 2), torch.cat([self.values.to(values.dtype), values], 2)


class WithoutCache(Part):
    """Take the cache away from a checkpointed layer before transformers does so and warns that it is lost.

    Older versions of transformers do both before any hook runs. Their warning can be ignored.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.compatibility_key = f"a prefix of {count} virtual tokens"

    def before(self, host: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Return the layer's inputs, without a cache if the layer is checkpointed."""
        # Since transformers 5.24, a checkpointed layer that will not run again keeps its cache.
        if host.training and torch.is_grad_enabled() and getattr(host, "gradient_checkpointing", False):
            kwargs = {
                name: None if name in NAMES or is_cache(value) else value for name, value in kwargs.items()
            }
        return args, kwargs
