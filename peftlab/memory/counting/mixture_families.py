"""The families of mixtures of experts: for each, a function from a `config.json` to its `Decoder`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peftlab.memory.counting.config import Config
from peftlab.memory.counting.decoder_families import llama, others, rotary_blocks, window
from peftlab.memory.counting.decoders import Decoder, Experts, Projection


def mixtral(c: Config) -> Decoder:
    """Describe Mixtral: experts in every block."""
    d = llama(c, usual_groups=8, qkv_bias=False, out_bias=False, **window(c, None, everywhere=True))
    return with_experts(d, c, count=8, per_token=2, inner=d.inner, wide_shares=True)


def qwen2_moe(c: Config) -> Decoder:
    """Describe Qwen2's mixture: experts, and one that every token takes and a layer weighs."""
    biased = c.flag("qkv_bias", True)
    d = llama(
        c, usual_groups=16, qkv_bias=biased, out_bias=False, inner=c.size("intermediate_size", default=5632),
        **window(c, 4096, switch="use_sliding_window", pattern=2),
    )  # fmt: skip
    return with_experts(
        d, c, count=60, per_token=4, inner=c.size("moe_intermediate_size", default=1408), blocks=_sparse_blocks(c, d),
        shared=c.size("shared_expert_intermediate_size", default=5632), shared_gate="shared_expert_gate",
        shared_first=True, normalised=c.flag("norm_topk_prob"),
    )  # fmt: skip


def qwen3_moe(c: Config) -> Decoder:
    """Describe Qwen3's mixture."""
    d = llama(
        c, usual_groups=4, head_norms=("q_norm", "k_norm"), inner=c.size("intermediate_size", default=6144),
        **window(c, 4096, switch="use_sliding_window", everywhere=True),
    )  # fmt: skip
    inner = c.size("moe_intermediate_size", default=768)
    return with_experts(d, c, count=128, per_token=8, inner=inner, blocks=_sparse_blocks(c, d),
                        normalised=c.flag("norm_topk_prob"))  # fmt: skip


def gpt_oss(c: Config) -> Decoder:
    """Describe gpt-oss: experts with biases, attention sinks, every second block sliding."""
    d = llama(
        c,
        usual_groups=8,
        usual_width=64,
        usual_bias=True,
        sinks=True,
        norm="olmo",
        rotary="chunks",
        sdpa=False,
        **window(c, 128, pattern=2),
    )
    return with_experts(d, c, count=128, per_token=4, inner=d.inner, router="router", bias=True, transposed=True,
                        choose_first=True)  # fmt: skip


def deepseek_v3(c: Config) -> Decoder:
    """Describe DeepSeek-V3: keys and values from a narrow vector, dense blocks first, a shared expert."""
    heads, hidden, biased = c.size("num_attention_heads"), c.size("hidden_size"), c.flag("attention_bias")
    turned, plain = c.size("qk_rope_head_dim", default=64), c.size("qk_nope_head_dim", default=128)
    value, narrow = c.size("v_head_dim", default=128), c.size("kv_lora_rank", default=512)
    queries = heads * (turned + plain)
    if "q_lora_rank" in c.values and c.values["q_lora_rank"] is None:
        first = [Projection("q_proj", hidden, queries)]
    else:
        rank = c.size("q_lora_rank", default=1536)
        first = [
            Projection("q_a_proj", hidden, rank, biased, "q_a_layernorm", rank), Projection("q_b_proj", rank,
        queries),
        ]  # fmt: skip
    last = (
        Projection("kv_a_proj_with_mqa", hidden, narrow + turned, biased, "kv_a_layernorm", narrow),
        Projection("kv_b_proj", narrow, heads * (plain + value)),
    )
    d = llama(
        c, grouped=False, own_width=False, width=turned + plain, latent=(*first, *last), value_width=value,
        rotated=turned,
    )  # fmt: skip
    inner, dense = c.size("moe_intermediate_size", default=2048), c.count("first_k_dense_replace", 3)
    return with_experts(
        d, c, count=256, per_token=8, inner=inner, blocks=frozenset(range(dense, d.layers)),
        shared=inner * c.size("n_shared_experts", default=1), shared_name="shared_experts",
    )  # fmt: skip


def llama4(c: Config) -> Decoder:
    """Describe the text part of Llama 4: experts in some blocks, with one that every token takes."""
    d = llama(
        c, usual_groups=8, usual_width=128, mlp="feed_forward", inner=c.size("intermediate_size_mlp", default=16384),
        unrotated=others(c, rotary_blocks(c)),
    )  # fmt: skip
    step = c.size("interleave_moe_layer_step", default=1)
    named = c.numbers("moe_layers")
    blocks = frozenset(range(step - 1, d.layers, step) if named is None else named)
    inner = c.size("intermediate_size", default=8192)
    return with_experts(
        d, c, count=16, per_token=1, inner=inner, blocks=blocks, router="router", router_kind="linear",
        transposed=True,
        shared=inner,
    )  # fmt: skip


def with_experts(
    d: Decoder, c: Config, *, count: int, per_token: int, inner: int, blocks: frozenset[int] | None = None, **more: Any
) -> Decoder:
    """Return a decoder with experts in some blocks, or in all. `count` and `per_token` are the family's defaults."""
    count = c.size("n_routed_experts", "num_local_experts", "num_experts", default=count)
    per_token = c.size("num_experts_per_tok", "experts_per_token", default=per_token)
    blocks = frozenset(range(d.layers)) if blocks is None else blocks
    return replace(d, experts=Experts(count, per_token, inner, blocks, **more))


def _sparse_blocks(c: Config, d: Decoder) -> frozenset[int]:
    """Return Qwen's blocks with experts: every so many, without those that are named."""
    step, dense = c.size("decoder_sparse_step", default=1), c.numbers("mlp_only_layers") or ()
    return frozenset(i for i in range(d.layers) if i not in dense and (i + 1) % step == 0)
