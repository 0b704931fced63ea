"""One training step, and one forward pass, of the Llama-2-7B shape with random weights: memory and time on a GPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.core.checkpointing import switch_checkpointing
from peftlab.core.records import as_transformer
from peftlab.errors import PeftLabError
from peftlab.optional import require

Adapt = Callable[[nn.Module, dict[str, Any]], nn.Module]
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def points() -> Iterator[dict[str, Any]]:
    """Yield training runs (full, LoRA in peft and here, 16-bit adapters), then forward passes of base and LoRA."""
    for batch, checkpointing in ((1, True), (1, False), (4, True), (4, False)):
        yield train("full", "transformers", batch, checkpointing)
    for (batch, checkpointing), library in product(((1, True), (1, False), (4, True), (4, False)), ("peft", "peftlab")):
        yield train("lora", library, batch, checkpointing, r=16, adapter_dtype="float32")
    yield train("lora", "peftlab", 4, True, r=16, adapter_dtype="bfloat16")
    yield train("lora", "peftlab", 4, True, r=256, adapter_dtype="float32")
    yield {"section": "latency", "timed": True, "shape": "llama-2-7b"}


def train(method: str, library: str, batch: int, checkpointing: bool, **lora: Any) -> dict[str, Any]:
    """Describe one training step to measure."""
    return {
        "section": "fullsize", "timed": True, "shape": "llama-2-7b", "method": method, "library": library,
        "batch": batch, "sequence": 512, "checkpointing": checkpointing, **lora,
    }  # fmt: skip


def measure(point: dict[str, Any], adapt: Adapt | None = None) -> list[dict[str, Any]]:
    """Measure one point, and return its rows. `adapt(model, point)` prepares the model; by default `with_adapter`."""
    if not torch.cuda.is_available():
        raise PeftLabError(f"Section {point['section']!r} measures a 7B model and needs a CUDA GPU.")
    try:
        if point["section"] == "fullsize":
            rows = list(training_step(point, adapt or with_adapter))
        else:
            rows = list(forward_passes(point))
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    told = {name: value for name, value in point.items() if name != "timed"}
    return [{**told, **row} for row in rows]


def llama_7b() -> nn.Module:
    """Make the Llama-2-7B architecture with random bf16 weights, on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False,
        use_cache=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def training_step(point: dict[str, Any], adapt: Adapt) -> Iterator[dict[str, Any]]:
    """Measure a step's peak memory and time: bf16 weights and autocast, fused AdamW; median of five after two."""
    torch.manual_seed(0)
    model = llama_7b()
    wrapped = adapt(model, point)
    wrapped.train()
    if point["checkpointing"]:
        switch_checkpointing(model, "enable", {"use_reentrant": False})
    trainable = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True)
    tokens = torch.randint(32000, (point["batch"], point["sequence"]), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = wrapped(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    row = measured(step, trainable, repeats=5, warm_up=2)
    yield {**row, "tokens_per_second": point["batch"] * point["sequence"] / row["seconds"]}


def with_adapter(model: nn.Module, point: dict[str, Any]) -> nn.Module:
    """Return the model as the point's library prepares it: LoRA on all seven linear layers, or nothing."""
    if point["method"] == "full":
        return model
    if point["library"] == "peft":
        peft = require("peft")

        return peft.get_peft_model(model, peft.LoraConfig(r=point["r"], lora_alpha=32, target_modules=list(ALL_LINEAR)))
    config = pl.LoRAConfig(r=point["r"], alpha=32, target_modules=ALL_LINEAR)
    return pl.attach(model, config, adapter_dtype=getattr(torch, point["adapter_dtype"]))


def vocabulary_of(model: nn.Module) -> int:
    """Return how many tokens a transformers model knows."""
    config: Any = as_transformer(model).config
    return config.vocab_size


@torch.no_grad()
def forward_passes(point: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Time one forward pass at batch 1: the base, with LoRA attached, and merged. Median of 20 after 5."""
    torch.manual_seed(0)
    model = llama_7b().eval()
    for state in ("base", "attached", "merged"):
        if state == "attached":
            config = pl.LoRAConfig(r=16, alpha=32, target_modules=ALL_LINEAR)
            pl.attach(model, config, adapter_dtype=torch.bfloat16)
        elif state == "merged":
            pl.merge(model, unload=True)
        for count in (1, 512):
            tokens = torch.randint(32000, (1, count), device="cuda")
            times = timed(partial(model, input_ids=tokens), repeats=20, warm_up=5)
            spread = max(times) - min(times)
            yield {"state": state, "tokens": count, "seconds": statistics.median(times), "seconds_spread": spread}


def measured(step: Callable[[], Any], trainable: list[nn.Parameter], repeats: int, warm_up: int) -> dict[str, Any]:
    """Return the number of trained parameters, the peak, and the median time of a training step."""
    times = timed(step, repeats, warm_up)
    return {
        "trainable": sum(parameter.numel() for parameter in trainable),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "seconds": statistics.median(times),
        "seconds_spread": max(times) - min(times),
    }


def timed(step: Callable[[], Any], repeats: int, warm_up: int) -> list[float]:
    """Return the seconds of each repeat, after a warm-up. The peak of memory is counted from the warm-up on."""
    torch.cuda.reset_peak_memory_stats()
    for _ in range(warm_up):
        step()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return times
