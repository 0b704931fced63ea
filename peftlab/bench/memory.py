"""The grid of runs that the estimator is compared with: `peftlab bench memory`.

Each point is one run of two steps: transformers' model with random weights at its real shape, under Hugging Face peft.
The result is `torch.cuda.max_memory_allocated`. The file holds no predictions; readers of it call `estimate`.

Sections:
    grid       shapes, methods, lengths, checkpointing, precisions, optimisers
    unseen     runs drawn at random, measured after the estimator was finished; nothing was changed afterwards
    timeline   bytes allocated during one step, as torch's allocator records them
    context    what the GPU holds outside torch's allocator: the CUDA context and the kernels' code
    optimizers the forms of torch's AdamW: what torch takes if nothing is said (foreach), and the fused one
    families   22 families of decoders, with experts among them (see `family_runs`)
    methods    LoRA's family under peftlab's own layers, in 16 and in 4 bits (see `family_runs`)

The last three came later than the others. Their rows are in files of their own, `results/memory_optimizers.json`,
`results/memory_families.json` and `results/memory_methods.json`.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.bench import family_runs
from peftlab.catalogue import METHODS
from peftlab.core.checkpointing import switch_checkpointing
from peftlab.errors import PeftLabError
from peftlab.memory import estimate
from peftlab.memory.counting.shapes import Shape, load_shape
from peftlab.memory.estimate import on_four_bits, uses_autocast
from peftlab.memory.replay.step import TORCH_ADAMW
from peftlab.optional import require

ALL = "all-linear"
SEED, UNSEEN, LARGEST = 11, 30, 60e9  # of the draw: its seed, how many runs, the largest peak
DRAWN_SHAPES = (
    "smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b", "gpt2", "bert-base", "roberta-base", "roberta-large", "t5-base",
    "minilm", "llama-3.2-3b", "llama-2-7b", "mistral-7b", "llama-3.1-8b", "qwen2.5-7b",
)  # fmt: skip
DRAWN_METHODS = (
    "full", "lora", "lora", "qlora", "qlora", "dora", "adalora", "vera", "ia3", "prompt", "p-tuning", "prefix",
)  # fmt: skip
STRETCHES = 250  # of a timeline
RUN = {"r": 16, "targets": ALL, "batch": 1, "sequence": 512, "precision": "bf16", "optimizer": "adamw",
       "checkpointing": False, "attention": "sdpa"}  # fmt: skip


def points() -> list[dict[str, Any]]:
    """Yield every run of the grid, the small shapes first."""
    return [
        {"section": "context"}, *_small(), *_decoders(), *_methods(), *_large(), *_unseen(), *_timelines(),
        *_optimizers(), *_families(), *_variants(),
    ]  # fmt: skip


def run(shape: str, method: str, **changes: Any) -> dict[str, Any]:
    """Describe one run. Prompt methods have no targets, and IA3 has its own."""
    point = {"section": "grid", "shape": shape, "method": method, **RUN, **changes}
    if not METHODS[method].takes("r"):
        point |= {"r": None, "targets": None}
    return point


def _small() -> Iterator[dict[str, Any]]:
    for shape, method in product(("gpt2", "bert-base", "roberta-large", "t5-base"), ("full", "lora")):
        yield run(shape, method, batch=8, sequence=256, precision="fp32")
    for precision in ("bf16", "mixed"):
        yield run("gpt2", "full", batch=8, sequence=512, precision=precision)
        yield run("bert-base", "lora", batch=16, sequence=256, precision=precision)
    yield run("gpt2", "lora", batch=8, sequence=512, checkpointing=True)
    yield run("smollm2-135m", "full", batch=8, sequence=1024, optimizer="adamw8bit")


def _decoders() -> Iterator[dict[str, Any]]:
    for shape, checkpointing in product(("qwen2.5-0.5b", "llama-3.2-1b"), (False, True)):
        yield run(shape, "lora", batch=4, sequence=1024, checkpointing=checkpointing)
    for optimizer in ("adamw", "adamw8bit", "sgd"):
        yield run("llama-3.2-1b", "full", batch=2, sequence=512, optimizer=optimizer)
    yield run("llama-3.2-1b", "full", batch=2, sequence=512, precision="mixed")
    yield run("llama-3.2-1b", "lora", batch=2, sequence=512, precision="fp32")
    yield run("llama-3.2-1b", "lora", batch=1, sequence=2048, attention="eager")


def _methods() -> Iterator[dict[str, Any]]:
    for method in ("dora", "adalora", "vera", "ia3", "prompt", "p-tuning", "prefix"):
        yield run("llama-3.2-3b", method, batch=2, sequence=512, **({"r": 256} if method == "vera" else {}))
    yield run("llama-3.2-3b", "qlora", batch=2, sequence=512)
    for method in ("ia3", "prompt", "prefix"):
        yield run("llama-2-7b", method)
    for method in ("lora", "qlora", "houlsby", "pfeiffer", "ia3", "prompt"):
        yield run("llama-2-7b", method, checkpointing=True)


def _large() -> Iterator[dict[str, Any]]:
    for sequence, checkpointing in product((128, 1024, 4096), (False, True)):
        yield run("llama-2-7b", "lora", sequence=sequence, checkpointing=checkpointing)
    for sequence, checkpointing in product((512, 4096), (False, True)):
        yield run("llama-3.1-8b", "qlora", sequence=sequence, checkpointing=checkpointing)
    yield run("llama-2-7b", "full", checkpointing=True)
    yield run("llama-2-7b", "full", checkpointing=True, optimizer="adamw8bit")
    yield run("qwen2.5-7b", "qlora", batch=4, sequence=1024, checkpointing=True)
    yield run("mistral-7b", "lora", batch=4, sequence=512, checkpointing=True, optimizer="paged-adamw8bit")
    for optimizer in ("adamw", "paged-adamw8bit"):
        yield run("llama-2-70b", "qlora", checkpointing=True, optimizer=optimizer)


def _unseen() -> Iterator[dict[str, Any]]:
    """Draw random runs that an H100 holds, always the same ones."""
    draw = random.Random(SEED)
    found = 0
    while found < UNSEEN:
        shape, method = draw.choice(DRAWN_SHAPES), draw.choice(DRAWN_METHODS)
        if (shape, method) == ("gpt2", "qlora"):  # `four_bit` does not replace its Conv1D layers
            continue
        large = shape.endswith(("7b", "8b"))
        changes = {
            "batch": draw.choice((1, 2) if large else (1, 3, 4, 8)), "sequence": draw.choice((96, 200, 384, 500)),
            "precision": draw.choice(("bf16", "fp32", "mixed")), "checkpointing": draw.random() < 0.5,
            "optimizer": draw.choice(("adamw", "adamw", "adamw8bit", "sgd")),
        }  # fmt: skip
        point = run(shape, method, **changes, **({"r": 256} if method == "vera" else {}))
        try:
            peak = estimate(**{name: value for name, value in point.items() if name != "section"}).peak_bytes
        except PeftLabError:  # peft or transformers would refuse it too
            continue
        if peak < LARGEST:
            found += 1
            yield {**point, "section": "unseen"}


def _timelines() -> Iterator[dict[str, Any]]:
    for method, checkpointing in (("full", False), ("lora", False), ("qlora", False), ("qlora", True)):
        yield {**run("llama-2-7b", method, batch=4, checkpointing=checkpointing), "section": "timeline"}


def _optimizers() -> Iterator[dict[str, Any]]:
    for optimizer in TORCH_ADAMW:
        for shape, method, changes in (
            ("llama-3.2-1b", "full", {"precision": "mixed"}), ("llama-2-7b", "full", {}), ("llama-2-7b", "lora", {}),
        ):  # fmt: skip
            point = run(shape, method, checkpointing=True, optimizer=optimizer, **changes)
            yield {**point, "section": "optimizers"}


def _families() -> Iterator[dict[str, Any]]:
    for shape, method, changes in family_runs.points():
        yield {**run(shape, method, **changes), "section": "families"}


def _variants() -> Iterator[dict[str, Any]]:
    for shape, method, changes in family_runs.method_points():
        yield {**run(shape, method, **changes), "section": "methods", "targets": ALL}


def shape_of(point: dict[str, Any]) -> Shape:
    """Return the shape of a run: a built-in one, or of the section `families` one with fewer layers."""
    return load_shape(family_runs.config_of(point) if point["section"] == "families" else point["shape"])


def measure(point: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure one point, and return its row."""
    if not torch.cuda.is_available():
        raise PeftLabError("bench memory measures a GPU's memory and needs a CUDA GPU.")
    try:
        if point["section"] == "context":
            torch.zeros(1, device="cuda")
            free, total = torch.cuda.mem_get_info()
            return [{**point, "bytes": total - free - torch.cuda.memory_reserved()}]
        model, batch = build(point, torch.device("cuda"))
        optimizer = optimizer_of(point["optimizer"], trained(model))
        torch.cuda.reset_peak_memory_stats()
        run_step = phases(model, optimizer, batch, autocast(point))
        steps(run_step, 1 if point["section"] == "timeline" else 2)
        if point["section"] == "timeline":
            return [{**point, **row} for row in timeline(run_step)]
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        del model, optimizer, batch, run_step
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return [{**point, "peak_bytes": peak, "reserved_bytes": reserved}]


