"""The speed ladder: `peftlab bench speed`.

A section is one training step: a shape, LoRA or QLoRA, a batch, with or without recomputing (`c` for checkpointing).
Its rows are the ladder's rungs, from an eager loop to the dense products alone, which no step can pass:

    peft             Hugging Face peft as its users run it: float32 adapters under autocast, fused AdamW
    eager            the loop of `peft` with adapters of this package, and torch's plain AdamW
    bf16 adapters    adapters in bf16, their masters in float32, no autocast
    compiled layers  each block through torch.compile
    chunked loss     no whole logits
    flat AdamW       one tensor for all that is trained
    triton           4-bit weights made by a Triton kernel (QLoRA only)
    cuda graph       the step's kernels launched at once
    train            `pl.train` on its plain path
    train compiled   the same with compile="layers" and adapters in bf16
    fast, no graph   `pl.train(fast=True)`, its kernels launched one by one
    fast             the same as it is: one CUDA graph
    fast, pinned     the same with the blocks' inputs in main memory (where blocks are recomputed)
    fast, 8-bit      the same, and AdamW's states in 8 bits: the least memory
    ceiling          the dense products of the step alone, in one CUDA graph

Each rung keeps what the rungs before it changed. A rung that cannot run here is left out, and `skipped` says why.
A section that ends in `unsloth` has few rungs, and Unsloth's own step beside them, where it is installed. It runs in
processes of its own (`bench/unsloth_step.py`), and is a section of its own because it wants older versions:

    unsloth          Unsloth's step in a plain loop
    unsloth, trainer the same in TRL's trainer, as its users run it

A section that ends in `loop` has one row: `pl.train` on its plain path beside a plain loop, in pairs and in changing
order (`peftlab/bench/loop.py`).
`host_seconds` is the same step on a model of the same depth but very narrow layers: what the host needs to launch it.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import peftlab as pl
from peftlab.bench import fourbit, rungs, timing, unsloth_step
from peftlab.bench.fullsize import peak
from peftlab.bench.loop import loop_pairs
from peftlab.bench.models import ALL_LINEAR, Row, gpu_for, held, let_go, random_model, release, vocabulary_of
from peftlab.bench.timing import clock, named
from peftlab.core.checkpointing import set_input_gradients, switch_checkpointing
from peftlab.core.records import as_transformer
from peftlab.memory.counting.shapes import load_shape
from peftlab.memory.speed import product_flops, sizes_of
from peftlab.optional import available
from peftlab.quantization import Linear4bit
from peftlab.quantization.backends import BACKENDS
from peftlab.settings import Settings
from peftlab.training import fast_path

R, ALPHA = 16, 32
NARROW = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2,
          "head_dim": 32, "vocab_size": 128}  # fmt: skip
SHAPES = {"135m": "smollm2-135m", "1b": "llama-3.2-1b", "7b": "llama-2-7b", "8b": "llama-3.1-8b"}
BATCHES = ((4, 512), (2, 2048))
# Rungs that are measured in one go, on one set of compiled blocks
GROUPS: dict[str, tuple[str, ...]] = {
    "peft": ("peft",),
    "unsloth": ("unsloth", "unsloth, trainer"),
    "eager": ("eager",),
    "bf16": ("bf16 adapters",),
    "compiled": ("compiled layers", "chunked loss", "flat AdamW", "triton", "cuda graph"),
    "train": ("train",),
    "train compiled": ("train compiled",),
    "fast, no graph": ("fast, no graph",),
    "fast": ("fast",),
    "fast, pinned": ("fast, pinned",),
    "fast, 8-bit": ("fast, 8-bit",),
    "ceiling": ("ceiling",),
}
MAIN = ("7b-lora-4x512-c",)  # the section with every rung but Unsloth's
FEW = ("peft", "compiled", "fast", "fast, pinned", "fast, 8-bit", "ceiling")  # what the others have
BESIDE = ("7b-lora-4x512-c", "7b-lora-2x2048-c", "7b-qlora-4x512-c", "7b-qlora-2x2048-c")  # also beside Unsloth
THEIRS = ("peft", "unsloth", "fast", "fast, pinned", "ceiling")  # what stands there
RECOMPUTING = ("fast, pinned", "fast, 8-bit")  # only where blocks are recomputed
# The shapes at which `pl.train` stands beside a plain loop, and how many pairs of both a process times. Where the host
# is slower than the GPU, pairs scatter more.
LOOPS = {"135m": 150, "1b": 200, "7b": 100}


def points() -> list[Row]:
    """Yield every group of rungs of every section; sections of one model stand together."""

    def point(section: str, group: str, shape: str, method: str, batch: int, sequence: int, checkpointing: bool) -> Row:
        return {
            "section": section, "timed": True, "group": group, "shape": shape, "method": method, "batch": batch,
            "sequence": sequence, "checkpointing": checkpointing, "r": R,
        }  # fmt: skip

    steps = [
        point(section, group, shape, method, batch, sequence, checkpointing)
        for name, shape in SHAPES.items()
        for method in ("lora", "qlora")
        for batch, sequence in BATCHES
        for checkpointing in (True, False)
        for step in [f"{name}-{method}-{batch}x{sequence}{'-c' if checkpointing else ''}"]
        for section in ([step, f"{step}-unsloth"] if step in BESIDE else [step])
        for group in groups_of(section)
        if checkpointing or group not in RECOMPUTING
    ]
    loops = [
        point(f"{name}-loop", "loop", SHAPES[name], "lora", *BATCHES[0], checkpointing=False) | {"pairs": pairs}
        for name, pairs in LOOPS.items()
    ]
    return steps + loops


def groups_of(section: str) -> tuple[str, ...]:
    """Return the groups of rungs of a section, in the ladder's order."""
    if section.endswith("-unsloth"):
        return THEIRS
    return tuple(name for name in GROUPS if name in FEW or (section in MAIN and name != "unsloth"))


