"""The measurements of the chapters on adapters and on IA3 and BitFit.

Sections:
    reviews, news   minilm classifies: every method, rates tried on the validation split, then more seeds at the best
    labels          the same on movie reviews, with a share of the training labels flipped
    desk            smollm2-135m learns the support desk by adapters, IA3 and its last block
    fullsize        one training step of the Llama-2-7B shape (random weights); IA3 beside peft
    biases          the same of roberta-large, which has biases
    latency         one forward pass of the 7B shape: the base, LoRA attached and merged, adapters, IA3
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.bench import fullsize, lora
from peftlab.bench.models import ALL_LINEAR, gpu_for, held, lent, vocabulary_of
from peftlab.bench.timing import clock, named
from peftlab.optional import require

SEEDS = (0, 1, 2)
LOW, MIDDLE, HIGH = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)
FULL = (5e-5, 2e-4, 5e-4)
# Modules that train beside every method. This checkpoint's pooler was never used, so its weights hardly pass a signal.
# A frozen pooler would hide what the layers below learn, with every method.
HEAD = ["pooler", "classifier"]
# The variants compared on minilm: name, settings, learning rates to try
VARIANTS: tuple[tuple[str, dict[str, Any], tuple[float, ...]], ...] = (
    ("head only", {"method": "head"}, MIDDLE),
    ("last block", {"method": "last block"}, LOW),
    ("full", {"method": "full"}, FULL),
    ("BitFit", {"method": "bitfit"}, MIDDLE),
    ("BitFit, queries", {"method": "bitfit", "targets": "query"}, HIGH),
    ("BitFit, queries and the middle", {"method": "bitfit", "targets": "query,intermediate.dense"}, MIDDLE),
    ("IA3", {"method": "ia3"}, HIGH),
    *((f"LoRA, r = {r}", {"method": "lora", "r": r}, MIDDLE) for r in (1, 8, 64)),
    *((f"Pfeiffer, width {m}", {"method": "pfeiffer", "width": m}, MIDDLE) for m in (1, 4, 24, 96, 384)),
    ("Houlsby, width 24", {"method": "houlsby", "width": 24}, MIDDLE),
    ("parallel, width 24", {"method": "parallel", "width": 24}, MIDDLE),
    ("prompt, 20 tokens", {"method": "prompt", "tokens": 20}, (1e-2, 3e-2, 1e-1)),
    ("prefix, 20 tokens", {"method": "prefix", "tokens": 20}, HIGH),
)
FLIPPED, ON_WRONG_LABELS = (0.1, 0.2, 0.4), ("full", "LoRA, r = 8", "Pfeiffer, width 24")
ON_NEWS = ("head only", "full", "BitFit", "IA3", "LoRA, r = 8", "Pfeiffer, width 24")


def points() -> list[dict[str, Any]]:
    """Yield every point to measure: first those that learn, then those that are timed."""
    learn = [*classified(), *mislabelled(), *desks()]
    return [*learn, *steps(), {"section": "latency", "timed": True, "shape": "llama-2-7b"}]


def classified() -> Iterator[dict[str, Any]]:
    """Yield each variant on movie reviews, and some on news. Leave out a method that this installation lacks."""
    for section, length, many in (("reviews", 64, 150), ("news", 128, 80)):
        for name, settings, rates in VARIANTS:
            there = settings["method"] in ("head", "last block", "full", *pl.METHODS)
            if there and (section == "reviews" or name in ON_NEWS):
                yield {
                    "section": section, "variant": name, **settings, "rates": list(rates), "steps": many,
                    "batch_size": 32, "max_length": length,
                }  # fmt: skip


def mislabelled() -> Iterator[dict[str, Any]]:
    """Yield some variants on movie reviews of whose training labels a share is wrong."""
    for flipped, (name, settings, rates) in product(FLIPPED, VARIANTS):
        if name in ON_WRONG_LABELS:
            yield {"section": "labels", "variant": name, **settings, "flipped": flipped, "rates": list(rates),
                   "steps": 150, "batch_size": 32, "max_length": 64}  # fmt: skip


def desks() -> Iterator[dict[str, Any]]:
    """Yield runs on the support desk, two learning rates each."""
    for method, settings, rates in (
        ("lora", {"r": 8}, (5e-3,)),
        ("pfeiffer", {"width": 16}, (1e-3, 3e-3)),
        ("houlsby", {"width": 8}, (1e-3, 3e-3)),
        ("parallel", {"width": 16}, (1e-3, 3e-3)),
        ("ia3", {}, (1e-2, 3e-2)),
        ("last block", {}, (3e-4, 1e-3)),
    ):
        for rate in rates:
            yield {"section": "desk", "method": method, **settings, "learning_rate": rate, "steps": 70,
                   "batch_size": 8, "seed": 0}  # fmt: skip


def steps() -> Iterator[dict[str, Any]]:
    """Yield training steps at full size: reduction factor 16, LoRA on all seven layers, IA3 on its defaults."""
    methods: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("lora", "peftlab", {"r": 16}), ("houlsby", "peftlab", {"reduction_factor": 16}),
        ("pfeiffer", "peftlab", {"reduction_factor": 16}), ("parallel", "peftlab", {"reduction_factor": 16}),
        ("ia3", "peftlab", {}), ("ia3", "peft", {}),
    )  # fmt: skip
    for (batch, checkpointing), (method, library, settings) in product(((4, True), (1, False)), methods):
        yield fullsize.train(method, library, batch, checkpointing, **settings)
    for method, settings in (
        ("full", {}), ("bitfit", {}), ("bitfit", {"targets": "query"}), ("ia3", {}), ("lora", {"r": 16}),
        ("houlsby", {"reduction_factor": 16}), ("pfeiffer", {"reduction_factor": 16}),
        ("parallel", {"reduction_factor": 16}), ("last block", {}), ("head", {}),
    ):  # fmt: skip
        yield {"section": "biases", "timed": True, "shape": "roberta-large", "method": method, **settings,
               "batch": 16, "sequence": 256}  # fmt: skip


def config_of(point: dict[str, Any], head: list[str] | None = None) -> Any:
    """Return the config of a point, with the modules that train as its head; None for full fine-tuning."""
    method, targets = point["method"], point["targets"].split(",") if point.get("targets") else None
    if method == "full":
        return None
    if method in ("head", "last block"):
        return pl.SelectiveConfig(last_layers=int(method == "last block"), modules_to_save=head)
    given: dict[str, Any] = {name: point[name] for name in ("r", "width", "reduction_factor") if name in point}
    if method == "lora":
        given["alpha"] = 2 * point["r"]
        targets = list(ALL_LINEAR) if point.get("shape") == "llama-2-7b" else targets
    if method in ("houlsby", "pfeiffer", "parallel"):
        given["placement"] = method
    if "tokens" in point:
        return pl.METHODS[method](num_virtual_tokens=point["tokens"], modules_to_save=head)
    return pl.METHODS[method](**given, target_modules=targets, modules_to_save=head)


def measure(point: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure one point, and return its rows."""
    section = point["section"]
    if section in ("reviews", "news", "labels"):
        return list(chosen_rate(point))
    if section == "desk":
        return [{**point, **desk(point)}]
    if section == "fullsize":
        return fullsize.measure(point, adapt=with_method)
    with held(point["shape"], gpu_for(point, "a GPU's memory and time")) as model:
        return named(point, [roberta_step(model, point)] if section == "biases" else forward_passes(model))


