"""Full size in four bits: Hugging Face peft on bitsandbytes and this package, compared on the same codes.

The Llama shapes have random weights and are quantised layer by layer on the GPU. The layers of both libraries share the
same codes, so one model is enough. The runs alternate, so that any disturbance of the machine affects both.
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.bench.fullsize import ALL_LINEAR, timed, vocabulary_of
from peftlab.bench.kernels import Row, forward_passes, kernels_of, profile_of
from peftlab.core.checkpointing import set_input_gradients, switch_checkpointing
from peftlab.memory.counting.shapes import load_shape
from peftlab.optional import available, require
from peftlab.quantization import Linear4bit
from peftlab.quantization.backends import AUTO, choose
from peftlab.quantization.codebooks import code_book, dynamic_book
from peftlab.quantization.model import replace, weight_bytes
from peftlab.quantization.preparing import kbit_casts

CARD = 48e9  # bytes: a card sold as 48 GB has a little more
REPEATS, WARM_UP, PAIRS = 2, 2, 24
PEAKS = {"peak_bytes": "allocated_bytes.all.peak", "requested_bytes": "requested_bytes.all.peak"}  # torch's counters
RUN = {"r": 16, "optimizer": "adamw", "batch": 1, "sequence": 512, "checkpointing": True, "adapter_dtype": "float32"}
# r, optimiser and adapter dtype that 70B is tried with, and the sequences from the longest down
FITS = ((16, "adamw", "float32"), (64, "adamw", "float32"), (64, "adamw", "bfloat16"),
        (64, "adamw8bit", "float32"), (64, "paged-adamw8bit", "float32"))  # fmt: skip
STEPS = ((1, True), (4, True), (4, False))  # batch and checkpointing at 7B
SEQUENCES = (4096, 2048, 1024, 512)


# ------------------------------------------------------------------------------------------------------ the models


@torch.no_grad()
def random_model(shape: str | dict, device: torch.device, four_bit: bool = True) -> nn.Module:
    """Make a Llama shape with random bf16 weights, layer by layer. The body's linear layers may be in NF4."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**load_shape(shape).config)
    config.use_cache = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    worker = choose(AUTO, "nf4", 64, device)
    for path, module in list(model.named_modules()):
        if four_bit and type(module) is nn.Linear and module is not model.get_output_embeddings():
            weight = torch.randn(module.weight.shape, dtype=torch.bfloat16, device=device).mul_(0.02)
            replace(model, path, Linear4bit(worker.quantize(weight, "nf4", 64, True, path)))
            continue
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_meta:
                value = torch.randn(tensor.shape, dtype=tensor.dtype, device=device).mul_(0.02)
                setattr(module, name, nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value)
    return model.requires_grad_(False)


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


