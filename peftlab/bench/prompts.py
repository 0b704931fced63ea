"""The measurements of the chapter on prompts and prefixes.

Sections, in the chapter's order:
    live                    a run of forty steps, which a notebook can repeat
    rate, start             the support desk learned by smollm2-135m through virtual tokens, one setting at a time
    more, length            the same, further
    reviews                 minilm on reviews: a prompt, a prefix, LoRA, the head alone
    headlines               smollm2-135m writes the headline of a news article
    fullsize, fullsize-more a training step of the Llama-2-7B shape (random weights), beside peft
    reading                 what a prefix and a prompt cost that shape when it reads and writes
    seq2seq                 a training step of the t5-base shape, beside peft
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.assets.data import articles
from peftlab.bench import fullsize, virtual_tokens
from peftlab.bench.virtual_tokens import config_of

# The recipe of the chapter's live run; a point names what it changes.
RECIPE = {"method": "prompt", "init": "vocabulary", "tokens": 20, "learning_rate": 1e-1, "steps": 100, "seed": 0}
# The points that the chapter needs
RATES = {
    ("prompt", "vocabulary"): (1e-2, 3e-2, 1e-1),
    ("prompt", "random"): (3e-2, 1e-1, 3e-1),
    ("prompt", "text"): (1e-1,),
    ("deep prompt", "vocabulary"): (1e-2, 1e-1, 1.0),
    ("prefix", "vocabulary"): (1e-2, 3e-2),
    ("lora", "kaiming"): (5e-3,),
}
STARTS = ("random", "vocabulary", "text")  # repeated with another seed
# Further points
MORE = {
    ("prefix", "random"): (1e-1,),
    ("prefix", "text"): (1e-2,),
    ("prefix projected", "random"): (1e-3, 3e-3),
    ("p-tuning", "random"): (1e-3, 3e-3),
}
LENGTHS = {"prompt": (1e-1, (1, 5, 80)), "prefix": (1e-2, (1, 80))}
REVIEWS = (("prompt", 1e-1), ("prefix", 1e-2), ("lora", 2e-3), ("head", 1e-2))
HEADLINES = {"prompt": 2e-2, "prefix": 5e-3, "lora": 2e-3}


def points() -> list[dict[str, Any]]:
    """Yield every point to measure."""
    learned = [*live(), *rate("rate", RATES), *start(), *rate("more", MORE), *length(), *reviews(), *headlines()]
    return [*learned, *full_size(), {"section": "reading", "timed": True, "shape": "llama-2-7b"}, *seq2seq()]


def desk(section: str, **changes: Any) -> dict[str, Any]:
    """Describe one run on the support desk."""
    return {"section": section, **RECIPE, **changes}


def rate(section: str, rates: dict[tuple[str, str], tuple[float, ...]]) -> Iterator[dict[str, Any]]:
    """Try learning rates, for each method and start."""
    for (method, init), values in rates.items():
        for learning_rate in values:
            yield desk(section, method=method, init=init, learning_rate=learning_rate)


def live() -> Iterator[dict[str, Any]]:
    """Make a run short enough to repeat in a notebook."""
    yield desk("live", steps=40)


def start() -> Iterator[dict[str, Any]]:
    """Vary the start of a prompt, with another seed."""
    for init in STARTS:
        yield desk("start", init=init, seed=1)


def length() -> Iterator[dict[str, Any]]:
    """Vary the number of virtual tokens. The recipe's own number is among the points above."""
    for method, (learning_rate, lengths) in LENGTHS.items():
        for tokens in lengths:
            yield desk("length", method=method, tokens=tokens, learning_rate=learning_rate)


def reviews() -> Iterator[dict[str, Any]]:
    """Train a classifier: minilm tells fresh from rotten."""
    for method, learning_rate in REVIEWS:
        yield {"section": "reviews", "method": method, "tokens": 20, "learning_rate": learning_rate, "steps": 200,
               "seed": 0}  # fmt: skip


def headlines() -> Iterator[dict[str, Any]]:
    """Write a headline for each article: untrained, and trained."""
    yield {"section": "headlines", "method": "none", "steps": 0, "seed": 0}
    for method, learning_rate in HEADLINES.items():
        yield {"section": "headlines", "method": method, "init": "vocabulary", "tokens": 20,
               "learning_rate": learning_rate, "steps": 100, "seed": 0}  # fmt: skip


def full_size() -> Iterator[dict[str, Any]]:
    """Measure training steps at 7B. peft refuses a prefix with checkpointing, so only ours is measured."""
    for section, method, checkpointing, library in (
        ("fullsize", "prompt", False, "peftlab"), ("fullsize", "prefix", False, "peft"),
        ("fullsize", "prefix", False, "peftlab"), ("fullsize", "prefix", True, "peftlab"),
        ("fullsize-more", "prompt", False, "peft"), ("fullsize-more", "prompt", True, "peftlab"),
        ("fullsize-more", "p-tuning", False, "peftlab"), ("fullsize-more", "prefix projected", False, "peftlab"),
    ):  # fmt: skip
        yield {**fullsize.train(method, library, 4, checkpointing, tokens=20), "section": section}