def measure(point: Row) -> list[Row]:
    """Measure a group of rungs, and return their rows."""
    device = gpu_for(point, "training steps")
    if point["group"] == "unsloth":
        found, weights = list(unsloth(point, device)), 0
    else:
        with held(point["shape"], device, four_bit=point["method"] == "qlora") as model:
            weights = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            group: Callable[[nn.Module, Row], Iterator[Row]] = GROUP_OF[point["group"]]
            torch.manual_seed(0)
            found = list(group(model, point))
    tokens = point["batch"] * point["sequence"]
    rows = []
    for row in found:
        used, base = row.get("peak_bytes"), row.get("weight_bytes", weights)
        working = None if used is None else used - base
        seconds = row.get("seconds")
        speed = tokens * row.get("batches", 1) / seconds if seconds and row["rung"] != "copy" else None
        rows.append({**row, "weight_bytes": base, "working_bytes": working, "tokens_per_second": speed})
    return named({name: value for name, value in point.items() if name != "group"}, rows)


# ------------------------------------------------------------------------------------------------- loops of one's own


def plain(model: nn.Module, point: Row, rung: str) -> Iterator[Row]:
    """Measure an eager loop: Hugging Face peft's, or ours with float32 or bf16 adapters."""

    def measured(of: nn.Module) -> Row:
        with ready(of, point, rung) as wrapped:
            step = rungs.loop(wrapped, batch_for(of, point), loss_of(rung), optimizer_of(rung, wrapped))
            return {**clock(step, details=True), "peak_bytes": peak()}

    yield from tried(rung, lambda: {**measured(model), **on_narrow(point, measured)})


def on_narrow(point: Row, measured: Callable[[nn.Module], Row]) -> Row:
    """Measure the same step on a model of the same depth that has next to nothing to compute."""
    config = {**load_shape(point["shape"]).config, **NARROW}
    device = gpu_for(point, "training steps")
    row = measured(random_model(config, device, point["method"] == "qlora"))
    return {"host_seconds": row["seconds"]}


