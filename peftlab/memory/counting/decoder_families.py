"""The families of decoders: for each, a function from a `config.json` to its `Decoder`.

To add one: write what differs from Llama. Defaults are those of transformers' config classes, because files on the hub
leave out what equals them. Tests compare each family with transformers' model, row by row, in several configurations.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peftlab.errors import PeftLabError
from peftlab.memory.counting.config import Config
from peftlab.memory.counting.decoders import Decoder
from peftlab.memory.counting.modules import Module, linear


def llama(
    c: Config,
    *,
    usual_groups: int | None = None,
    usual_width: int | None = None,
    usual_bias: bool = False,
    usual_tied: bool = False,
    usual_act: str = "silu",
    grouped: bool = True,
    own_width: bool = True,
    **more: Any,
) -> Decoder:
    """Describe Llama: grouped key/value heads, a gated feed-forward, RMS norms, rotary positions.

    Args:
        usual_groups: the default number of key/value heads; None is one for each head.
        usual_width: the default width of a head; None is hidden / heads.
        usual_bias: the default of `attention_bias`.
        usual_tied: the default of `tie_word_embeddings`.
        usual_act: the default of `hidden_act`.
        grouped: whether `num_key_value_heads` is read.
        own_width: whether `head_dim` is read.
        more: what differs from Llama.
    """
    vocabulary = c.size("vocab_size")
    hidden = c.size("hidden_size", "n_embed", "n_embd")
    heads = c.size("num_attention_heads", "n_head")
    shared = heads
    if grouped:
        # null means one key/value head per head. A missing key means the architecture's own default.
        usual = heads if "num_key_value_heads" in c.values or usual_groups is None else usual_groups
        shared = c.size("num_key_value_heads", default=usual)
    if heads % shared:
        raise PeftLabError(
            f"{c.source}: {heads} attention heads cannot share {shared} key/value heads evenly. Give a "
            "num_attention_heads that is a multiple of num_key_value_heads."
        )
    biased = c.flag("attention_bias", usual_bias)
    fields = {
        "vocabulary": vocabulary, "hidden": hidden, "layers": c.size("num_hidden_layers", "n_layer"),
        "heads": heads, "groups": shared,
        "width": c.per_head(hidden, heads, usual_width) if own_width else c.divided(hidden, heads),
        "inner": more.pop("inner", None) or c.size("intermediate_size"),
        "tied": c.flag("tie_word_embeddings", usual_tied), "qkv_bias": biased, "out_bias": biased,
        "activation": c.text("hidden_activation", c.text("hidden_act", usual_act)),
        "attention_dropout": c.share("attention_dropout", 0.0),
    }  # fmt: skip
    return Decoder(**{**fields, **more})


def llama_itself(c: Config) -> Decoder:
    """Describe Llama, whose feed-forward may have biases."""
    return llama(c, mlp_bias=c.flag("mlp_bias"))


def mistral(c: Config) -> Decoder:
    """Describe Mistral: every block slides over a window, unless it is null."""
    return llama(c, usual_groups=8, qkv_bias=False, out_bias=False, **window(c, 4096, everywhere=True))


def qwen2(c: Config) -> Decoder:
    """Describe Qwen2: biases on queries, keys and values."""
    return llama(c, usual_groups=32, qkv_bias=True, out_bias=False, **window(c, 4096, switch="use_sliding_window"))


def qwen3(c: Config) -> Decoder:
    """Describe Qwen3: norms of queries and keys, and heads of their own width."""
    sliding = window(c, 4096, switch="use_sliding_window")
    return llama(c, usual_groups=32, usual_width=128, head_norms=("q_norm", "k_norm"), **sliding)


def gemma(c: Config) -> Decoder:
    """Describe Gemma: norms with 1 + w, scaled embeddings, a tied head."""
    return llama(
        c,
        usual_groups=16,
        usual_width=256,
        usual_tied=True,
        usual_act="gelu_pytorch_tanh",
        norm="gemma",
        scaled_embedding=True,
    )


def gemma2(c: Config, **more: Any) -> Decoder:
    """Describe Gemma 2: norms before and behind, every second block sliding, capped logits."""
    fields = {
        **window(c, 4096, pattern=2), "capped_logits": c.values.get("final_logit_softcapping", 30.0) is not None,
        "capped_scores": c.values.get("attn_logit_softcapping", 50.0) is not None, "sdpa": False,
        "after_attention": "post_attention_layernorm", "before_mlp": "pre_feedforward_layernorm",
        "after_mlp": "post_feedforward_layernorm",
    }  # fmt: skip
    return llama(
        c, usual_groups=4, usual_width=256, usual_tied=True, usual_act="gelu_pytorch_tanh", norm="gemma",
        scaled_embedding=True, **{**fields, **more},
    )  # fmt: skip


def gemma3(c: Config) -> Decoder:
    """Describe the text part of Gemma 3: Gemma 2 with norms of queries and keys, and five sliding blocks of six."""
    # the published files leave out what equals these
    c = c.with_defaults(vocab_size=262208, num_attention_heads=8)
    pattern = c.size("sliding_window_pattern", "_sliding_window_pattern", default=6)
    return gemma2(
        c, head_norms=("q_norm", "k_norm"), capped_logits=c.values.get("final_logit_softcapping") is not None,
        capped_scores=False, sdpa=True, two_tables=True,
        **window(c, 4096, pattern=pattern),
    )  # fmt: skip


def phi3(c: Config) -> Decoder:
    """Describe Phi-3: one projection for queries, keys and values, and one for gate and up."""
    return llama(
        c, qkv=("qkv_proj",), up=("gate_up_proj",), qkv_bias=False, out_bias=False, dropout=c.share("resid_pdrop",
        0.0),
        **_partial(c, 1.0), **window(c, None, everywhere=True),
    )  # fmt: skip


def olmo2(c: Config) -> Decoder:
    """Describe OLMo 2: norms behind attention and feed-forward, and norms of whole queries and keys."""
    return llama(
        c, norm="olmo", before_attention=None, after_attention="post_attention_layernorm", before_mlp=None,
        after_mlp="post_feedforward_layernorm", head_norms=("q_norm", "k_norm"), head_norm="projection",
    )  # fmt: skip


def smollm3(c: Config) -> Decoder:
    """Describe SmolLM3: every fourth block has no rotary positions."""
    rotary = rotary_blocks(c)
    sliding = window(c, None, switch="use_sliding_window", blocks=rotary)
    return llama(
        c, usual_groups=4, usual_tied=True, mlp_bias=c.flag("mlp_bias"), unrotated=others(c, rotary), **sliding
    )


def granite(c: Config) -> Decoder:
    """Describe Granite: Llama with scaled embeddings, residuals and logits."""
    return llama(c, mlp_bias=c.flag("mlp_bias"), scaled_input=True, scaled_residual=True, scaled_logits=True)


def cohere(c: Config) -> Decoder:
    """Describe Cohere: attention and feed-forward side by side behind one norm without a bias."""
    norms: dict[str, Any] = {"head_norms": ("q_norm", "k_norm"), "head_norm": "heads"} if c.flag("use_qk_norm") else {}
    return llama(
        c,
        usual_tied=True,
        norm="cohere",
        before_mlp=None,
        parallel=True,
        rotary="pairs",
        wide_rotary=True,
        scaled_logits=True,
        **norms,
    )


def starcoder2(c: Config) -> Decoder:
    """Describe StarCoder 2: LayerNorms, a feed-forward without a gate, biases everywhere."""
    biased = c.flag("use_bias", True)
    return llama(
        c, usual_groups=2, usual_tied=True, usual_act="gelu_pytorch_tanh", norm="layer", up=("c_fc",),
        down="c_proj", gated=False, qkv_bias=biased, out_bias=biased, mlp_bias=biased,
        dropout=c.share("residual_dropout", 0.0),
        embedding_dropout=c.share("embedding_dropout", 0.0), **window(c, None, everywhere=True),
    )  # fmt: skip


def glm4(c: Config) -> Decoder:
    """Describe GLM-4: four norms in a block, one projection for gate and up, half of each head rotated."""
    return llama(
        c, usual_groups=2, usual_width=128, usual_bias=True, out_bias=False, up=("gate_up_proj",), rotary="pairs",
        after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm", **_partial(c, 0.5),
    )  # fmt: skip


def phi(c: Config) -> Decoder:
    """Describe Phi: one LayerNorm in front of attention and feed-forward side by side, biases everywhere."""
    norms: dict[str, Any] = (
        {"head_norms": ("q_layernorm", "k_layernorm"), "head_norm_bias": True} if c.flag("qk_layernorm") else {}
    )
    return llama(
        c, usual_act="gelu_new", norm="layer", before_mlp=None, last_norm="final_layernorm", parallel=True,
        out="dense",
        up=("fc1",), down="fc2", gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, output_bias=True,
        dropout=c.share("resid_pdrop", 0.0), embedding_dropout=c.share("embd_pdrop", 0.0), **_partial(c, 0.5),
        **norms,
    )  # fmt: skip


def stablelm(c: Config) -> Decoder:
    """Describe StableLM: LayerNorms, a quarter of each head rotated."""
    parallel = c.flag("use_parallel_residual")
    norms: dict[str, Any] = (
        {"head_norms": ("q_layernorm", "k_layernorm"), "head_norm": "modules"} if c.flag("qk_layernorm") else {}
    )
    return llama(
        c, usual_groups=32, own_width=False, norm="layer", holds=True, qkv_bias=c.flag("use_qkv_bias"), out_bias=False,
        before_mlp=None if parallel else "post_attention_layernorm", parallel=parallel,
        dropout=c.share("hidden_dropout", 0.0), **_partial(c, 0.25), **norms,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- older names of modules


def gpt_neox(c: Config) -> Decoder:
    """Describe GPT-NeoX and Pythia: fused queries, keys and values, two LayerNorms side by side."""
    return llama(
        c, grouped=False, own_width=False, usual_bias=True, usual_act="gelu", prefix="gpt_neox", embedding="embed_in",
        attention="attention", qkv=("query_key_value",), out="dense", up=("dense_h_to_4h",), down="dense_4h_to_h",
        gated=False, mlp_bias=True, norm="layer", last_norm="final_layer_norm", cut="chunk",
        parallel=c.flag("use_parallel_residual", True), dropout=c.share("hidden_dropout", 0.0),
        embedding_dropout=c.share("hidden_dropout", 0.0), **_partial(c, 0.25, "rotary_pct"),
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


# ---------------------------------------------------------------------------------------------- what they share


def window(
    c: Config,
    usual: int | None,
    *,
    everywhere: bool = False,
    switch: str | None = None,
    pattern: int | None = None,
    blocks: frozenset[int] | None = None,
) -> dict[str, Any]:
    """Return the width of the sliding window, and the blocks that have it.

    Args:
        usual: the default width.
        everywhere: whether every block slides.
        switch: the flag without which none does.
        pattern: of so many blocks, the last one does not slide.
        blocks: the blocks that do not slide, if the configuration does not name them.
    """
    if not c.values.get("sliding_window", usual) or (switch and not c.flag(switch)):
        return {}
    layers, named = c.size("num_hidden_layers"), c.values.get("layer_types")
    sliding: Iterable[int] = range(layers)
    if isinstance(named, list) and not everywhere:
        sliding = [i for i, kind in enumerate(named) if kind == "sliding_attention"]
    elif pattern is not None:
        sliding = [i for i in range(layers) if (i + 1) % pattern]
    elif blocks is not None:
        sliding = [i for i in range(layers) if i not in blocks]
    elif not everywhere:
        sliding = range(min(c.count("max_window_layers", 28), layers), layers)
    return {"window": c.size("sliding_window", default=usual), "sliding": frozenset(sliding)}


def _partial(c: Config, usual: float, name: str = "partial_rotary_factor") -> dict[str, Any]:
    """Return how much of a head is rotated, in families that join it to the rest with torch.cat, even to nothing."""
    joined = {"joined": True}
    rope = c.values.get("rope_parameters") or c.values.get("rope_scaling")
    inside = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    share = Config({"share": inside if inside is not None else c.values.get(name)}, c.source).share("share", usual, 1)
    if share == 1:
        return joined
    hidden, heads = c.size("hidden_size"), c.size("num_attention_heads")
    return {"rotated": int(c.size("head_dim", default=hidden // heads) * share), **joined}


def rotary_blocks(c: Config) -> frozenset[int]:
    """Return the blocks with rotary positions, which are all but every fourth."""
    named, step = c.numbers("no_rope_layers"), c.size("no_rope_layer_interval", default=4)
    layers = c.size("num_hidden_layers")
    return frozenset(i for i in range(layers) if (named[i] if named and i < len(named) else (i + 1) % step))


def others(c: Config, blocks: frozenset[int]) -> frozenset[int]:
    """Return the blocks that are not in `blocks`."""
    return frozenset(range(c.size("num_hidden_layers"))) - blocks
