"""The measurements of the LoRA chapter.

Sections, in the chapter's order:
    rank, scaling, rslora, where, rate, overfit   the support desk learned by smollm2-135m, one setting varied at a time
    intrinsic                             all linear weights moved along a few random directions
    forgetting                            the same with full fine-tuning beside it, over many steps
    spectrum                              singular values of a full fine-tuning update and of the weights before it
    fullsize                              one training step of the Llama-2-7B shape (random weights), beside peft
    latency                               one forward pass of that shape: base, LoRA attached, LoRA merged
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.bench import fullsize
from peftlab.core.records import own_tensor
from peftlab.training import subspace

# The recipe of the chapter's live run; a point names what it changes.
RECIPE: dict[str, Any] = {
    "method": "lora", "r": 8, "alpha": 16, "targets": "q_proj,v_proj", "layers": "all", "rslora": False,
    "dropout": 0.0, "learning_rate": 5e-3, "weight_decay": 0.0, "steps": 70, "batch_size": 8, "examples": 2000,
    "seed": 0,
}  # fmt: skip
LAYERS = 30
QKVO = "q_proj,k_proj,v_proj,o_proj"
MLP = "gate_proj,up_proj,down_proj"
# About 920,000 parameters each: r (d_in + d_out) summed over the modules
PLACES = (
    ("q_proj,v_proj", 16, "all"), (QKVO, 8, "all"), (MLP, 5, "all"), (f"{QKVO},{MLP}", 3, "all"),
    ("q_proj,v_proj", 32, "last half"), ("q_proj,v_proj", 32, "first half"),
)  # fmt: skip
RATES = {"lora": (3e-4, 1e-3, 3e-3, 1e-2), "full": (3e-5, 1e-4, 3e-4)}


def points() -> list[dict[str, Any]]:
    """Yield every point to measure, the untrained model first."""
    untrained = desk("base", method="none", steps=0)
    learned = (
        untrained, *rank(), *intrinsic(), *scaling(), *where(), *rate(), *overfit(), *forgetting(), *spectra(),
    )  # fmt: skip
    return [*learned, *fullsize.points()]


def desk(section: str, **changes: Any) -> dict[str, Any]:
    """Describe one run on the support desk."""
    return {"section": section, **RECIPE, **changes}


def rank() -> Iterator[dict[str, Any]]:
    """Vary r, with alpha = 2 r. The recipe itself runs with three seeds, to see the effect of chance."""
    for r, seed in ((1, 0), (2, 0), (4, 0), (8, 0), (8, 1), (8, 2), (16, 0), (32, 0), (64, 0)):
        yield desk("rank", r=r, alpha=2 * r, seed=seed)


def intrinsic() -> Iterator[dict[str, Any]]:
    """Move all linear weights along d random directions, at three learning rates each."""
    for dimension, learning_rate in product((100, 1000, 10_000, 100_000, 1_000_000), (3e-4, 1e-3, 3e-3)):
        yield desk("intrinsic", method="subspace", dimension=dimension, learning_rate=learning_rate)


def scaling() -> Iterator[dict[str, Any]]:
    """Try alpha = r, 2 r, 4 r; and a fixed alpha while r grows, with alpha / r and with alpha / sqrt(r)."""
    for factor in (1, 2, 4):
        yield desk("scaling", r=8, alpha=factor * 8)
    for r, rslora in product((4, 256), (False, True)):
        yield desk("rslora", r=r, alpha=16, rslora=rslora)


def where() -> Iterator[dict[str, Any]]:
    """Put the same budget into different layers."""
    for targets, r, layers in PLACES:
        yield desk("where", targets=targets, r=r, alpha=2 * r, layers=layers)


def rate() -> Iterator[dict[str, Any]]:
    """Try learning rates of LoRA and of full fine-tuning."""
    for method, rates in RATES.items():
        for learning_rate in rates:
            yield desk("rate", method=method, learning_rate=learning_rate)


def overfit() -> Iterator[dict[str, Any]]:
    """Show few examples many times, and vary rank, dropout and weight decay."""
    ways = ((16, 8, 0, 0), (16, 64, 0, 0), (16, 8, 0.1, 0), (16, 8, 0, 0.1), (128, 8, 0, 0), (128, 64, 0, 0))
    for examples, r, dropout, decay in ways:
        yield desk("overfit", examples=examples, r=r, alpha=2 * r, dropout=dropout, weight_decay=decay)


def forgetting() -> Iterator[dict[str, Any]]:
    """Run LoRA and full fine-tuning for the recipe's steps and for twice as many."""
    ways = (("lora", RECIPE["learning_rate"]), ("full", 1e-4))
    for (method, learning_rate), times in product(ways, (1, 2)):
        yield desk("forgetting", method=method, learning_rate=learning_rate, steps=times * RECIPE["steps"])


