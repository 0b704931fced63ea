"""A small T5 learns a family of jobs, and then a new job by a prompt, a prefix and LoRA.

This book has no T5 with trained weights, so the base is trained here, from random weights. It learns to write the
fields of a support desk's ticket that are named in front of the message, in their order:

    "product urgency: My lamp is broken. It is urgent."     ->  "lamp, urgent"

It learns every choice and order of the three fields but one. That one is the new job, and nothing is named:

    "My lamp is broken. It is urgent."                      ->  "urgent, lamp, repair"

So the base knows the parts of the new job, and has never put them together so. A prompt can bring out what a model can
do, and this shows how far that goes. The model is small, with a vocabulary of its own of 1,000 tokens, so that it
learns within a minute or two on a GPU. A notebook cannot repeat it: a base of one layer, for product and urgency alone,
takes about 20 seconds on a CPU, and no prompt teaches it the new job. The number of layers is odd, because an even one
would leave half of a prefix unread (see `methods.prefix_tuning`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import permutations
from random import Random
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

import peftlab as pl
from peftlab.assets.fetch import ensure

RATES = {
    "prompt": (1e-1, 3e-1, 1.0, 3.0),
    "prefix": (1e-1, 3e-1, 1.0, 3.0),
    "lora": (3e-3, 1e-2, 3e-2),
    "full": (1e-3, 3e-3),
}
FIELDS = pl.support_desk.FIELDS
JOB = FIELDS[::-1]
KNOWN = [order for count in (1, 2, 3) for order in permutations(FIELDS, count) if order != JOB]


def points(seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield a point for each seed. It trains a base of its own, and adapts that by each method at each rate."""
    for seed in seeds:
        yield {"section": "t5", "seed": seed, "width": 128, "layers": 3, "base_steps": 1500, "base_batch": 128,
               "base_rate": 2e-3, "tokens": 20, "steps": 150, "batch_size": 32}  # fmt: skip


def measure(point: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Train a base, then adapt it by each method at each rate. Yield rows for the base, and one for each run."""
    told = {name: point[name] for name in ("section", "seed")}
    base, tokenizer = trained_base(point)
    for order in (FIELDS[1:], FIELDS, JOB):
        row = score(base, tokenizer, order, named=order != JOB)
        yield {**told, "method": "base", "job": " ".join(order), **row}
    examples = encoded(base, tokenizer, messages("train")[:4000], JOB, named=False)
    for method, rates in RATES.items():
        for learning_rate in rates:
            model = adapted(base, tokenizer, examples, point, method, learning_rate)
            row = {"learning_rate": learning_rate, "trainable": pl.count_parameters(model).trainable}
            yield {**told, "method": method, "job": " ".join(JOB), **row, **score(model, tokenizer, JOB, named=False)}


def adapted(
    base: nn.Module, tokenizer: Any, examples: list[dict], point: dict[str, Any], method: str, learning_rate: float
) -> nn.Module:
    """Return a copy of the base that has learned the new job by a method."""
    model = copy.deepcopy(base)
    torch.manual_seed(point["seed"])
    if method != "full":
        pl.attach(model, config_of(method, point["tokens"]))
    train(model, tokenizer, examples, point, point["steps"], point["batch_size"], learning_rate)
    return model


def config_of(method: str, tokens: int) -> Any:
    """Return the config of a method. A prefix of zeros changes least of what the base knows."""
    return {
        "prompt": pl.PromptTuningConfig(num_virtual_tokens=tokens),
        "prefix": pl.PrefixTuningConfig(num_virtual_tokens=tokens, init="zero"),
        "lora": pl.LoRAConfig(r=8, alpha=16),
    }[method]


@cache
def messages(split: str) -> list[dict[str, str]]:
    """Return the messages of a split with their fields: 20,000 to train on, else 500. No split shares a sentence."""
    return pl.support_desk.generate(split, 20_000 if split == "train" else 500)


@cache
def small_tokenizer() -> Any:
    """Make a tokenizer of 1,000 tokens from the messages, of the same kind as that of smollm2-135m."""
    rows = messages("train")[:4000]
    texts = [" ".join([*row.values(), *row]) for row in rows]
    large = AutoTokenizer.from_pretrained(ensure("smollm2-135m"))
    return large.train_new_from_iterator(texts, 1000, show_progress=False)


def trained_base(point: dict[str, Any]) -> tuple[nn.Module, Any]:
    """Make a T5 with random weights, and teach it the known jobs: of each message one, drawn at random."""
    tokenizer = small_tokenizer()
    torch.manual_seed(point["seed"])
    ends: dict[str, Any] = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    config = T5Config(
        vocab_size=len(tokenizer), d_model=point["width"], d_ff=2 * point["width"], num_layers=point["layers"],
        num_heads=4, d_kv=point["width"] // 4, dropout_rate=0.0, use_cache=False, **ends,
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = T5ForConditionalGeneration(config)
    draw, rows = Random(point["seed"]), messages("train")
    examples = [example for row in rows for example in encoded(model, tokenizer, [row], draw.choice(KNOWN), named=True)]
    train(model, tokenizer, examples, point, point["base_steps"], point["base_batch"], point["base_rate"])
    return model, tokenizer


def text_and_answer(row: dict[str, str], order: tuple[str, ...], named: bool) -> tuple[str, str]:
    """Return a message, with the fields to write in front if they are named, and the answer."""
    text = f"{' '.join(order)}: {row['message']}" if named else row["message"]
    return text, ", ".join(row[field] for field in order)


def encoded(
    model: nn.Module, tokenizer: Any, rows: list[dict[str, str]], order: tuple[str, ...], named: bool
) -> list[dict[str, list[int]]]:
    """Return examples: what the encoder reads, and what the decoder learns to write."""
    return [pl.encode_completion(tokenizer, *text_and_answer(row, order, named), model=model) for row in rows]


def train(
    model: nn.Module, tokenizer: Any, examples: list[dict], point: dict[str, Any], steps: int, batch_size: int,
    learning_rate: float,
) -> None:  # fmt: skip
    """Train the model in place."""
    try:
        pl.train(
            model, examples, tokenizer=tokenizer, steps=steps, batch_size=batch_size, learning_rate=learning_rate,
            seed=point["seed"], precision="fp32", warmup=0.1, schedule="linear", progress=False,
        )  # fmt: skip
    except pl.TrainingError:  # divergence is a result too; the model keeps its last finite state
        pass


def score(model: nn.Module, tokenizer: Any, order: tuple[str, ...], named: bool) -> dict[str, Any]:
    """Return the loss on validation messages, and how many of the test messages get the right answer."""
    held_out = encoded(model, tokenizer, messages("validation"), order, named)
    pairs = [text_and_answer(row, order, named) for row in messages("test")]
    answers = pl.generate_text(
        model, tokenizer, [text for text, _ in pairs], max_new_tokens=12, batch_size=250, progress=False
    )
    return {
        "validation_loss": pl.mean_loss(model, held_out, pl.Collator(tokenizer), batch_size=250),
        "messages": len(pairs),
        "correct": sum(answer.strip() == wanted for answer, (_, wanted) in zip(answers, pairs, strict=True)),
    }
