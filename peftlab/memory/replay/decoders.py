"""Decoders: Llama and its relatives, and GPT-2, as transformers' models compute them."""

from __future__ import annotations

from collections.abc import Callable

from peftlab.memory.replay import ops
from peftlab.memory.replay.attention import Style
from peftlab.memory.replay.nets import Net
from peftlab.memory.replay.tape import Tensor


def gated_decoder(net: Net, ids: Tensor) -> Tensor:
    """Replay Llama, Mistral, Qwen2 or Gemma, and return the logits (b, s, V)."""
    c = net.config
    gemma = net.shape.family == "gemma"
    usual = "gelu_pytorch_tanh" if gemma else "silu"
    activate = net.activation(c.text("hidden_activation", c.text("hidden_act", usual)))
    style = Style(dropout=c.share("attention_dropout", 0.0))
    norm = net.gemma_norm if gemma else net.rms_norm
    heads = c.size("num_attention_heads")
    width = net.weight_size("model.layers.0.self_attn.q_proj")[0] // heads
    groups = net.weight_size("model.layers.0.self_attn.k_proj")[0] // width
    x = net.words("model.embed_tokens", ids, ops.scale if gemma else None)
    batch, length = x.shape[:2]
    cos, sin = x.new((1, 1, length, width)), x.new((1, 1, length, width))

    def rotate(x: Tensor) -> Tensor:
        straight = ops.mul_constant(x, cos)
        return ops.add(straight, ops.mul_constant(ops.split_halves_rotated(x), sin))

    def attention(i: int, at: str, x: Tensor) -> Tensor:
        q = net.linear(at + "q_proj", x).view(batch, heads, length, width)
        k = net.linear(at + "k_proj", x).view(batch, groups, length, width)
        v = net.linear(at + "v_proj", x).view(batch, groups, length, width)
        rotated = rotate(q), rotate(k)
        q, k = rotated
        del rotated
        k, v = net.extend(i, k, v)
        mixed = net.attend(q, k, v, style)
        del q, k, v
        return net.linear(at + "o_proj", mixed)

    def mlp(at: str, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            gate = activate(net.linear(at + "gate_proj", x))
            inner = ops.mul(gate, net.linear(at + "up_proj", x))
            del gate
            return net.linear(at + "down_proj", inner)

        return net.around(at + "down_proj", x, run)

    def layer(i: int) -> Callable[[Tensor], Tensor]:
        at = f"model.layers.{i}."

        def run(x: Tensor) -> Tensor:
            x = ops.add(x, attention(i, at + "self_attn.", norm(at + "input_layernorm", x)))
            return ops.add(x, mlp(at + "mlp.", norm(at + "post_attention_layernorm", x)))

        return run

    for i in range(c.size("num_hidden_layers")):
        net.memory.moment = f"forward, layer {i}"
        x = net.block(f"model.layers.{i}.", layer(i), x)
    x = norm("model.norm", x)
    with net.memory.kind("logits"):
        return net.output("lm_head", x)


def gpt2(net: Net, ids: Tensor) -> Tensor:
    """Replay GPT-2, and return the logits (b, s, V)."""
    c = net.config
    heads = c.size("n_head", "num_attention_heads")
    drop = c.share("resid_pdrop", 0.1)
    activate = net.activation(c.text("activation_function", "gelu_new"))
    style = Style(wide_softmax=False, dropout=c.share("attn_pdrop", 0.1))
    x = net.words("transformer.wte", ids)
    places = net.table("transformer.wpe", net.places(x.shape[1]))
    x = ops.dropout(ops.add_broadcast(x, places), c.share("embd_pdrop", 0.1))
    del places

    def attention(i: int, at: str, x: Tensor) -> Tensor:
        qkv = net.linear(at + "c_attn", x)
        mixed = net.attend_packed(i, qkv, heads, style)
        del qkv
        return ops.dropout(net.linear(at + "c_proj", mixed), drop)

    def mlp(at: str, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return net.linear(at + "c_proj", activate(net.linear(at + "c_fc", x)))

        return ops.dropout(net.around(at + "c_proj", x, run), drop)

    def layer(i: int) -> Callable[[Tensor], Tensor]:
        at = f"transformer.h.{i}."

        def run(x: Tensor) -> Tensor:
            x = ops.add(attention(i, at + "attn.", net.layer_norm(at + "ln_1", x)), x)
            return ops.add(x, mlp(at + "mlp.", net.layer_norm(at + "ln_2", x)))

        return run

    for i in range(c.size("n_layer", "num_hidden_layers")):
        net.memory.moment = f"forward, layer {i}"
        x = net.block(f"transformer.h.{i}.", layer(i), x)
    x = net.layer_norm("transformer.ln_f", x)
    with net.memory.kind("logits"):
        return net.output("lm_head", x)
