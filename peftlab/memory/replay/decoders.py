"""Decoders as transformers computes them, from their descriptions (`counting.decoders.Decoder`).

A decoder gives words, (b, s, V), or has a head for classes: of each example, (b, labels), or of each token,
(b, s, labels).
"""

from __future__ import annotations

from collections.abc import Callable

from peftlab.memory.counting.decoders import Decoder
from peftlab.memory.replay import ops, views
from peftlab.memory.replay.attention import Style, matmul, split
from peftlab.memory.replay.mixtures import mixture
from peftlab.memory.replay.nets import Net
from peftlab.memory.replay.positions import Rotary
from peftlab.memory.replay.tape import Tensor


def decoder(net: Net, ids: Tensor) -> Tensor:
    """Replay a decoder, and return the logits of its head."""
    d = layout(net)
    at = f"{d.prefix}."
    x = net.words(at + d.embedding, ids, ops.scale if d.scaled_embedding else None)
    if d.scaled_input:
        x = ops.scale(x)
    if at + "project_in" in net.modules:
        x = net.linear(at + "project_in", x)
    words = x  # a variable of the model holds it until the blocks are done
    x = positions(net, d, x)
    if d.after_embedding:
        x = norm(net, d, at + d.after_embedding, x)
    x = ops.dropout(x, d.embedding_dropout)
    blocks = Blocks(net, d, x)
    for i in range(d.layers):
        net.memory.moment = f"forward, layer {i}"
        x = net.block(d.block(i), blocks.layer(i), x)
    if d.last_norm:
        x = norm(net, d, at + d.last_norm, x)
    if at + "project_out" in net.modules:
        x = net.linear(at + "project_out", x)
    del words, blocks
    return head(net, d, x)


def head(net: Net, d: Decoder, x: Tensor) -> Tensor:
    """Replay the head of a decoder, and return its logits."""
    with net.memory.kind("logits"):
        if net.shape.task != "language model":
            return classes(net, x)
        logits = net.output("lm_head", x)
        del x
        if net.recipe.chunked_loss:
            return logits
        if d.scaled_logits:
            logits = ops.scale(logits)
        if d.capped_logits:
            logits = ops.scale(logits)
            logits = ops.from_result(logits)
            logits = ops.scale(logits)
        return logits


def classes(net: Net, x: Tensor) -> Tensor:
    """Replay a head for classes. For those of an example it runs on all tokens, and the last one is taken."""
    net.held.append(x)
    batch, length, hidden = x.shape
    if net.shape.task == "token classifier":
        usual = net.config.share("hidden_dropout", 0.1)
        x = ops.dropout(x, net.config.share("classifier_dropout", usual))
        return net.linear("score", x)
    logits = net.linear("score", x)
    last = x.new((batch,), ops.INT64)
    net.held.append(logits)
    return ops.rows_of(logits.view(batch * length, logits.shape[2]), batch, last)


def layout(net: Net) -> Decoder:
    """Return the description of a decoder."""
    assert net.shape.layout is not None  # every decoder of `families` has one
    return net.shape.layout


def positions(net: Net, d: Decoder, x: Tensor) -> Tensor:
    """Add learned positions, if the family has them."""
    learned = next((m.path for m in d.extra if m.kind == "embedding"), None)
    if learned is None:
        return x
    places = net.table(learned, net.places(x.shape[1]))
    return ops.add_broadcast(x, places)


def norm(net: Net, d: Decoder, path: str, x: Tensor) -> Tensor:
    """Call a norm of the kind that the family has."""
    kinds = {"rms": net.rms_norm, "gemma": net.gemma_norm, "olmo": net.wide_norm, "layer": net.layer_norm,
             "cohere": net.centred_norm}  # fmt: skip
    return kinds[d.norm](path, x)


