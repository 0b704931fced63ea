"""What the variants do to the weights: intruders, magnitude and direction, first singular vectors, ranks, vectors.

Every linear layer that is looked at has no bias. So the weight with which it acts, its adapter included, is what it
makes of the unit vectors (`weight_of`), whatever the method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import peftlab as pl
from peftlab.bench import lora
from peftlab.bench.family_variants import ALPHA, SEEDS, TASKS, run
from peftlab.bench.models import ALL_LINEAR
from peftlab.core.modes import device_of
from peftlab.core.records import own_tensor, placed

Row = dict[str, Any]
Train = Callable[..., tuple[nn.Module, Row]]

SECTIONS = ("direction", "principal", "allocation", "vectors", "trim")
MODULES = ("self_attn.q_proj", "self_attn.v_proj")
LOOKED_AT = (15, 30, 45, 60)  # steps of a run
TOP = 8  # first singular vectors
# Intruders (Shuttleworth et al. 2024, arXiv:2410.21228): of the first so many singular vectors of W + dW, those whose
# cosine with every singular vector of W is below the threshold
FIRST, THRESHOLD = 10, 0.5
LEFT = (1.0, 0.5, 0.0)  # what is left of an intruder; the first is the adapter as it was trained


def points() -> Iterator[Row]:
    """Yield one run for each thing to look at, at rates near the best ones of the LoRA chapter."""
    rates = {"full": 1e-4, "LoRA": 3e-3, "DoRA": 3e-3, "PiSSA": 1e-3}
    for section, names in (("direction", ("full", "LoRA", "DoRA")), ("principal", ("full", "LoRA", "PiSSA"))):
        for task in TASKS:
            for name in names:
                settings: Row = {"init": "pissa"} if name == "PiSSA" else {}
                settings |= {} if name == "full" else {**ALPHA, "r": 8}
                yield run(section, task, name, settings, rates[name], SEEDS[0])
    for seed in SEEDS:
        ranks: Row = {**ALPHA, "init_r": 6, "target_r": 4}
        yield run("allocation", "desk", "AdaLoRA", ranks, 3e-2, seed, targets=",".join(ALL_LINEAR))
    for seed in SEEDS[:2]:
        yield run("vectors", "desk", "VeRA", {"r": 256}, 3e-2, seed)
    for task in TASKS:
        for rate in (3e-3, 1e-2):
            yield run("trim", task, "LoRA", {**ALPHA, "r": 8}, rate, SEEDS[0])


def measure(point: Row, train: Train, score: Callable[[nn.Module], Row]) -> Iterator[Row]:
    """Train as a point says, and yield a row for each matrix that is looked at, or for each trimming."""
    told = {name: point[name] for name in ("section", "task", "variant", "learning_rate", "seed")}
    if point["section"] == "trim":
        yield from ({**told, **row} for row in trimmed(point, train, score))
        return
    found = {"direction": directions, "principal": principal, "allocation": allocation, "vectors": vectors}
    yield from ({**told, **row} for row in found[point["section"]](point, train))


# ---------------------------------------------------------------------------------------------- a layer as it acts


@torch.no_grad()
def weight_of(module: nn.Module) -> Tensor:
    """Return the weight (out, in) with which a linear layer without bias acts, its adapter included, on the CPU."""
    weight = own_tensor(module, "weight")
    return module(torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype)).T.float().cpu()


def looked_at(every: int) -> Iterator[tuple[int, str, str]]:
    """Yield (layer, module, path) of the queries and values in each so-manyth layer."""
    for layer in range(0, lora.LAYERS, every):
        for name in MODULES:
            yield layer, name.rpartition(".")[2], f"model.layers.{layer}.{name}"


@cache
def before(path: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition U, S, V^T of a weight before training."""
    return torch.linalg.svd(weight_of(lora.base()[0].get_submodule(path)), full_matrices=False)


def intruders(model: nn.Module) -> Row:
    """Return how many of the first singular vectors are intruders, of how many, in every sixth layer.

    As `pl.find_intruders`, but whatever changed the weights, full fine-tuning too.
    """
    count, of = 0, 0
    for _, _, path in looked_at(every=6):
        try:
            first = torch.linalg.svd(weight_of(model.get_submodule(path)), full_matrices=False)[0][:, :FIRST]
        except torch.linalg.LinAlgError:  # the run diverged
            return {"intruders": None, "looked_at": None}
        # max_i |u_i . u'_j| over all singular vectors u_i of W
        nearest = (before(path)[0].T @ first).abs().amax(0)
        count, of = count + int((nearest < THRESHOLD).sum()), of + first.shape[1]
    return {"intruders": count, "looked_at": of}


