"""The measurements of the chapter on QLoRA and NF4.

Sections, in the chapter's order:
    equality    codes, scales and weights against bitsandbytes' CUDA kernels, 10^8 values in each dtype
    perplexity  smollm2-135m on news text in each format and block size
    quality     the same formats after LoRA on top: the support desk, and held-out news
    forgetting  LoRA, QLoRA and full fine-tuning on the support desk: what they learn, and what news text costs after
    curve       twenty steps of LoRA on an NF4 base, here and with Hugging Face peft on bitsandbytes
    seven, eight, seventy   Llama shapes at full size beside Hugging Face peft's recipe; 7B also in bf16; 70B in 48 GB
    where       where the time of a step at 7B goes, and what a forward pass costs
    fits        what can be trained of 70B on a card of 48 GB
    segments    the same at the longest sequence, with an allocator that leaves fewer gaps
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.bench import fourbit, lora
from peftlab.bench.fourbit import Row
from peftlab.bench.models import gpu_for, release
from peftlab.bench.timing import named
from peftlab.optional import require
from peftlab.quantization.blockwise import quantize
from peftlab.quantization.model import replace

VALUES = 100_000_000
FORMATS = ("whole", "nf4", "fp4", "int4")
BLOCK_SIZES = (32, 64, 256, 1024, 4096)
DESK = {"task": "desk", "r": 8, "alpha": 32, "learning_rate": 5e-3, "steps": 70, "batch_size": 8, "seed": 0}
NEWS = {"task": "news", "r": 8, "alpha": 32, "learning_rate": 1e-3, "steps": 60, "batch_size": 8, "seed": 0}
# What is trained on the support desk, and the learning rates to begin with
FORGETTING = {"lora": (1e-3, 3e-3, 1e-2, 3e-2), "qlora": (1e-3, 3e-3, 1e-2, 3e-2), "full": (1e-5, 3e-5, 1e-4, 3e-4)}


def points() -> list[Row]:
    """Yield every point to measure."""
    dtypes = ("float32", "bfloat16", "float16")
    equality = [{"section": "equality", "dtype": dtype, "values": VALUES, "block_size": 64} for dtype in dtypes]
    equality += [{"section": "equality", "dtype": "bfloat16", "values": VALUES // 10, "block_size": size}
                 for size in (32, 4096)]  # fmt: skip
    perplexity = [{"section": "perplexity", "format": format} for format in FORMATS]
    quality = [{"section": "quality", "format": format, **task} for task in (DESK, NEWS) for format in FORMATS]
    return [
        *equality, *perplexity, *quality, *forgetting(), {"section": "curve", "steps": 20}, *fourbit.points(),
    ]  # fmt: skip


def forgetting() -> Iterator[Row]:
    """Yield the LoRA chapter's recipe for LoRA, for LoRA on an NF4 base, and for full fine-tuning."""
    for method, rates in FORGETTING.items():
        yield lora.desk("forgetting", rates, method=method)


def measure(point: Row) -> list[Row]:
    """Measure one point, and return its rows."""
    section = point["section"]
    small = {"perplexity": perplexities, "quality": quality, "curve": curve}
    if section not in (*small, "forgetting", "equality"):
        return fourbit.measure(point, gpu_for(point, "a GPU"))
    try:
        if section == "forgetting":
            return list(forget(point))
        if section == "equality":
            return named(point, equality(point, gpu_for(point, "a GPU")))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return named(point, small[section](point, device))
    finally:
        release()


# -------------------------------------------------------------------------------------------------------- equality


@torch.no_grad()
def equality(point: Row, device: torch.device, piece: int = 10_000_000) -> Iterator[Row]:
    """Count the bytes of codes, scales and weights that differ from bitsandbytes' kernels on the same values.

    The reference runs on the CPU, where it equals bitsandbytes' CPU code, and on the GPU.
    """
    functional, block_size = require("bitsandbytes").functional, point["block_size"]
    differing = {place: dict.fromkeys(("codes", "scales", "scale_codes", "weights"), 0) for place in ("cpu", "cuda")}
    for start in range(0, point["values"], piece):
        make = torch.Generator(device).manual_seed(start)
        count = min(piece, point["values"] - start)
        weight = torch.randn(count, generator=make, device=device).mul_(0.02).to(getattr(torch, point["dtype"]))
        packed, state = functional.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
        _, doubled = functional.quantize_4bit(weight, blocksize=block_size, quant_type="nf4", compress_statistics=True)
        back = functional.dequantize_4bit(packed, state)
        for place, found in differing.items():
            held = quantize(weight.to(place), block_size=block_size, double_quant=False)
            twice = quantize(weight.to(place), block_size=block_size)
            ours = pl.Quantized(packed.to(place), held.state).dequantize()  # from the same codes
            for what, mine, theirs in (
                ("codes", held.packed, packed), ("scales", held.absmax, state.absmax),
                ("scale_codes", twice.absmax, doubled.absmax), ("weights", ours, back),
            ):  # fmt: skip
                found[what] += int((mine.to(device).flatten() != theirs.flatten()).sum())
    for place, found in differing.items():
        yield {"reference_on": place, **{f"{what}_differing": number for what, number in found.items()}}


