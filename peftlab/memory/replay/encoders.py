"""Encoders and encoder-decoders: BERT and RoBERTa with a classification head, T5. More are in `text_encoders`."""

from __future__ import annotations

from collections.abc import Callable

from peftlab.memory.replay import ops, views
from peftlab.memory.replay.attention import Style
from peftlab.memory.replay.nets import Net
from peftlab.memory.replay.tape import Tensor, leaf


def bert(net: Net, ids: Tensor, prefix: str = "bert") -> Tensor:
    """Replay BERT or RoBERTa with a classification head, and return the logits (b, labels)."""
    drop = net.config.share("hidden_dropout_prob", 0.1)
    x = embedded(net, f"{prefix}.embeddings.", ids, drop)
    net.held.append(x)
    x = bert_blocks(net, f"{prefix}.encoder.layer.", x)
    net.held.append(x)
    x = views.first_of(x)
    if prefix == "bert":
        x = ops.dropout(ops.from_result(net.linear("bert.pooler.dense", x)), drop)
        with net.memory.kind("logits"):
            return net.linear("classifier", x)
    return two_layers(net, x, drop, ops.from_result)


def embedded(net: Net, at: str, ids: Tensor, drop: float) -> Tensor:
    """Replay the embeddings of words, of segments if there are any, and of positions, and the norm of their sum."""
    words = net.words(at + "word_embeddings", ids)
    x = words
    if at + "token_type_embeddings" in net.modules:
        types = net.table(at + "token_type_embeddings", ids)
        x = ops.add(words, types)
    places = net.table(at + "position_embeddings", net.places(words.shape[1]))
    x = ops.add_broadcast(x, places)
    return ops.dropout(net.layer_norm(at + "LayerNorm", x), drop)


def two_layers(net: Net, x: Tensor, drop: float, activate: Callable[[Tensor], Tensor]) -> Tensor:
    """Replay a classification head of two linear layers on the first vector of each example."""
    x = activate(net.linear("classifier.dense", ops.dropout(x, drop)))
    with net.memory.kind("logits"):
        return net.linear("classifier.out_proj", ops.dropout(x, drop))


def bert_blocks(net: Net, at: str, x: Tensor) -> Tensor:
    """Replay the blocks of BERT, whose paths begin with `at`."""
    c = net.config
    heads, drop = c.size("num_attention_heads", default=4), c.share("hidden_dropout_prob", 0.1)
    activate = net.activation(c.text("hidden_act", "gelu"))
    style = Style(causal=False, wide_softmax=False, dropout=c.share("attention_probs_dropout_prob", 0.1))
    batch, length, hidden = x.shape
    width = hidden // heads

    def layer(i: int) -> Callable[[Tensor], Tensor]:
        block = f"{at}{i}."

        def attention(x: Tensor) -> Tensor:
            q, k, v = (
                net.linear(f"{block}attention.self.{name}", x).view(batch, heads, length, width)
                for name in ("query", "key", "value")
            )
            return net.attend(q, *net.extend(i, k, v), style)

        def close(name: str, x: Tensor, before: Tensor) -> Tensor:
            return net.layer_norm(f"{block}{name}.LayerNorm", ops.add(ops.dropout(x, drop), before))

        def run(x: Tensor) -> Tensor:
            held = []  # transformers' layer holds the intermediate output until it returns

            def feed_forward(x: Tensor) -> Tensor:
                held.append(activate(net.linear(block + "intermediate.dense", x)))
                return net.linear(block + "output.dense", held[0])

            x = close("attention.output", net.linear(block + "attention.output.dense", attention(x)), x)
            return close("output", net.around(block + "output.dense", x, feed_forward), x)

        return run

    for i in range(depth(net, at)):
        net.memory.moment = f"forward, layer {i}"
        x = net.block(f"{at}{i}.", layer(i), x)
    return x


def depth(net: Net, at: str) -> int:
    """Return how many blocks have paths that begin with `at`."""
    return len({m.layer for m in net.shape.modules if m.layer is not None and m.path.startswith(at)})


