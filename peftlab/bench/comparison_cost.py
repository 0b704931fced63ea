"""What each method of `bench comparison` costs at the shape of a 1B model: a training step, and decoding.

The weights are random, because neither memory nor time depends on them. PiSSA's start is made by a randomised
decomposition (`pissa_niter_4`): the step is the same, and the start takes seconds instead of minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.bench import fullsize
from peftlab.bench.comparison_methods import ALL_LAYERS, COMPARED, MERGED, config_of
from peftlab.bench.models import gpu_for, held, vocabulary_of
from peftlab.bench.timing import clock, named
from peftlab.memory.estimate import Estimate

Row = dict[str, Any]

SHAPE = "llama-3.2-1b"
SECTIONS = ("cost", "latency", "batch")
ON_A_DECODER = [name for name, compared in COMPARED.items() if "desk" in compared.tasks]
READ, WRITTEN = 32, 16  # tokens of a prompt, and tokens that are written after it
IN_A_BATCH = ("LoRA", "Pfeiffer", "IA3", "prefix")


def points() -> Iterator[Row]:
    """Yield a step of each method, then decoding with each one, for one sequence and for several."""
    for name in ON_A_DECODER:
        yield described("cost", name, batch=4, sequence=512)
    for section, batch, names in (("latency", 1, ON_A_DECODER), ("batch", 16, IN_A_BATCH)):
        sizes: Row = {"batch": batch, "sequence": READ, "written": WRITTEN}
        yield {"section": section, "timed": True, "shape": SHAPE, "variant": "base", "state": "base", **sizes}
        for name in names:
            if name != "full":  # it decodes as the base does
                for state in ("attached", "merged") if name in MERGED else ("attached",):
                    yield described(section, name, state=state, **sizes)


def described(section: str, name: str, **more: Any) -> Row:
    """Describe one thing to time."""
    method, settings, *_ = COMPARED[name]
    point = {"section": section, "timed": True, "shape": SHAPE, "variant": name, "method": method, **settings, **more}
    if name == "LoRA, all layers":
        point["targets"] = ALL_LAYERS["smollm2-135m"]
    return {**point, "init": "pissa_niter_4"} if point.get("init") == "pissa" else point


def measure(point: Row, device: torch.device | None = None) -> list[Row]:
    """Measure one point, and return its row."""
    device = device or gpu_for(point, "a GPU's memory and time")
    with held(point["shape"], device) as model:
        if point["section"] == "cost":
            return named(point, [fullsize.training_step(model, point, with_method)])
        return named(point, [decoding(model, point)])


def estimate_of(row: Row) -> Estimate:
    """Return what `pl.memory.estimate` predicts for a row of `cost`: its peak, its operations, the size of the file.

    >>> from peftlab.bench.comparison_cost import estimate_of
    >>> row = {"shape": "gpt2", "method": "prefix", "num_virtual_tokens": 20, "batch": 4, "sequence": 64}
    >>> estimate_of(row).peak_bytes > estimate_of({**row, "num_virtual_tokens": 1}).peak_bytes
    True
    """
    names = {name: name for name in ("r", "init", "targets", "reduction_factor", "oft_block_size")}
    options = {of: row[name] for name, of in {**names, "num_virtual_tokens": "virtual_tokens"}.items() if name in row}
    if "targets" in options:
        options["targets"] = options["targets"].split(",")
    return pl.memory.estimate(row["shape"], row["method"], batch=row["batch"], sequence=row["sequence"], autocast=True,
                              optimizer="adamw-fused", library="peftlab", **options)  # fmt: skip


def with_method(model: nn.Module, point: Row) -> nn.Module:
    """Return the model with what a point trains: float32 adapters on its weights, or all its weights."""
    config = config_of(point)
    return model.requires_grad_(True) if config is None else pl.attach(model, config)


@torch.no_grad()
def decoding(model: nn.Module, point: Row) -> Row:
    """Time greedy decoding, with 16-bit adapters, and return the time per token that each sequence gets.

    Reading the prompt is part of it: one forward pass of `sequence` tokens.
    """
    torch.manual_seed(0)
    model.eval()
    if point["state"] != "base":
        pl.attach(model, config_of(point), adapter_dtype=next(model.parameters()).dtype)
    try:
        if point["state"] == "merged":
            pl.merge(model, unload=True)  # what is left is a plain model
        device = next(model.parameters()).device
        prompt = torch.randint(vocabulary_of(model), (point["batch"], point["sequence"]), device=device)
        many = point["written"]
        write: Any = model.generate
        spent = clock(
            partial(write, input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True,
                    max_new_tokens=many, min_new_tokens=many, pad_token_id=0),
            repeats=3, warm_up=1,
        )  # fmt: skip
    finally:
        if pl.attached(model):
            pl.detach(model)
    seconds = {name: value / many if value else None for name, value in spent.items() if name.endswith("seconds")}
    return {**spent, **{f"token_{name}": value for name, value in seconds.items()}}
