"""More encoders of texts with a classification head: ELECTRA, DistilBERT, MPNet and ModernBERT."""

from __future__ import annotations

from collections.abc import Callable

from peftlab.errors import PeftLabError
from peftlab.memory.replay import ops, views
from peftlab.memory.replay.attention import Style, matmul, split
from peftlab.memory.replay.encoders import bert_blocks, depth, embedded, two_layers
from peftlab.memory.replay.nets import Net
from peftlab.memory.replay.tape import Tensor


def electra(net: Net, ids: Tensor) -> Tensor:
    """Replay ELECTRA, whose embeddings may be narrower than its blocks, and return the logits (b, labels)."""
    drop = net.config.share("hidden_dropout_prob", 0.1)
    x = embedded(net, "electra.embeddings.", ids, drop)
    if "electra.embeddings_project" in net.modules:
        x = net.linear("electra.embeddings_project", x)
    net.held.append(x)
    x = bert_blocks(net, "electra.encoder.layer.", x)
    net.held.append(x)
    return two_layers(net, views.first_of(x), net.config.share("classifier_dropout", drop), ops.from_input)


def distilbert(net: Net, ids: Tensor) -> Tensor:
    """Replay DistilBERT, and return the logits (b, labels)."""
    c, at = net.config, "distilbert.transformer.layer."
    heads, drop = c.size("num_attention_heads", "n_heads", default=12), c.share("dropout", 0.1)
    activate = net.activation(c.text("activation", "gelu"))
    style = Style(causal=False, wide_softmax=False, dropout=c.share("attention_dropout", 0.1))
    x = embedded(net, "distilbert.embeddings.", ids, drop)
    net.held.append(x)
    batch, length, hidden = x.shape

    def layer(i: int) -> Callable[[Tensor], Tensor]:
        block = f"{at}{i}."

        def attention(x: Tensor) -> Tensor:
            q, k, v = (
                net.linear(f"{block}attention.{name}", x).view(batch, heads, length, hidden // heads)
                for name in ("q_lin", "k_lin", "v_lin")
            )
            mixed = net.attend(q, k, v, style)
            return net.linear(block + "attention.out_lin", mixed)

        def feed_forward(x: Tensor) -> Tensor:
            x = activate(net.linear(block + "ffn.lin1", x))
            return net.linear(block + "ffn.lin2", x)

        def run(x: Tensor) -> Tensor:
            mixed = net.layer_norm(block + "sa_layer_norm", ops.add(attention(x), x))
            fed = ops.dropout(net.around(block + "ffn.lin2", mixed, feed_forward), drop)
            return net.layer_norm(block + "output_layer_norm", ops.add(fed, mixed))

        return run

    for i in range(depth(net, at)):
        net.memory.moment = f"forward, layer {i}"
        x = net.block(f"{at}{i}.", layer(i), x)
    net.held.append(x)
    x = ops.from_result(net.linear("pre_classifier", views.first_of(x)))
    with net.memory.kind("logits"):
        return net.linear("classifier", ops.dropout(x, c.share("seq_classif_dropout", 0.2)))


def mpnet(net: Net, ids: Tensor) -> Tensor:
    """Replay MPNet, whose attention transformers always computes in separate operations; return the logits."""
    if net.recipe.checkpointing:
        raise PeftLabError("transformers cannot train MPNet with checkpointing. Leave checkpointing off.")
    c, at = net.config, "mpnet.encoder.layer."
    heads, drop = c.size("num_attention_heads", default=12), c.share("hidden_dropout_prob", 0.1)
    activate, dropped = net.activation(c.text("hidden_act", "gelu")), c.share("attention_probs_dropout_prob", 0.1)
    x = embedded(net, "mpnet.embeddings.", ids, drop)
    net.held.append(x)
    batch, length, hidden = x.shape
    rows = net.table("mpnet.encoder.relative_attention_bias", x.new((length, length), ops.INT64))
    bias = views.enlarge(rows.view(1, heads, length, length), (batch, heads, length, length))
    del rows

    def attention(block: str, x: Tensor) -> Tensor:
        shape = (batch, heads, length, hidden // heads)
        q, k, v = (net.linear(f"{block}attention.attn.{name}", x).view(*shape) for name in ("q", "k", "v"))
        if net.autocast:
            q, k, v = net.half(q), net.half(k), net.half(v)
        scores = ops.add_in_place(ops.scale(matmul(q, k, (batch, heads, length, length))), bias)
        weights = ops.from_result(ops.cast(scores, ops.FLOAT32) if net.autocast else scores)
        weights = ops.dropout(weights, dropped)
        mixed = ops.copy(matmul(net.half(weights) if net.autocast else weights, v, shape))
        return net.linear(block + "attention.attn.o", mixed.view(batch, length, hidden))

    def layer(i: int) -> Callable[[Tensor], Tensor]:
        block = f"{at}{i}."

        def run(x: Tensor) -> Tensor:
            held = []  # transformers' layer holds the intermediate output until it returns

            def feed_forward(x: Tensor) -> Tensor:
                held.append(activate(net.linear(block + "intermediate.dense", x)))
                return net.linear(block + "output.dense", held[0])

            mixed = attention(block, x)
            x = net.layer_norm(block + "attention.LayerNorm", ops.add(ops.dropout(mixed, drop), x))
            del mixed
            fed = ops.dropout(net.around(block + "output.dense", x, feed_forward), drop)
            return net.layer_norm(block + "output.LayerNorm", ops.add(fed, x))

        return run

    for i in range(depth(net, at)):
        net.memory.moment = f"forward, layer {i}"
        x = net.block(f"{at}{i}.", layer(i), x)
    net.held.append(x)
    return two_layers(net, views.first_of(x), drop, ops.from_result)


def modernbert(net: Net, ids: Tensor) -> Tensor:
    """Replay ModernBERT, two thirds of whose blocks attend to a window, and return the logits (b, labels)."""
    c = net.config
    heads, dropped = c.size("num_attention_heads", default=12), c.share("attention_dropout", 0.0)
    activate = net.activation(c.text("hidden_activation", "gelu"))
    style = Style(causal=False, dropout=dropped)
    x = net.layer_norm("model.embeddings.norm", net.words("model.embeddings.tok_embeddings", ids))
    x = ops.dropout(x, c.share("embedding_dropout", 0.0))
    batch, length, hidden = x.shape
    width = hidden // heads
    windows = windowed(net, depth(net, "model.layers."), length)
    tables = [[x.new((1, 1, length, width)) for _ in range(2)] for _ in range(2)]  # for all and for windows
    mask = x.new((batch, 1, length, length)) if windows and not net.fused() else None

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        straight = ops.mul_constant(ops.cast(x, ops.FLOAT32), cos)
        return ops.add(straight, ops.mul_constant(views.split_halves_rotated(ops.cast(x, ops.FLOAT32)), sin))

    def attention(i: int, block: str, x: Tensor) -> Tensor:
        qkv = net.linear(block + "attn.Wqkv", x)
        q, k, v = split(qkv, (batch, heads, length, width))
        wide = turned(q, *tables[i in windows]), turned(k, *tables[i in windows])
        q, k = (ops.cast(one, v.bytes) for one in wide)
        del wide
        if not net.fused():  # a product of matrices copies the view, and lets go of the rest of qkv
            v = ops.copy(v)
        bias = (mask or q.new((batch, 1, length, length))) if i in windows else None
        mixed = net.attend(q, k, v, style, bias)
        return ops.dropout(net.linear(block + "attn.Wo", mixed), dropped)

    def layer(i: int) -> Callable[[Tensor], Tensor]:
        block = f"model.layers.{i}."

        def feed_forward(x: Tensor) -> Tensor:
            both = net.linear(block + "mlp.Wi", x)
            inner, gate = views.halves(both)
            inner = ops.dropout(ops.mul(activate(inner), gate), c.share("mlp_dropout", 0.0))
            return net.linear(block + "mlp.Wo", inner)

        def run(x: Tensor) -> Tensor:
            mixed = attention(i, block, net.layer_norm(block + "attn_norm", x) if i else x)  # held until the end
            x = ops.add(x, mixed)
            return ops.add(x, net.around(block + "mlp.Wo", net.layer_norm(block + "mlp_norm", x), feed_forward))

        return run

    for i in range(depth(net, "model.layers.")):
        net.memory.moment = f"forward, layer {i}"
        x = net.block(f"model.layers.{i}.", layer(i), x)
    x = net.layer_norm("model.final_norm", x)
    net.held.append(x)
    if c.text("classifier_pooling", "cls") == "mean":
        x = views.sum_groups(ops.mul_constant(x, x.new((batch, length, 1), ops.BOOL)), batch)
        x = ops.divide(x, x.new((batch, 1), ops.INT64))
    else:
        x = views.first_of(x)
    last = net.activation(c.text("classifier_activation", "gelu"))
    x = net.layer_norm("head.norm", last(net.linear("head.dense", x)))
    with net.memory.kind("logits"):
        return net.linear("classifier", ops.dropout(x, c.share("classifier_dropout", 0.0)))


def windowed(net: Net, layers: int, length: int) -> tuple[int, ...]:
    """Return the blocks of ModernBERT that attend to a window: those of `layer_types`, or all but every third.

    A sequence that is shorter than half the window needs no mask.
    """
    if length < net.config.size("local_attention", default=128) // 2:
        return ()
    named = net.config.values.get("layer_types")
    if isinstance(named, list) and named:
        return tuple(i for i, kind in enumerate(named) if kind == "sliding_attention")
    every = net.config.size("global_attn_every_n_layers", default=3)
    return tuple(i for i in range(layers) if i % every)
