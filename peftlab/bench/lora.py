"""The measurements of the LoRA chapter.

smollm2-135m learns the support desk, in every section by the same protocol:

1. Each learning rate runs with the tuning seeds. The rate with the lowest mean loss on the validation messages is
   taken. If it is the lowest or the highest that was tried, the next one is tried as well.
2. At this rate three other seeds run. They alone are scored on all test messages (`scored` is true in their rows).

Sections:
    base        the model before training
    shots       the same model with the rules and some solved messages in its prompt
    live        shorter and shorter runs, for the one that the chapter makes
    rank        ranks from 1 to 256 under three rules for alpha, at the same learning rates
    forgetting  LoRA, LoRA on 4-bit weights and full fine-tuning; two of them over three times as many steps, too
    alpha       alpha = 4, 16 and 64 at one rank
    where       the same number of parameters in different layers
    overfit     few examples shown many times; rank, dropout and weight decay
    intrinsic   all linear weights moved along random directions
    spectrum    singular values of a full fine-tuning update and of the weights before it
    fullsize    one training step of the Llama-2-7B shape (random weights), beside peft
    latency     one forward pass of that shape: base, LoRA attached, LoRA merged
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import tempfile
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.bench import fullsize
from peftlab.core.records import own_tensor
from peftlab.training import subspace

Row = dict[str, Any]

# What every run does, if its point does not say otherwise
RECIPE: Row = {
    "method": "lora", "r": 8, "alpha": 16, "rule": "alpha / r", "targets": "q_proj,v_proj", "layers": "all",
    "dropout": 0.0, "weight_decay": 0.0, "steps": 60, "batch_size": 8, "examples": 2000,
}  # fmt: skip
SEEDS = (0, 1, 2)  # of the runs that are scored
TUNING, TUNING_RANK = (10,), (10, 11)  # of the runs that choose a rate
LADDER = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # all rates that may be tried

LAYERS = 30
QKVO = "q_proj,k_proj,v_proj,o_proj"
MLP = "gate_proj,up_proj,down_proj"
# About 920,000 parameters each: r (d_in + d_out) summed over the modules
PLACES = (
    ("q_proj,v_proj", 16, "all"), (QKVO, 8, "all"), (MLP, 5, "all"), (f"{QKVO},{MLP}", 3, "all"),
    ("q_proj,v_proj", 32, "last half"), ("q_proj,v_proj", 32, "first half"),
)  # fmt: skip
RULES = (
    "Reply with the ticket as one line of JSON and nothing else. intent: refund, repair, delivery, billing or advice. "
    "product: the one that needs attention. urgency: urgent, normal or can wait."
)


def points() -> list[Row]:
    """Yield every point to measure. Those that take longest come first, so that no process works alone at the end."""
    learned = (forgetting(), rank(), intrinsic(), overfit(), where(), alpha(), shots(), live(), spectra())
    return [*(point for points in learned for point in points), {"section": "base"}, *fullsize.points()]


def desk(section: str, rates: tuple[float, ...], tuning: tuple[int, ...] = TUNING, **changes: Any) -> Row:
    """Describe one setting, the rates to try for it, and the seeds to try them with."""
    return {"section": section, **RECIPE, **changes, "rates": list(rates), "tuning": list(tuning)}


def rank() -> Iterator[Row]:
    """Vary r: alpha = 16 with alpha / r and with alpha / sqrt(r), and alpha = 2 r. The rule of thumb gives r = 6."""
    rates = (1e-3, 3e-3, 1e-2, 3e-2)
    for r in (1, 4, 6, 8, 16, 64, 256):
        yield desk("rank", rates, TUNING_RANK, r=r)
    for r in (4, 16, 64, 256):
        yield desk("rank", rates, TUNING_RANK, r=r, rule="alpha / sqrt(r)")
    for r in (1, 4, 16, 64, 256):
        yield desk("rank", rates, TUNING_RANK, r=r, alpha=2 * r, rule="alpha = 2 r")


def forgetting() -> Iterator[Row]:
    """Compare three methods over a wide range of rates, and two of them over three times as many steps."""
    low_rank, full = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
    for method, rates in (("lora", low_rank), ("full", full)):
        yield desk("forgetting", rates[1:4], method=method, steps=3 * RECIPE["steps"])
    for method, rates in (("qlora", low_rank), ("lora", low_rank), ("full", full)):
        yield desk("forgetting", rates, method=method)


def intrinsic() -> Iterator[Row]:
    """Move all linear weights along d random directions."""
    for dimension in (100, 1000, 10_000, 100_000, 1_000_000):
        yield desk("intrinsic", (3e-4, 1e-3, 3e-3), method="subspace", dimension=dimension)


def overfit() -> Iterator[Row]:
    """Show few examples many times, and vary rank, dropout and weight decay."""
    ways = ((16, 8, 0.0, 0.0), (16, 64, 0.0, 0.0), (16, 8, 0.1, 0.0), (16, 8, 0.0, 0.1), (128, 8, 0.0, 0.0),
            (128, 64, 0.0, 0.0))  # fmt: skip
    for examples, r, dropout, decay in ways:
        changes: Row = {"examples": examples, "r": r, "dropout": dropout, "weight_decay": decay}
        yield desk("overfit", (1e-3, 3e-3, 1e-2), steps=2 * RECIPE["steps"], **changes)


def where() -> Iterator[Row]:
    """Put the same number of parameters into different layers."""
    for targets, r, layers in PLACES:
        yield desk("where", (3e-3, 1e-2, 3e-2), targets=targets, r=r, layers=layers)


def alpha() -> Iterator[Row]:
    """Vary alpha at r = 8. The larger alpha is, the smaller is the rate in the middle."""
    for value, rates in ((4, (1e-2, 3e-2, 1e-1)), (16, (3e-3, 1e-2, 3e-2)), (64, (1e-3, 3e-3, 1e-2))):
        yield desk("alpha", rates, alpha=value)


def shots() -> Iterator[Row]:
    """Put some solved messages into the prompt, in three draws."""
    for number in (50, 20, 5, 1):
        for draw in range(3):
            yield {"section": "shots", "shots": number, "draw": draw}
    yield {"section": "shots", "shots": 0, "draw": 0}


def live() -> Iterator[Row]:
    """Shorten the run. The chapter's own run is one of these, on a processor: its time goes with steps times batch."""
    for steps, batch_size in ((100, 4), (60, 4), (40, 4), (80, 2), (50, 2)):
        yield desk("live", (3e-3, 1e-2, 3e-2), steps=steps, batch_size=batch_size)


