"""The controlled comparison of the chapter on choosing a method: on three tasks only the method varies.

Twelve methods and more, each at its usual size and in its usual places, learn three tasks (see `comparison_tasks`): a
classification by an encoder (reviews), answers of a fixed form (desk), and text such as the base knows already (news).
All runs of a task have the same model, examples, number of steps and schedule, in float32. By one protocol:

1. Each method tries six learning rates with one seed. If the rate with the lowest loss on the validation examples is
   the lowest or the highest that was tried, the next one is tried as well.
2. At this rate three other seeds run. They alone are tested, once (`scored` is true in their rows).

Each run is a point of its own, and what comes next follows from the rows that are there. So a run that is cut keeps
every run that ended, and its points begin with the methods that matter most.

Sections:
    base     each model before training; of the reviews, an answer that is always the more frequent one
    reviews  every method on film reviews, with minilm
    desk     every method on the support desk, with smollm2-135m
    news     every method on news articles, with smollm2-135m
    cost     one training step of each method at the shape of a 1B model (random weights; see `comparison_cost`)
    latency  greedy decoding at that shape, for one sequence: the base, and each method attached and merged
    batch    the same for 16 sequences

A row that was tested has the loss on training examples (`sample_loss`) beside that on test examples, both read in
evaluation mode, what was kept of another ability, and the size of the saved weights.

With four GPUs the parts that learn take `--jobs 48`, with NVIDIA's MPS running (`nvidia-cuda-mps-control -d`).
`PREDICTIONS` of `comparison_methods` holds what each source leads one to expect. It was written before the first run.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.bench import comparison_cost, comparison_tasks, family, lora
from peftlab.bench.comparison_methods import COMPARED, HEAD, TASKS, config_of, grids
from peftlab.bench.family_variants import SEEDS
from peftlab.core.records import as_transformer

Row = dict[str, Any]


def points() -> list[Row]:
    """Yield every point to measure: what matters most comes first, because a run may be cut."""
    bases = [{"section": "base", "task": task} for task in TASKS]
    return [*bases, *grids(), *comparison_cost.points()]


def follow_up(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the next rates of a method while its best one is at an edge, then three seeds at the best one."""
    runs = (row for row in rows if row["section"] in TASKS)
    yield from family.next_runs(runs, lambda row: COMPARED[row["variant"]].rates)


def measure(point: Row) -> list[Row]:
    """Measure one point, and return its rows."""
    if point["section"] in comparison_cost.SECTIONS:
        return comparison_cost.measure(point)
    try:
        if point["section"] == "base":
            return [{**point, **before(point["task"])}]
        model, tokenizer, row = trained(point)
        return [{**row, **scored(model, tokenizer, point)} if point["scored"] else row]
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # other processes share the GPU


def trained(point: Row) -> tuple[nn.Module, Any, Row]:
    """Train once, as a point says. Return the model, its tokenizer, and its row with the loss on the validation set."""
    task = point["section"]
    model, tokenizer = comparison_tasks.OF[task].base(point["seed"])
    config = config_of(point, HEAD if task == "reviews" else None)
    if config is not None:
        pl.attach(model, config)
    examples = comparison_tasks.examples(task, "train", point["examples"])
    losses = family.fit(model, tokenizer, examples, point)
    validation = comparison_tasks.loss_on(model, tokenizer, comparison_tasks.examples(task, "validation"))
    trainable = pl.count_parameters(model).trainable
    return model, tokenizer, {**point, "trainable": trainable, **losses, "validation_loss": validation}


def scored(model: nn.Module, tokenizer: Any, point: Row) -> Row:
    """Return what the test says, the loss on training examples, what the model kept, and the size of what is saved."""
    task = point["section"]
    of = comparison_tasks.OF[task]
    sample = comparison_tasks.examples(task, "train", comparison_tasks.SAMPLE[task])[: point["examples"]]
    found = {**of.tested(model), "sample_loss": comparison_tasks.loss_on(model, tokenizer, sample), **of.kept(model)}
    return {**found, "file_bytes": file_bytes(model)} if point["seed"] == SEEDS[0] else found


def before(task: str) -> Row:
    """Return what a model does before training."""
    of = comparison_tasks.OF[task]
    model, _ = of.base(SEEDS[0])
    if task != "reviews":
        return {**of.tested(model), **of.kept(model)}
    # its head says nothing yet, so every review gets the label that is more frequent among the training examples
    labels = [row["labels"] for row in comparison_tasks.examples(task, "train", TASKS[task]["examples"])]
    usual = max(set(labels), key=labels.count)
    right = [row["labels"] == usual for row in comparison_tasks.examples(task, "test")]
    return {**comparison_tasks.told(right), **of.kept(model)}


def file_bytes(model: nn.Module) -> int:
    """Return the size of the saved weights: of the adapter, or of the whole model if it has none."""
    if pl.attached(model):
        return lora.adapter_bytes(model)
    with tempfile.TemporaryDirectory() as folder:
        as_transformer(model).save_pretrained(folder)
        return sum(os.path.getsize(file) for file in Path(folder).glob("*.safetensors"))
