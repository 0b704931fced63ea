"""Recipes: from the members of a wheel to the files that are loaded.

The output of each recipe depends only on the bytes of its input. So the hashes of its files can be listed in
`assets.json` and checked like those of a download.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize

# GGUF's names of the parts of a Llama block, and transformers' names of the same.
LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def copy(source: Path, target: Path) -> None:
    """Copy the members as they are."""
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)


def news(source: Path, target: Path) -> None:
    """Join 2,225 small files into one, with one JSON line {text, label} per article, in the order of their paths.

    The articles are in UTF-8, except for one in Latin-1.
    """
    with open(target / "news.jsonl", "w", encoding="utf-8", newline="\n") as out:
        for path in sorted(source.glob("*/*.txt")):
            raw = path.read_bytes()
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                text = raw.decode("latin-1")
            out.write(json.dumps({"text": text.strip(), "label": path.parent.name}, ensure_ascii=False) + "\n")


def llama(source: Path, target: Path) -> None:
    """Turn a Llama in a GGUF file into a folder that `from_pretrained` reads: float32 weights, config, tokenizer.

    Every four-bit value becomes the float32 that it stands for. Nothing else changes. The result is an ordinary model,
    which can be trained, saved and quantised again.
    """
    (path,) = source.glob("*.gguf")
    reader = GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    heads = {"attn_q": metadata["llama.attention.head_count"], "attn_k": metadata["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        part = tensor.name.split(".")[-2]
        weights[llama_name(tensor.name)] = unpermute(values, heads[part]) if part in heads else values
    write_safetensors(target / "model.safetensors", weights)
    for file, content in (llama_config(metadata) | tokenizer_files(metadata)).items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (target / file).write_bytes(text.encode("utf-8"))


def llama_name(name: str) -> str:
    """Translate a name: `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if block := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        return f"model.layers.{block[1]}.{LLAMA_BLOCK[block[2]]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection, (out, in), from GGUF's rotary order to that of transformers.

    GGUF rotates neighbouring rows of a head as a pair. transformers rotates row i with row i + half.
    """
    out, size = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, size).swapaxes(1, 2).reshape(out, size)


def llama_config(metadata: dict) -> dict:
    """Return the contents of config.json and generation_config.json. The output head is tied to the embedding."""
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "unknown"}  # <|endoftext|> pads: see below
    tokens = {key: metadata[f"tokenizer.ggml.{kind}_token_id"] for key, kind in ids.items()}
    width, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "float32",
        "head_dim": width // heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_theta": metadata["llama.rope.freq_base"], "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": metadata["llama.vocab_size"],
    } | tokens
    return {"config.json": config, "generation_config.json": dict(tokens)}


def tokenizer_files(metadata: dict) -> dict:
    """Return the contents of tokenizer.json and tokenizer_config.json, and the chat template.

    The published tokenizer pads with `<|im_end|>`, the token that ends a turn. Code that masks padding by its id then
    also masks the end, and the model never learns to stop. Here padding is `<|endoftext|>`, which occurs in no chat.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    special = [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == 3]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i]} | flags for i in special],
        "normalizer": None,
        # GGUF calls this splitting "smollm": digits one by one, then GPT-2's rules.
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": config,
        "chat_template.jinja": metadata["tokenizer.chat_template"],
    }


def write_safetensors(path: Path, weights: dict[str, np.ndarray]) -> None:
    """Write float32 arrays in the safetensors format: eight bytes of header length, a JSON header, the data.

    We do not use the library, because a new version of it might order tensors differently, and the hash must not
    change.
    """
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(weights):
        begin, end = end, end + weights[name].size * 4
        header[name] = {"dtype": "F32", "shape": list(weights[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of eight
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(weights):
            file.write(np.ascontiguousarray(weights[name], "<f4").data)


RECIPES = {"copy": copy, "gguf": llama, "news": news}