def compare(
    model: nn.Module, run: Row, libraries: tuple[str, ...], device: torch.device, repeats: int = REPEATS
) -> Iterator[Row]:  # fmt: skip
    """Measure one run under each library in turn: its peak, its kernels' GPU time, and its median step.

    The steps of two libraries alternate one by one, each on a copy of the model's modules over the same weights. If the
    host is slow for a second, it is slow for both.
    """
    times: dict[str, list[float]] = {library: [] for library in libraries}
    peaks: dict[str, Row] = {}
    kernels: dict[str, Row] = {}
    for library in libraries:
        with under(model, library, run) as wrapped:
            step = stepper(wrapped, run, device)
            times[library] = timed(step, repeats=repeats, warm_up=WARM_UP)
            peaks[library] = peak()
            spent = [seconds for _, seconds in kernels_of(step)]
            kernels[library] = {"kernels": len(spent), "gpu_seconds": sum(spent)}
            trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
            del step, wrapped
    ratio = None
    if len(libraries) == 2:
        # swap the trees for half of them: steps on a tree that was made at once, as a copy is, are a few per cent
        # faster
        twin = twin_of(model)
        times = {library: [] for library in libraries}
        for trees in ((model, twin), (twin, model)):
            sides = {library: (tree, library) for library, tree in zip(libraries, trees, strict=True)}
            for library, taken in alternating(sides, run, device, PAIRS // 2).items():
                times[library] += taken
        ratio = ratio_of(times)
    for library in libraries:
        yield {
            "ratio": ratio if library == libraries[0] else None,
            **run, "library": library, **peaks[library], **kernels[library], "trainable": trainable,
            **spread_of(times[library]),
            "tokens_per_second": run["batch"] * run["sequence"] / statistics.median(times[library]),
        }  # fmt: skip


def alternating(
    sides: dict[str, tuple[nn.Module, str]], run: Row, device: torch.device, pairs: int
) -> dict[str, list[float]]:  # fmt: skip
    """Time single steps of two models in turn, each under a library. The first one changes every time."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    one, other = sides.values()
    with under(*one, run) as first, under(*other, run) as second:
        steps = {name: stepper(model, run, device) for name, model in zip(sides, (first, second), strict=True)}
        for number in range(WARM_UP + pairs):
            for name in sides if number % 2 else reversed(sides):
                taken = timed(steps[name], repeats=1, warm_up=0)
                times[name] += taken if number >= WARM_UP else []
        del steps
    return times


def spread_of(times: list[float]) -> Row:
    """Return a row's columns about the times of one side."""
    return {"seconds": statistics.median(times), "fastest": min(times), "seconds_spread": max(times) - min(times)}


def ratio_of(times: dict[str, list[float]]) -> float:
    """Return the median ratio of the times of a step of the first and its partner."""
    return statistics.median(a / b for a, b in zip(*times.values(), strict=True))


def twin_of(model: nn.Module) -> nn.Module:
    """Return another tree of modules over the same weights, codes and scales."""
    states = [module.quant_state for module in model.modules() if isinstance(module, Linear4bit)]
    shared = [*model.parameters(), *model.buffers(), *(t for state in states for t in state.tensors().values())]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


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


def release() -> None:
    """Free what nothing refers to. bitsandbytes keeps a list of all paged states it ever made."""
    if available("bitsandbytes") is not None:
        require("bitsandbytes").functional.GlobalPageManager.get_instance().paged_tensors.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------ the points


def beside(model: nn.Module, runs: list[Row], device: torch.device) -> Iterator[Row]:
    """Measure each run here and in peft without casts, in turn; then once by peft's published recipe."""
    for run in runs:
        both = compare(model, run, ("peftlab", "peft"), device)
        published = compare(model, run, ("peft, prepared",), device)
        yield from ({"kind": "step", "method": "qlora", **row} for row in (*both, *published))


def profiles(model: nn.Module, device: torch.device) -> Iterator[Row]:
    """Measure where the time of one step goes, at 1 and at 4 x 512 tokens."""
    for batch in (1, 4):
        run = {**RUN, "batch": batch}
        with under(model, "peftlab", run) as wrapped:
            yield from ({**run, **row} for row in profile_of(stepper(wrapped, run, device)))


def seven(point: Row, device: torch.device) -> Iterator[Row]:
    """Measure 7B: steps here and in peft, and the optimisers."""
    model = random_model(point["shape"], device)
    yield {"kind": "weights", "format": "nf4", "weight_bytes": weight_bytes(model)}
    yield from beside(model, [{**RUN, "batch": b, "checkpointing": c} for b, c in STEPS], device)
    for r, optimizer in product((16, 64), ("adamw", "adamw8bit", "paged-adamw8bit")):
        run = {**RUN, "r": r, "optimizer": optimizer}
        for row in compare(model, run, ("peftlab",), device, repeats=3):
            yield {"kind": "optimizer", "method": "qlora", **row}


def sixteen(point: Row, device: torch.device) -> Iterator[Row]:
    """Measure 7B in bf16: LoRA on 16-bit weights, for comparison, then its steps and 4-bit steps in turn."""
    whole = random_model(point["shape"], device, four_bit=False)
    yield {"kind": "weights", "format": "bf16", "weight_bytes": weight_bytes(whole)}
    runs = [{**RUN, "batch": batch, "checkpointing": checkpointing} for batch, checkpointing in STEPS]
    for run in runs:
        for row in compare(whole, run, ("peftlab",), device):
            yield {"kind": "step", "method": "lora", **row}
    sides = {"nf4": (random_model(point["shape"], device), "peftlab"), "bf16": (whole, "peftlab")}
    for run in runs:
        times = alternating(sides, run, device, PAIRS)
        for format, taken in times.items():
            yield {
                "kind": "beside", "format": format, **run, "ratio": ratio_of(times) if format == "nf4" else None,
                **spread_of(taken),
            }  # fmt: skip


def where(point: Row, device: torch.device) -> Iterator[Row]:
    """Measure 7B in four bits and in bf16: where the time of a step goes, and what answering costs."""
    for format in ("nf4", "bf16"):
        model = random_model(point["shape"], device, four_bit=format == "nf4")
        yield from ({"kind": "latency", "format": format, **row} for row in forward_passes(model, device))
        yield from ({"kind": "profile", "format": format, **row} for row in profiles(model, device))
        del model
        release()


def eight(point: Row, device: torch.device) -> Iterator[Row]:
    """Measure 8B, whose vocabulary has 128,256 words: steps here and in peft, and what its preparation casts."""
    model = random_model(point["shape"], device)
    for step in kbit_casts(model):
        yield {"kind": "cast", "what": step.step, "modules": step.modules, "bytes": step.bytes}
    yield from beside(model, [{**RUN, "r": 64, "batch": batch} for batch in (1, 4)], device)


def seventy(point: Row, device: torch.device) -> Iterator[Row]:
    """Measure 70B on a card of 48 GB: steps here and in peft. The rest of the GPU's memory is taken away first."""
    with only(CARD, device) as taken:
        model = random_model(point["shape"], device)
        yield {"kind": "weights", "format": "nf4", "weight_bytes": weight_bytes(model), "card_bytes": int(CARD)}
        for row in beside(model, [RUN], device):
            yield without(taken, row)


def fits(point: Row, device: torch.device) -> Iterator[Row]:
    """Measure what else can be trained on that card: the longest sequence of each kind of run."""
    with only(CARD, device) as taken:
        model = random_model(point["shape"], device)
        for r, optimizer, adapter_dtype in FITS:
            fitted = False
            for sequence in SEQUENCES:
                run = {**RUN, "r": r, "optimizer": optimizer, "adapter_dtype": adapter_dtype, "sequence": sequence}
                if fitted:
                    yield {"kind": "fits", **run, "fits": True, "tried": False}  # a shorter one than one that fits
                    continue
                row = without(taken, tried(model, run, device))
                fitted = row["fits"]
                yield {"kind": "fits", **run, "tried": True, **row}


def segments(point: Row, device: torch.device) -> Iterator[Row]:
    """Measure the longest sequence again, with an allocator whose segments grow and leave fewer gaps."""
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    try:
        with only(CARD, device) as taken:
            model, run = random_model(point["shape"], device), {**RUN, "sequence": SEQUENCES[0]}
            yield {"kind": "fits", **run, "tried": True, **without(taken, tried(model, run, device))}
    finally:
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")


def tried(model: nn.Module, run: Row, device: torch.device) -> Row:
    """Measure two steps of a run: its peak and the second's time, or that there was not enough memory."""
    try:
        return {"fits": True, **two_steps(model, run, device)}
    except torch.OutOfMemoryError:
        return {"fits": False, **dict.fromkeys(PEAKS), "seconds": None}
    finally:
        release()  # the optimiser has been freed by now


def two_steps(model: nn.Module, run: Row, device: torch.device) -> Row:
    """Return the peak of two steps and the time of the second."""
    with under(model, "peftlab", run) as wrapped:
        times = timed(stepper(wrapped, run, device), repeats=1, warm_up=1)
        return {**peak(), "seconds": times[0]}


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