def spectra() -> Iterator[dict[str, Any]]:
    """Run one full fine-tuning, for the singular values of its update."""
    yield desk("spectrum", method="full", learning_rate=1e-4)


def measure(point: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure one point, and return its rows."""
    section = point["section"]
    if section in ("fullsize", "latency"):
        return fullsize.measure(point)
    if section == "spectrum":
        return spectrum(point)
    return [{**point, **learn(point)[1]}]


def learn(point: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Train smollm2-135m on the support desk as a point says. Return the model and the measurements."""
    torch.manual_seed(point["seed"])
    model, tokenizer = pl.load_model("smollm2-135m", device="cuda" if torch.cuda.is_available() else None)
    train, test, news = desk_data()
    if point["method"] == "lora":
        first = {"all": 0, "first half": 0, "last half": LAYERS // 2}[point["layers"]]
        last = LAYERS // 2 if point["layers"] == "first half" else LAYERS
        config = pl.LoRAConfig(
            r=point["r"], alpha=point["alpha"], dropout=point["dropout"], use_rslora=point["rslora"],
            target_modules=point["targets"].split(","), layers_to_transform=range(first, last),
        )  # fmt: skip
        pl.attach(model, config)
    elif point["method"] == "subspace":
        subspace.move_along(model, point["dimension"], point["seed"])
    encoded = [pl.encode_completion(tokenizer, row["prompt"], row["ticket"]) for row in train]
    held_out = [pl.encode_completion(tokenizer, row["prompt"], row["ticket"]) for row in test]
    losses: list[float] = []
    started = time.perf_counter()
    if point["steps"]:
        try:
            history = pl.train(
                model, encoded[: point["examples"]], tokenizer=tokenizer, steps=point["steps"],
                batch_size=point["batch_size"], learning_rate=point["learning_rate"], seed=point["seed"],
                weight_decay=point["weight_decay"], precision="fp32", warmup=0.1, schedule="linear",
                group_by_length=True, progress=False,
            )  # fmt: skip
            losses = [step["loss"] for step in history.steps]
        except pl.TrainingError:  # divergence is a result too; the model keeps its last finite state
            losses = []
    seconds = time.perf_counter() - started
    prompts = [row["prompt"] for row in test]
    answers = pl.generate_text(model, tokenizer, prompts, max_new_tokens=40, batch_size=64, progress=False)
    return model, {
        "trainable": pl.count_parameters(model).trainable,
        "adapter_bytes": adapter_bytes(model) if point["method"] == "lora" else None,
        "train_loss": statistics.fmean(losses[-10:]) if losses else None,
        "test_loss": pl.mean_loss(model, held_out, pl.Collator(tokenizer)),
        "exact": pl.support_desk.score(answers, [row["ticket"] for row in test])["exact"],
        "news_perplexity": pl.perplexity(model, news, tokenizer, progress=False),
        "seconds": seconds,
    }


@cache
def desk_data() -> tuple[list[dict], list[dict], list[str]]:
    """Return training messages, 128 held-out messages, and 40 news articles cut to 1,000 characters."""
    data = pl.load_data("support-desk")
    news = [row["text"][:1000] for row in pl.load_data("news")["test"].select(range(40))]
    return list(data["train"].select(range(2000))), list(data["test"].select(range(128))), news


def adapter_bytes(model: nn.Module) -> int:
    """Return the size of the adapter's weights on disk."""
    with tempfile.TemporaryDirectory() as folder:
        return os.path.getsize(pl.save_adapter(model, folder) / "adapter_model.safetensors")


def spectrum(point: dict[str, Any]) -> list[dict[str, Any]]:
    """Return singular values of W - W0 after full fine-tuning, and of W0, for a few matrices of a middle layer."""
    before, _ = pl.load_model("smollm2-135m")
    after, measured = learn(point)
    rows = [{**point, "module": "all", **measured}]
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        path = f"model.layers.{LAYERS // 2}.{name}"
        weight = own_tensor(before.get_submodule(path), "weight").double()
        update = own_tensor(after.get_submodule(path), "weight").detach().cpu().double() - weight
        values = zip(torch.linalg.svdvals(weight).tolist(), torch.linalg.svdvals(update).tolist(), strict=True)
        rows += [
            {"section": "spectrum", "module": path, "index": i, "weight": w, "update": u}
            for i, (w, u) in enumerate(values, 1)
        ]
    return rows
