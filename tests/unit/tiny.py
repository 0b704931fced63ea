"""Models and tokenizers small enough to train in a test, built from nothing: no download, fixed by a seed."""

import copy
import dataclasses
import random
from collections import OrderedDict

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

torch.set_num_threads(1)  # at this size a second thread only waits for the first

BUILT = {}  # models by what they were built from, and where the random numbers stood then
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
    """A Llama with grouped-query attention (4 heads, 2 key-value heads), hidden size 16 and 32 words.

    A copy of one that was built before, where there is one: that takes a third of the time. Where the random numbers
    stand afterwards is the same either way.
    """
    key = (seed, layers, dtype, torch.get_default_dtype(), torch.get_default_device(), repr(sorted(settings.items())))
    if key not in BUILT:
        model = built(seed, layers, dtype, settings)
        if model.device.type != "cpu" or model.num_parameters() > 100_000:  # inside `with torch.device("meta")`, say
            return model
        BUILT[key] = model, torch.get_rng_state()
    model, drawn = BUILT[key]
    torch.set_rng_state(drawn)
    return twin_of(model)


def twin_of(model):
    """A deep copy. What is empty (the tables of hooks: eight in each module) is made, not copied: that is faster."""
    tables = (one for module in model.modules() for one in vars(module).values())
    empty = {id(one): type(one)() for one in tables if type(one) in (dict, OrderedDict, set) and not one}
    return copy.deepcopy(model, empty)


def built(seed, layers, dtype, settings):
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