def compiled(model: nn.Module, point: Row, _: str) -> Iterator[Row]:
    """Measure the rungs on compiled blocks, each keeping what the one before it changed."""
    batch = batch_for(model, point)
    with ready(model, point, "compiled layers") as wrapped:
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        rungs.compile_layers(blocks_of(model))
        loss: Callable[..., Tensor] = rungs.plain_loss
        optimizer: Any = rungs.Masters(trained)

        def measured(step: Callable[[], Any]) -> Row:
            return {**clock(step, warm_up=3, details=True), "peak_bytes": peak()}

        yield from tried("compiled layers", lambda: measured(rungs.loop(model, batch, loss, optimizer)))
        loss = rungs.chunked_loss
        yield from tried("chunked loss", lambda: measured(rungs.loop(model, batch, loss, optimizer)))
        optimizer = rungs.Flat(trained)
        release()
        yield from tried("flat AdamW", lambda: measured(rungs.loop(model, batch, loss, optimizer)))
        if point["method"] == "qlora":
            reason = BACKENDS["triton"].cannot("nf4", 64, batch["input_ids"].device)
            if reason is None:
                set_backend(model, "triton")
            yield from tried("triton", lambda: measured(rungs.loop(model, batch, loss, optimizer)), reason)
        reason = None if batch["input_ids"].is_cuda else "there is no GPU"

        def in_graph() -> Row:
            torch.cuda.reset_peak_memory_stats()
            replay = rungs.in_one_graph(rungs.loop(model, batch, loss, optimizer))
            recorded = peak()  # a replay allocates nothing
            return {**measured(replay), "peak_bytes": recorded}

        yield from tried("cuda graph", in_graph, reason)


@contextmanager
def ready(model: nn.Module, point: Row, rung: str) -> Iterator[nn.Module]:
    """Prepare a held model for a rung, inside the block; afterwards it is as it was."""
    if rung == "peft":
        run = {"r": R, "checkpointing": point["checkpointing"]}
        hooks: Any = as_transformer(model).get_input_embeddings()._forward_hooks
        before = dict(hooks)
        with fourbit.under(model, "peft", run) as wrapped:
            yield wrapped
        for number in set(hooks) - set(before):  # peft and transformers each make one, and one of them stays
            del hooks[number]
        return
    set_backend(model, "bitsandbytes" if available("bitsandbytes") else "reference")
    dtype = torch.float32 if rung == "eager" else torch.bfloat16
    pl.attach(model, pl.LoRAConfig(r=R, alpha=ALPHA, target_modules=ALL_LINEAR), adapter_dtype=dtype).train()
    if point["checkpointing"]:  # no dropout, so no state of the generator needs to be kept
        switch_checkpointing(model, "enable", {"use_reentrant": False, "preserve_rng_state": False})
        set_input_gradients(model, False)
    try:
        yield model
    finally:
        for block in blocks_of(model):
            block.__dict__.pop("forward", None)
        torch.compiler.reset()
        if point["checkpointing"]:
            switch_checkpointing(model, "disable")
        pl.detach(model)
        model.requires_grad_(False)
        set_backend(model, "auto")
        release()


def set_backend(model: nn.Module, backend: str) -> None:
    """Say who makes the 4-bit weights of a model."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.backend = backend


def blocks_of(model: Any) -> nn.ModuleList:
    """Return the blocks of a Llama-like decoder."""
    return model.model.layers


def batch_for(model: nn.Module, point: Row) -> dict[str, Tensor]:
    """Return a batch of random tokens."""
    device = next(model.parameters()).device
    tokens = torch.randint(vocabulary_of(model), (point["batch"], point["sequence"]), device=device)
    return {"input_ids": tokens, "labels": tokens}


def loss_of(rung: str) -> Callable[..., Tensor]:
    """Return the loss of an eager rung."""
    return rungs.plain_loss if rung == "bf16 adapters" else rungs.autocast_loss


def optimizer_of(rung: str, model: nn.Module) -> Any:
    """Return the optimiser of an eager rung: peft's users get the fused AdamW from transformers' Trainer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if rung == "bf16 adapters":
        return rungs.Masters(trained)
    return torch.optim.AdamW(trained, lr=rungs.RATE, fused=True if rung == "peft" else None)