def autocast(point: dict[str, Any]) -> bool:
    """Say whether a run uses autocast: what it says, or as `estimate` decides it."""
    told = point.get("autocast")
    return uses_autocast(point["method"], point["precision"], point.get("four_bit")) if told is None else told


def build(point: dict[str, Any], device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model with random weights under its method, and a batch."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    shape = shape_of(point)
    kinds = {
        "decoder": AutoModelForCausalLM,
        "encoder": AutoModelForSequenceClassification,
        "encoder-decoder": AutoModelForSeq2SeqLM,
    }
    config = AutoConfig.for_model(**shape.config)
    config._attn_implementation, config.decoder_start_token_id = point["attention"], 0
    config.use_cache = False
    dtype = torch.bfloat16 if point["precision"] == "bf16" else torch.float32
    torch.manual_seed(0)
    codes = on_four_bits(point["method"], point.get("four_bit"))
    with torch.device("meta" if codes else device):
        model = kinds[shape.kind].from_config(config, dtype=dtype)
    if codes:
        four_bit(model, shape, device, torch.bfloat16 if autocast(point) else dtype)
    if point["checkpointing"]:
        switch_checkpointing(model, "enable", {"use_reentrant": False})
    wrapped = with_method(model, point, shape.kind)
    wrapped.train()
    ids = torch.randint(shape.config["vocab_size"], (point["batch"], point["sequence"]), device=device)
    labels = ids[:, 0] % 2 if shape.kind == "encoder" else ids
    return wrapped, {"input_ids": ids, "labels": labels}


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def four_bit(model: nn.Module, shape: Any, device: torch.device, compute: torch.dtype) -> None:
    """Replace the body's linear layers by random NF4 weights, doubly quantised, and allocate the rest."""
    bnb = require("bitsandbytes")

    for module in shape.modules:
        if module.kind != "linear" or module.role != "body":
            continue
        old = model.get_submodule(module.path)
        assert isinstance(old, nn.Linear)
        new = bnb.nn.Linear4bit(
            old.in_features, old.out_features, bias=old.bias is not None, compute_dtype=compute,
            compress_statistics=True, quant_type="nf4", device="meta",
        )  # fmt: skip
        weight = torch.randn(old.out_features, old.in_features, dtype=compute, device=device) * 0.02
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4").to(
            device
        )
        if old.bias is not None:
            new.bias = nn.Parameter(torch.zeros(old.out_features, dtype=old.bias.dtype, device=device))
        parent, _, name = module.path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    for module in model.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if tensor.device.type == "meta":
                real = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)  # of a BERT also numbers of places
                value = real.normal_(std=0.02) if tensor.is_floating_point() else real
                is_parameter = isinstance(tensor, nn.Parameter)
                setattr(module, name, nn.Parameter(value) if is_parameter else value)
    transformer: Any = model
    transformer.tie_weights()
    transformer.is_loaded_in_4bit = True  # by which peft knows its layers


