"""Name 4-bit weights in a file by bitsandbytes' keys, so that transformers opens such a file too.

Next to `...weight` (the codes) are `weight.absmax`, `weight.quant_map` (the code book), and
`weight.quant_state.bitsandbytes__nf4` (the rest, as JSON in bytes). With double quantisation there are also
`weight.nested_absmax` and `weight.nested_quant_map`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from peftlab.errors import PeftLabError
from peftlab.foreign import parse
from peftlab.quantization.blockwise import SCALE_BLOCK, QuantState
from peftlab.quantization.codebooks import code_book, dynamic_book

MARK = "quant_state."
# int4 is not a format of bitsandbytes, so a file with it must not carry bitsandbytes' mark
OWNERS = {"nf4": "bitsandbytes__nf4", "fp4": "bitsandbytes__fp4", "int4": "peftlab__int4"}

EXPERTS = "peftlab__experts"  # the mark of several experts in one parameter

DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
FLOATS = tuple(DTYPES.values())
FLOAT_MAX = torch.finfo(torch.float32).max
LARGEST_BLOCK = 2**31
LONGEST_TEXT = 10_000


def to_tensors(state: QuantState) -> dict[str, Tensor]:
    """Return what is stored beside the codes, by the end of its key.

    The code books are copies: tensors in a file may not share memory.
    """
    device = state.absmax.device
    tensors = {"absmax": state.absmax.detach(), "quant_map": code_book(state.format, device).clone()}
    facts = {
        "quant_type": state.format,
        "blocksize": state.block_size,
        "dtype": str(state.dtype).removeprefix("torch."),
        "shape": list(state.shape),
    }
    if state.nested_absmax is not None and state.offset is not None:
        tensors |= {"nested_absmax": state.nested_absmax.detach(), "nested_quant_map": dynamic_book(device).clone()}
        facts |= {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32", "nested_offset": state.offset.item()}
    return tensors | {MARK + OWNERS[state.format]: _text(facts)}


def from_tensors(tensors: Mapping[str, Tensor], device: torch.device, name: str = "weight") -> QuantState:
    """Return the `QuantState` of stored tensors: the reverse of `to_tensors`.

    What does not fit together is refused before anything is computed with it.

    Args:
        name: what to call the weight in an error.

    Raises:
        PeftLabError: a key is missing, of a wrong type, shape or value, or says something that this package does not
            compute with.
    """
    marks = [key for key in tensors if key.startswith(MARK)]
    if len(marks) != 1 or "absmax" not in tensors or "quant_map" not in tensors:
        raise PeftLabError(
            f"{name} is no 4-bit weight: it is stored as quant_map, absmax and one {MARK}...; found "
            f"{', '.join(map(str, tensors)) or 'none of them'}."
        )
    facts = _facts(tensors[marks[0]], name)
    format, block_size, shape = facts.get("quant_type"), facts.get("blocksize"), facts.get("shape")
    if not isinstance(format, str) or format not in OWNERS or marks[0] != MARK + OWNERS[format]:
        raise _wrong(name, f"its format is {format!r} under {marks[0]}; this package knows {', '.join(OWNERS)}")
    if not _whole(block_size) or block_size < 2 or block_size.bit_count() > 1 or block_size > LARGEST_BLOCK:
        raise _wrong(name, f"its blocksize is {block_size!r}; it is a power of two from 2 to {LARGEST_BLOCK:,}")
    if not isinstance(shape, list) or not shape or not all(_whole(size) and size > 0 for size in shape):
        raise _wrong(name, f"its shape is {shape!r}; it is a list of positive whole numbers")
    if not isinstance(facts.get("dtype"), str) or facts["dtype"] not in DTYPES:
        raise _wrong(name, f"its dtype is {facts.get('dtype')!r}; it is one of {', '.join(DTYPES)}")

    blocks = -(math.prod(shape) // -block_size)
    nested = "nested_absmax" in tensors
    offset = None
    allowed = {marks[0], "absmax", "quant_map"} | ({"nested_absmax", "nested_quant_map"} if nested else set())
    if strange := sorted(set(tensors) - allowed):
        raise _wrong(name, f"beside it lies {strange[0]!r}, which says nothing here")
    _check(name, "quant_map", tensors, 16, FLOATS, code_book(format))
    if nested:
        if "nested_quant_map" not in tensors or facts.get("nested_dtype") != "float32":
            raise _wrong(name, "its scales are quantised, without nested_quant_map or with nested_dtype "
                         f"{facts.get('nested_dtype')!r}, which is float32")  # fmt: skip
        if facts.get("nested_blocksize") != SCALE_BLOCK:
            raise _wrong(name, f"its scales lie in blocks of {facts.get('nested_blocksize')!r}, not {SCALE_BLOCK}")
        offset = facts.get("nested_offset")
        if isinstance(offset, bool) or not isinstance(offset, (int, float)) or not abs(offset) <= FLOAT_MAX:
            raise _wrong(name, f"its nested_offset is {offset!r}; it is a finite number")
        _check(name, "absmax", tensors, blocks, (torch.uint8,))
        _check(name, "nested_absmax", tensors, -(blocks // -SCALE_BLOCK), (torch.float32,))
        _check(name, "nested_quant_map", tensors, 256, FLOATS, dynamic_book())
    else:
        _check(name, "absmax", tensors, blocks, (torch.float32,))
    state = QuantState(
        tensors["absmax"].to(device),
        torch.Size(shape),
        DTYPES[facts["dtype"]],
        block_size,
        format,
        nested_absmax=tensors["nested_absmax"].to(device) if nested else None,
        offset=None if offset is None else torch.tensor(float(offset), dtype=torch.float32, device=device),
    )
    # a weight has no value above its dtype's largest; the scale of a block may be rounded up a little
    if not bool((state.scales().abs() <= min(1.02 * torch.finfo(state.dtype).max, FLOAT_MAX)).all()):
        raise _wrong(name, f"its scales stand for weights that {facts['dtype']} cannot hold")
    return state


def experts_to_tensors(state: QuantState) -> dict[str, Tensor]:
    """Return what is stored beside the codes of several experts: the same tensors, with the experts in front.

    The offsets of double quantisation, one for each expert, are a tensor here. The mark is not bitsandbytes', which
    has no such form.
    """
    tensors = to_tensors(replace(state, offset=None if state.offset is None else state.offset.mean()))
    del tensors[MARK + OWNERS[state.format]]
    facts = {
        "quant_type": state.format, "blocksize": state.block_size, "dtype": str(state.dtype).removeprefix("torch."),
        "shape": list(state.shape),
    }  # fmt: skip
    if state.offset is not None:
        facts |= {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32"}
        tensors["nested_offset"] = state.offset.detach()
    return tensors | {MARK + EXPERTS: _text(facts)}


def experts_from_tensors(tensors: Mapping[str, Tensor], name: str) -> list[QuantState]:
    """Return the state of each expert: the reverse of `experts_to_tensors`, with the checks of `from_tensors`."""
    if MARK + EXPERTS not in tensors:
        raise PeftLabError(f"{name} holds no 4-bit experts: {MARK}{EXPERTS} is missing beside it.")
    facts = _facts(tensors[MARK + EXPERTS], name)
    shape, format = facts.get("shape"), facts.get("quant_type")
    if not isinstance(shape, list) or len(shape) != 3 or not all(_whole(size) and size > 0 for size in shape):
        raise _wrong(name, f"its shape is {shape!r}; it is three positive whole numbers")
    if not isinstance(format, str) or format not in OWNERS:
        raise _wrong(name, f"its format is {format!r}; this package knows {', '.join(OWNERS)}")
    stacked = {key: tensors[key] for key in ("absmax", "nested_absmax", "nested_offset") if key in tensors}
    for key, tensor in stacked.items():
        if tensor.dim() != (1 if key == "nested_offset" else 2) or tensor.shape[0] != shape[0]:
            raise _wrong(name, f"its {key} is {tuple(tensor.shape)}; it has {shape[0]} experts in front")
    if strange := sorted(set(tensors) - {*stacked, "quant_map", "nested_quant_map", MARK + EXPERTS}):
        raise _wrong(name, f"beside it lies {strange[0]!r}, which says nothing here")
    books = {key: tensors[key] for key in ("quant_map", "nested_quant_map") if key in tensors}
    states = []
    for e in range(shape[0]):
        own = {key: tensor[e] for key, tensor in stacked.items()}
        offset = own.pop("nested_offset", None)
        mine = {**facts, "shape": shape[1:]} | ({} if offset is None else {"nested_offset": float(offset)})
        one = {**own, **books, MARK + OWNERS[format]: _text(mine)}
        states.append(from_tensors(one, torch.device("cpu"), f"{name}[{e}]"))
    return states


def _text(facts: Mapping[str, Any]) -> Tensor:
    """Return facts as JSON in the bytes of a tensor."""
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


def packed_codes(stored: Tensor, state: QuantState, name: str = "weight") -> Tensor:
    """Return the codes of a 4-bit weight as (bytes, 1) uint8; some files hold the same bytes as another dtype.

    Raises:
        PeftLabError: there are not as many as the state says.
    """
    packed, wanted = stored.contiguous().flatten().view(torch.uint8).reshape(-1, 1), -(math.prod(state.shape) // -2)
    if len(packed) != wanted:
        shape = tuple(state.shape)
        raise _wrong(name, f"it holds {len(packed):,} bytes of codes, and its shape {shape} needs {wanted:,}")
    return packed


def _facts(text: Tensor, name: str) -> dict[str, Any]:
    """Read the JSON that is stored in the bytes of a tensor."""
    if text.dtype != torch.uint8 or text.dim() != 1 or len(text) > LONGEST_TEXT:
        raise _wrong(name, f"its record is {tuple(text.shape)} of {text.dtype}; it is some hundred bytes of text")
    facts = parse(bytes(text.cpu().tolist()), f"The record of the 4-bit weight {name}")
    if not isinstance(facts, dict):
        raise _wrong(name, f"its record is a {type(facts).__name__}, not a table of values")
    return facts


def _check(
    name: str, key: str, tensors: Mapping[str, Tensor], count: int, dtypes: tuple, book: Tensor | None = None
) -> None:
    """Require a length, one of some dtypes and sound values of a tensor.

    Sound are the values of the code book, or scales that are finite and not negative.
    """
    tensor = tensors[key]
    if tensor.dtype not in dtypes or tuple(tensor.shape) != (count,):
        found, kind = f"{tuple(tensor.shape)} of {tensor.dtype}", " or ".join(map(str, dtypes))
        raise _wrong(name, f"its {key} is {found}; it is ({count},) of {kind}")
    if book is not None and not torch.equal(tensor.cpu().float(), book):
        raise _wrong(name, f"its {key} is another code book than this format's, so its codes mean other values")
    if book is None and tensor.is_floating_point() and not (torch.isfinite(tensor) & (tensor >= 0)).all():
        raise _wrong(name, f"its {key} holds scales that are negative or not finite")


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(name: str, what: str) -> PeftLabError:
    return PeftLabError(f"The 4-bit weight {name} cannot be read: {what}. The file is damaged; fetch or save it again.")
