"""A policy gradient on a reward that a program checks: `peftlab bench recipes --only policy`.

A small Llama learns to write JSON from texts of which many are broken. Then it is rewarded for answers that parse. Each
rank of LoRA, and full training, runs at several rates with one seed; two other seeds run at the best.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.assets import sloppy
from peftlab.bench.models import Row
from peftlab.training.packing import IGNORE
from peftlab.training.policy import policy_gradient, sample_answers

SEEDS = (0, 1, 2)  # the first one chooses the rate
RUN: Row = {"steps": 50, "samples": 32, "answers": 500}
WAYS: tuple[Row, ...] = (
    {"method": "lora", "r": 1, "alpha": 2, "rates": [3e-3, 1e-2, 3e-2]},
    {"method": "lora", "r": 8, "alpha": 2, "rates": [3e-3, 1e-2, 3e-2]},
    {"method": "lora", "r": 64, "alpha": 2, "rates": [3e-3, 1e-2, 3e-2]},
    {"method": "full", "r": None, "alpha": None, "rates": [3e-4, 1e-3, 3e-3]},
)


def points() -> Iterator[Row]:
    """Yield one point for each rank, and one for full training."""
    for way in WAYS:
        yield {"section": "policy", **RUN, **way}


def measure(point: Row) -> list[Row]:
    """Train at each rate, then with the other seeds at the best one, by the share of valid answers."""
    point = dict(point)
    rates = point.pop("rates")
    runs = [run(point, rate, SEEDS[0]) for rate in rates]
    best = max(runs, key=lambda row: row["valid"])["learning_rate"]
    runs += [run(point, best, seed) for seed in SEEDS[1:]]
    return [{**row, "chosen": row["learning_rate"] == best} for row in runs]


def run(point: Row, rate: float, seed: int) -> Row:
    """Train once from the same start, and count valid and different answers before and after."""
    model = copy.deepcopy(writer())
    torch.manual_seed(seed)
    if point["method"] == "lora":
        pl.attach(model, pl.LoRAConfig(r=point["r"], alpha=point["alpha"], target_modules=["q_proj", "v_proj"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    before = answers(model, point["answers"])
    rewards = policy_gradient(
        model, [sloppy.START], reward, optimizer=torch.optim.AdamW(trained, lr=rate, weight_decay=0.0),
        steps=point["steps"], samples=point["samples"], length=sloppy.LONGEST, end=sloppy.END,
    )  # fmt: skip
    after = answers(model, point["answers"])
    return {
        **point, "learning_rate": rate, "seed": seed, "trainable": sum(p.numel() for p in trained),
        "valid_before": share(before), "valid": share(after), "different": len(set(after)),
        "different_before": len(set(before)), "last_rewards": sum(rewards[-10:]) / len(rewards[-10:]),
    }  # fmt: skip


def reward(tokens: list[int]) -> float:
    """One for an answer that is valid JSON, and nothing for any other."""
    return float(sloppy.is_valid(sloppy.decode(tokens)))


def share(texts: list[str]) -> float:
    """Return the share of texts that are valid."""
    return sum(map(sloppy.is_valid, texts)) / len(texts)


def answers(model: nn.Module, number: int) -> list[str]:
    """Draw answers from a model, always by the same random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        batch = sample_answers(model, [sloppy.START], number, length=sloppy.LONGEST, end=sloppy.END)
    rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    return [sloppy.decode([i for i, label in zip(ids, labels, strict=True) if label != IGNORE]) for ids, labels in rows]


@cache
def writer(steps: int = 200) -> Any:
    """Pre-train the small Llama on sloppy texts. Every run starts from a copy of it."""
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=sloppy.VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )  # fmt: skip
    )
    rows = [[sloppy.START, *sloppy.encode(text), sloppy.END] for text in sloppy.texts(2000)]
    pl.train(
        model, [{"input_ids": row, "labels": row} for row in rows], steps=steps, batch_size=32, learning_rate=3e-3,
        precision="fp32", progress=False,
    )  # fmt: skip
    return model
