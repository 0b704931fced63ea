"""Virtual tokens at real sizes on a GPU: training steps of 7B and t5-base, also in peft; reading and writing at 7B."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.bench import fullsize
from peftlab.bench.models import gpu_for, held, lent, vocabulary_of
from peftlab.bench.timing import clock, named
from peftlab.core.modes import device_of
from peftlab.methods.caches import cache_in, cache_name
from peftlab.optional import require

INSTRUCTION = "Turn the customer's message into a JSON ticket with its intent, its product and its urgency."
READ = (0, 20, 100, 500, 2000)


def measure(point: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure a point of the sections `reading` and `seq2seq`, and return its rows."""
    with held(point["shape"], gpu_for(point, f"a whole {point['shape']}")) as model:
        return named(point, reading(model) if point["section"] == "reading" else [seq2seq_step(model, point)])


def config_of(point: dict[str, Any], tokenizer: Any = None, task_type: str | None = None) -> Any:
    """Return the config of a point: its method and, for virtual tokens, their number and start."""
    method, tokens = point["method"], point.get("tokens")
    text = {"init_text": INSTRUCTION, "tokenizer": tokenizer} if point.get("init") == "text" else {}
    shared = {"num_virtual_tokens": tokens, "task_type": task_type}
    init = {"init": point["init"]} if "init" in point else {}
    if method == "lora":
        return pl.LoRAConfig(r=8, alpha=16, task_type=task_type)
    if method == "p-tuning":
        return pl.PTuningConfig(**shared)
    if method == "prefix projected":
        return pl.PrefixTuningConfig(projection=True, **shared)
    if method == "prefix":
        return pl.PrefixTuningConfig(**shared, **init, **text)
    return pl.PromptTuningConfig(deep=method == "deep prompt", **shared, **init, **text)


def attached(model: nn.Module, point: dict[str, Any]) -> nn.Module:
    """Return the model as the point's library prepares it."""
    if point["library"] == "peft":
        return in_peft(model, point["method"], point["tokens"], "CAUSAL_LM")
    # peft's own start, which needs no forward pass
    init = {} if point["method"] == "p-tuning" else {"init": "random"}
    return pl.attach(model, config_of({**point, **init}))


def in_peft(model: nn.Module, method: str, tokens: int, task: str) -> nn.Module:
    """Return the model in Hugging Face peft."""
    peft = require("peft")

    shared = {"num_virtual_tokens": tokens, "task_type": task}
    configs = {
        "prompt": lambda: peft.PromptTuningConfig(**shared),
        "p-tuning": lambda: peft.PromptEncoderConfig(**shared),
        "prefix": lambda: peft.PrefixTuningConfig(**shared),
    }
    return peft.get_peft_model(model, configs[method]())


def encoder_decoder(model: nn.Module, point: dict[str, Any]) -> nn.Module:
    """Return an encoder-decoder as the point's library prepares it."""
    if point["library"] == "peft":
        return in_peft(model, point["method"], point["tokens"], "SEQ_2_SEQ_LM")
    return pl.attach(model, config_of({**point, "init": "random"}))


@torch.no_grad()
def reading(model: nn.Module, lengths: tuple[int, ...] = READ) -> Iterator[dict[str, Any]]:
    """Measure batch 1: read 512 tokens, and write one more after them."""
    torch.manual_seed(0)
    model.eval()
    text = torch.randint(vocabulary_of(model), (1, 512), device=device_of(model))
    for method in ("prefix", "prompt"):
        for tokens in lengths:
            if tokens:
                point = {"method": method, "tokens": tokens, "init": "random"}
                pl.attach(model, config_of(point), adapter_dtype=torch.bfloat16)
            elif method == "prompt":
                continue  # the base was measured already
            read = clock(partial(model, input_ids=text, use_cache=True), 10, 3, "read_")
            peak = fullsize.peak()

            def write(cache: Any) -> None:
                model(input_ids=text[:, :1], use_cache=True, **{str(cache_name(model)): cache})
                cache.crop(-1)  # that token again, each time

            cache = cache_in(model(input_ids=text, use_cache=True).values())
            yield {
                "method": method if tokens else "base",
                "tokens": tokens,
                **read,
                **clock(partial(write, cache), 10, 3, "write_"),
                "cache_bytes": sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)),
                "peak_bytes": peak,
            }
            if tokens:
                pl.detach(model)


def seq2seq_step(model: nn.Module, point: dict[str, Any]) -> dict[str, Any]:
    """Measure peak memory and time of a step: float32 weights, bf16 autocast, 64 tokens to write."""
    torch.manual_seed(0)
    with lent(model, encoder_decoder, point) as wrapped:
        ids = torch.randint(vocabulary_of(model), (point["batch"], point["sequence"]), device=device_of(model))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, :64].contiguous()}
        return fullsize.step_of(wrapped, batch)
