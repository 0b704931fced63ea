"""Put learned keys and values in front of each layer's own.

    head = softmax(q [P_k; K]^T / sqrt(w)) [P_v; V],    q, K, V: (t, w),  P_k, P_v: (n, w) in each head of each layer
    P = W2 tanh(W1 E),    E: (n, k),  P: (n, 2 L k),    if an MLP makes the prefix during training

One table of shape (n, 2 L k) holds the whole prefix: for each virtual token, a key and a value for each of the L
layers. k = heads x w, with the heads of keys and values (under grouped-query attention there are fewer of them than of
queries).

For an encoder-decoder the prefix stands in the decoder's self-attention. As in Hugging Face peft, its layer i reads
pair 2 i mod L of the table. So for an even L each pair that is read serves two layers, and every other pair is never
read.

Paper: Li and Liang, *Prefix-Tuning: Optimizing Continuous Prompts for Generation*, 2021, arXiv:2101.00190, section 4;
section 4.3 has the MLP.
Book: section 4.4, "A prefix in every layer"; also 4.6, "The MLP that makes a prefix".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from peftlab.catalogue import METHODS
from peftlab.checks import check_fields, one_of, whole
from peftlab.core.hooks import active_prompt
from peftlab.core.interface import Part, Placement
from peftlab.core.records import as_transformer
from peftlab.errors import PeftLabError
from peftlab.methods.caches import NAMES, begins, cache_argument, cache_name, given_cache
from peftlab.methods.layer_prefix import LayerPrefix, WithoutCache
from peftlab.methods.states import (
    Attention,
    attention_of,
    attentions,
    blocks,
    keys_and_values,
    new_cache,
    only_attention,
    own_cache,
    windows,
)
from peftlab.methods.virtual import (
    Table,
    VirtualTokens,
    by_name,
    cache_dtype,
    check_room,
    check_start,
    initial_tokens,
    is_encoder_decoder,
    lengthened,
    path_of,
    require_one_text,
    room_for,
    stored_names,
    text_ids,
    word_embeddings,
)
from peftlab.methods.within import within

# The inputs that show the batch's size, in the order of preference: of a decoder, and of an encoder-decoder.
INPUTS = (
    ("input_ids", "inputs_embeds"),
    ("decoder_input_ids", "decoder_inputs_embeds", "labels"),
)


class Prefix(Part):
    """Put a prefix into an empty cache: keys and values for each layer of a model.

    Attention then reads [P_k; K] and [P_v; V].

    Attributes:
        source: makes the table (n, 2 L k). Called, it gives all of it; `source.part(a, b)` gives columns a to b.
        named: the name of the cache in the model's call.
        carried: whether each layer's attention can put its share in front itself when there is no cache.
    """

    on_forward = True
    carried = True
    source: Table | Projection

    def __init__(
        self, source: Table | Projection, sizes: Attention, count: int, limit: int | None, stride: int, named: str
    ) -> None:
        super().__init__()
        self.source, self.sizes, self.count, self.limit, self.stride = source, sizes, count, limit, stride
        self.named = named
        self.compatibility_key = f"a prefix of {count} virtual tokens"
        self.keys, self.encoder_keys = stored_names(source)

    @property
    def made(self) -> Tensor:
        """Return what the source makes, (n, 2 L k)."""
        return self.source()

    def make_prompt(self, host: nn.Module) -> Tensor:
        """Return the whole table, (n, 2 L k)."""
        return self.source()

    def before(self, host: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Lengthen the mask, move the positions on, and fill an empty cache with the prefix, in the base's dtype."""
        kwargs = by_name(host, args, kwargs)
        kwargs.pop("cache_position", None)
        whose = "decoder_" if is_encoder_decoder(host) else ""
        mask = kwargs.get(f"{whose}attention_mask")
        kwargs[f"{whose}attention_mask"] = lengthened(mask, self.count)
        if kwargs.get(f"{whose}position_ids") is not None:
            kwargs[f"{whose}position_ids"] = kwargs[f"{whose}position_ids"] + self.count
        # Without a cache, every step of a generation reads the whole text again, so the last step's cache is ignored.
        cache = None if kwargs.get("use_cache") is False else given_cache(kwargs)
        text = next(kwargs[name] for name in INPUTS[bool(whose)] if kwargs.get(name) is not None)
        beginning = begins(cache, text.shape[1], mask, self.count)
        if cache is None:
            cache = new_cache(host)
            kwargs = {name: value for name, value in kwargs.items() if name not in NAMES} | {self.named: cache}
        if not beginning:
            return (), kwargs
        check_room(text.shape[1], self.count, self.limit)
        uncarried = host.training and not self.carried
        if uncarried and any(getattr(module, "gradient_checkpointing", False) for module in host.modules()):
            raise PeftLabError(
                f"Under gradient checkpointing {type(host).__name__} drops its cache and the prefix in it, and we "
                "cannot tell its attention modules apart. Train without checkpointing, or use a prompt."
            )
        base = word_embeddings(host).weight
        pairs = self.laid_out(active_prompt(host, text.shape[0])).to(cache_dtype(base.dtype, base.device))
        for index in range(self.sizes.layers):
            at = 2 * self.pair(index)
            own_cache(cache).update(pairs[at], pairs[at + 1], index)
        return (), kwargs

    def pair(self, layer: int) -> int:
        """Return which pair of keys and values of the table a layer reads."""
        return self.stride * layer % self.sizes.layers

    def laid_out(self, table: Tensor) -> Tensor:
        """Return a table (b, n, l k) as l keys and values in turn: (l, b, heads, n, width)."""
        return table.view(len(table), self.count, -1, self.sizes.heads, self.sizes.width).permute(2, 0, 3, 1, 4)


