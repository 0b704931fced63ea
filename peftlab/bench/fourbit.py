"""Full size in four bits: Hugging Face peft on bitsandbytes and this package, compared on the same codes.

The Llama shapes have random weights and are quantised layer by layer on the GPU. The layers of both libraries share the
same codes, so one model is enough.

Kinds of points:
    weights     the bytes of the weights
    step        one training step; timed, but by peft's published preparation, of which only the memory is measured
    optimizer   the memory of a step by the optimiser
    cast        what that preparation casts to float32
    latency     one forward pass of 1 and of 512 tokens
    profile     where the GPU's time of a step goes
    fits        what can be trained on a card of 48 GB
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.bench.models import ALL_LINEAR, held, let_go, release, vocabulary_of
from peftlab.bench.timing import busy, clock, kernels_of, named, profiling, timed
from peftlab.core.checkpointing import set_input_gradients, switch_checkpointing
from peftlab.optional import require
from peftlab.quantization import Linear4bit
from peftlab.quantization.codebooks import code_book, dynamic_book
from peftlab.quantization.model import replace, weight_bytes
from peftlab.quantization.preparing import kbit_casts

Row = dict[str, Any]
CARD = 48_000_000_000  # bytes: a card sold as 48 GB has a little more
PEAKS = {"peak_bytes": "allocated_bytes.all.peak", "requested_bytes": "requested_bytes.all.peak"}  # torch's counters
RUN = {"r": 16, "optimizer": "adamw", "batch": 1, "sequence": 512, "checkpointing": True, "adapter_dtype": "float32"}
# r, optimiser and adapter dtype that 70B is tried with, and the sequences from the longest down
FITS = ((16, "adamw", "float32"), (64, "adamw", "float32"), (64, "adamw", "bfloat16"),
        (64, "adamw8bit", "float32"), (64, "paged-adamw8bit", "float32"))  # fmt: skip
STEPS = tuple({**RUN, "batch": b, "checkpointing": c} for b, c in ((1, True), (4, True), (4, False)))  # at 7B
SEQUENCES = (4096, 2048, 1024, 512)
SEVEN = {"shape": "llama-2-7b", "format": "nf4"}
EIGHT = {"shape": "llama-3.1-8b", "format": "nf4"}
SEVENTY = {"shape": "llama-2-70b", "format": "nf4", "card_bytes": CARD}
KERNELS = (
    ("dequantise the weights", ("dequantize_blockwise", "dequantizeblockwise", "kdequantize")),
    ("matrix products", ("gemm", "cutlass", "nvjet", "xmma", "matmul", "cublas")),
    ("attention", ("flash", "fmha", "attention")),
    ("optimiser", ("adam", "multi_tensor")),
)


# ------------------------------------------------------------------------------------------------------ the points


def points() -> Iterator[Row]:
    """Yield every point at full size. Points that take turns stand together; those of one model too."""
    yield {"section": "seven", "alone": True, "kind": "weights", **SEVEN}
    for run in STEPS:
        yield from beside("seven", SEVEN, run)
    for r, optimizer in product((16, 64), ("adamw", "adamw8bit", "paged-adamw8bit")):
        yield {"section": "seven", "alone": True, "kind": "optimizer", "method": "qlora", "library": "peftlab", **SEVEN,
               **RUN, "r": r, "optimizer": optimizer}  # fmt: skip
    bf16 = {**SEVEN, "format": "bf16"}
    for run in STEPS:
        yield {"section": "seven", "timed": True, "kind": "step", "method": "lora", "library": "peftlab", **bf16, **run}
    for model in (bf16, SEVEN):
        yield {"section": "where", "timed": True, "kind": "latency", **model}
        yield {"section": "where", "timed": True, "kind": "profile", **model, **RUN, "batch": 4}
    yield {"section": "eight", "alone": True, "kind": "cast", **EIGHT}
    for batch in (1, 4):
        yield from beside("eight", EIGHT, {**RUN, "r": 64, "batch": batch})
    yield {"section": "seventy", "alone": True, "kind": "weights", **SEVENTY}
    yield from beside("seventy", SEVENTY, RUN)
    for r, optimizer, adapter_dtype in FITS:
        yield {"section": "fits", "alone": True, "kind": "fits", **SEVENTY, **RUN, "r": r, "optimizer": optimizer,
               "adapter_dtype": adapter_dtype, "sequence": None}  # fmt: skip
    yield {"section": "segments", "alone": True, "kind": "fits", **SEVENTY, **RUN, "sequence": SEQUENCES[0]}


def beside(section: str, model: Row, run: Row) -> Iterator[Row]:
    """Yield one run here and in peft without casts, in turn; then its memory by peft's published recipe."""
    for library in ("peftlab", "peft", "peft, prepared"):
        how = "timed" if library != "peft, prepared" else "alone"
        yield {"section": section, how: True, "kind": "step", "method": "qlora", "library": library, **model, **run}


