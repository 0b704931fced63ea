"""The measurements of the chapter on the LoRA family: does a variant help when each has its own best learning rate?

smollm2-135m learns two tasks: the support desk (tickets in JSON, by the recipe of `bench lora`), and film reviews,
which it answers with one token, "negative" or "positive". All variants change the same weights, the queries and values
of all layers, in float32. `path` says which path of `pl.train` a run took; both give the same steps. By one protocol:

1. Each variant, in two sizes, tries its learning rates with one seed. If the rate with the lowest loss on the
   validation examples is the lowest or the highest that was tried, the next one is tried as well.
2. At this rate three other seeds run. They alone are scored on all test examples (`scored` is true in their rows).

Each run is a point of its own, and what comes next follows from the rows that are there (`follow_up`). So a run that is
cut keeps every run that ended.

Sections:
    base        the model before training, on both tasks
    desk        every variant on the support desk
    reviews     every variant on the reviews
    ratio       LoRA+: ratios of B's rate to A's, against the rate
    longer      LoRA over more steps, for the time that a slower method takes for its 60
    scale       ranks from 1 to 256 under three rules for the scale, on the reviews (the desk: `bench lora`, "rank")
    direction   how far magnitude and direction of each weight move during a run (see `family_why` for this and below)
    principal   how much of an update lies along the first singular vectors of the weight before it
    allocation  the ranks that AdaLoRA leaves in each layer
    vectors     the two vectors that VeRA trains in each layer
    trim        LoRA whose intruders are scaled down
    fullsize    one training step of the shape of a 1B model (random weights), ours beside peft's (see `family_sizes`)
    start       seconds to make each start at that shape

The parts that learn are about 720 runs of 60 steps or more. Starting their many small kernels takes longer than the
kernels, so several processes share each GPU: with four GPUs `--jobs 48`, and NVIDIA's MPS running (`nvidia-cuda-mps-
control -d`). Without it processes take turns on a GPU: 56 of them on four H200 ended no run within the first 70
seconds.

`PREDICTIONS` of `family_variants` holds what each paper leads one to expect. It was written before the first run.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import peftlab as pl
from peftlab.bench import family_sizes, family_why, lora, search
from peftlab.bench.family_variants import ALPHA, LOWEST, RATES, TASKS, TUNING, VARIANTS, grids, run
from peftlab.core.modes import device_of

Row = dict[str, Any]

AT_ONCE = 64  # examples of a batch that is only read
EVA = {"use_label_mask": False}  # all tokens count: of a review only one is learned
EVA_BATCH = 32  # examples of a batch that EVA reads; it takes as many as its directions need to come to rest
WORDS = ("negative", "positive")  # one token each; the place in the tuple is the label
SIZES = {"train": 4000, "validation": 640, "test": 1280}  # reviews
LONGER = (80, 100, 120, 140)  # steps: DoRA's 60 last as long as 80 to 135 of LoRA's (sections small and fullsize)
QUESTION = "Is this film review negative or positive? Answer with one word."


# --------------------------------------------------------------------------------------------------------- points


def points() -> list[Row]:
    """Yield every point to measure: what matters most comes first, because a run may be cut."""
    small = [*grids("desk", 0), *grids("reviews", 0)]
    large = [*grids("desk", 1), *grids("reviews", 1)]
    bases = [{"section": "base", "task": task} for task in TASKS]
    learned = [*bases, *small, *family_why.points(), *ratios(), *large, *longer(), *scales()]
    return [point for point in learned if there(point)] + list(family_sizes.points())


def there(point: Row) -> bool:
    """Whether this installation has what a point needs."""
    config = pl.METHODS.get(point.get("method", "lora"))
    return config is not None or point.get("method") == "full"


def ratios() -> Iterator[Row]:
    """Vary the ratio of B's rate to A's; the learning rate is A's."""
    for ratio in (1.0, 4.0, 16.0, 64.0):
        for rate in LOWEST:
            for seed in (TUNING, TUNING + 1):
                settings = {**ALPHA, "r": 8, "loraplus_lr_ratio": ratio}
                yield run("ratio", "desk", "LoRA+", settings, rate, seed)