def with_method(model: nn.Module, point: dict[str, Any], kind: str) -> nn.Module:
    """Return the model as Hugging Face peft prepares it, or with our own layers where the point says so.

    peft lacks bottleneck adapters, so those are ours, too.
    """
    if point.get("library") == "peftlab":
        row = METHODS[point["method"]]
        rank = {option.config_field: point["r"] for option in row.options if option.name == "r"}
        return pl.attach(model, row.config_class()(**rank, target_modules=point["targets"]))
    peft = require("peft")

    method, task = point["method"], {"decoder": "CAUSAL_LM", "encoder": "SEQ_CLS", "encoder-decoder": "SEQ_2_SEQ_LM"}
    common = {"task_type": task[kind]}
    targets = point["targets"] if isinstance(point["targets"], str | None) else list(point["targets"])
    low_rank = {"r": point["r"], "target_modules": targets, **common}
    parameters = {"target_parameters": list(point["target_parameters"])} if point.get("target_parameters") else {}
    configs = {
        "lora": lambda: peft.LoraConfig(lora_alpha=32, **low_rank, **parameters),
        "dora": lambda: peft.LoraConfig(lora_alpha=32, use_dora=True, **low_rank),
        "adalora": lambda: peft.AdaLoraConfig(init_r=point["r"], target_modules=targets, total_step=100, **common),
        "vera": lambda: peft.VeraConfig(**low_rank),
        "ia3": lambda: peft.IA3Config(**common),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=20, **common),
        "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=20, **common),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=20, **common),
    }
    if method == "full":
        return model
    if method in ("houlsby", "pfeiffer", "parallel"):
        return pl.attach(model, pl.AdapterConfig(placement=method))
    return peft.get_peft_model(model, configs["lora" if method == "qlora" else method]())