# -------------------------------------------------------------------------------------------------------- pl.train


def training(model: nn.Module, point: Row, rung: str, **settings: Any) -> Iterator[Row]:
    """Measure `pl.train`, on its plain path or on the fast one."""
    missing = sorted(set(settings) - set(Settings.__dataclass_fields__))
    settings = {"fast": False, **settings}
    reason = f"pl.train has no setting {', '.join(missing)}" if missing else None

    def measured() -> Row:
        set_backend(model, "auto")
        dtype = torch.bfloat16 if rung == "train compiled" else torch.float32
        pl.attach(model, pl.LoRAConfig(r=R, alpha=ALPHA, target_modules=ALL_LINEAR), adapter_dtype=dtype)
        try:
            with launched_one_by_one() if rung == "fast, no graph" else nullcontext():
                return steps_of_train(model, point, **{"checkpointing": point["checkpointing"], **settings})
        finally:
            pl.detach(model)
            model.requires_grad_(False)
            torch.compiler.reset()
            release()

    yield from tried(rung, measured, reason)


@contextmanager
def launched_one_by_one() -> Iterator[None]:
    """Keep the fast path from recording CUDA graphs, inside the block. A user has no reason to, so it is no setting."""
    with mock.patch.object(fast_path, "Graphs", lambda step: None):
        yield


def steps_of_train(model: nn.Module, point: Row, repeats: int = 5, warm_up: int = 4, **settings: Any) -> Row:
    """Read the clock at `pl.train`'s callback, or profile the kernels between two of its calls."""
    draw = torch.Generator().manual_seed(0)
    shape = (4 * point["batch"], point["sequence"])
    rows = torch.randint(vocabulary_of(model), shape, generator=draw).tolist()
    between = timing.BetweenCalls(warm_up, repeats)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    pl.train(
        model, [{"input_ids": ids, "labels": ids} for ids in rows], steps=warm_up + repeats,
        batch_size=point["batch"], learning_rate=rungs.RATE, progress=False,
        callback=between, **settings,
    )  # fmt: skip
    return {**between.row(), "peak_bytes": peak()}


def loop(model: nn.Module, point: Row, rung: str) -> Iterator[Row]:
    """Measure `pl.train` beside a plain loop around the same model; in a process that reads kernels, nothing."""

    def measured() -> Row:
        pl.attach(model, pl.LoRAConfig(r=R, alpha=ALPHA, target_modules=ALL_LINEAR))
        try:
            return loop_pairs(model, point["batch"], point["sequence"], pairs=point["pairs"])
        finally:
            pl.detach(model)
            model.requires_grad_(False)
            release()

    if not timing.profiling():
        yield from tried(rung, measured)


# ------------------------------------------------------------------------------------------------------ the ceiling