def t5(net: Net, ids: Tensor) -> Tensor:
    """Replay T5 with an encoder and a decoder of equal length, and return the decoder's logits (b, s, V)."""
    c = net.config
    heads, drop = c.size("num_heads", "num_attention_heads"), c.share("dropout_rate", 0.1)
    width = c.size("d_kv", "head_dim", default=64)
    depth = c.size("num_layers", "num_hidden_layers")
    depths = {"encoder": depth, "decoder": c.size("num_decoder_layers", default=depth)}

    names = c.text("feed_forward_proj", "gated-gelu" if net.shape.family == "mt5" else "relu").rpartition("-")
    activate = net.activation("gelu_new" if names[0] and names[2] == "gelu" else names[2])

    def attention(at: str, x: Tensor, source: Tensor, bias: Tensor, i: int | None = None) -> Tensor:
        batch, length = x.shape[:2]
        q = net.linear(at + "q", x).view(batch, heads, length, width)
        k = net.linear(at + "k", source).view(batch, heads, source.shape[1], width)
        v = net.linear(at + "v", source).view(batch, heads, source.shape[1], width)
        if i is not None:
            k, v = net.extend(i, k, v)
            if k.shape[2] != bias.shape[3]:  # with a prefix the bias is enlarged, for each example
                bias = views.enlarge(bias, (batch, heads, length, k.shape[2]))
        fusible = net.recipe.contiguous_bias or at.endswith("EncDecAttention.")  # whose bias is zeros
        style = Style(causal=i is not None, wide_softmax=False, dropout=drop, fusible=fusible)
        return net.linear(at + "o", net.attend(q, k, v, style, bias))

    def feed_forward(at: str, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            if at + "wi" in net.modules:
                x = activate(net.linear(at + "wi", x))
            else:
                x = ops.mul(activate(net.linear(at + "wi_0", x)), net.linear(at + "wi_1", x))
            return net.linear(at + "wo", ops.cast(ops.dropout(x, drop), net.recipe.weight_bytes))

        return net.around(at + "wo", x, run)

    def residual(at: str, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return ops.add(x, ops.dropout(function(net.t5_norm(at + "layer_norm", x)), drop))

    def encoder(i: int) -> Callable[..., Tensor]:
        at = f"encoder.block.{i}.layer."

        def run(x: Tensor, bias: Tensor) -> Tensor:
            if net.recipe.contiguous_bias:
                bias = ops.copy(bias)  # for each block
            x = residual(at + "0.", x, lambda x: attention(at + "0.SelfAttention.", x, x, bias))
            return residual(at + "1.", x, lambda x: feed_forward(at + "1.DenseReluDense.", x))

        return run

    def decoder(i: int) -> Callable[..., Tensor]:
        at = f"decoder.block.{i}.layer."

        def run(x: Tensor, bias: Tensor, encoded: Tensor, cross: Tensor) -> Tensor:
            bias = ops.copy(bias)  # made causal for each block
            x = residual(at + "0.", x, lambda x: attention(at + "0.SelfAttention.", x, x, bias, i))
            x = residual(at + "1.", x, lambda x: attention(at + "1.EncDecAttention.", x, encoded, cross))
            return residual(at + "2.", x, lambda x: feed_forward(at + "2.DenseReluDense.", x))

        return run

    def bias(name: str, x: Tensor) -> Tensor:
        places = x.new((x.shape[1], x.shape[1]), ops.INT64)
        rows = net.table(f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias", places)
        return rows.view(1, heads, x.shape[1], x.shape[1])

    def stack(name: str, x: Tensor, block: Callable, *others: Tensor) -> Tensor:
        x = ops.dropout(x, drop)
        places = bias(name, x)
        for i in range(depths[name]):
            net.memory.moment = f"forward, {name} layer {i}"
            x = net.block(f"{name}.block.{i}.", block(i), x, places, *others)
        return ops.dropout(net.t5_norm(f"{name}.final_layer_norm", x), drop)

    # each half has a table of its own, whose weight is that of "shared", which nothing calls
    encoded = stack("encoder", net.words("encoder.embed_tokens", ids), encoder)
    words = net.words("decoder.embed_tokens", ids, front=False)
    cross = words.new((1, heads, words.shape[1], encoded.shape[1]))
    if net.recipe.checkpointing:  # transformers then computes its gradient
        cross = leaf(cross)
    x = stack("decoder", words, decoder, encoded, cross)
    with net.memory.kind("logits"):
        return net.output("lm_head", x)
