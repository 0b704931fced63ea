"""Memory and time of a training step with each method of the LoRA family, ours beside Hugging Face peft's.

The models have random weights: neither memory nor time depends on what the weights are. A start such as PiSSA's takes
its time once, before the first step; `start` measures it on two layers. EVA's is left out, because it reads as many
batches as its data need. An AdaLoRA step is measured without the loop's part: the importances and the new ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.bench import fullsize
from peftlab.bench.models import ALL_LINEAR, gpu_for, held, lent
from peftlab.bench.timing import named
from peftlab.optional import require

Row = dict[str, Any]

SECTIONS = ("small", "fullsize", "large", "start")
# {name: (fields of our config, class in peft, its fields)}; PiSSA is LoRA with a start that stays beside it here
METHODS: dict[str, tuple[Row, str, Row]] = {
    "lora": ({"r": 16, "alpha": 32}, "LoraConfig", {"r": 16, "lora_alpha": 32}),
    "dora": ({"r": 16, "alpha": 32}, "LoraConfig", {"r": 16, "lora_alpha": 32, "use_dora": True}),
    "pissa": ({"r": 16, "alpha": 32, "init": "pissa_niter_4"}, "LoraConfig",
              {"r": 16, "lora_alpha": 32, "init_lora_weights": "pissa_niter_4"}),
    "adalora": ({"init_r": 16, "alpha": 32}, "AdaLoraConfig", {"init_r": 16, "lora_alpha": 32, "total_step": 1000}),
    "vera": ({"r": 256}, "VeraConfig", {"r": 256}),
    "loha": ({"r": 8, "alpha": 16}, "LoHaConfig", {"r": 8, "alpha": 16}),
    "lokr": ({"r": 16, "alpha": 32}, "LoKrConfig", {"r": 16, "alpha": 32}),
    "oft": ({"oft_block_size": 32}, "OFTConfig", {"oft_block_size": 32}),
}  # fmt: skip
STARTS = ("kaiming", "pissa", "pissa_niter_4", "olora", "orthogonal")
STARTED_LAYERS = 2


def points() -> Iterator[Row]:
    """Yield steps at the size of the quality runs, of a 1B model and of a 7B model, then the starts."""
    there = [name for name in METHODS if kind_of(name) is not None]
    for section, shape, batch, sequence, checkpointing, methods, libraries in (
        ("small", "smollm2-135m", 8, 128, False, there, ("peftlab",)),
        ("fullsize", "llama-3.2-1b", 4, 512, False, there, ("peftlab", "peft")),
        ("large", "llama-2-7b", 1, 512, True, [m for m in there if m in ("lora", "dora", "oft")], ("peftlab",)),
    ):
        runs = [("full", "transformers"), *((method, library) for method in methods for library in libraries)]
        for method, library in runs:
            yield {
                "section": section, "timed": True, "shape": shape, "method": method, "library": library,
                "targets": "q_proj,v_proj" if section == "small" else "all-linear", "batch": batch,
                "sequence": sequence, "checkpointing": checkpointing,
            }  # fmt: skip
    for start in STARTS:
        yield {"section": "start", "alone": True, "shape": "llama-3.2-1b", "init": start, "r": 16,
               "targets": "q_proj,v_proj", "layers": STARTED_LAYERS}  # fmt: skip


def kind_of(name: str) -> Any:
    """Return the config class of a method, or None where this installation lacks it."""
    return pl.METHODS.get("lora" if name == "pissa" else name)


def measure(point: Row, device: torch.device | None = None) -> list[Row]:
    """Measure one point, and return its row."""
    device = device or gpu_for(point, "a GPU's memory and time")
    with held(point["shape"], device) as model:
        if point["section"] == "start":
            return named(point, [started(model, point)])
        return named(point, [fullsize.training_step(model, point, with_method)])


def with_method(model: nn.Module, point: Row) -> nn.Module:
    """Return the model as the point's library prepares it: float32 adapters on its weights."""
    method, targets = point["method"], list(ALL_LINEAR)
    if method == "full":
        return model.requires_grad_(True)
    if point["targets"] != "all-linear":
        targets = point["targets"].split(",")
    ours, name, theirs = METHODS[method]
    if point["library"] == "peft":
        peft = require("peft")

        return peft.get_peft_model(model, getattr(peft, name)(**theirs, target_modules=targets))
    return pl.attach(model, kind_of(method)(**ours, target_modules=targets))


def started(model: nn.Module, point: Row) -> Row:
    """Measure how long `attach` takes with a start on a few layers, on the clock."""
    spent = []
    for _ in range(2):  # the first call also loads libraries
        begun = time.perf_counter()
        with lent(model, with_start, point):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent.append(time.perf_counter() - begun)
    return {"start_seconds": spent[-1]}


def with_start(model: nn.Module, point: Row) -> nn.Module:
    """Return the model with LoRA on the first layers, started as the point says."""
    config = pl.LoRAConfig(
        r=point["r"], alpha=16, init=point["init"], target_modules=point["targets"].split(","),
        layers_to_transform=range(point["layers"]),
    )  # fmt: skip
    return pl.attach(model, config)
