"""Name 4-bit weights in a file by bitsandbytes' keys, so that transformers opens such a file too.

Next to `...weight` (the codes) are `weight.absmax`, `weight.quant_map` (the code book), and
`weight.quant_state.bitsandbytes__nf4` (the rest, as JSON in bytes). With double quantisation there are also
`weight.nested_absmax` and `weight.nested_quant_map`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from peftlab.errors import PeftLabError
from peftlab.quantization.blockwise import SCALE_BLOCK, QuantState
from peftlab.quantization.codebooks import FORMATS, code_book, dynamic_book

MARK = "quant_state."
# int4 is not a format of bitsandbytes, so a file with it must not carry bitsandbytes' mark
OWNERS = {"nf4": "bitsandbytes__nf4", "fp4": "bitsandbytes__fp4", "int4": "peftlab__int4"}


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
    text = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    return tensors | {MARK + OWNERS[state.format]: text}


def from_tensors(tensors: Mapping[str, Tensor], device: torch.device) -> QuantState:
    """Return the `QuantState` of stored tensors: the reverse of `to_tensors`.

    Raises:
        PeftLabError: a key is missing, or holds something that this package does not compute with.
    """
    marks = [key for key in tensors if key.startswith(MARK)]
    if len(marks) != 1 or "absmax" not in tensors:
        raise PeftLabError(f"A 4-bit weight is stored as absmax and one {MARK}...; found {', '.join(tensors)}.")
    facts = json.loads(bytes(tensors[marks[0]].cpu().tolist()).decode())
    name = facts["quant_type"]
    if name not in FORMATS or facts.get("nested_blocksize", SCALE_BLOCK) != SCALE_BLOCK:
        raise PeftLabError(f"The file holds {name!r} with scales in blocks of {facts.get('nested_blocksize')}; "
                           f"this package knows {', '.join(FORMATS)}, and blocks of {SCALE_BLOCK}.")
    for key, book in (("quant_map", code_book(name)), ("nested_quant_map", dynamic_book())):
        if key in tensors and not torch.equal(tensors[key].cpu().float(), book):
            raise PeftLabError(
                f"The file's {key} is not the code book of {name}, so its codes mean other values. Save it again with "
                "this package or with bitsandbytes."
            )
    nested = "nested_absmax" in tensors
    return QuantState(
        tensors["absmax"].to(device),
        torch.Size(facts["shape"]),
        getattr(torch, facts["dtype"]),
        facts["blocksize"],
        name,
        nested_absmax=tensors["nested_absmax"].to(device) if nested else None,
        offset=torch.tensor(facts["nested_offset"], dtype=torch.float32, device=device) if nested else None,
    )
