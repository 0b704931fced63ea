"""The families of decoders from before Llama, whose modules have names of their own. See `decoder_families`."""

from __future__ import annotations

from peftlab.memory.counting.config import Config
from peftlab.memory.counting.decoder_families import llama, partial_rotary
from peftlab.memory.counting.decoders import Decoder
from peftlab.memory.counting.modules import Module, linear


def gpt_neox(c: Config) -> Decoder:
    """Describe GPT-NeoX and Pythia: fused queries, keys and values, two LayerNorms side by side."""
    return llama(
        c, grouped=False, own_width=False, usual_bias=True, usual_act="gelu", prefix="gpt_neox", embedding="embed_in",
        attention="attention", qkv=("query_key_value",), out="dense", up=("dense_h_to_4h",), down="dense_4h_to_h",
        gated=False, mlp_bias=True, norm="layer", last_norm="final_layer_norm", cut="chunk",
        parallel=c.flag("use_parallel_residual", True), dropout=c.share("hidden_dropout", 0.0),
        embedding_dropout=c.share("hidden_dropout", 0.0), **partial_rotary(c, 0.25, "rotary_pct"),
    )  # fmt: skip


def gptj(c: Config) -> Decoder:
    """Describe GPT-J: one LayerNorm, attention without biases beside a feed-forward with them."""
    hidden = c.size("n_embd", "hidden_size")
    return llama(
        c, grouped=False, own_width=False, inner=c.size("n_inner", default=4 * hidden), prefix="transformer",
        embedding="wte", blocks="h", attention="attn", out="out_proj", up=("fc_in",), down="fc_out", gated=False,
        mlp_bias=True,
        qkv_bias=False, out_bias=False, output_bias=True, norm="layer", before_attention="ln_1", before_mlp=None,
        last_norm="ln_f", parallel=True, rotary="pairs", wide_scores=True,
        rotated=c.size("rotary_dim", default=64) if c.values.get("rotary_dim", 64) is not None else None,
        activation=c.text("activation_function", "gelu_new"), attention_dropout=c.share("attn_pdrop", 0.0),
        dropout=c.share("resid_pdrop", 0.0), embedding_dropout=c.share("embd_pdrop", 0.0),
    )  # fmt: skip


def gpt2(c: Config) -> Decoder:
    """Describe GPT-2: learned positions, one Conv1D for queries, keys and values, LayerNorms."""
    c.refuse("add_cross_attention")
    hidden = c.size("n_embd", "hidden_size")
    rows = c.size("n_positions", "max_position_embeddings", default=1024)
    return llama(
        c, grouped=False, own_width=False, inner=c.size("n_inner", default=4 * hidden), usual_tied=True,
        prefix="transformer", embedding="wte", blocks="h", attention="attn", qkv=("c_attn",), out="c_proj",
        up=("c_fc",), down="c_proj",
        gated=False, linear="conv1d", qkv_bias=True, out_bias=True, mlp_bias=True, norm="layer", rotary=None,
        before_attention="ln_1", before_mlp="ln_2", last_norm="ln_f",
        extra=(Module("transformer.wpe", "embedding", rows, hidden),),
        activation=c.text("activation_function", "gelu_new"), attention_dropout=c.share("attn_pdrop", 0.1),
        dropout=c.share("resid_pdrop", 0.1), embedding_dropout=c.share("embd_pdrop", 0.1),
    )  # fmt: skip


def opt(c: Config) -> Decoder:
    """Describe OPT: learned positions, LayerNorms before or behind, an embedding of its own width."""
    hidden, biased, first = c.size("hidden_size"), c.flag("enable_bias", True), c.flag("do_layer_norm_before", True)
    at, narrow = "model.decoder.", c.size("word_embed_proj_dim", default=hidden)
    rows = c.size("max_position_embeddings", default=2048) + 2  # two positions are not used
    extra = [Module(at + "embed_positions", "embedding", rows, hidden)]
    if narrow != hidden:
        extra += [linear(at + "project_in", narrow, hidden), linear(at + "project_out", hidden, narrow)]
    names = ("self_attn_layer_norm", "final_layer_norm")
    attention, mlp = names if first else (None, None)
    return llama(
        c, grouped=False, own_width=False, inner=c.size("ffn_dim"), usual_tied=True, prefix="model.decoder",
        out="out_proj", mlp="", up=("fc1",), down="fc2", gated=False, qkv_bias=biased, out_bias=biased,
        mlp_bias=biased, norm="layer",
        affine=c.flag("layer_norm_elementwise_affine", True), before_attention=attention, before_mlp=mlp,
        after_attention=None if first else names[0], after_mlp=None if first else names[1],
        last_norm=names[1] if first and not c.flag("_remove_final_layer_norm") else None, extra=tuple(extra),
        rotary=None, scaled_queries=True, activation=c.text("activation_function", "relu"),
        dropout=c.share("dropout", 0.1),
    )  # fmt: skip


def bloom(c: Config) -> Decoder:
    """Describe BLOOM: no positions but a slope in the scores (ALiBi), a norm behind the embedding."""
    hidden = c.size("n_embed", "hidden_size")
    return llama(
        c, grouped=False, own_width=False, inner=4 * hidden, usual_tied=True, prefix="transformer",
        embedding="word_embeddings", blocks="h", attention="self_attention", qkv=("query_key_value",), out="dense",
        up=("dense_h_to_4h",), down="dense_4h_to_h",
        gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, norm="layer", last_norm="ln_f", rotary=None,
        after_embedding="word_embeddings_layernorm", activation="bloom", cut="copy", slopes=True, sdpa=False,
        dropout=c.share("hidden_dropout", 0.0),
    )  # fmt: skip


def falcon(c: Config) -> Decoder:
    """Describe Falcon: one projection for queries, keys and values, and one, two or no norms side by side."""
    hidden, heads = c.size("hidden_size"), c.size("num_attention_heads", "n_head")
    new, parallel = c.flag("new_decoder_architecture"), c.flag("parallel_attn", True)
    groups = c.size("num_kv_heads", default=heads) if new else 1 if c.flag("multi_query", True) else heads
    two = c.size("num_ln_in_parallel_attn", default=2 if new else 1) == 2
    names = ("ln_attn", "ln_mlp") if two else ("input_layernorm", None)
    if not parallel:
        names = ("input_layernorm", "post_attention_layernorm")
    biased = c.flag("bias")
    return llama(
        c, grouped=False, own_width=False, usual_tied=True,
        inner=c.size("ffn_hidden_size", default=4 * hidden), prefix="transformer", embedding="word_embeddings",
        blocks="h", attention="self_attention", qkv=("query_key_value",), out="dense", up=("dense_h_to_4h",),
        down="dense_4h_to_h", gated=False, qkv_bias=biased, out_bias=biased, mlp_bias=biased, norm="layer",
        last_norm="ln_f", groups=groups, before_attention=names[0], before_mlp=names[1],
        parallel=new or parallel, rotary=None if c.flag("alibi") else "halves",
        slopes=c.flag("alibi"), in_place=True, holds=True, always_masked=True,
        cut="grouped" if new else "index" if c.flag("multi_query", True) else "slice",
        activation=c.text("activation", "gelu"), dropout=c.share("hidden_dropout", 0.0),
    )  # fmt: skip
