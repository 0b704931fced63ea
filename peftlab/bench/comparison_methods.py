"""The methods that `bench comparison` compares, what their sources lead one to expect, and how a run is described."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, NamedTuple

import peftlab as pl
from peftlab.bench.family_variants import HIGHER, LOWER, LOWEST, RATES, TUNING
from peftlab.bench.models import ALL_LINEAR
from peftlab.catalogue import METHODS as CATALOGUE

Row = dict[str, Any]

# A third as many training examples as a run shows, so each is seen three times. A run that saw every example once
# would have no generalisation gap.
TASKS: dict[str, Row] = {
    "reviews": {"model": "minilm", "steps": 150, "batch_size": 32, "examples": 1600},
    "desk": {"model": "smollm2-135m", "steps": 60, "batch_size": 8, "examples": 160},
    "news": {"model": "smollm2-135m", "steps": 48, "batch_size": 8, "examples": 128},
}
# Modules that train beside every method on the encoder. The pooler of this checkpoint was never used, see `adapters`.
HEAD = ("pooler", "classifier")


class Compared(NamedTuple):
    """One method at its usual size: its name in the catalogue or "full" or "head", its settings, the rates to try."""

    method: str
    settings: Row
    rates: tuple[float, ...]
    tasks: tuple[str, ...] = tuple(TASKS)


LOW_RANK: Row = {"r": 8, "alpha": 16}
VIRTUAL: Row = {"num_virtual_tokens": 20}
COMPARED = {
    "LoRA": Compared("lora", LOW_RANK, LOWER),
    "full": Compared("full", {}, (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)),
    "Pfeiffer": Compared("pfeiffer", {"reduction_factor": 16}, LOWER),
    "IA3": Compared("ia3", {}, RATES),
    "prefix": Compared("prefix", VIRTUAL, HIGHER),
    "prompt": Compared("prompt", VIRTUAL, (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)),
    "DoRA": Compared("dora", LOW_RANK, LOWER),
    "head": Compared("head", {}, LOWER, ("reviews",)),
    "BitFit": Compared("bitfit", {}, LOWER, ("reviews",)),  # the decoder has no biases
    "VeRA": Compared("vera", {"r": 256}, HIGHER),
    "PiSSA": Compared("lora", {**LOW_RANK, "init": "pissa"}, LOWEST),
    "OFT": Compared("oft", {"oft_block_size": 32}, LOWEST),
    "Houlsby": Compared("houlsby", {"reduction_factor": 16}, LOWER),
    "LoKr": Compared("lokr", {"r": 8, "alpha": 8}, RATES),
    "LoRA, all layers": Compared("lora", LOW_RANK, LOWER),
}
ALL_LAYERS = {"minilm": "query,key,value,intermediate.dense,output.dense", "smollm2-135m": ",".join(ALL_LINEAR)}
MERGED = ("LoRA", "DoRA", "PiSSA", "VeRA", "LoKr", "OFT", "IA3", "LoRA, all layers")  # these can be merged

# {method: (source, what it leads one to expect here, in a form that a row can contradict)}
PREDICTIONS = {
    "full": ("Biderman et al. 2024, arXiv:2405.09673",
             "the lowest loss on the test of every task, the largest gap between test and training, and the most "
             "forgetting"),
    "LoRA": ("Hu et al. 2021, arXiv:2106.09685; Schulman 2025, LoRA Without Regret",
             "equals full fine-tuning within the intervals, with a best rate about ten times as high"),
    "LoRA, all layers": ("Biderman et al. 2024; Schulman 2025", "better than LoRA on queries and values"),
    "DoRA": ("Liu et al. 2024, arXiv:2402.09353", "better than LoRA on each task; its step takes longer"),
    "PiSSA": ("Meng et al. 2024, arXiv:2404.02948", "better than LoRA on each task"),
    "VeRA": ("Kopiczko et al. 2023, arXiv:2310.11454", "equals LoRA with a tenth of its parameters"),
    "LoKr": ("Yeh et al. 2023, arXiv:2309.14859", "equals LoRA with fewer parameters"),
    "OFT": ("Qiu et al. 2023, arXiv:2306.07280", "forgets less than LoRA at an equal loss on the task"),
    "IA3": ("Liu et al. 2022, arXiv:2205.05638",
            "better than LoRA and full fine-tuning with few examples; its step is the fastest of those that change the "
            "blocks"),
    "BitFit": ("Ben Zaken et al. 2022, arXiv:2106.10199", "equals full fine-tuning with few examples"),
    "Pfeiffer": ("Pfeiffer et al. 2021, arXiv:2005.00247; He et al. 2022, arXiv:2110.04366",
                 "equals Houlsby's with half of its parameters, and is better than LoRA on queries and values, because "
                 "it changes the MLP's output"),
    "Houlsby": ("Houlsby et al. 2019, arXiv:1902.00751", "within 0.4 points of full fine-tuning"),
    "prompt": ("Lester et al. 2021, arXiv:2104.08691",
               "far behind full fine-tuning, because the models are small; behind every method but the head alone"),
    "prefix": ("Li and Liang 2021, arXiv:2101.00190; He et al. 2022",
               "equals full fine-tuning on the structured answers; behind LoRA and adapters on classification"),
    "head": ("Houlsby et al. 2019, figure 3; Peters et al. 2019, arXiv:1903.05987",
             "the worst of all on the encoder by several points"),
}  # fmt: skip
# {task: (the best one, what else)}; a tie is a paired test that does not tell two methods apart at 5%
PREDICTED_BEST = {
    "reviews": ("full", "LoRA, DoRA and both adapters tie with it; then BitFit, IA3, prefix, prompt, the head alone"),
    "desk": ("full", "adapters and LoRA on all layers tie with it; IA3 and VeRA lose some points; prompts lose many"),
    "news": ("full", "all methods lower the base's loss, and lie within 0.02 nats per token of each other, because the "
                     "base knows such text already"),
}  # fmt: skip
# The kernels' busy time of a training step, longest first: full fine-tuning computes the gradient of every weight, and
# that is a third of its products. OFT and DoRA build or scale whole weights. The others differ by little.
PREDICTED_COST = ("full", "OFT", "DoRA", "Houlsby", "LoRA", "IA3")
PREDICTED_LATENCY = (
    "merged methods take the base's time; a prefix or a prompt does almost; every other method that stays attached "
    "takes longer by its number of new kernels: Houlsby's adapters longer than Pfeiffer's, DoRA longer than LoRA"
)


def grids() -> Iterator[Row]:
    """Yield the runs that choose each method's rate on each task."""
    for name, compared in COMPARED.items():
        for task in compared.tasks:
            for rate in compared.rates:
                yield run(task, name, rate, TUNING)


def run(task: str, name: str, rate: float, seed: int, **more: Any) -> Row:
    """Describe one run of training; `more` changes how long it is, for example."""
    settings = {"method": COMPARED[name].method, **COMPARED[name].settings}
    if name == "LoRA, all layers":
        settings["targets"] = ALL_LAYERS[TASKS[task]["model"]]
    return {"section": task, "variant": name, **settings, **TASKS[task], **more, "learning_rate": rate, "seed": seed,
            "scored": False}  # fmt: skip


def config_of(point: Row, head: tuple[str, ...] | None = None) -> Any:
    """Return the config that a point describes, with the modules that train as its head; None for all weights."""
    if point["method"] == "full":
        return None
    if point["method"] == "head":
        return pl.SelectiveConfig(modules_to_save=head)
    row = CATALOGUE[point["method"]]
    kind = row.config_class()
    known = {one.name for one in fields(kind)}
    given = {name: value for name, value in point.items() if name in known}
    if "targets" in point:
        given["target_modules"] = point["targets"].split(",")
    return kind(**row.fixed, **given, modules_to_save=head)
