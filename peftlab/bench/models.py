"""Models at full size with random weights, made on the GPU within seconds, and lent to one point after the other."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

import peftlab as pl
from peftlab.core.checkpointing import set_input_gradients, switch_checkpointing
from peftlab.core.records import as_transformer
from peftlab.errors import PeftLabError
from peftlab.memory.counting.shapes import load_shape
from peftlab.optional import available, require
from peftlab.quantization import Linear4bit
from peftlab.quantization.backends import AUTO, choose
from peftlab.quantization.model import replace

Row = dict[str, Any]
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = {
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModelForSequenceClassification",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
}
_held: dict[str, nn.Module] = {}  # one at most


def gpu_for(point: Row, what: str) -> torch.device:
    """Return the GPU, or raise an error that says what needs one."""
    if not torch.cuda.is_available():
        raise PeftLabError(f"Section {point['section']!r} measures {what} and needs a CUDA GPU.")
    return torch.device("cuda")


@contextmanager
def held(
    shape: str | dict,
    device: torch.device,
    four_bit: bool = False,
    make: Callable[..., nn.Module] | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[nn.Module]:
    """Lend a random model of this shape, frozen. It is kept until a block asks for another one, or fails.

    Give it back as it was, but for values of weights: the next block of this process gets the same one.
    `make(shape, device, four_bit)` makes the model; by default `random_model`, in `dtype`.
    """
    name = json.dumps([shape, str(device), four_bit, str(dtype)])
    if name not in _held:
        let_go()
        make = make or (partial(random_model, dtype=dtype) if dtype else random_model)
        _held[name] = make(shape, device, four_bit)
    try:
        yield _held[name]
    except BaseException:
        _held.clear()
        raise
    finally:
        release()


def let_go() -> None:
    """Free the model that is held, and the GPU's memory."""
    _held.clear()
    release()


def release() -> None:
    """Free what nothing refers to. bitsandbytes keeps a list of all paged states it ever made."""
    if available("bitsandbytes") is not None:
        require("bitsandbytes").functional.GlobalPageManager.get_instance().paged_tensors.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def random_model(
    shape: str | dict, device: torch.device, four_bit: bool = False, dtype: torch.dtype | None = None
) -> nn.Module:
    """Make a shape with random weights, by default decoders in bf16 and others in float32.

    Each weight is allocated on the device and filled there. With `four_bit` the body's linear layers are quantised to
    NF4 one by one.
    """
    import transformers

    known = load_shape(shape)
    config = transformers.AutoConfig.for_model(**known.config)
    config.use_cache = False
    if known.kind == "encoder-decoder":
        config.decoder_start_token_id = 0
    dtype = dtype or (torch.bfloat16 if known.kind == "decoder" else torch.float32)
    with torch.device("meta"):
        model = getattr(transformers, KINDS[known.kind]).from_config(config, dtype=dtype)
    worker = choose(AUTO, "nf4", 64, device) if four_bit else None
    made: dict[int, nn.Parameter] = {}  # a tied weight stands in two places
    for path, module in list(model.named_modules()):
        if worker is not None and type(module) is nn.Linear and module is not model.get_output_embeddings():
            weight = torch.empty(module.weight.shape, dtype=dtype, device=device).normal_(std=0.02)
            replace(model, path, Linear4bit(worker.quantize(weight, "nf4", 64, True, path)))
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(_filled(parameter, device), requires_grad=False)
                setattr(module, name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, _filled(buffer, device))
    return model.requires_grad_(False)


def _filled(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return new.normal_(std=0.02) if tensor.is_floating_point() else new.zero_()


def vocabulary_of(model: nn.Module) -> int:
    """Return how many tokens a transformers model knows."""
    config: Any = as_transformer(model).config
    return config.vocab_size


@contextmanager
def lent(model: nn.Module, adapt: Callable[[nn.Module, Row], nn.Module], point: Row) -> Iterator[nn.Module]:
    """Prepare a held model as a point says, inside the block. Afterwards it is as it was, but for trained weights.

    `adapt(model, point)` returns the model itself, or a wrapper of Hugging Face peft. With the point's `checkpointing`,
    gradient checkpointing is on.
    """
    wrapped = adapt(model, point)
    if point.get("checkpointing"):
        switch_checkpointing(model, "enable", {"use_reentrant": False})
    yield wrapped.train()
    if point.get("checkpointing"):
        switch_checkpointing(model, "disable")
        set_input_gradients(model, False)
    if wrapped is not model:
        take_off: Any = getattr(wrapped, "unload", None)  # peft's prompts change no module
        if take_off is not None:
            take_off()
    elif pl.attached(model):
        pl.detach(model)
    model.requires_grad_(False)