@torch.no_grad()
def ceiling(model: nn.Module, point: Row, rung: str) -> Iterator[Row]:
    """Measure the frozen products of a step alone, and how fast the memory copies."""
    device = gpu_for(point, "dense products")
    of, tokens = sizes_of(point["shape"]), point["batch"] * point["sequence"]
    new = partial(torch.empty, device=device, dtype=torch.bfloat16)
    # matrices that read the same input are one product, which is faster than several
    shapes = [(of.d, of.q + 2 * of.kv), (of.q, of.d), (of.d, 2 * of.m), (of.m, of.d), (of.d, of.vocabulary)]
    # Inputs are never overwritten by results: on numbers that have overflowed a GPU draws less power and runs faster.
    made = [(new(tokens, i).normal_(), new(tokens, o).normal_(), new(o, i).normal_(std=0.02)) for i, o in shapes]
    into = {width: new(tokens, width) for pair in shapes for width in pair}

    def use(x: Tensor, gradient: Tensor, weight: Tensor, times: int) -> None:
        for _ in range(times):
            torch.mm(x, weight.T, out=into[weight.shape[0]])
        torch.mm(gradient, weight, out=into[weight.shape[1]])

    def products() -> None:
        for _ in range(of.layers):
            for one in made[:-1]:
                use(*one, times=2 if point["checkpointing"] else 1)
        use(*made[-1], times=1)

    def measured() -> Row:
        step = rungs.in_one_graph(products) if device.type == "cuda" else products
        return {
            **clock(step, repeats=10, warm_up=5, details=True),
            "flops": product_flops(point["shape"], tokens, point["checkpointing"]),
        }

    yield from tried(rung, measured)
    source = new(2**28 if device.type == "cuda" else 2**16)
    copied = torch.empty_like(source)
    yield {"rung": "copy", **clock(lambda: copied.copy_(source)), "bytes": 2 * source.nbytes}


def unsloth(point: Row, device: torch.device) -> Iterator[Row]:
    """Measure Unsloth's own step on the same shape, where it is installed. The GPU is free for its processes."""
    if find_spec("unsloth") is None:  # it is not imported here: that would change the other rungs
        yield from ({"rung": rung, "skipped": "unsloth is not installed"} for rung in GROUPS["unsloth"])
        return
    let_go()
    job = {**point, "alpha": ALPHA, "targets": list(ALL_LINEAR)}
    with tempfile.TemporaryDirectory() as folder:
        unsloth_step.save(point["shape"], device, Path(folder))
        release()
        for rung in GROUPS["unsloth"]:
            yield from tried(rung, partial(unsloth_step.measured, rung, job, Path(folder)))


def tried(rung: str, measured: Callable[[], Row], reason: str | None = None) -> Iterator[Row]:
    """Yield a rung's row; if it cannot run, a row without times that says why."""
    if reason is None:
        try:
            yield {"rung": rung, "skipped": None, **measured()}
            return
        except Exception as error:  # one rung must not cost the others
            reason = re.sub(r"0x[0-9a-f]+|\d+", "N", f"{type(error).__name__}: {error}".partition("\n")[0])[:160]
            print(f"{rung}: {error!r}, after {error.__context__!r}", file=sys.stderr, flush=True)
        with suppress(Exception):
            recover()
    yield {"rung": rung, "skipped": reason}


def recover() -> None:
    """Free what a failed rung left. A recording that broke off leaves the generator unusable, so renew its state."""
    release()
    if torch.cuda.is_available():
        current = torch.cuda.default_generators[torch.cuda.current_device()]
        current.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())


def group_of(call: Callable[..., Iterator[Row]], rung: str, **settings: Any) -> Callable[..., Iterator[Row]]:
    """Return the function of a group of rungs."""
    return lambda model, point: call(model, point, rung, **settings)


GROUP_OF: dict[str, Callable[[nn.Module, Row], Iterator[Row]]] = {
    "peft": group_of(plain, "peft"),
    "eager": group_of(plain, "eager"),
    "bf16": group_of(plain, "bf16 adapters"),
    "compiled": group_of(compiled, ""),
    "train": group_of(training, "train"),
    "train compiled": group_of(training, "train compiled", compile="layers"),
    "fast, no graph": group_of(training, "fast, no graph", fast=True),
    "fast": group_of(training, "fast", fast=True),
    "fast, pinned": group_of(training, "fast, pinned", fast=True, checkpointing="pinned"),
    "fast, 8-bit": group_of(training, "fast, 8-bit", fast=True, checkpointing="pinned", optimizer="adamw8bit"),
    "loop": group_of(loop, "loop"),
    "ceiling": group_of(ceiling, "ceiling"),
}
