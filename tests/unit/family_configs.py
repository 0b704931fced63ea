"""Small configurations of the decoder families, with odd sizes, in as many variants as one asks for."""

import random

NAMES = {  # the keys of sizes that are not Llama's
    "gptj": ("n_embd", "n_head", "n_layer"), "bloom": ("hidden_size", "n_head", "n_layer"),
}  # fmt: skip
UNGROUPED = ("gpt_neox", "gptj", "opt", "bloom", "falcon", "deepseek_v3")
WITHOUT_WIDTH = (*UNGROUPED, "stablelm")
DECODERS = (
    "phi3", "olmo2", "smollm3", "granite", "cohere", "starcoder2", "glm4", "phi", "stablelm", "gpt_neox", "gptj", "opt",
    "bloom", "falcon", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "mistral",
    "qwen3", "gemma2", "gemma3_text",
)  # fmt: skip


def variant(family, seed):
    """A small random configuration of a decoder family."""
    pick = random.Random(f"{family}/{seed}")
    yes = lambda: pick.random() < 0.5  # noqa: E731
    heads, layers = pick.choice([2, 4, 6]), pick.choice([1, 2, 4, 5])
    hidden_name, heads_name, layers_name = NAMES.get(
        family, ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    values = {
        "model_type": family, "vocab_size": pick.randint(50, 99), hidden_name: heads * pick.choice([8, 12]),
        heads_name: heads, layers_name: layers, "tie_word_embeddings": yes(),
    }  # fmt: skip
    values |= {"attention_bias": yes(), "mlp_bias": yes(), "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    if family == "opt":
        values |= {"ffn_dim": pick.choice([44, 36]), "max_position_embeddings": 40}
    elif family == "gptj":
        values |= {"n_inner": pick.choice([None, 44]), "rotary_dim": pick.choice([4, 8])}
    elif family == "falcon":
        values |= {"ffn_hidden_size": pick.choice([None, 44])}
    elif family != "bloom":
        values |= {"intermediate_size": pick.choice([44, 36])}
    if family not in UNGROUPED:
        values["num_key_value_heads"] = pick.choice([1, 2, heads])
    if family not in WITHOUT_WIDTH:
        values["head_dim"] = pick.choice([8, 12])
        if family in ("mixtral", "mistral", "starcoder2", "phi3", "olmo2", "granite", "cohere", "phi") and yes():
            del values["head_dim"]
    more = {
        "mistral": lambda: {"sliding_window": pick.choice([None, 16])},
        "mixtral": lambda: {"num_local_experts": pick.choice([3, 4]), "sliding_window": pick.choice([None, 16])},
        "cohere": lambda: {"use_qk_norm": yes()},
        "starcoder2": lambda: {"use_bias": yes()},
        "phi": lambda: {"qk_layernorm": yes(), "head_dim": values[hidden_name] // heads},
        "stablelm": lambda: {"qk_layernorm": yes(), "use_qkv_bias": yes(), "use_parallel_residual": yes()},
        "gpt_neox": lambda: {"use_parallel_residual": yes(), "rotary_pct": 0.5},
        "opt": lambda: {
            "enable_bias": yes(), "do_layer_norm_before": yes(), "layer_norm_elementwise_affine": yes(),
            "word_embed_proj_dim": pick.choice([12, values[hidden_name]]),
        },
        "falcon": lambda: {
            "new_decoder_architecture": yes(), "multi_query": yes(), "parallel_attn": yes(), "bias": yes(),
            "num_kv_heads": pick.choice([1, 2, heads]), "alibi": yes(),
            "num_ln_in_parallel_attn": pick.choice([None, 1, 2]),
        },
        "qwen2_moe": lambda: {
            "num_experts": pick.choice([4, 6]), "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28,
            "decoder_sparse_step": pick.choice([1, 2]), "mlp_only_layers": pick.choice([[], [0]]), "qkv_bias": yes(),
        },
        "qwen3_moe": lambda: {
            pick.choice(["num_experts", "num_local_experts"]): 5, "moe_intermediate_size": 20,
            "decoder_sparse_step": pick.choice([1, 2]), "mlp_only_layers": pick.choice([[], [0]]),
        },
        "gpt_oss": lambda: {"num_local_experts": pick.choice([3, 4])},
        "deepseek_v3": lambda: {
            "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 12, "kv_lora_rank": 10,
            "n_shared_experts": pick.choice([1, 2]), "first_k_dense_replace": pick.choice([0, 1]),
            "q_lora_rank": pick.choice([None, 14]), "qk_rope_head_dim": 8, "qk_nope_head_dim": 4, "v_head_dim": 6,
        },
        "llama4_text": lambda: {
            "num_local_experts": 3, "intermediate_size_mlp": 52, "interleave_moe_layer_step": pick.choice([1, 2]),
            "moe_layers": pick.choice([None, [0]]),
        },
    }  # fmt: skip
    return values | more.get(family, dict)()