def longer() -> Iterator[Row]:
    """Train LoRA over more steps, on both tasks: a method that takes longer is compared with it at equal time."""
    for task in TASKS:
        for steps in LONGER:
            for rate in RATES:
                yield run("longer", task, "LoRA", {**ALPHA, "r": 8}, rate, TUNING, steps=steps)


def scales() -> Iterator[Row]:
    """Vary r: alpha = 16 with alpha / r and with alpha / sqrt(r), and alpha = 2 r."""
    for r in (256, 64, 16, 4, 1):
        rules = {"alpha / r": {**ALPHA}, "alpha = 2 r": {"alpha": 2 * r},
                 "alpha / sqrt(r)": {**ALPHA, "use_rslora": True}}  # fmt: skip
        for rule, settings in rules.items():
            for rate in RATES[:5]:
                yield run("scale", "reviews", "LoRA", {"r": r, **settings}, rate, TUNING, rule=rule)


def follow_up(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield what follows from the rows of the two tasks, and of longer runs."""
    searched = (row for row in rows if row["section"] in (*TASKS, "longer"))
    yield from next_runs(searched, lambda row: VARIANTS[row["variant"]].rates)


def next_runs(rows: Iterable[Row], rates_of: Callable[[Row], tuple[float, ...]]) -> Iterator[Row]:
    """Yield the next rates of a setting while its best one is at an edge, then three seeds at the best one.

    Args:
        rows: one for each run that ended. What was run stands in the columns up to `scored`.
        rates_of: the rates that are tried first, from a row of their setting.
    """
    yield from search.follow_up(rows, lambda row: search.Search(rates_of(row)))


# ------------------------------------------------------------------------------------------------------- training


def measure(point: Row) -> list[Row]:
    """Measure one point, and return its rows."""
    section = point["section"]
    if section in family_sizes.SECTIONS:
        return family_sizes.measure(point)
    try:
        if section == "base":
            model, _ = lora.base()
            return [{**point, **scored(point, model)}]
        if section in family_why.SECTIONS:
            return list(family_why.measure(point, trained, partial(scored, point)))
        model, losses = trained(point)
        row = {**point, **losses, **judged(point, model)}
        return [{**row, **tested(point, model)} if point["scored"] else row]
    finally:
        torch.cuda.empty_cache()  # other processes share the GPU


def trained(
    point: Row, examples: list[Any] | None = None, base: nn.Module | None = None, **settings: Any
) -> tuple[nn.Module, Row]:
    """Train once, as a point says. Return the model, and its losses on the way.

    Args:
        examples: what to train on; by default the training examples of the point's task.
        base: the model to copy, if it is not smollm2-135m as it is.
        settings: other settings of `pl.train` than the usual ones.
    """
    torch.manual_seed(point["seed"])
    model, tokenizer = copy.deepcopy(lora.base()[0] if base is None else base), lora.base()[1]
    examples = encoded(point["task"], "train") if examples is None else examples
    if point.get("init") == "eva":
        pl.attach(model, config_of(point), data=batches(point))
    elif point["method"] != "full":
        pl.attach(model, config_of(point))
    if "loraplus_lr_ratio" in point:
        settings["loraplus_lr_ratio"] = point["loraplus_lr_ratio"]
    losses = fit(model, tokenizer, examples, point, **settings)
    return model, {"trainable": pl.count_parameters(model).trainable, **losses}


def fit(model: nn.Module, tokenizer: Any, examples: list[Any], point: Row, **settings: Any) -> Row:
    """Train a model as a point says, by the recipe of all runs. Return its losses on the way, and the loop's path."""
    usual: Row = {
        "steps": point["steps"], "batch_size": point["batch_size"], "learning_rate": point["learning_rate"],
        "seed": point["seed"], "precision": "fp32", "warmup": 0.1, "schedule": "linear", "group_by_length": True,
        "fast": False if "callback" in settings else "auto", "progress": False,
    }  # fmt: skip
    losses: list[float] = []
    path = None
    try:
        history = pl.train(model, examples, tokenizer=tokenizer, **{**usual, **settings})
        losses = [step["loss"] for step in history.steps]
        path = history.path.partition(":")[0]
    except pl.TrainingError:
        pass  # divergence is a result too; the model keeps its last finite state
    # the mean of five steps that end here, and of the last ten
    ends = {"loss_10": losses[5:10], "loss_20": losses[15:20], "loss_40": losses[35:40], "train_loss": losses[-10:]}
    return {"path": path, **{name: statistics.fmean(those) if those else None for name, those in ends.items()}}


def config_of(point: Row) -> Any:
    """Return the config that a point describes: its columns that are fields of the method's config."""
    kind = pl.METHODS[point["method"]]
    known = {one.name for one in fields(kind)}
    given = {name: value for name, value in point.items() if name in known}
    if point.get("init") == "eva":
        given["init_options"] = EVA
    return kind(**given, target_modules=point["targets"].split(","))


def batches(point: Row) -> list[dict[str, Any]]:
    """Return the batches whose inputs EVA starts from: training examples."""
    examples, collate = encoded(point["task"], "train"), pl.Collator(lora.base()[1])
    return [collate(examples[start : start + EVA_BATCH]) for start in range(0, min(len(examples), 1024), EVA_BATCH)]


# --------------------------------------------------------------------------------------------------------- scores


def asked(text: str) -> list[Row]:
    """Return what the model reads: the question as the system's turn and the review as the user's."""
    return [{"role": "system", "content": QUESTION}, {"role": "user", "content": text}]


@cache
def encoded(task: str, split: str) -> list[Any]:
    """Return the examples of a split. Of a review only the one token of the answer is learned."""
    if task == "desk":
        return lora.encoded(split)
    tokenizer = lora.base()[1]
    made = []
    for row in pl.load_data("reviews")[split].select(range(SIZES[split])):
        whole = pl.encode_completion(tokenizer, asked(row["text"]), WORDS[row["label"]])
        made.append({name: values[:-1] for name, values in whole.items()})  # without the end token
    return made


def judged(point: Row, model: nn.Module) -> Row:
    """Return the loss on the validation examples, the perplexity on news, and how many directions are intruders."""
    return {**on_validation(point, model), **on_news(model), **family_why.intruders(model)}


def on_validation(point: Row, model: nn.Module) -> Row:
    """Return the loss on the validation examples."""
    loss = pl.mean_loss(model, encoded(point["task"], "validation"), pl.Collator(lora.base()[1]), batch_size=AT_ONCE)
    return {"validation_loss": lora.finite(loss)}


def on_news(model: nn.Module) -> Row:
    """Return the perplexity on news."""
    return {"news_perplexity": lora.finite(pl.perplexity(model, lora.news(), lora.base()[1]))}


def scored(point: Row, model: nn.Module) -> Row:
    """Return what the validation and the test examples say."""
    return {**judged(point, model), **tested(point, model)}


def tested(point: Row, model: nn.Module) -> Row:
    """Return the loss on the test examples, their number, and how many answers are right."""
    tokenizer, examples = lora.base()[1], encoded(point["task"], "test")
    if point["task"] == "reviews":
        loss, right = chosen(model, tokenizer, examples)
        return {"test_loss": lora.finite(loss), "tested": len(examples), "right": right}
    loss = pl.mean_loss(model, examples, pl.Collator(tokenizer), batch_size=AT_ONCE)
    prompts = [row["prompt"] for row in lora.messages("test")]
    found = lora.answered(model, tokenizer, prompts, max_new_tokens=24, batch_size=250)
    return {"test_loss": lora.finite(loss), "tested": found["messages"], "right": found["right"]}


@torch.no_grad()
def chosen(model: nn.Module, tokenizer: Any, examples: list[Any]) -> tuple[float, int]:
    """Return the mean loss of the answers, and how often the right one of the two words is the more likely one."""
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in WORDS]
    collate, total, right = pl.Collator(tokenizer), 0.0, 0
    model.eval()
    for start in range(0, len(examples), AT_ONCE):
        batch = collate(examples[start : start + AT_ONCE])
        batch = {name: tensor.to(device_of(model)) for name, tensor in batch.items()}
        answers = batch.pop("labels")
        rows, places = (answers >= 0).nonzero(as_tuple=True)
        logits = model(**batch).logits[rows, places - 1]  # of the token before the answer
        total += float(F.cross_entropy(logits.float(), answers[rows, places], reduction="sum"))
        right += int((logits[:, words].argmax(-1) == (answers[rows, places] == words[1])).sum())
    return total / len(examples), right
