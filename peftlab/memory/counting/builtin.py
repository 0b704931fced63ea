"""The shapes known by name: for each, the values of its published `config.json` that counting needs.

The values come from the models' own configuration files on the Hugging Face hub. They are read by the same code as any
other `config.json`.
"""

from __future__ import annotations

from typing import Any


def _llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 131072,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **more,
    }


def _qwen2(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    config = _llama(hidden, intermediate, layers, heads, kv_heads, **more)
    return {**config, "model_type": "qwen2"}


def _bert(hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "vocab_size": 30522,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        **more,
    }


def _roberta(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    # RoBERTa numbers positions from 2, so 512 tokens need 514 rows; it has one token type.
    config = _bert(hidden, intermediate, layers, heads, vocab_size=50265, max_position_embeddings=514)
    return {**config, "model_type": "roberta", "type_vocab_size": 1}


# Mixtral's values are also those of transformers' config class. Qwen3's layers and heads are in tables 1 and 2 of its
# report (arXiv:2505.09388), gpt-oss's in table 1 of its card (arXiv:2508.10925).
_MIXTRAL = {**_llama(4096, 14336, 32, 32, 8, vocab_size=32000), "model_type": "mixtral", "num_local_experts": 8,
            "num_experts_per_tok": 2}  # fmt: skip


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    config = _llama(hidden, intermediate, layers, heads, kv_heads, vocab_size=151936, head_dim=128, **more)
    return {**config, "model_type": "qwen3", "max_position_embeddings": 40960}


def _gemma3(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """Return the text part of a Gemma 3 with images."""
    return {
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "sliding_window": 1024,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    }


BUILT_IN: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, vocab_size=32000, max_position_embeddings=4096),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, vocab_size=32000, max_position_embeddings=4096),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, head_dim=128, tie_word_embeddings=True),
    "mistral-7b": {  # version 0.1; 0.3 has 32,768 words and so 6.3 M parameters more
        **_llama(4096, 14336, 32, 32, 8, vocab_size=32000, max_position_embeddings=32768),
        "model_type": "mistral",
    },
    "qwen2.5-0.5b": _qwen2(
        896, 4864, 24, 14, 2, vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True
    ),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, vocab_size=152064),
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "tie_word_embeddings": True,
    },
    "bert-base": _bert(768, 3072, 12, 12),
    "roberta-base": _roberta(768, 3072, 12, 12),
    "roberta-large": _roberta(1024, 4096, 24, 16),
    "t5-base": {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": 768,
        "d_kv": 64,
        "d_ff": 3072,
        "num_layers": 12,
        "num_decoder_layers": 12,
        "num_heads": 12,
        "relative_attention_num_buckets": 32,
        "feed_forward_proj": "relu",
        "dropout_rate": 0.1,
    },
    "smollm2-135m": _llama(
        576, 1536, 30, 9, 3, vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True
    ),
    "minilm": _bert(384, 1536, 6, 12),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, tie_word_embeddings=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8),
    "qwen3-30b-a3b": {
        **_qwen3(2048, 6144, 48, 32, 4),
        "model_type": "qwen3_moe",
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "gemma-3-4b": _gemma3(2560, 10240, 34, 8, 4),
    "mixtral-8x7b": _MIXTRAL,
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "smollm3-3b": {
        **_llama(2048, 11008, 36, 16, 4, tie_word_embeddings=True, max_position_embeddings=65536),
        "model_type": "smollm3",
    },
}