class Blocks:
    """The blocks of a decoder. What they share lives as long as the forward pass: rotary tables and masks."""

    def __init__(self, net: Net, d: Decoder, x: Tensor):
        self.net, self.d = net, d
        batch, length = x.shape[:2]
        self.rotary = Rotary(d, x) if d.rotary else None
        self.activate = net.activation(d.activation)
        self.style = Style(
            dropout=d.attention_dropout, capped=d.capped_scores, wide_scores=d.wide_scores, wide_softmax=not d.sinks,
            by_head=d.joined, fusible=d.cut != "index",
        )  # fmt: skip
        self.masked = {i for i in d.sliding if d.window is not None and length >= d.window}
        eager = not net.fused()
        kinds = 2 if d.sliding and len(d.sliding) < d.layers else 1
        masks = kinds if eager else bool(self.masked) or (d.always_masked and not d.slopes)
        shape = (batch, 1, length, length) if eager else (length, length)
        self.masks = [x.new(shape, None if eager else ops.BOOL) for _ in range(masks)]
        self.slopes: Tensor | None = None  # joined to the mask, where attention is fused
        if d.slopes:
            self.masks.append(x.new((batch * d.heads, 1, length)))
            self.slopes = None if eager else x.new((batch, d.heads, length, length))

    def layer(self, i: int) -> Callable[[Tensor], Tensor]:
        """Return the function of a block."""
        net, d = self.net, self.d
        at = d.block(i)

        def normed(name: str | None, x: Tensor) -> Tensor:
            return norm(net, d, at + name, x) if name else x

        def left(x: Tensor) -> Tensor:
            """What is added to the residual."""
            x = ops.dropout(x, d.dropout)
            return ops.scale(x) if d.scaled_residual else x

        def attend(x: Tensor) -> Tensor:
            return left(normed(d.after_attention, self.attention(i, at + d.attention + ".", x)))

        def feed(x: Tensor) -> Tensor:
            path = at + (f"{d.mlp}." if d.mlp else "")
            return left(normed(d.after_mlp, self.sparse(i, path, x) if d.sparse(i) else self.mlp(path, x)))

        def one_after_the_other(x: Tensor) -> Tensor:
            first = normed(d.before_attention, x)
            mixed = attend(first)
            if not d.holds:
                first = x
            x = ops.add(x, mixed)
            if not d.holds:
                del first, mixed
            return ops.add(x, feed(normed(d.before_mlp, x)))

        def behind(x: Tensor) -> Tensor:  # the norm comes after the sum, as in OPT-350m
            x = normed(d.after_attention, ops.add(x, left(self.attention(i, at + d.attention + ".", x))))
            return normed(d.after_mlp, ops.add(x, left(self.mlp(at, x))))

        def side_by_side(x: Tensor) -> Tensor:
            first = normed(d.before_attention, x)
            second = normed(d.before_mlp, x) if d.holds and d.before_mlp else None  # Falcon's come both first
            mixed = attend(first)
            if second is None:
                first = second = normed(d.before_mlp, x) if d.before_mlp else first
            fed = feed(second)
            if d.in_place:
                return ops.add(x, ops.add_in_place(fed, mixed))
            return ops.add(ops.add(mixed, fed), x)

        if d.parallel:
            return side_by_side
        return behind if d.norm == "layer" and d.after_attention else one_after_the_other

    def attention(self, i: int, at: str, x: Tensor) -> Tensor:
        """Replay the attention of a block, with its projections."""
        net, d = self.net, self.d
        if d.slopes and not net.fused():
            return self.sloped(i, at, x)
        q, k, v, *held = self.projected(at, x)
        if d.head_norms:
            q, k = self.head_norms(at, q, k)
        if self.rotary and i not in d.unrotated:
            rotated = self.rotary(q), self.rotary(k)
            q, k = rotated
            del rotated
        k, v = net.extend(i, k, v)
        mixed = net.attend(
            q, k, v, self.style, self.slopes, i in self.masked or d.always_masked, net.weights.get(at + "sinks")
        )
        del q, k, v
        mixed = net.linear(at + d.out, mixed)
        del held
        return mixed

    def sloped(self, i: int, at: str, x: Tensor) -> Tensor:
        """Replay BLOOM's attention in separate operations. Its variables live until the output projection is done."""
        net, d = self.net, self.d
        batch, length = x.shape[:2]
        qkv = net.linear(at + d.qkv[0], x)
        q, k, v = (ops.copy(views.part(qkv, (batch, d.heads, length, d.width))) for _ in range(3))
        k, v = net.extend(i, k, v)
        if net.autocast:
            q, k, v = net.half(q), net.half(k), net.half(v)
        scores = matmul(q, k, (batch, d.heads, length, k.shape[2]))
        masked = ops.shift(scores)
        shares = ops.cast(ops.from_result(ops.cast(masked, ops.FLOAT32)), masked.bytes)
        shares = ops.dropout(shares, d.attention_dropout)
        mixed = matmul(shares, v, q.shape)
        merged = ops.copy(mixed).view(batch, length, d.heads * d.width)
        return net.linear(at + d.out, merged)

    def projected(self, at: str, x: Tensor) -> tuple[Tensor, ...]:
        """Return queries (b, heads, s, d), keys and values (b, groups, s, d), and a tensor that a variable holds."""
        net, d = self.net, self.d
        batch, length = x.shape[:2]
        shapes = [(batch, count, length, d.width) for count in (d.heads, d.groups, d.groups)]
        if len(d.qkv) == 3:
            q = net.linear(at + d.qkv[0], x)
            if d.scaled_queries:
                q = ops.scale(q)
            k, v = (net.linear(at + name, x) for name in d.qkv[1:])
            k_shape = shapes[1]
            if d.head_norms and d.head_norm == "projection":
                q, k = (self.head(at + name, one, 1) for name, one in zip(d.head_norms, (q, k), strict=True))
            return q.view(*shapes[0]), k.view(*k_shape), v.view(*shapes[2])
        qkv = net.linear(at + d.qkv[0], x)
        if d.cut == "chunk":
            return split(qkv, shapes[0])
        parts = [views.part(qkv, shape) for shape in shapes]
        if d.cut == "index":  # the one head of keys, and of values, is copied
            parts[1:] = [ops.copy(part) for part in parts[1:]]
        elif d.cut == "grouped" and d.groups == 1:  # the copies of the one head are views
            parts[1:] = [views.expand(ops.copy(part), shapes[0]) for part in parts[1:]]
        elif d.cut == "grouped":  # keys and values are repeated for each head
            parts = [ops.copy(parts[0]), *(views.enlarge(ops.copy(part), shapes[0]) for part in parts[1:])]
        elif d.cut == "copy":
            parts = [ops.copy(part) for part in parts]
        return *parts, qkv

    def head_norms(self, at: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Replay the norms of queries and keys, if they stand on heads."""
        d = self.d
        assert d.head_norms is not None
        if d.head_norm == "projection":  # these came before the heads were told apart
            return q, k
        return self.head(at + d.head_norms[0], q, d.heads), self.head(at + d.head_norms[1], k, d.groups)

    def head(self, path: str, x: Tensor, heads: int) -> Tensor:
        """Call the norm of queries or keys."""
        net, d = self.net, self.d
        if d.head_norm != "modules":
            return norm(net, d, path, x)
        batch, _, length, width = x.shape
        pieces = [
            net.layer_norm(f"{path}.norms.{head}", piece)
            for head, piece in enumerate(views.split_heads(x, (batch, 1, length, width), heads))
        ]
        return views.stack_heads(pieces, x.shape)

    def mlp(self, at: str, x: Tensor) -> Tensor:
        """Replay a feed-forward, with or without a gate."""
        net, d = self.net, self.d

        def run(x: Tensor) -> Tensor:
            if not d.gated:
                return net.linear(at + d.down, self.activate(net.linear(at + d.up[0], x)))
            if len(d.up) == 1:
                both = net.linear(at + d.up[0], x)
                gate, up = views.halves(both)
                inner = ops.mul(up, self.activate(gate))
                del up
                return net.linear(at + d.down, inner)
            gate = self.activate(net.linear(at + d.up[0], x))
            inner = ops.mul(gate, net.linear(at + d.up[1], x))
            del gate
            return net.linear(at + d.down, inner)

        return net.around(at + d.down, x, run)

    def sparse(self, i: int, at: str, x: Tensor) -> Tensor:
        """Replay the experts of a block, with the expert that every token takes."""
        assert self.d.experts is not None
        return self.net.around(
            at.rstrip("."), x, lambda x: mixture(self.net, self.d, at, x, self.activate, self.mlp)
        )


def gpt2(net: Net, ids: Tensor) -> Tensor:
    """Replay GPT-2, and return the logits of its head."""
    d = layout(net)
    style = Style(wide_softmax=False, dropout=d.attention_dropout)
    activate = net.activation(d.activation)
    words = net.words("transformer.wte", ids)  # variables of the model hold it, and the positions
    places = net.table("transformer.wpe", net.places(words.shape[1]))
    x = ops.dropout(ops.add_broadcast(words, places), d.embedding_dropout)

    def attention(i: int, at: str, x: Tensor) -> Tensor:
        qkv = net.linear(at + "c_attn", x)
        mixed = net.attend_packed(i, qkv, d.heads, style)
        del qkv
        return ops.dropout(net.linear(at + "c_proj", mixed), d.dropout)

    def mlp(at: str, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return net.linear(at + "c_proj", activate(net.linear(at + "c_fc", x)))

        return ops.dropout(net.around(at + "c_proj", x, run), d.dropout)

    def layer(i: int) -> Callable[[Tensor], Tensor]:
        at = d.block(i)

        def run(x: Tensor) -> Tensor:
            x = ops.add(attention(i, at + "attn.", net.layer_norm(at + "ln_1", x)), x)
            return ops.add(x, mlp(at + "mlp.", net.layer_norm(at + "ln_2", x)))

        return run

    for i in range(d.layers):
        net.memory.moment = f"forward, layer {i}"
        x = net.block(d.block(i), layer(i), x)
    x = net.layer_norm("transformer.ln_f", x)
    del words, places
    return head(net, d, x)
