"""The description of a decoder, from which both the table of its modules and the replay of its steps are made.

A family is one function from a `config.json` to a `Decoder` (see `decoder_families`). The function decides everything
that a configuration decides, so a `Decoder` holds plain values: how wide, which norms and where, which projections and
how they are fused, which biases, which experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from peftlab.memory.counting.modules import Module


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture: one set in each block of `blocks`. The other blocks have a plain feed-forward."""

    count: int
    per_token: int
    inner: int  # the inner width of one expert
    blocks: frozenset[int]
    router: str = "gate"
    router_kind: str = "router"  # "linear" if the router is an `nn.Linear`
    bias: bool = False  # of the experts and the router
    transposed: bool = False  # whether the weights lie as (experts, inputs, outputs)
    shared: int | None = None  # the inner width of the expert that every token takes, or None for none
    shared_name: str = "shared_expert"
    shared_gate: str | None = None  # the layer that weighs the shared expert
    shared_first: bool = False  # whether that expert runs before the others
    wide_shares: bool = False  # whether the shares of the experts stay in float32
    normalised: bool = True  # whether the shares of a token are made to sum to one
    choose_first: bool = False  # whether the softmax is taken of the chosen scores; experts then clamp their gates


@dataclass(frozen=True)
class Projection:
    """One matrix of an attention, with the norm of its output if there is one."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    norm: str | None = None
    norm_width: int = 0


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder: sizes, names, norms, biases, and what its forward pass does beside them."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    groups: int  # key/value heads
    width: int  # of a head
    inner: int  # of the feed-forward
    tied: bool = False

    # The names of modules, as in transformers
    prefix: str = "model"  # of everything but the head; a model without a head has no prefix
    embedding: str = "embed_tokens"
    blocks: str = "layers"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # one name: one projection makes all three
    out: str = "o_proj"
    mlp: str = "mlp"
    up: tuple[str, ...] = ("gate_proj", "up_proj")  # one name and `gated`: one projection makes both
    down: str = "down_proj"
    gated: bool = True
    linear: str = "linear"  # the kind of its projections; GPT-2's are "conv1d"
    extra: tuple[Module, ...] = ()  # rows outside the blocks that few models have, such as learned positions

    # Norms. None: there is no such norm.
    norm: str = "rms"  # "rms"; "gemma" (1 + w, in float32); "olmo" (w x in float32); "layer"; "cohere" (float32)
    affine: bool = True  # whether norms have weights
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    last_norm: str | None = "norm"
    after_embedding: str | None = None
    head_norms: tuple[str, str] | None = None  # of queries and keys
    head_norm: str = "head"  # over a "head", a whole "projection", each head with its own weights ("heads", "modules")
    head_norm_bias: bool = False

    # Biases
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    output_bias: bool = False  # of the language-model head
    sinks: bool = False  # a logit for each head that takes up attention

    experts: Experts | None = None
    latent: tuple[Projection, ...] = ()  # the projections of DeepSeek's attention, in the place of `qkv`
    value_width: int | None = None  # of a head of values, if it differs from that of queries

    # What the forward pass does beside that; counting does not need it
    activation: str = "silu"
    parallel: bool = False  # attention and feed-forward both read the block's input
    rotary: str | None = "halves"  # "halves", "pairs" (every second element), "chunks" (gpt-oss), or None
    wide_rotary: bool = False  # whether positions are turned in float32
    joined: bool = False  # whether torch.cat makes the turned queries, so that they lie head by head
    two_tables: bool = False  # whether sliding and full blocks have rotary tables of their own
    slopes: bool = False  # positions as slopes in the scores (ALiBi)
    rotated: int | None = None  # how much of a head is rotated; None: all of it
    unrotated: frozenset[int] = frozenset()  # blocks without rotary positions
    window: int | None = None  # of sliding attention
    sliding: frozenset[int] = frozenset()  # the blocks that have it
    attention_dropout: float = 0.0
    dropout: float = 0.0  # of what a block adds
    embedding_dropout: float = 0.0
    scaled_embedding: bool = False  # within the embedding, so that a prompt is not scaled
    scaled_input: bool = False  # behind it
    scaled_residual: bool = False
    scaled_logits: bool = False
    capped_logits: bool = False
    capped_scores: bool = False
    wide_scores: bool = False  # whether separate operations compute the scores in float32
    scaled_queries: bool = False
    holds: bool = False  # whether variables of a block hold the attention and its input to the end
    in_place: bool = False  # whether the attention is added to the feed-forward in place
    cut: str = "slice"  # of one projection for queries, keys and values: see `replay.decoders`
    sdpa: bool = True  # whether transformers has the fused attention for it
    always_masked: bool = False  # whether the fused attention always gets a mask

    def block(self, i: int) -> str:
        """Return the path of a block, with a dot behind it."""
        return f"{self.prefix}.{self.blocks}.{i}."

    def sparse(self, i: int) -> bool:
        """Say whether a block has experts."""
        return self.experts is not None and i in self.experts.blocks

    def table(self) -> Iterator[Module]:
        """Yield the rows of everything but the head, the word embedding first."""
        at = f"{self.prefix}."
        positions = [module for module in self.extra if module.path.startswith(at)]
        embedded = next((m.inputs for m in positions if m.path.endswith("project_in")), self.hidden)
        yield Module(at + self.embedding, "embedding", self.vocabulary, embedded)
        yield from self.extra
        yield from self._norm(at, self.after_embedding)
        for i in range(self.layers):
            at = self.block(i)
            yield from self._attention(at + self.attention + ".", i)
            mlp = at + (f"{self.mlp}." if self.mlp else "")
            yield from self._mixture(mlp, i) if self.sparse(i) else self._mlp(mlp, i)
            for name in (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp):
                yield from self._norm(at, name, i)
        yield from self._norm(f"{self.prefix}.", self.last_norm)

    def _linear(self, path: str, inputs: int, outputs: int, bias: bool, layer: int) -> Module:
        return Module(path, self.linear, inputs, outputs, bias, layer=layer)

    def _norm(self, at: str, name: str | None, layer: int | None = None) -> Iterator[Module]:
        if name and self.affine:
            yield Module(at + name, "norm", self.hidden, self.hidden, self.norm == "layer", layer=layer)

    def _attention(self, at: str, i: int) -> Iterator[Module]:
        query, key, hidden = self.heads * self.width, self.groups * self.width, self.hidden
        if self.latent:
            for one in self.latent:
                yield self._linear(at + one.name, one.inputs, one.outputs, one.bias, i)
                if one.norm is not None:
                    yield Module(at + one.norm, "norm", one.norm_width, one.norm_width, layer=i)
        elif len(self.qkv) == 1:
            yield self._linear(at + self.qkv[0], hidden, query + 2 * key, self.qkv_bias, i)
        else:
            for name, outputs in zip(self.qkv, (query, key, key), strict=True):
                yield self._linear(at + name, hidden, outputs, self.qkv_bias, i)
        yield self._linear(at + self.out, self.heads * (self.value_width or self.width), hidden, self.out_bias, i)
        for name, count in zip(self.head_norms or (), (self.heads, self.groups), strict=bool(self.head_norms)):
            for path, width in self.head_norm_rows(at + name, count):
                yield Module(path, "norm", width, width, self.head_norm_bias, layer=i)
        if self.sinks:
            yield Module(at + "sinks", "vector", 1, self.heads, layer=i)

    def head_norm_rows(self, path: str, heads: int) -> Iterator[tuple[str, int]]:
        """Yield (path, width) of the norms of queries or keys: one, or one for each head."""
        if self.head_norm == "modules":
            for head in range(heads):
                yield f"{path}.norms.{head}", self.width
        else:
            yield path, self.width * (1 if self.head_norm == "head" else heads)

    def _mlp(self, at: str, i: int, inner: int | None = None) -> Iterator[Module]:
        inner = inner or self.inner
        for name in self.up:
            both = 2 if self.gated and len(self.up) == 1 else 1
            yield self._linear(at + name, self.hidden, both * inner, self.mlp_bias, i)
        yield self._linear(at + self.down, inner, self.hidden, self.mlp_bias, i)

    def _mixture(self, at: str, i: int) -> Iterator[Module]:
        e = self.experts
        assert e is not None
        yield Module(at + e.router, e.router_kind, self.hidden, e.count, e.bias, layer=i)
        for name, inputs, outputs in (("gate_up_proj", self.hidden, 2 * e.inner), ("down_proj", e.inner, self.hidden)):
            path = f"{at}experts.{name}"
            yield Module(path, "experts", inputs, outputs, layer=i, experts=e.count, transposed=e.transposed)
            if e.bias:
                yield Module(path + "_bias", "vector", 1, e.count * outputs, layer=i)
        if e.shared:
            yield from self._mlp(f"{at}{e.shared_name}.", i, e.shared)
        if e.shared_gate:
            yield self._linear(at + e.shared_gate, self.hidden, 1, False, i)
