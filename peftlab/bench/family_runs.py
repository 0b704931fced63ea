"""Two sections of `peftlab bench memory`: many families of models, and the members of LoRA's family.

The section `families` runs many decoders, with fewer layers than they have, so that each run is built in seconds and
fits. Widths, heads, vocabularies and experts are those of the published configurations. `config_of` gives the
configuration of a run; readers of the results file call it too. The section `methods` runs two whole Llamas under each
method of LoRA's family, with peftlab's own layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peftlab.memory.counting.builtin import BUILT_IN

LAYERS = {"gptj": "n_layer", "bloom": "n_layer"}  # the key of the number of layers, where it is not num_hidden_layers
QV = ("q_proj", "v_proj")

# Published configurations: the values that counting and the forward pass need
SHAPES: dict[str, dict[str, Any]] = {
    "gemma-2-2b": {"model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
                   "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    "phi-4": {"model_type": "phi3", "vocab_size": 100352, "hidden_size": 5120, "intermediate_size": 17920,
              "num_attention_heads": 40, "num_key_value_heads": 10, "pad_token_id": 0},
    "olmo-2-7b": {"model_type": "olmo2", "vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 11008,
                  "num_attention_heads": 32, "num_key_value_heads": 32},
    "smollm3-3b": {"model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
                   "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "mistral-7b-windowed": {**BUILT_IN["mistral-7b"], "sliding_window": 512},
    "granite-3-8b": {"model_type": "granite", "vocab_size": 49155, "hidden_size": 4096, "intermediate_size": 12800,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
                     "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 16.0},
    "aya-8b": {"model_type": "cohere", "vocab_size": 256000, "hidden_size": 4096, "intermediate_size": 14336,
               "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "starcoder2-7b": {"model_type": "starcoder2", "vocab_size": 49152, "hidden_size": 4608, "intermediate_size": 18432,
                      "num_attention_heads": 36, "num_key_value_heads": 4, "use_bias": True,
                      "residual_dropout": 0.1, "tie_word_embeddings": False},
    "falcon-7b": {"model_type": "falcon", "vocab_size": 65024, "hidden_size": 4544, "num_attention_heads": 71,
                  "multi_query": True, "parallel_attn": True, "bias": False, "alibi": False},
    "pythia-6.9b": {"model_type": "gpt_neox", "vocab_size": 50432, "hidden_size": 4096, "intermediate_size": 16384,
                    "num_attention_heads": 32, "use_parallel_residual": True, "rotary_pct": 0.25},
    "gpt-j-6b": {"model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_head": 16, "rotary_dim": 64},
    "opt-1.3b": {"model_type": "opt", "vocab_size": 50272, "hidden_size": 2048, "ffn_dim": 8192,
                 "num_attention_heads": 32, "max_position_embeddings": 2048, "word_embed_proj_dim": 2048},
    "bloom-7b1": {"model_type": "bloom", "vocab_size": 250880, "hidden_size": 4096, "n_head": 32},
    "phi-2": {"model_type": "phi", "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240,
              "num_attention_heads": 32, "num_key_value_heads": 32, "partial_rotary_factor": 0.4, "resid_pdrop": 0.1},
    "stablelm-2-1.6b": {"model_type": "stablelm", "vocab_size": 100352, "hidden_size": 2048, "intermediate_size": 5632,
                        "num_attention_heads": 32, "num_key_value_heads": 32, "use_qkv_bias": True},
    "glm-4-9b": {"model_type": "glm4", "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696,
                 "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "attention_bias": True,
                 "pad_token_id": 0},
    "qwen1.5-moe-a2.7b": {"model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048,
                          "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16,
                          "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts": 60,
                          "num_experts_per_tok": 4},
}  # fmt: skip


def config_of(point: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a run: a published one, with as many layers as the run says, or all of them.

    >>> from peftlab.bench import family_runs
    >>> family_runs.config_of({"shape": "phi-2", "layers": 4})["num_hidden_layers"]
    4
    """
    values = {**BUILT_IN, **SHAPES}[point["shape"]]
    if "layers" not in point:
        return {**values, "_name_or_path": point["shape"]}
    kept = {key: value for key, value in values.items() if key != "layer_types"}
    return {**kept, LAYERS.get(values["model_type"], "num_hidden_layers"): point["layers"],
            "_name_or_path": point["shape"]}  # fmt: skip