class Projection(nn.Module):
    """Make the prefix, (n, 2 L k), from n learned vectors of width k: W2 tanh(W1 E).

    Attributes:
        embedding: E, (n, k).
        inner: W1, k -> h.
        outer: W2, h -> 2 L k.
    """

    def __init__(self, count: int, sizes: Attention, hidden: int | None, init: str) -> None:
        super().__init__()
        k = sizes.heads * sizes.width
        self.embedding = nn.Parameter(torch.randn(count, k))
        self.inner, self.outer = nn.Linear(k, hidden or k), nn.Linear(hidden or k, 2 * sizes.layers * k)
        if init == "zero":
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)

    def forward(self) -> Tensor:
        """Return the whole prefix."""
        return self.outer(torch.tanh(self.inner(self.embedding)))

    def part(self, start: int, end: int) -> Tensor:
        """Return only the columns from `start` to `end`."""
        inner = torch.tanh(self.inner(self.embedding))
        return nn.functional.linear(inner, self.outer.weight[start:end], self.outer.bias[start:end])


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(VirtualTokens):
    """Say how many learned keys and values a prefix has in each layer and where they start.

    Attributes:
        num_virtual_tokens, modules_to_save, task_type: as for every method with virtual tokens.
        init: where keys and values start. `"vocabulary"` takes those that the model computes for tokens drawn at
            random. `"text"` takes those for `init_text`, repeated or cut to the length. `"random"` is standard normal,
            as in Hugging Face peft. `"zero"` is zero. None means `"vocabulary"`; but with a projection it means
            `"random"`, and so it does for an encoder-decoder, whose layers share keys and values.
        init_text, tokenizer: as for prompt tuning.
        projection: during training, an MLP, k -> h -> 2 L k with tanh between, makes the prefix.
        encoder_hidden: h, the inner width of that MLP; None for k.

    Raises:
        PeftLabError: a value is out of range; the message says what was found.

    >>> model = pl.attach(model, pl.PrefixTuningConfig(num_virtual_tokens=4))
    >>> pl.count_parameters(model).trainable
    128
    """

    init: str | None = None
    init_text: str | Iterable[int] | None = None
    tokenizer: Any = field(default=None, repr=False, compare=False)
    projection: bool = False
    encoder_hidden: int | None = None

    method: ClassVar[str] = "prefix"
    peft_type: ClassVar[str] = "PREFIX_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, whole, "encoder_hidden", least=1, optional=True)
        check_fields(self, one_of, "projection", known=(True, False))
        check_start(self, (None, *METHODS["prefix"].starts))
        if self.projection and self.init in ("vocabulary", "text"):
            raise PeftLabError(
                f"init={self.init!r} does not work with a projection, whose weights decide where the prefix starts. "
                "Leave the projection out, or start from 'random' or 'zero'."
            )

    def parts(self, model: nn.Module) -> Iterator[Placement]:
        """Yield the prefix on the model, the parts that checkpointed layers need, and the copies of heads."""
        word_embeddings(model)  # raises an error if the model is of the wrong kind
        body = as_transformer(model).get_decoder() if is_encoder_decoder(model) else model
        require_one_text(model, "prefix")
        named = cache_name(model)
        # An encoder-decoder must take it itself: BART's classifier makes its decoder's input, and no cache enters.
        if named is None or (is_encoder_decoder(model) and cache_argument(model) is None):
            raise PeftLabError(f"{type(model).__name__} takes no past keys and values, so no prefix. Use a prompt.")
        if not only_attention(model):
            raise PeftLabError(
                f"{type(model).__name__} has layers without keys and values, so it can have no prefix. Use a prompt."
            )
        sizes, n = attention_of(model), self.num_virtual_tokens
        limit = room_for(model, n)
        init = self.init or ("random" if self.projection or is_encoder_decoder(model) else "vocabulary")
        if init in ("vocabulary", "text") and is_encoder_decoder(model):
            raise PeftLabError(
                f"init={init!r} gives each layer its own keys and values, but in Hugging Face's layout layers of an "
                "encoder-decoder share them. Start from 'random' or 'zero'."
            )
        total = 2 * sizes.layers * sizes.heads * sizes.width
        source: Table | Projection
        if self.projection:
            source = Projection(n, sizes, self.encoder_hidden, init)
        elif init in ("vocabulary", "text"):
            tokens = initial_tokens(model, n, None if init == "vocabulary" else text_ids(self))
            source = Table(keys_and_values(model, tokens))
        else:
            source = Table(torch.zeros(n, total) if init == "zero" else torch.randn(n, total))
        carriers, seen = attentions(body), windows(model)
        stride = 2 if is_encoder_decoder(model) else 1
        prefix = Prefix(source, sizes, n, limit, stride, named)
        prefix.carried = len(carriers) == sizes.layers
        yield Placement("", "prefix", prefix)
        for index, path in carriers.items():
            at = ".".join(filter(None, (path_of(model, body), path)))
            yield Placement(at, "prefix", LayerPrefix(prefix, index, seen.get(index)))
        for block in blocks(body):
            yield Placement(path_of(model, block), "prefix", WithoutCache(n))
        yield from within(model, "", body, "prefix", prefix.compatibility_key)
        yield from self.task_heads(model)

    def as_stored(self) -> Self:
        """Return the config of what an adapter folder holds: the prefix without its projection."""
        return replace(self, projection=False)

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the fields of Hugging Face's `adapter_config.json` for prefix tuning, sized by the key/value heads."""
        sizes = attention_of(model)
        return {
            **self.shared_fields(model),
            "num_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "token_dim": sizes.heads * sizes.width,
            "encoder_hidden_size": self.encoder_hidden or sizes.heads * sizes.width,
            "prefix_projection": self.projection,
        }

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for this class: the reverse of `to_peft`.

        How the prefix began no longer matters.
        """
        return {
            "num_virtual_tokens": fields.get("num_virtual_tokens"),
            "init": "random",
            "projection": bool(fields.get("prefix_projection", False)),
            "encoder_hidden": fields.get("encoder_hidden_size"),
        }