def seq2seq() -> Iterator[dict[str, Any]]:
    """Measure training steps of t5-base."""
    for method in ("prompt", "prefix"):
        for library in ("peft", "peftlab"):
            yield {"section": "seq2seq", "timed": True, "shape": "t5-base", "method": method, "library": library,
                   "tokens": 20, "batch": 8, "sequence": 256}  # fmt: skip


def measure(point: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure one point, and return its rows."""
    section = point["section"]
    if section in ("fullsize", "fullsize-more"):
        rows = fullsize.measure({**point, "section": "fullsize"}, virtual_tokens.attached)
        return [{**row, "section": section} for row in rows]
    if section in ("reading", "seq2seq"):
        return virtual_tokens.measure(point)
    return [{**point, **{"reviews": classify, "headlines": summarise}.get(section, learn)(point)}]


def device() -> str | None:
    """Return a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else None


def learn(point: dict[str, Any]) -> dict[str, Any]:
    """Train smollm2-135m on the support desk as a point says, and measure what it learned."""
    model, tokenizer = pl.load_model("smollm2-135m", device=device())
    torch.manual_seed(point["seed"])
    pl.attach(model, config_of(point, tokenizer))
    train, test = desk_data()
    encoded = [pl.encode_completion(tokenizer, row["prompt"], row["ticket"]) for row in train]
    held_out = [pl.encode_completion(tokenizer, row["prompt"], row["ticket"]) for row in test]
    measured = trained(model, encoded, tokenizer, point, batch_size=8)
    answers = pl.generate_text(
        model, tokenizer, [row["prompt"] for row in test], max_new_tokens=40, batch_size=64, progress=False
    )
    return {
        **measured,
        "test_loss": pl.mean_loss(model, held_out, pl.Collator(tokenizer), batch_size=32),
        "exact": pl.support_desk.score(answers, [row["ticket"] for row in test])["exact"],
    }


def trained(
    model: nn.Module, examples: list[dict], tokenizer: Any, point: dict[str, Any], batch_size: int
) -> dict[str, Any]:
    """Train as the point says. Return the parameters, the seconds, and the mean loss of the last ten steps."""
    started, losses = time.perf_counter(), []
    try:
        history = pl.train(
            model, examples, tokenizer=tokenizer, steps=point["steps"], batch_size=batch_size,
            learning_rate=point["learning_rate"], seed=point["seed"], precision="fp32", warmup=0.1, schedule="linear",
            group_by_length=True, progress=False,
        )  # fmt: skip
        losses = [step["loss"] for step in history.steps]
    except pl.TrainingError:  # divergence is a result too; the model keeps its last finite state
        pass
    return {
        "trainable": pl.count_parameters(model).trainable,
        "first_loss": losses[0] if losses else None,
        "train_loss": statistics.fmean(losses[-10:]) if losses else None,
        "seconds": time.perf_counter() - started,
    }


@cache
def desk_data() -> tuple[list[dict], list[dict]]:
    """Return training messages, and 64 held-out ones."""
    data = pl.load_data("support-desk")
    return list(data["train"].select(range(2000))), list(data["test"].select(range(64)))


def classify(point: dict[str, Any]) -> dict[str, Any]:
    """Train minilm to classify reviews."""
    torch.manual_seed(point["seed"])
    model, tokenizer = pl.load_model("minilm", num_labels=2, device=device())
    if point["method"] == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("classifier"))
    else:
        pl.attach(model, config_of(point, task_type="SEQ_CLS"))
    data = pl.load_data("reviews")
    train, test = ([pl.encode_classification(tokenizer, row["text"], row["label"], 64) for row in rows]
                   for rows in (data["train"].select(range(6400)), data["test"].select(range(1000))))  # fmt: skip
    measured = trained(model, train, tokenizer, point, batch_size=32)
    found = pl.predict_labels(model, test, tokenizer, batch_size=100)
    return {**measured, "accuracy": pl.accuracy(found, [example["labels"] for example in test])}


def summarise(point: dict[str, Any]) -> dict[str, Any]:
    """Train smollm2-135m to write headlines."""
    model, tokenizer = pl.load_model("smollm2-135m", device=device())
    torch.manual_seed(point["seed"])
    measured: dict[str, Any] = {"trainable": 0}
    train, test = articles()
    if point["method"] != "none":
        pl.attach(model, config_of(point, tokenizer))
        encoded = [pl.encode_completion(tokenizer, row["prompt"], row["headline"], 256) for row in train]
        measured = trained(model, encoded, tokenizer, point, batch_size=8)
    answers = pl.generate_text(
        model, tokenizer, [row["prompt"] for row in test], max_new_tokens=24, batch_size=32, progress=False
    )
    return {**measured, "token_f1": pl.token_f1(answers, [row["headline"] for row in test])}