def arguments_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with which `estimate` predicts a row of the results file.

    >>> from peftlab.bench import family_runs
    >>> family_runs.arguments_of({"shape": "phi-2", "layers": 4, "method": "full", "targets": None})["method"]
    'full'
    """
    kept = ("method", "r", "targets", "target_parameters", "batch", "sequence", "precision", "optimizer",
            "checkpointing", "attention", "library", "four_bit", "autocast")  # fmt: skip
    found = {name: row[name] for name in kept if row.get(name) is not None}
    for name in ("targets", "target_parameters"):  # lists are joined in the file
        if isinstance(found.get(name), str) and found[name] != "all-linear":
            found[name] = found[name].split(",")
    return {"shape": config_of(row), **found}


def points() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (shape, method, what differs from the usual run) of each run."""
    yield "qwen3-8b", "lora", {"layers": 6, "batch": 2}
    yield "qwen3-8b", "qlora", {"layers": 6, "batch": 2}
    yield "qwen3-8b", "lora", {"layers": 6, "batch": 4, "sequence": 1024, "checkpointing": True}
    yield "qwen3-8b", "full", {"layers": 4, "batch": 2, "precision": "mixed"}
    yield "gemma-2-2b", "lora", {"layers": 6, "batch": 2, "attention": "eager"}
    yield "gemma-2-2b", "full", {"layers": 8, "batch": 1, "attention": "eager", "optimizer": "sgd",
                                 "checkpointing": True}  # fmt: skip
    yield "gemma-3-4b", "lora", {"layers": 8, "batch": 1, "sequence": 2048}
    yield "gemma-3-4b", "qlora", {"layers": 8, "batch": 2, "checkpointing": True}
    yield "gemma-3-4b", "full", {"layers": 6, "batch": 1, "optimizer": "adamw8bit", "checkpointing": True}
    yield "phi-4", "lora", {"layers": 4, "batch": 4}
    yield "phi-4", "qlora", {"layers": 6, "batch": 2}
    yield "olmo-2-7b", "lora", {"layers": 6, "batch": 4}
    yield "olmo-2-7b", "full", {"layers": 4, "batch": 4, "checkpointing": True}
    yield "smollm3-3b", "lora", {"layers": 8, "batch": 4, "precision": "mixed"}
    yield "smollm3-3b", "full", {"layers": 6, "batch": 2, "sequence": 256, "optimizer": "sgd", "checkpointing": True}
    yield "mistral-7b-windowed", "lora", {"layers": 6, "batch": 4, "sequence": 1024}
    yield "mistral-7b-windowed", "lora", {"layers": 6, "batch": 4, "sequence": 1024, "checkpointing": True}
    yield "granite-3-8b", "lora", {"layers": 6, "batch": 8}
    yield "granite-3-8b", "full", {"layers": 4, "batch": 4}
    yield "aya-8b", "lora", {"layers": 6, "batch": 2}
    yield "aya-8b", "full", {"layers": 4, "batch": 1, "sequence": 256, "optimizer": "sgd", "checkpointing": True}
    yield "starcoder2-7b", "lora", {"layers": 6, "batch": 8}
    yield "starcoder2-7b", "full", {"layers": 4, "batch": 4, "precision": "mixed"}
    yield "falcon-7b", "lora", {"layers": 6, "batch": 8}
    yield "falcon-7b", "qlora", {"layers": 8, "batch": 4}
    yield "pythia-6.9b", "lora", {"layers": 6, "batch": 8}
    yield "pythia-6.9b", "full", {"layers": 4, "batch": 8, "checkpointing": True}
    yield "gpt-j-6b", "lora", {"layers": 6, "batch": 8}
    yield "opt-1.3b", "lora", {"layers": 12, "batch": 8}
    yield "opt-1.3b", "full", {"layers": 8, "batch": 8, "precision": "fp32"}
    yield "bloom-7b1", "lora", {"layers": 6, "batch": 2, "attention": "eager"}
    yield "phi-2", "lora", {"layers": 12, "batch": 8}
    yield "phi-2", "full", {"layers": 8, "batch": 8, "checkpointing": True}
    yield "stablelm-2-1.6b", "lora", {"layers": 12, "batch": 8}
    yield "glm-4-9b", "lora", {"layers": 6, "batch": 4}
    yield "glm-4-9b", "qlora", {"layers": 6, "batch": 2, "checkpointing": True}
    experts = {"target_parameters": ("experts.gate_up_proj", "experts.down_proj")}
    yield "mixtral-8x7b", "lora", {"layers": 2, "batch": 4, "targets": QV}
    yield "mixtral-8x7b", "lora", {"layers": 2, "batch": 4}
    yield "mixtral-8x7b", "qlora", {"layers": 2, "batch": 4, "targets": QV}
    yield "mixtral-8x7b", "full", {"layers": 2, "batch": 8, "optimizer": "sgd"}
    yield "qwen3-30b-a3b", "lora", {"layers": 4, "batch": 4, "targets": QV}
    yield "qwen3-30b-a3b", "lora", {"layers": 4, "batch": 4, "checkpointing": True}
    yield "qwen3-30b-a3b", "lora", {"layers": 4, "batch": 4, "targets": QV, **experts}
    yield "qwen3-30b-a3b", "full", {"layers": 2, "batch": 8, "optimizer": "adamw8bit", "checkpointing": True}
    yield "qwen1.5-moe-a2.7b", "lora", {"layers": 4, "batch": 4}
    yield "gpt-oss-20b", "lora", {"layers": 4, "batch": 4, "attention": "eager"}
    yield "gpt-oss-20b", "lora", {"layers": 4, "batch": 4, "attention": "eager", "checkpointing": True}


# LoRA's family with the ranks of the runs; OFT has blocks of its own size instead of a rank
RANKS = {"lora": 16, "dora": 16, "adalora": 16, "vera": 256, "loha": 16, "lokr": 16, "oft": None}


def method_points() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (shape, method, what differs from the usual run) of each run of the section `methods`.

    They are whole models under peftlab's own layers: 16 bits under autocast as `peftlab train` computes on a GPU, the
    same with checkpointing, and four bits.
    """
    ours = {"library": "peftlab", "autocast": True}
    for method, r in RANKS.items():
        one = {**ours, "r": r, "batch": 4}
        yield "llama-3.2-1b", method, one
        yield "llama-3.2-1b", method, {**one, "checkpointing": True, "optimizer": "adamw-fused"}
        yield "llama-3.2-1b", method, {**one, "autocast": False, "batch": 2, "sequence": 384}
        yield "llama-3.2-1b", method, {**one, "four_bit": True}
        yield "llama-2-7b", method, {**one, "batch": 2, "checkpointing": True}
        yield "llama-2-7b", method, {**one, "batch": 2, "checkpointing": True, "four_bit": True}