def spectra() -> Iterator[Row]:
    """Run one full fine-tuning, for the singular values of its update."""
    yield {"section": "spectrum", **RECIPE, "method": "full", "learning_rate": 1e-4, "seed": SEEDS[0]}


def measure(point: Row) -> list[Row]:
    """Measure one point, and return its rows."""
    section = point["section"]
    if section in ("fullsize", "latency"):
        return fullsize.measure(point)
    try:
        if section == "base":
            model, tokenizer = base()
            return [{**point, **on_validation(model, tokenizer), **on_test(model, tokenizer)}]
        if section == "shots":
            return [{**point, **few_shot(point)}]
        return list(spectrum(point) if section == "spectrum" else tuned(point))
    finally:
        torch.cuda.empty_cache()  # other processes share the GPU


# ------------------------------------------------------------------------------------------------------- protocol


def tuned(point: Row) -> Iterator[Row]:
    """Try rates until the best is not at an edge, then score three seeds at the best one."""
    told = {name: value for name, value in point.items() if name not in ("rates", "tuning")}
    todo, losses = point["rates"], {}
    while todo:
        for rate in todo:
            tried = [trained({**told, "learning_rate": rate, "seed": seed})[1] for seed in point["tuning"]]
            yield from ({**row, "scored": False} for row in tried)
            found = [row["validation_loss"] for row in tried]
            losses[rate] = math.inf if None in found else statistics.fmean(found)
        best = min(losses, key=lambda rate: losses[rate])
        todo = beyond(best, losses)
    for seed in SEEDS:
        yield scored({**told, "learning_rate": best, "seed": seed})[1]


def beyond(best: float, tried: Any, ladder: tuple[float, ...] = LADDER) -> list[float]:
    """Return the next rate of the ladder if the best one is the lowest or the highest that was tried."""
    place = ladder.index(best)
    return [rate for rate in (*ladder[:place][-1:], *ladder[place + 1 :][:1])
            if not min(tried) <= rate <= max(tried)]  # fmt: skip


def scored(point: Row) -> tuple[nn.Module, Row]:
    """Train once, and score the model on the test messages."""
    model, row = trained(point)
    return model, {**row, **on_test(model, base()[1]), "scored": True}


def trained(point: Row) -> tuple[nn.Module, Row]:
    """Train once. Return the model, and its row: the point and what the validation messages and the news say."""
    torch.manual_seed(point["seed"])
    model, tokenizer = copy.deepcopy(base("qlora" if point["method"] == "qlora" else "whole")[0]), base()[1]
    if point["method"] in ("lora", "qlora"):
        pl.attach(model, config_of(point))
    elif point["method"] == "subspace":
        subspace.move_along(model, point["dimension"], point["seed"])
    loss = None
    try:
        history = pl.train(
            model, encoded("train")[: point["examples"]], tokenizer=tokenizer, steps=point["steps"],
            batch_size=point["batch_size"], learning_rate=point["learning_rate"], seed=point["seed"],
            weight_decay=point["weight_decay"], precision="fp32", warmup=0.1, schedule="linear",
            group_by_length=True, progress=False,
        )  # fmt: skip
        loss = statistics.fmean(step["loss"] for step in history.steps[-10:])
    except pl.TrainingError:
        pass  # divergence is a result too; the model keeps its last finite state
    trainable = pl.count_parameters(model).trainable
    return model, {**point, "trainable": trainable, "train_loss": loss, **on_validation(model, tokenizer)}


