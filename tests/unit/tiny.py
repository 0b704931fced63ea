"""Models and tokenizers small enough to train in a test, built from nothing: no download, fixed by a seed."""

import dataclasses
import random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

torch.set_num_threads(1)  # at this size a second thread only waits for the first

WORDS = ["yes", "no", "red", "green", "blue", "cat", "dog", "runs", "sleeps", "the", "a", "?", "."]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }} {{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)


def tokenizer(chat: bool = False, pad: bool = True) -> PreTrainedTokenizerFast:
    """One token a word; the padding token, unless left out, is the end token, as in many real tokenizers."""
    special = ["<|end|>", "<|unk|>", "<|start|>"]
    vocabulary = {word: index for index, word in enumerate(special + ["user", "assistant"] + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    backend.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        unk_token="<|unk|>",
        pad_token="<|end|>" if pad else None,
        additional_special_tokens=["<|start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


def llama(seed: int = 0, layers: int = 2, dtype: torch.dtype = torch.float32, **settings) -> LlamaForCausalLM:
    """A Llama with grouped-query attention (4 heads, 2 key-value heads), hidden size 16 and 32 words."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**{**values, **settings})).to(dtype)


def checkpointing_arguments(reentrant: bool) -> dict:
    """Gradient checkpointing for `TrainingArguments`, which newer transformers call activation checkpointing there."""
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    kind = "activation" if "activation_checkpointing" in fields else "gradient"
    return {f"{kind}_checkpointing": True, f"{kind}_checkpointing_kwargs": {"use_reentrant": reentrant}}


def examples(count: int = 24, seed: int = 0, vocabulary: int = 32) -> list[dict]:
    """Encoded examples of 3 to 12 tokens, the first one to four of them a prompt without labels."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [draw.randrange(1, vocabulary) for _ in range(draw.randint(3, 12))]
        prompt = draw.randint(1, min(4, len(ids) - 1))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows
