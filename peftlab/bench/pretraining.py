"""A small Llama learns to write film reviews, letter by letter, from random weights: `peftlab bench recipes`.

Each way trains at several rates with one seed. The rate with the lowest validation loss is taken, and two other seeds
run at it. Embedding, head and norms train in every way; the ways differ in what they let the linear layers do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import peftlab as pl
from peftlab.bench.models import ALL_LINEAR, Row
from peftlab.training.low_rank import GaLore

SEEDS = (0, 1, 2)  # the first one chooses the rate
LETTERS = 128  # the vocabulary: ASCII
SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 4}  # fmt: skip
RUN: Row = {"steps": 1000, "batch": 32, "letters": 128, "every": 50, "warmup": 0.1, **SHAPE}
WAYS: tuple[Row, ...] = (
    {"way": "galore", "r": 16, "rates": [1e-3, 3e-3, 1e-2]},
    {"way": "relora", "r": 16, "rates": [1e-3, 3e-3, 1e-2], "restarts": 4},
    {"way": "lora", "r": 64, "rates": [1e-3, 3e-3, 1e-2]},
    {"way": "lora", "r": 16, "rates": [1e-3, 3e-3, 1e-2]},
    {"way": "lora", "r": 4, "rates": [1e-3, 3e-3, 1e-2]},
    {"way": "full", "r": None, "rates": [3e-4, 1e-3, 3e-3, 1e-2]},
    {"way": "none", "r": None, "rates": [1e-3, 3e-3, 1e-2]},
)
TOP = 16  # singular values whose share of a change is measured


def points() -> Iterator[Row]:
    """Yield one point for each way to train."""
    for way in WAYS:
        yield {"section": "pretrain", **RUN, "restarts": 0, **way}


def measure(point: Row) -> list[Row]:
    """Train at each rate, then with the other seeds at the best rate. Rows of the section `curve` are on the way."""
    point = dict(point)
    rates = point.pop("rates")
    runs = [run(point, rate, SEEDS[0]) for rate in rates]
    best = min(runs, key=lambda rows: rows[0]["validation_loss"])[0]["learning_rate"]
    runs += [run(point, best, seed) for seed in SEEDS[1:]]
    return [{**row, "chosen": row["learning_rate"] == best} for rows in runs for row in rows]


def run(point: Row, rate: float, seed: int) -> list[Row]:
    """Train once. The first row has the losses at the end, and what the linear weights' changes are like."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    model = small_llama(point, seed).to(device)
    start = {path: m.weight.detach().clone() for path, m in linears(model)}
    optimizer = begin(model, point, seed)
    texts = {split: torch.tensor(letters(split), device=device) for split in ("train", "validation", "test")}
    loss = partial(mean_loss, model, length=point["letters"])
    draw = torch.Generator().manual_seed(seed)
    stretch = point["steps"] // (point["restarts"] + 1)
    same = {"learning_rate": rate, "seed": seed}
    curve = []
    for step in range(point["steps"]):
        since = step % stretch
        if point["way"] == "relora" and step and not since:
            optimizer = restart(model, optimizer, point, seed + step)
        for group in optimizer.param_groups:
            group["lr"] = rate * share(step, point) * (min(1.0, (since + 1) / 20) if step >= stretch else 1.0)
        optimizer.zero_grad()
        total = model(**rows_of(texts["train"], point, draw)).loss
        total.backward()
        optimizer.step()
        if (step + 1) % point["every"] == 0:
            done = {**point, **same, "section": "curve", "step": step + 1}
            curve.append({**done, "validation_loss": loss(texts["validation"])})
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    states = sum(v.numel() for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))
    row = {**point, **same, "trainable": trained, "state_elements": states,
           "validation_loss": loss(texts["validation"]), "test_loss": loss(texts["test"])}  # fmt: skip
    if pl.attached(model):
        pl.merge(model, unload=True)
    return [{**row, **changes(start, dict(linears(model)))}, *curve]


def small_llama(point: Row, seed: int) -> Any:
    """Make the model, with random weights."""
    import transformers

    torch.manual_seed(seed)
    shape = {name: point[name] for name in SHAPE}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=LETTERS,
            max_position_embeddings=point["letters"],
            use_cache=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=0,
            **shape,
        )  # fmt: skip
    )


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return the linear layers of the blocks, with their paths."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear) and path.endswith(ALL_LINEAR)]


def begin(model: nn.Module, point: Row, seed: int) -> torch.optim.Optimizer:
    """Say what trains, and return the optimiser."""
    matrices = [m.weight for _, m in linears(model)]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    if point["way"] == "galore":
        groups = [{"params": matrices, "r": point["r"]}, {"params": others, "r": None}]
        return GaLore(groups, lr=0.0, every=point["steps"] // 8)
    if point["way"] in ("lora", "relora"):
        add_low_rank(model, point["r"], seed)
    elif point["way"] == "none":
        for matrix in matrices:
            matrix.requires_grad_(False)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)


def add_low_rank(model: nn.Module, r: int, seed: int) -> None:
    """Attach LoRA to the linear layers. Embedding, head and norms go on training as well."""
    torch.manual_seed(seed)
    others = [p for p in model.parameters() if p.requires_grad]
    frozen = {id(m.weight) for _, m in linears(model)}
    pl.attach(model, pl.LoRAConfig(r=r, alpha=2 * r, target_modules=ALL_LINEAR))
    for parameter in others:
        parameter.requires_grad_(id(parameter) not in frozen)


def restart(model: nn.Module, optimizer: torch.optim.Optimizer, point: Row, seed: int) -> torch.optim.Optimizer:
    """Put the low-rank update into the weights, and begin another one: W <- W + s B A; A random, B = 0.

    The model computes the same before and after. Only the new A and B have new states. See Lialin et al., *ReLoRA*,
    2023, arXiv:2307.05695.
    """
    pl.merge(model, unload=True)
    add_low_rank(model, point["r"], seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    fresh = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    fresh.state.update({p: optimizer.state[p] for p in trained if p in optimizer.state})
    return fresh


def share(step: int, point: Row) -> float:
    """Return the share of the rate at a step: a linear warm-up, then half a cosine, down to a tenth."""
    warm = max(1, round(point["warmup"] * point["steps"]))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / (point["steps"] - warm)))


@cache
def letters(split: str) -> list[int]:
    """Return the reviews of a split as one text, each letter as a number below 128."""
    text = "\n".join(pl.load_data("reviews")[split]["text"])
    return [min(ord(letter), LETTERS - 1) for letter in text]


def rows_of(text: Tensor, point: Row, draw: torch.Generator) -> dict[str, Tensor]:
    """Cut random pieces out of a text."""
    starts = torch.randint(len(text) - point["letters"], (point["batch"], 1), generator=draw).to(text.device)
    ids = text[starts + torch.arange(point["letters"], device=text.device)]
    return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def mean_loss(model: nn.Module, text: Tensor, length: int, rows: int = 128) -> float:
    """Return the mean loss per letter on the first pieces of a text."""
    ids = text[: min(len(text) // length, rows) * length].view(-1, length)
    return model(input_ids=ids, labels=ids).loss.item()


def changes(start: dict[str, Tensor], end: dict[str, nn.Linear]) -> Row:
    """Return the share of the linear weights' changes in their 16 largest directions, and how many hold 90% of them."""
    shares, needed = [], []
    for path, before in start.items():
        size = torch.linalg.svdvals((end[path].weight.detach() - before).float()).square()
        if size.sum() > 0:
            part = size.cumsum(0) / size.sum()
            shares.append(part[TOP - 1].item())
            needed.append(int((part < 0.9).sum()) + 1)
    if not shares:
        return {"top16_share": None, "directions_90": None}
    return {"top16_share": sum(shares) / len(shares), "directions_90": sum(needed) / len(needed)}