def measure(point: Row, device: torch.device) -> list[Row]:
    """Measure one point, and return its rows."""
    kinds: dict[str, Callable[..., Any]] = {
        "weights": weights, "step": step, "optimizer": step, "cast": casts, "latency": latency, "profile": profile,
        "fits": fits,
    }  # fmt: skip
    if point["section"] != "segments":
        return limited(kinds[point["kind"]], point, device)
    let_go()
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")  # they grow and leave fewer gaps
    try:
        return limited(kinds[point["kind"]], point, device)
    finally:
        let_go()
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")


def limited(kind: Callable[..., Iterator[Row]], point: Row, device: torch.device) -> list[Row]:
    """Measure a kind of point, on a card of the size that the point names, if it names one."""
    card = only(point["card_bytes"], device) if "card_bytes" in point else nullcontext(0)
    with card as taken, held(point["shape"], device, four_bit=point["format"] == "nf4") as model:
        return named(point, (without(taken, row) for row in kind(model, point, device)))


# --------------------------------------------------------------------------------------- one model, two libraries


def as_bitsandbytes(layer: Linear4bit) -> nn.Module:
    """Return bitsandbytes' layer over the same codes and scales."""
    bnb, state = require("bitsandbytes"), layer.quant_state
    scales = bnb.functional.QuantState(
        state.nested_absmax, blocksize=256, code=dynamic_book(state.absmax.device), dtype=torch.float32
    )
    theirs = bnb.functional.QuantState(
        state.absmax, shape=state.shape, code=code_book(state.format, state.absmax.device), blocksize=state.block_size,
        quant_type=state.format, dtype=state.dtype, offset=state.offset, state2=scales,
    )  # fmt: skip
    new = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, quant_type=state.format, device="meta",
        compute_dtype=state.dtype,
    )  # fmt: skip
    new.weight = bnb.nn.Params4bit(
        layer.weight.data, requires_grad=False, quant_state=theirs, quant_type=state.format, bnb_quantized=True,
        blocksize=state.block_size, module=new,
    )  # fmt: skip
    new.quant_state = theirs
    return new


@contextmanager
def under(model: nn.Module, library: str, run: Row) -> Iterator[nn.Module]:
    """Prepare the model as a library does, inside the block.

    `"peftlab"`; `"peft"`, with its layers on bitsandbytes' layers and without casts; or `"peft, prepared"`, the
    published recipe, which also casts the embedding, the head and the norms to float32.
    """
    own = {path: module for path, module in model.named_modules() if isinstance(module, Linear4bit)}
    before = {name: p.dtype for name, p in model.named_parameters()}
    if library == "peftlab":
        config = pl.LoRAConfig(r=run["r"], alpha=32, target_modules=ALL_LINEAR)
        wrapped = pl.attach(model, config, adapter_dtype=getattr(torch, run["adapter_dtype"]))
        if run["checkpointing"]:
            pl.prepare_for_training(model, checkpointing=True)
    else:
        peft = require("peft")

        for path, layer in own.items():
            replace(model, path, as_bitsandbytes(layer))
        say_four_bit(model, bool(own))
        if library == "peft, prepared":
            kind = {"use_reentrant": False}
            peft.prepare_model_for_kbit_training(model, run["checkpointing"], kind)
        elif run["checkpointing"]:
            switch_checkpointing(model, "enable", {"use_reentrant": False})
        config = peft.LoraConfig(r=run["r"], lora_alpha=32, target_modules=list(ALL_LINEAR))
        wrapped = peft.get_peft_model(model, config)
    try:
        yield wrapped.train()
    finally:
        if library == "peftlab":
            pl.detach(model)
        else:
            wrapped.unload()
            for path, layer in own.items():
                replace(model, path, layer)
            say_four_bit(model, False)
        if run["checkpointing"]:
            switch_checkpointing(model, "disable")
            set_input_gradients(model, False)
        for name, parameter in model.named_parameters():  # the casts came from 16-bit values, so casting back is exact
            if parameter.dtype != before[name]:
                parameter.data = parameter.data.to(before[name])
        del wrapped, own
        release()


# ------------------------------------------------------------------------------------------------------ one step


def say_four_bit(model: nn.Module, so: bool) -> None:
    """Set the flag by which peft knows that layers are bitsandbytes'."""
    transformer: Any = model
    transformer.is_loaded_in_4bit = so


