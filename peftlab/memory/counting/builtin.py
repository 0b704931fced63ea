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
}