def config_of(point: Row) -> pl.LoRAConfig:
    """Return the settings of LoRA that a point describes."""
    first = LAYERS // 2 if point["layers"] == "last half" else 0
    last = LAYERS // 2 if point["layers"] == "first half" else LAYERS
    return pl.LoRAConfig(
        r=point["r"], alpha=point["alpha"], dropout=point["dropout"], use_rslora=point["rule"] == "alpha / sqrt(r)",
        target_modules=point["targets"].split(","), layers_to_transform=range(first, last),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------- models and scores


@cache
def base(kind: str = "whole") -> tuple[nn.Module, Any]:
    """Return the untrained model, in float32 or with 4-bit weights, and its tokenizer. Each process loads it once."""
    model, tokenizer = pl.load_model("smollm2-135m", device="cuda" if torch.cuda.is_available() else None)
    return (pl.quantize_model(model) if kind == "qlora" else model), tokenizer


@cache
def messages(split: str) -> list[Row]:
    """Return 2,000 training messages, or all messages of another split."""
    rows = list(pl.load_data("support-desk")[split])
    return rows[:2000] if split == "train" else rows


@cache
def encoded(split: str) -> list[Any]:
    """Return the messages of a split as examples."""
    return [pl.encode_completion(base()[1], row["prompt"], row["ticket"]) for row in messages(split)]


@cache
def news() -> list[str]:
    """Return 40 news articles, cut to 1,000 characters."""
    return [row["text"][:1000] for row in pl.load_data("news")["test"].select(range(40))]


def on_validation(model: nn.Module, tokenizer: Any) -> Row:
    """Return the loss on the validation messages, and the perplexity on news. None stands for a value too large."""
    loss = pl.mean_loss(model, encoded("validation"), pl.Collator(tokenizer), batch_size=8)
    perplexity = pl.perplexity(model, news(), tokenizer)
    return {"validation_loss": finite(loss), "news_perplexity": finite(perplexity)}


def on_test(model: nn.Module, tokenizer: Any) -> Row:
    """Return the loss on the test messages, their number, and how many answers are right."""
    loss = pl.mean_loss(model, encoded("test"), pl.Collator(tokenizer), batch_size=8)
    prompts = [row["prompt"] for row in messages("test")]
    return {"test_loss": finite(loss), **answered(model, tokenizer, prompts, max_new_tokens=24, batch_size=125)}


def answered(model: nn.Module, tokenizer: Any, prompts: list, **settings: int) -> Row:
    """Return the number of test messages, of right answers (exact tickets), and of answers that are JSON at all."""
    answers = pl.generate_text(model, tokenizer, prompts, progress=False, **settings)
    score = pl.support_desk.score(answers, [row["ticket"] for row in messages("test")])
    many = len(answers)
    return {"messages": many, "right": round(many * score["exact"]), "valid": round(many * score["valid"])}


def finite(value: float) -> float | None:
    """Return a value that a results file can hold."""
    return value if math.isfinite(value) else None


def few_shot(point: Row) -> Row:
    """Answer the test messages with the rules and some solved training messages in the prompt."""
    solved: list[Row] = [{"role": "system", "content": RULES}]
    start = 100 * point["draw"]
    for row in messages("train")[start : start + point["shots"]]:
        solved += [{"role": "user", "content": row["message"]}, {"role": "assistant", "content": row["ticket"]}]
    prompts = [[*solved, row["prompt"][-1]] for row in messages("test")]
    at_once = max(1, min(125, 400 // (point["shots"] + 1)))  # so many tokens fit beside other processes
    return answered(*base(), prompts, max_new_tokens=48, batch_size=at_once)


def spectrum(point: Row) -> Iterator[Row]:
    """Return singular values of W - W0 after full fine-tuning, and of W0, for a few matrices of a middle layer."""
    before, _ = base()
    after, row = scored(point)
    yield {**row, "module": "all"}
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        path = f"model.layers.{LAYERS // 2}.{name}"
        old, new = (own_tensor(net.get_submodule(path), "weight").detach().cpu().double() for net in (before, after))
        values = zip(torch.linalg.svdvals(old).tolist(), torch.linalg.svdvals(new - old).tolist(), strict=True)
        for i, (w, u) in enumerate(values, 1):
            yield {"section": "spectrum", "module": path, "index": i, "weight": w, "update": u}


# --------------------------------------------------------------------------- what the bench of adapters takes from here


def desk_data() -> tuple[list[Row], list[Row], list[str]]:
    """Return the training messages, 128 test messages, and the news."""
    return messages("train"), messages("test")[:128], news()


def adapter_bytes(model: nn.Module) -> int:
    """Return the size of the adapter's weights on disk."""
    with tempfile.TemporaryDirectory() as folder:
        return os.path.getsize(pl.save_adapter(model, folder) / "adapter_model.safetensors")