# -------------------------------------------------------------------------------------------------- what is looked at


def directions(point: Row, train: Train) -> Iterator[Row]:
    """Yield how far the rows of a weight moved in magnitude and in direction, at a few steps of the run."""
    rows = []

    def look(model: nn.Module, step: Row) -> None:
        if step["step"] not in LOOKED_AT:
            return
        for layer, module, path in looked_at(every=2):
            old, new = (weight_of(net.get_submodule(path)).double() for net in (lora.base()[0], model))
            # the magnitude of a row is its norm, its direction the row over its norm (DoRA's section 3.2)
            change = (new.norm(dim=1) - old.norm(dim=1)).abs()
            turned = 1 - torch.cosine_similarity(new, old, dim=1)
            rows.append({"step": step["step"], "layer": layer, "module": module,
                         "magnitude": float(change.mean()), "direction": float(turned.mean()),
                         "relative": float((change / old.norm(dim=1)).mean())})  # fmt: skip

    train(point, callback=look)
    yield from rows


def principal(point: Row, train: Train) -> Iterator[Row]:
    """Yield how much of each weight, and of its update, lies along the first singular vectors of the weight."""
    model, _ = train(point)
    for layer, module, path in looked_at(every=2):
        u, s, v = before(path)
        update = weight_of(model.get_submodule(path)) - weight_of(lora.base()[0].get_submodule(path))
        whole = update.square().sum()
        yield {
            "layer": layer, "module": module, "top": TOP, "update_norm": float(whole.sqrt()),
            "of_weight": float(s[:TOP].square().sum() / s.square().sum()),
            "of_update_left": float((u[:, :TOP].T @ update).square().sum() / whole),
            "of_update_right": float((update @ v[:TOP].T).square().sum() / whole),
            "by_chance_left": TOP / update.shape[0], "by_chance_right": TOP / update.shape[1],
        }  # fmt: skip


def allocation(point: Row, train: Train) -> Iterator[Row]:
    """Yield the rank that AdaLoRA leaves to each layer: how many numbers of e are not zero."""
    model, _ = train(point)
    for told, part in adapted(model):
        e = part.lora_E
        yield {**told, "r_start": e.numel(), "r": int((e != 0).sum())}


def vectors(point: Row, train: Train) -> Iterator[Row]:
    """Yield what VeRA's two vectors look like in each layer: d began with the same number everywhere, b at zero."""
    model, _ = train(point)
    for told, part in adapted(model):
        d, b = part.vera_lambda_d.detach().cpu(), part.vera_lambda_b.detach().cpu()
        yield {**told, "d_least": float(d.min()), "d_median": float(d.median()), "d_most": float(d.max()),
               "d_spread": float(d.std()), "b_size": float(b.square().mean().sqrt()),
               "b_most": float(b.abs().max())}  # fmt: skip


def trimmed(point: Row, train: Train, score: Callable[[nn.Module], Row]) -> Iterator[Row]:
    """Yield the scores of an adapter whose intruders are scaled down."""
    model, _ = train(point)
    device = device_of(model)
    for left in LEFT:
        name = "default" if left == LEFT[0] else f"left_{round(100 * left)}"
        if name != "default":
            # on the CPU, because other processes share the GPU, which is slow at such a decomposition
            report = pl.reduce_intruders(model.cpu(), new_name=name, top_k=FIRST, threshold=THRESHOLD, scale=left)
        else:
            report = pl.find_intruders(model.cpu(), top_k=FIRST, threshold=THRESHOLD)
        pl.activate(model.to(device), name)
        yield {"left": left, "found": report.count, **score(model)}


def adapted(model: nn.Module) -> Iterator[tuple[Row, Any]]:
    """Yield each part of the adapter, with its layer and its module."""
    for path, _, part in placed(model, "default"):
        _, _, layer, _, module = path.split(".")
        yield {"layer": int(layer), "module": module}, part