def optimizer_of(name: str, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimiser by the estimator's name for it."""
    if name == "sgd":
        return torch.optim.SGD(trained, lr=1e-4)
    if name == "adamw-foreach":  # nothing is said, as in a plain loop: on a GPU torch then takes foreach=True
        return torch.optim.AdamW(trained, lr=1e-5)
    if name in TORCH_ADAMW:
        return torch.optim.AdamW(trained, lr=1e-5, foreach=False, fused=name == "adamw-fused")
    bnb = require("bitsandbytes")

    return (bnb.optim.PagedAdamW8bit if name.startswith("paged") else bnb.optim.AdamW8bit)(trained, lr=1e-5)


def phases(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any], autocasts: bool
) -> dict[str, Callable[[], None]]:
    """Return the parts of a step, in order. The loss lives until the next one exists, as in a plain loop."""
    held = {}

    def forward() -> None:
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=autocasts):
            held["loss"] = model(**batch).loss

    def optimize() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"forward": forward, "backward": lambda: held["loss"].backward(), "optimiser": optimize}


def steps(parts: dict[str, Callable[[], None]], times: int) -> None:
    """Make some steps."""
    for _ in range(times):
        for part in parts.values():
            part()


def timeline(parts: dict[str, Callable[[], None]]) -> Iterator[dict[str, Any]]:
    """Return the bytes allocated during a step: the highest value of each stretch of allocations."""
    now, points = torch.cuda.memory_allocated(), []
    for name, part in parts.items():
        torch.cuda.memory._record_memory_history(context=None, max_entries=10_000_000)
        part()
        torch.cuda.synchronize()
        events = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
        torch.cuda.memory._record_memory_history(enabled=None)
        for event in events:
            now += {"alloc": event["size"], "free_completed": -event["size"]}.get(event["action"], 0)
            if event["action"] == "alloc":
                points.append((name, now))
    for share, (name, size) in thinned(points, STRETCHES):
        yield {"phase": name, "share": share, "bytes": size}


def thinned(points: list[tuple[str, int]], most: int) -> Iterator[tuple[float, tuple[str, int]]]:
    """Return (share of the step, highest point) of at most this many stretches."""
    width = -(-len(points) // most)
    for i in range(0, len(points), width):
        yield i / len(points), max(points[i : i + width], key=lambda point: point[1])