def chosen_rate(point: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Try every rate with the first seed, and the other seeds with the rate that is best on the validation split."""
    rates = point["rates"]
    told = {name: value for name, value in point.items() if name != "rates"}
    tried = [{**told, "learning_rate": rate, "seed": SEEDS[0], **classify(point, rate, SEEDS[0])} for rate in rates]
    best = max(tried, key=lambda row: row["validation"])["learning_rate"]
    again = [{**told, "learning_rate": best, "seed": seed, **classify(point, best, seed)} for seed in SEEDS[1:]]
    for row in (*tried, *again):
        yield {**row, "chosen": row["learning_rate"] == best}


def classify(point: dict[str, Any], rate: float, seed: int) -> dict[str, Any]:
    """Train minilm on one task, and return the measurements."""
    data = "reviews" if point["section"] == "labels" else point["section"]
    train, validation, test, classes = encoded(data, point["max_length"])
    train = with_wrong_labels(train, point.get("flipped", 0.0))
    torch.manual_seed(seed)
    model, tokenizer = pl.load_model(
        "minilm", num_labels=classes, device="cuda" if torch.cuda.is_available() else None
    )  # fmt: skip
    config = config_of(point, HEAD)
    if config is not None:
        pl.attach(model, config)
    started = time.perf_counter()
    try:
        history = pl.train(
            model, train, tokenizer=tokenizer, steps=point["steps"], batch_size=point["batch_size"],
            learning_rate=rate, warmup=0.1, schedule="linear", group_by_length=True, precision="fp32", seed=seed,
            progress=False,
        )  # fmt: skip
        losses = [step["loss"] for step in history.steps]
    except pl.TrainingError:  # divergence is a result too; the model keeps its last finite state
        losses = []
    seconds = time.perf_counter() - started

    def score(rows: list[dict[str, Any]]) -> float:
        predicted = pl.predict_labels(model, rows, tokenizer, batch_size=128)
        return pl.accuracy(predicted, [row["labels"] for row in rows])

    return {
        "trainable": pl.count_parameters(model).trainable,
        "head": sum(p.numel() for p in (*head_of(model.bert.pooler), *head_of(model.classifier))),
        "train_loss": statistics.fmean(losses[-10:]) if losses else None,
        "validation": score(validation),
        "accuracy": score(test),
        "seconds": seconds,
    }


def with_wrong_labels(rows: list[dict], share: float) -> list[dict]:
    """Return the rows with this share of their labels, 0 or 1, exchanged: always the same rows."""
    wrong = set(random.Random(0).sample(range(len(rows)), round(share * len(rows))))
    return [{**row, "labels": 1 - row["labels"]} if i in wrong else row for i, row in enumerate(rows)]


def head_of(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a head, without the copy that trains."""
    return [parameter for name, parameter in module.named_parameters() if "peftlab" not in name]


@cache
def encoded(name: str, max_length: int) -> tuple[list[dict], list[dict], list[dict], int]:
    """Return the three splits as examples, and the number of classes."""
    data = pl.load_data(name)
    _, tokenizer = pl.load_model("minilm", num_labels=2)
    splits = [
        [pl.encode_classification(tokenizer, row["text"], row["label"], max_length) for row in data[split]]
        for split in ("train", "validation", "test")
    ]
    train, validation, test = splits
    return train, validation, test, len(data["train"].features["label"].names)


def desk(point: dict[str, Any]) -> dict[str, Any]:
    """Train smollm2-135m on the support desk, by the LoRA chapter's recipe, and return the measurements."""
    torch.manual_seed(point["seed"])
    model, tokenizer = pl.load_model("smollm2-135m", device="cuda" if torch.cuda.is_available() else None)
    rows, test, news = lora.desk_data()
    pl.attach(model, config_of(point))
    examples = [pl.encode_completion(tokenizer, row["prompt"], row["ticket"]) for row in rows]
    held_out = [pl.encode_completion(tokenizer, row["prompt"], row["ticket"]) for row in test]
    history = pl.train(
        model, examples, tokenizer=tokenizer, steps=point["steps"], batch_size=point["batch_size"],
        learning_rate=point["learning_rate"], seed=point["seed"], precision="fp32", warmup=0.1, schedule="linear",
        group_by_length=True, progress=False,
    )  # fmt: skip
    prompts = [row["prompt"] for row in test]
    answers = pl.generate_text(model, tokenizer, prompts, max_new_tokens=40, batch_size=64, progress=False)
    return {
        "trainable": pl.count_parameters(model).trainable,
        "adapter_bytes": lora.adapter_bytes(model),
        "train_loss": statistics.fmean(step["loss"] for step in history.steps[-10:]),
        "test_loss": pl.mean_loss(model, held_out, pl.Collator(tokenizer)),
        "exact": pl.support_desk.score(answers, [row["ticket"] for row in test])["exact"],
        "news_perplexity": pl.perplexity(model, news, tokenizer, progress=False),
    }


def with_method(model: nn.Module, point: dict[str, Any]) -> nn.Module:
    """Return the 7B model as the point's library prepares it: float32 adapters on bf16 weights."""
    if point["library"] == "peft":
        peft = require("peft")

        return peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM"))
    return pl.attach(model, config_of(point))


def roberta_step(model: nn.Module, point: dict[str, Any]) -> dict[str, Any]:
    """Measure a step's peak and time: float32 weights, bf16 autocast, fused AdamW."""
    torch.manual_seed(0)
    with lent(model, with_head, point) as wrapped:
        device = next(model.parameters()).device
        ids = torch.randint(3, vocabulary_of(model), (point["batch"], point["sequence"]), device=device)
        return fullsize.step_of(wrapped, {"input_ids": ids, "labels": ids[:, 0] % 2})


def with_head(model: nn.Module, point: dict[str, Any]) -> nn.Module:
    """Return the classifier with what a point trains, its head too."""
    config = config_of(point, ["classifier"])
    return model.requires_grad_(True) if config is None else pl.attach(model, config)


SIZES = tuple(product((1, 32), (1, 128)))  # sequences, and tokens of each
STATES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("houlsby", {"method": "houlsby", "reduction_factor": 16}),
    ("pfeiffer", {"method": "pfeiffer", "reduction_factor": 16}),
    ("parallel", {"method": "parallel", "reduction_factor": 16}),
    ("ia3", {"method": "ia3"}),
    ("lora", {"method": "lora", "r": 16, "shape": "llama-2-7b"}),
)


@torch.no_grad()
def forward_passes(model: nn.Module, sizes: tuple[tuple[int, int], ...] = SIZES) -> Iterator[dict[str, Any]]:
    """Time a forward pass by the numbers of sequences and of tokens in each, with 16-bit adapters."""
    torch.manual_seed(0)
    model.eval()
    device = next(model.parameters()).device

    def passes(state: str) -> Iterator[dict[str, Any]]:
        for batch, count in sizes:
            tokens = torch.randint(vocabulary_of(model), (batch, count), device=device)
            spent = clock(partial(model, input_ids=tokens, logits_to_keep=1), 10, 3)
            yield {"state": state, "batch": batch, "tokens": count, **spent}

    yield from passes("base")
    for name, settings in STATES:
        pl.attach(model, config_of(settings), adapter_dtype=torch.bfloat16)
        yield from passes(name)
        if name in ("ia3", "lora"):
            pl.merge(model, unload=True)
            yield from passes(f"{name} merged")
        else:
            pl.detach(model)
