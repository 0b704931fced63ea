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
        **partial_rotary(c, 1.0), **window(c, None, everywhere=True),
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
        after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm", **partial_rotary(c, 0.5),
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
        dropout=c.share("resid_pdrop", 0.0), embedding_dropout=c.share("embd_pdrop", 0.0), **partial_rotary(c, 0.5),
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
        dropout=c.share("hidden_dropout", 0.0), **partial_rotary(c, 0.25), **norms,
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


def partial_rotary(c: Config, usual: float, name: str = "partial_rotary_factor") -> dict[str, Any]:
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