def optimizer_of(name: str, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimiser with this name in `pl.train`."""
    if name == "adamw":
        return torch.optim.AdamW(trained, lr=1e-5, fused=trained[0].is_cuda)
    optimizers = require("bitsandbytes").optim
    return (optimizers.PagedAdamW8bit if name.startswith("paged") else optimizers.AdamW8bit)(trained, lr=1e-5)


def stepper(wrapped: nn.Module, run: Row, device: torch.device) -> Callable[[], None]:
    """Return one training step as a function: forward under bf16 autocast, backward, optimiser."""
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = optimizer_of(run["optimizer"], trained)
    tokens = torch.randint(vocabulary_of(wrapped), (run["batch"], run["sequence"]), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = wrapped(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak() -> Row:
    """Return the most bytes that torch's allocator handed out since `timed`, and the most requested; 0 without a GPU.

    The allocator hands out a block up to 1 MB larger than requested, if the rest is too small to be split off. Which
    blocks are free depends on what ran before. So the first number differs by a few MB between runs; the second does
    not.
    """
    stats = torch.cuda.memory_stats() if torch.cuda.is_available() else {}
    return {name: stats.get(counter, 0) for name, counter in PEAKS.items()}


def without(ballast: int, row: Row) -> Row:
    """Return a row whose peaks do not include memory that was only taken away."""
    return {**row, **{name: row[name] - ballast for name in PEAKS if row.get(name) is not None}}


# ------------------------------------------------------------------------------------------------------- the kinds


def weights(model: nn.Module, point: Row, device: torch.device) -> Iterator[Row]:
    """Measure the bytes of the weights."""
    yield {"weight_bytes": weight_bytes(model)}


def casts(model: nn.Module, point: Row, device: torch.device) -> Iterator[Row]:
    """Measure what peft's preparation casts to float32."""
    for cast in kbit_casts(model):
        yield {"what": cast.step, "modules": cast.modules, "bytes": cast.bytes}


def step(model: nn.Module, point: Row, device: torch.device) -> Iterator[Row]:
    """Measure one training step: its peak, and its time if the point is timed."""
    with under(model, point["library"], point) as wrapped:
        trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        call = stepper(wrapped, point, device)
        spent = clock(call, 3 if "card_bytes" in point else 5) if point.get("timed") else {}
        if not spent:
            timed(call, repeats=0, warm_up=2)
        yield {"trainable": trainable, **peak(), **spent}
        del call, wrapped


@torch.no_grad()
def latency(model: nn.Module, point: Row, device: torch.device) -> Iterator[Row]:
    """Measure one forward pass in bf16 over 1 and over 512 tokens: what a quantised base costs when it answers."""
    model.eval()
    for count in (1, 512):
        tokens = torch.randint(vocabulary_of(model), (1, count), device=device)
        yield {"tokens": count, **clock(partial(model, input_ids=tokens), 10, 3)}


def profile(model: nn.Module, point: Row, device: torch.device) -> Iterator[Row]:
    """Measure where the GPU's time of one step goes. Only the process that reads the kernels' time has rows."""
    if not profiling():
        return
    with under(model, "peftlab", point) as wrapped:
        call = stepper(wrapped, point, device)
        timed(call, repeats=0, warm_up=2)
        spent: dict[str, list[Any]] = {}
        for kernel in kernels_of(call):
            spent.setdefault(kind_of(kernel.name), []).append(kernel)
        del call, wrapped
    for what, kernels in sorted(spent.items()):
        yield {"what": what, "kernels": len(kernels), "busy_seconds": busy(kernels)}


def kind_of(kernel: str) -> str:
    """Say what a CUDA kernel does, from its name."""
    name = kernel.lower()
    for kind, marks in KERNELS:
        if any(mark in name for mark in marks):
            return kind
    return "copies" if "memcpy" in name or "memset" in name else "everything else"


def fits(model: nn.Module, point: Row, device: torch.device) -> Iterator[Row]:
    """Try the sequence of the point. If it has none, go from the longest one down to the first that fits."""
    fitted = False
    for sequence in [point["sequence"]] if point["sequence"] else SEQUENCES:
        if fitted:
            yield {"sequence": sequence, "fits": True, "tried": False}
            continue
        row = tried(model, {**point, "sequence": sequence}, device)
        fitted = row["fits"]
        yield {"sequence": sequence, "tried": True, **row}


def tried(model: nn.Module, run: Row, device: torch.device) -> Row:
    """Make two steps of a run. Return their peak, or that there was not enough memory."""
    try:
        with under(model, "peftlab", run) as wrapped:
            timed(stepper(wrapped, run, device), repeats=0, warm_up=2)
            return {"fits": True, **peak()}
    except torch.OutOfMemoryError:
        return {"fits": False, **dict.fromkeys(PEAKS)}
    finally:
        release()  # the optimiser has been freed by now


@contextmanager
def only(size: float, device: torch.device) -> Iterator[int]:
    """Leave this many bytes of the GPU, CUDA's context included, and yield the bytes taken away.

    A tensor fills the rest of the card, so memory that torch does not count, such as paged states, cannot go there
    either. torch's allocator is limited to what remains.
    """
    torch.zeros(1, device=device)
    release()
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)  # CUDA's context
    ballast = torch.empty(int(total - size), dtype=torch.uint8, device=device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (total - max(outside, 0)) / total), torch.cuda.current_device())
    try:
        yield ballast.nbytes
    finally:
        del ballast
        torch.cuda.set_per_process_memory_fraction(1.0, torch.cuda.current_device())
        release()