# --------------------------------------------------------------------------------------------------------- quality


def in_format(format: str, device: torch.device, block_size: int = 64) -> tuple[nn.Module, Any]:
    """Return smollm2-135m with its linear layers in a format; `"whole"` leaves them in float32."""
    torch.manual_seed(0)
    model, tokenizer = pl.load_model("smollm2-135m", device=device)
    return model if format == "whole" else pl.quantize_model(model, format=format, block_size=block_size), tokenizer


def perplexities(point: Row, device: torch.device) -> Iterator[Row]:
    """Measure perplexity on news, and the weights' relative error, by block size."""
    whole, tokenizer = in_format("whole", device)
    news = texts()[1]
    for block_size in (64,) if point["format"] == "whole" else BLOCK_SIZES:
        model = copy.deepcopy(whole)
        if point["format"] != "whole":
            pl.quantize_model(model, format=point["format"], block_size=block_size)
        originals = {path: m.weight.detach() for path, m in whole.named_modules() if hasattr(m, "weight")}
        errors = [
            ((layer.dequantize() - originals[path]).norm() / originals[path].norm()).item()
            for path, layer in model.named_modules() if hasattr(layer, "quant_state")
        ]  # fmt: skip
        yield {
            "block_size": block_size, "perplexity": pl.perplexity(model, news, tokenizer, progress=False),
            "weight_error": statistics.fmean(errors) if errors else 0.0,
        }  # fmt: skip


def quality(point: Row, device: torch.device) -> Iterator[Row]:
    """Train LoRA on a base in a format, on the support desk or on news text."""
    model, tokenizer = in_format(point["format"], device)
    train_text, news = texts()
    before = pl.perplexity(model, news, tokenizer, progress=False)
    target = ["q_proj", "v_proj"] if point["task"] == "desk" else "all-linear"
    pl.attach(model, pl.LoRAConfig(r=point["r"], alpha=point["alpha"], target_modules=target))
    examples = lora.encoded("train")
    if point["task"] == "news":
        examples = [pl.encode_text(tokenizer, text, max_length=256) for text in train_text]
    history = pl.train(
        model, examples, tokenizer=tokenizer, steps=point["steps"], batch_size=point["batch_size"], warmup=0.1,
        learning_rate=point["learning_rate"], seed=point["seed"], precision="fp32", group_by_length=True,
        progress=False,
    )  # fmt: skip
    row = {"perplexity_before": before, "perplexity": pl.perplexity(model, news, tokenizer, progress=False),
           "train_loss": statistics.fmean(step["loss"] for step in history.steps[-10:]), "exact": None}  # fmt: skip
    if point["task"] == "desk":
        score = lora.on_test(model, tokenizer)
        row |= {**score, "exact": score["right"] / score["messages"]}
    yield row


def forget(point: Row) -> Iterator[Row]:
    """Tune and score a method by the LoRA chapter's protocol. Add the perplexity on news before training."""
    model, tokenizer = lora.base("qlora" if point["method"] == "qlora" else "whole")
    before = pl.perplexity(model, lora.news(), tokenizer, progress=False)
    yield from ({**row, "news_perplexity_before": before} for row in lora.tuned(point))


@cache
def texts() -> tuple[list[str], list[str]]:
    """Return news to train on, and 40 other articles, cut to 1,000 characters, to test on."""
    data = pl.load_data("news")
    return (
        [row["text"][:1000] for row in data["train"].select(range(480))],
        [row["text"][:1000] for row in data["test"].select(range(40))],
    )


# ----------------------------------------------------------------------------------------------------------- curve


def curve(point: Row, device: torch.device, layers: int | None = None) -> Iterator[Row]:
    """Return losses of LoRA on one NF4 base, here and in Hugging Face peft on bitsandbytes, from equal A and B."""
    peft = require("peft")

    ours, tokenizer = in_format("nf4", device)
    if layers is not None:
        body: Any = ours.get_submodule("model")
        body.layers = body.layers[:layers]
    theirs = copy.deepcopy(ours)
    for path, layer in list(theirs.named_modules()):
        if isinstance(layer, fourbit.Linear4bit):
            replace(theirs, path, fourbit.as_bitsandbytes(layer))
    fourbit.say_four_bit(theirs, True)
    targets = list(fourbit.ALL_LINEAR)
    pl.attach(ours, pl.LoRAConfig(r=8, alpha=20, target_modules=targets)).train()
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=8, lora_alpha=20, target_modules=targets)).train()
    mine = dict(ours.named_parameters())
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            path, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            parameter.data.copy_(mine[f"{path}.peftlab.default.lora.lora_{rest[0]}"])
    rows = [tokenizer(text)["input_ids"][:128] for text in texts()[0][: 4 * point["steps"]]]
    shortest = min(map(len, rows))
    batches = torch.tensor([row[:shortest] for row in rows], device=device).view(point["steps"], 4, shortest)
    losses = [_losses(model, batches) for model in (ours, wrapped)]
    for step, (found, expected) in enumerate(zip(*losses, strict=True), 1):
        yield {"step": step, "loss": found, "loss_peft": expected}


def _losses(model: nn.Module, batches: torch.Tensor) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
