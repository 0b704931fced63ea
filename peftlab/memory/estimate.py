"""How much memory a training step takes, before it is started: `estimate(...)`.

The answer comes from a replay of a step (see `replay/step` and `replay/tape`), not from a fitted formula. It is what
`torch.cuda.max_memory_allocated` reports for transformers' model under Hugging Face peft, with float32 adapters, SDPA,
`torch.optim.AdamW(foreach=False)` and `loss = model(input_ids, labels=labels).loss`. cuBLAS' workspace is included.
With 16-bit weights it is a step without autocast, except for `qlora`. `Trainer(bf16=True)` and `peftlab train` on a GPU
use autocast, under which adapters keep less: pass `autocast=True` for those.

The answer is nearly always a little too low. Of the 87 runs in `results/memory.json` it lies below the measured peak in
84, and is at most 1.9% too low and 1.1% too high. Of the 47 runs over 22 families of decoders in
`results/memory_families.json`, none is off by more than 0.1%. So leave a margin: add 3% to the peak, and 0.7 GB for the
CUDA context, which torch's counter does not see. `fits` and its neighbours do so. torch also reserves more than it
uses, because free gaps are too small for the next tensor; `cards` says what speaks for the margin all the same.

Experts of a mixture are replayed as transformers computes them by default (`experts_implementation="grouped_mm"`). A
4-bit base keeps them in 16 bits, as bitsandbytes does; with `library="peftlab"` they are in 4 bits too. Of the 15 runs
in `results/experts.json`, none is off by more than 0.1%. Of the 42 runs of LoRA's family in
`results/memory_methods.json` (peftlab's layers, 16 and 4 bits) none is off by more than 1%, if AdaLoRA's running means
are left out: that loop did not call `after_step`, which makes them (8 bytes for each trained number).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from operator import itemgetter
from typing import Any

from peftlab.catalogue import METHODS
from peftlab.checks import checked, number, one_of, whole
from peftlab.errors import PeftLabError
from peftlab.memory.counting.config import MOST
from peftlab.memory.counting.families import FAMILIES, class_end, of_the_same_name
from peftlab.memory.counting.methods import check_options, method_name, trained_by
from peftlab.memory.counting.options import Options, Trained, names_of
from peftlab.memory.counting.shapes import Shape, UnknownFamilyError, load_shape
from peftlab.memory.counting.totals import count_trained
from peftlab.memory.replay.step import FORWARD, Recipe, Run
from peftlab.memory.replay.tape import KINDS, without_collector

PRECISIONS = {"bf16": 2, "fp32": 4, "mixed": 4}  # bytes of a weight, and so of its gradient and states
OPTIMIZERS = ("adamw", "adamw-foreach", "adamw-fused", "adamw32bit", "adamw8bit", "paged-adamw8bit", "sgd")
PARALLEL = ("ddp", "fsdp")
LIBRARIES = ("peft", "peftlab")
ATTENTIONS = ("sdpa", "eager")
ADAPTER_PRECISIONS = {"fp32": 4, "bf16": 2}
# The arguments of `estimate` that are one of a few words, and these
CHOICES = {
    "parallel": PARALLEL, "library": LIBRARIES, "precision": PRECISIONS, "optimizer": OPTIMIZERS,
    "adapter_precision": ADAPTER_PRECISIONS, "masters": (True, False), "attention": ATTENTIONS,
    "chunked_loss": (True, False), "autocast": (None, True, False),
}  # fmt: skip
CONTIGUOUS_BIAS = (5, 20)  # the version of transformers that changed T5's bias
FUSED_GPTJ = (5, 24)  # the version of transformers that let GPT-J take fused attention
DECODER_HEADS = ("language model", "classifier", "token classifier")  # the heads of decoders that are replayed
UNUSED_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")
POINTS = 2000  # the most points of a step's history that are kept
# PyTorch gives cuBLAS 32 MiB on Hopper (8 MiB on older GPUs) for each thread that multiplies matrices. There are two:
# one for the forward pass and one for the backward pass. See CUBLAS_WORKSPACE_CONFIG in PyTorch's documentation.
CUBLAS_WORKSPACE = 2 * 32 * 2**20


@dataclass(frozen=True)
class Estimate:
    """The bytes at the moment of a step when most are allocated."""

    shape: str
    method: str
    peak_bytes: int
    weights: int  # those of the model; four-bit ones as they are packed
    adapter: int  # the tensors that the method adds
    gradients: int
    optimizer: int
    activations: int  # kept for the backward pass
    logits: int  # with the float32 copies that the loss makes
    workspace: int  # tensors that live only at this moment, and cuBLAS' workspace
    moment: str  # where in the step the peak is
    flops: int  # of one step's matrix products; a multiplication with its addition counts two
    written: int  # bytes of all tensors that an eager step makes; `peftlab.memory.speed` reads it
    file_bytes: int  # tensors of the checkpoint: all of the model's, or only the adapter's
    trainable: int
    total: int
    history: list[tuple[str, int]] = field(repr=False, compare=False)  # of the second step: (where, bytes), thinned out

    def __str__(self) -> str:
        parts = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in self.parts.items() if size >= 5e6)
        return f"{self.shape}, {self.method}: peak {self.peak_bytes / 1e9:.2f} GB in {self.moment} ({parts})"

    @property
    def parts(self) -> dict[str, int]:
        """The parts by name; their sum is `peak_bytes`."""
        return {kind: getattr(self, kind) for kind in KINDS}

    def seconds(self, peak_flops: float, efficiency: float) -> float:
        """Return the seconds of a step on a device that reaches the share `efficiency` of `peak_flops` per second.

        Only matrix products count. A step of many small kernels also waits for their launches and takes longer.
        """
        peak_flops = number("peak_flops", peak_flops, above=0)
        return self.flops / (number("efficiency", efficiency, above=0, most=1) * peak_flops)

    def as_dict(self) -> dict[str, int | str]:
        """Return the numbers as `peftlab memory --json` prints them."""
        return {name: value for name, value in vars(self).items() if name != "history"}


@checked(
    "r", "virtual_tokens", "reduction_factor", "decompose_factor", "oft_block_size", "labels", "batch", "sequence",
    "gpus",
)  # fmt: skip
def estimate(
    shape: str | os.PathLike[str] | dict | Shape,
    method: str = "lora",
    *,
    r: int | None = None,
    targets: str | Iterable[str] | None = None,
    target_parameters: Iterable[str] | None = None,
    bias: str = "none",
    virtual_tokens: int = 20,
    reduction_factor: int = 16,
    decompose_factor: int = -1,
    oft_block_size: int | None = None,
    projection: bool = False,
    init: str | None = None,
    batch: int = 1,
    sequence: int = 512,
    precision: str = "bf16",
    optimizer: str = "adamw",
    checkpointing: bool | int = False,
    chunked_loss: bool = False,
    autocast: bool | None = None,
    adapter_precision: str = "fp32",
    masters: bool = False,
    attention: str = "sdpa",
    labels: int | None = None,
    library: str = "peft",
    four_bit: bool | None = None,
    transformers: str | None = None,
    gpus: int = 1,
    parallel: str = "ddp",
) -> Estimate:
    """Estimate the peak memory of a training step on one GPU, or on each of several, and its parts.

    The model keeps no cache of keys and values. The answer is nearly always a little too low. Add 3% to it, and 0.7 GB
    for the CUDA context; `pl.memory.cards.with_margin` does so, and the top of this file says why.

    Args:
        shape: a built-in name, the path of a `config.json` or of its folder, its dict, or a `Shape`.
        method: a method's name, such as `"lora"`. The arguments `r` to `init` are those of `count`. peftlab's LoRA
            keeps a start from the weight (`init="pissa"` or `"olora"`) beside A and B.
        batch: examples at once.
        sequence: tokens per example, padding included.
        precision: `"bf16"` (weights, gradients and optimiser states), `"fp32"`, or `"mixed"` (float32 weights and bf16
            autocast). A 4-bit base keeps embeddings, norms and the output head in this precision.
        optimizer: `"adamw"`, `"adamw8bit"`, `"paged-adamw8bit"` or `"sgd"` (without momentum). `"adamw"` is torch's
            plain loop, `foreach=False`. `"adamw-foreach"` is what torch takes on a GPU if nothing is said: it makes a
            temporary tensor for every trained parameter at once. `"adamw-fused"` makes none. The states of these three
            have the precision of what is trained. `"adamw32bit"` is bitsandbytes' AdamW, with float32 states always.
        checkpointing: whether the backward pass computes each block's activations again. A number means so many blocks,
            the first ones.
        chunked_loss: whether a decoder's loss is computed in chunks, without its whole logits, as `peftlab.train` does
            (`peftlab.training.chunked`) on a GPU with Triton. Without Triton a run in 16 bits takes up to 0.3 GB more.
        autocast: whether the forward pass runs under bf16 autocast, as in `Trainer(bf16=True)`. None switches it on
            for mixed precision and for a base in four bits, and for nothing else.
        adapter_precision: the precision of the tensors that the method adds, `"fp32"` as in peft or `"bf16"`.
        masters: whether the optimiser keeps float32 copies of what the method adds in bf16, as `train` does. Its states
            are float32 then.
        attention: `"sdpa"` (fused) or `"eager"`.
        labels: classes of an encoder's head. A decoder then has a classification head in the place of words.
        library: `"peft"` or `"peftlab"`: whose layers are replayed. peftlab's LoRA, also in four bits, keeps less under
            autocast. On experts it keeps no changed weights until the backward pass, and its 4-bit base holds experts
            in four bits. It makes the updates of LoHa and LoKr again in the backward pass, and its DoRA needs no
            identity matrix. It trains a copy beside a bias. Methods that are no relatives of LoRA, but for BitFit, are
            replayed as in peft.
        four_bit: whether the base is held in four bits, whatever the method. None: only for `qlora`.
        transformers: the version whose forward pass is replayed. None takes the installed one, or else the newest. It
            matters for T5, whose self-attention is not fused before 5.20, and for GPT-J, whose attention is not before
            5.24. (Gemma 2's was fused before 5.21, without its soft cap; its estimate is that of 5.21 and later.)
        gpus: the number of GPUs that train together. `batch` is the batch of each.
        parallel: `"ddp"` (each GPU holds everything) or `"fsdp"` (each block, and the rest, is divided into shards).

    Raises:
        PeftLabError: an unknown name (with near matches), a number that is not positive, a target without a match, an
            option that the method does not take, a method that this model cannot have, a target that no training step
            uses, an architecture whose activations are not known.

    >>> print(pl.memory.estimate("llama-2-7b", "lora", r=16, checkpointing=True))
    llama-2-7b, lora: peak 13.98 GB in backward (weights 13.48, ...)
    """
    try:
        shape = load_shape(shape, labels)
    except UnknownFamilyError as error:  # name the families that have an estimate
        raise UnknownFamilyError(error.name, error.family, FORWARD) from None
    method = method_name(method)
    four_bit = on_four_bits(method, four_bit)
    batch, sequence = whole("batch", batch, least=1, most=MOST), whole("sequence", sequence, least=1, most=MOST)
    gpus = whole("gpus", gpus, least=1, ceiling=MOST)
    check_choices(
        parallel=parallel, library=library, precision=precision, optimizer=optimizer, masters=masters,
        adapter_precision=adapter_precision, attention=attention, chunked_loss=chunked_loss, autocast=autocast,
    )  # fmt: skip
    since = _since(CONTIGUOUS_BIAS, transformers), _since(FUSED_GPTJ, transformers)
    if targets is not None and not isinstance(targets, str):
        targets = tuple(targets)
    options = Options(
        r, targets, bias, virtual_tokens, reduction_factor, projection, decompose_factor=decompose_factor,
        oft_block_size=oft_block_size, target_parameters=names_of(target_parameters), init=init,
    )  # fmt: skip
    check_options(method, options)
    _refuse_what_cannot_run(shape, method, sequence, virtual_tokens)
    trained = trained_by(method, shape, options)
    _refuse_biases_beside_parameters(trained, options, library)
    recipe = Recipe(
        batch=batch,
        sequence=sequence,
        weight_bytes=PRECISIONS[precision],
        adapter_bytes=ADAPTER_PRECISIONS[adapter_precision],
        masters=masters,
        autocast=uses_autocast(method, precision, four_bit) if autocast is None else autocast,
        checkpointing=checked_blocks(checkpointing, shape),
        chunked_loss=_is_decoder(chunked_loss, shape),
        optimizer=optimizer,
        four_bit=four_bit,
        fused_attention=attention == "sdpa" and (shape.family != "gptj" or since[1]),
        contiguous_bias=shape.kind != "encoder-decoder" or since[0],
        library=library,
        gpus=gpus,
        sharded=parallel == "fsdp",
    )
    with without_collector():
        run = Run(shape, method, trained, recipe)
        step = run.second_step()
        run.close()
    parts = {**step.at_peak, "workspace": step.at_peak["workspace"] + CUBLAS_WORKSPACE}
    counted = count_trained(shape, method, trained)
    return Estimate(
        shape.name, method, step.peak + CUBLAS_WORKSPACE, **parts,
        moment=step.moment, flops=step.flops, written=step.written,
        file_bytes=_file_bytes(shape, trained, recipe), trainable=counted.trainable, total=counted.total,
        history=_thinned(step.history),
    )  # fmt: skip


def check_choices(**given: Any) -> None:
    """Require that each of these arguments of `estimate` is one of its words."""
    for name, known in CHOICES.items():
        if name in given:
            one_of(name, given[name], known)


def checked_blocks(checkpointing: bool | int, shape: Shape) -> bool | int:
    """Return how many blocks of a model are computed again. True is all of them, and 1 is the first one."""
    if isinstance(checkpointing, bool):
        return checkpointing
    count = whole("checkpointing", checkpointing, least=0, usual="True, False or a number of blocks")
    if count and shape.layout is None:
        raise PeftLabError(f"checkpointing={count}: {shape.name} is no decoder, so give True or False.")
    if count > (most := blocks_of(shape)):
        raise PeftLabError(f"checkpointing={count}, and {shape.name} has {most} blocks. True is all of them.")
    return count


def blocks_of(shape: Shape) -> int:
    """Return how many blocks a decoder has."""
    assert shape.layout is not None
    return shape.layout.layers


def _is_decoder(chunked_loss: bool, shape: Shape) -> bool:
    if chunked_loss and (shape.kind != "decoder" or shape.task != "language model"):
        raise PeftLabError(f"chunked_loss=True is for language models that predict the next token, not {shape.name}.")
    return chunked_loss


def _since(release: tuple[int, int], transformers: str | None) -> bool:
    """Say whether a version of transformers, or else the installed one, is this release or a newer one."""
    if transformers is None:
        try:
            transformers = version("transformers")
        except PackageNotFoundError:
            return True
    try:
        return tuple(int(part) for part in transformers.split(".")[:2]) >= release
    except ValueError:
        raise PeftLabError(f"transformers must be a version such as '5.20.0'; found {transformers!r}.") from None


def on_four_bits(method: str, four_bit: bool | None = None) -> bool:
    """Return whether the base is held in four bits.

    Raises:
        PeftLabError: the method says otherwise, or trains weights that would be codes.
    """
    row = METHODS[method]
    one_of("four_bit", four_bit, (None, True, False))
    if four_bit is False and row.four_bit:
        raise PeftLabError(f"four_bit=False, and {method} is a method on a base in four bits. Use lora.")
    if four_bit and row.whole:
        raise PeftLabError(f"four_bit=True, and {method} trains the weights themselves; codes do not train. Use qlora.")
    return row.four_bit if four_bit is None else four_bit


def uses_autocast(method: str, precision: str, four_bit: bool | None = None) -> bool:
    """Say whether a run is estimated under bf16 autocast if nothing is said: with mixed precision or a 4-bit base."""
    return precision == "mixed" or on_four_bits(method, four_bit)


def _refuse_what_cannot_run(shape: Shape, method: str, sequence: int, virtual_tokens: int) -> None:
    """Refuse what transformers cannot run, and models without a replay. A method's replay refuses what it cannot do."""
    if shape.family not in FORWARD:
        raise PeftLabError(
            f"The activations of {shape.family} models are not known yet; known: {', '.join(FORWARD)}."
            f"{of_the_same_name(shape.family, FORWARD)} Its parameters are: peftlab count {shape.name}."
        )
    predicted = DECODER_HEADS if shape.kind == "decoder" else FAMILIES[shape.family].tasks[:1]
    if shape.task not in predicted:
        named = ", ".join(str(name) for name in shape.config.get("architectures") or [])
        ends = [class_end(task, shape.kind) for task in predicted]
        raise PeftLabError(
            f"{shape.name}: architectures names {named}, whose training step is not predicted. Predicted are classes "
            f"that end in {', '.join(ends)}; without architectures, {ends[0]} is taken. Its parameters are: peftlab "
            f"count {shape.name}."
        )
    experts = shape.layout and shape.layout.experts
    if experts and experts.per_token > experts.count:  # transformers builds such a model, and its first step fails
        raise PeftLabError(
            f"{shape.name}: each token goes to {experts.per_token:,} experts, and there are {experts.count:,}."
        )
    most = longest(shape, method, virtual_tokens)
    if sequence > most:
        taken = f" beside {virtual_tokens} virtual ones" if METHODS[method].takes("virtual_tokens") else ""
        raise PeftLabError(f"{shape.name} has positions for {most:,} tokens{taken}, too few for {sequence:,}.")


def _refuse_biases_beside_parameters(trained: Trained, options: Options, library: str) -> None:
    """Refuse what peftlab's LoRA refuses when it is attached. Hugging Face peft trains these biases in place."""
    fused = [module.path for module in trained.adapted if module.kind in ("experts", "router")]
    if library == "peftlab" and options.bias != "none" and (first := [*fused, *options.target_parameters][:1]):
        raise PeftLabError(
            f"bias={options.bias!r} cannot be used with adapted parameters such as {first[0]}: the biases of experts "
            "and routers are not added to what their modules return. Use bias='none'."
        )


def longest(shape: Shape, method: str, virtual_tokens: int) -> int:
    """Return the most tokens that a model takes: the number of its learned positions, or `MOST` if it learns none.

    RoBERTa and MPNet do not use two of their positions. The virtual tokens of a prompt or prefix take positions too.
    """
    rows = [m.inputs for m in shape.modules if m.path.endswith(("transformer.wpe", "embeddings.position_embeddings"))]
    if not rows:
        return MOST
    taken = virtual_tokens if METHODS[method_name(method)].takes("virtual_tokens") else 0
    return rows[0] - taken - (2 if shape.family in UNUSED_POSITIONS else 0)


def _file_bytes(shape: Shape, trained: Trained, recipe: Recipe) -> int:
    """Return the bytes of a checkpoint: of all weights, or only of what trains."""
    if trained.whole:
        return recipe.weight_bytes * shape.parameters
    elements = trained.saved
    if elements is None:
        elements = sum(tensor.elements for tensor in trained.added if tensor.trains and not tensor.buffer)
    own = sum(m.outputs if kind == "bias" else m.weight for m, kind in trained.own)
    head = sum(module.parameters for module in shape.head)
    return recipe.adapter_bytes * elements + recipe.weight_bytes * (own + head)


def _thinned(history: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return at most `POINTS` points: the highest of each stretch, so that no peak is lost."""
    width = -(-len(history) // POINTS)
    return [max(history[i : i + width], key=itemgetter(1)) for i in range(0, len(history), width)]
