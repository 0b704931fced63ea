"""Read a quantised parameter, this package's or bitsandbytes', and write to it in place.

Both mark such a parameter by an attribute `quant_state`. bitsandbytes' own layers have one trap. On a CPU with
AVX512-BF16, a forward pass in eval mode and without gradients rearranges the codes in place and rounds the scales to
bf16. From then on the weight cannot be read as before, and no gradient passes through it. `layers_that_repack` finds
such layers before that happens, and `unpack` undoes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.core.parameters import Coded
from peftlab.errors import PeftLabError
from peftlab.quantization.backends import AUTO, choose, from_bitsandbytes
from peftlab.quantization.blockwise import Quantized, QuantState, quantize, quantize_scales
from peftlab.quantization.codebooks import dynamic_book
from peftlab.quantization.stacks import StackState, quantize_experts

REPACKS = "support_avx512bf16_for_cpu"  # bitsandbytes' layers repack only if this is set
ROWS = 32  # a repacked block holds so many rows of the weight


def state_on(parameter: Tensor | None) -> Any:
    """Return what a parameter's codes stand for, ours or bitsandbytes' record; None if it holds plain numbers."""
    return getattr(parameter, "quant_state", None)


def is_quantized(parameter: Tensor | None) -> bool:
    """Say whether a parameter holds 4-bit codes."""
    return state_on(parameter) is not None


def quantized(parameter: Tensor) -> Quantized:
    """Return a quantised parameter's codes and what they stand for. The tensors are the parameter's own, not copies.

    Raises:
        PeftLabError: bitsandbytes has repacked the parameter for inference.
    """
    state = state_on(parameter)
    if is_repacked(parameter):
        raise PeftLabError(
            "bitsandbytes has repacked this 4-bit weight for inference on this CPU, with scales rounded to bf16. "
            "Attach adapters, merge or dequantise before the first forward pass in eval mode, or load the model again."
        )
    ours = state if isinstance(state, QuantState) else from_bitsandbytes(state)
    return Quantized(parameter.detach().view(torch.uint8).reshape(-1, 1), ours)


def dense(parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the weight that a quantised parameter stands for, in its own dtype or another."""
    if isinstance(parameter, Coded):
        return parameter.dense(dtype or state_on(parameter).dtype)
    held = quantized(parameter)
    backend = choose(AUTO, held.state.format, held.state.block_size, held.packed.device)
    return backend.dequantize(held.packed, held.state, dtype or held.state.dtype)


def decode_into(out: Tensor, parameter: Tensor) -> None:
    """Write the weight that a quantised parameter stands for into `out`, whose rows may be apart."""
    held = quantized(parameter)
    backend = choose(AUTO, held.state.format, held.state.block_size, held.packed.device)
    backend.dequantize_into(out, held.packed, held.state)


def held_tensors(parameter: Tensor) -> list[Tensor]:
    """Return the tensors that make up a parameter: itself and, for 4-bit codes, their scales."""
    if not is_quantized(parameter):
        return [parameter.detach()]
    held = quantized(parameter)
    return [held.packed, *held.state.tensors().values()]


@torch.no_grad()
def keep(parameter: Tensor) -> list[Tensor]:
    """Return copies of the tensors that make up a parameter, for `restore_parameter`."""
    return [tensor.clone() for tensor in held_tensors(parameter)]


@torch.no_grad()
def restore_parameter(parameter: Tensor, kept: list[Tensor]) -> None:
    """Restore a parameter as it was at `keep`, bit for bit and in place."""
    for tensor, value in zip(held_tensors(parameter), kept, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def store(parameter: Tensor, value: Tensor, name: str = "weight") -> None:
    """Put a value into a parameter in place: rounded to its dtype, or quantised as it was.

    Raises:
        PeftLabError: the value is not finite and the parameter is quantised.
    """
    if not is_quantized(parameter):
        parameter.data.copy_(value)
        return
    state = quantized(parameter).state
    if isinstance(state, StackState):

        def quantize_one(weight: Tensor, one: str) -> Quantized:
            return quantize(weight, state.format, block_size=state.block_size, double_quant=state.nested, name=one)

        packed, stack = quantize_experts(value, quantize_one, name)
        restore_parameter(parameter, [packed.reshape(-1, 1), *stack.tensors().values()])
        return
    new = quantize(value, state.format, block_size=state.block_size, double_quant=state.nested, name=name)
    restore_parameter(parameter, [new.packed, *new.state.tensors().values()])


def is_repacked(parameter: Tensor) -> bool:
    """Say whether bitsandbytes holds the weight in its layout for inference on a CPU."""
    return bool(getattr(state_on(parameter), "packing_format_for_cpu", False))


def layers_that_repack(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield bitsandbytes' layers that would repack their weights, by path."""
    for path, module in model.named_modules():
        if getattr(module, REPACKS, False):
            yield path, module


@torch.no_grad()
def unpack(module: nn.Module) -> bool:
    """Undo bitsandbytes' repacking of a layer's weight, in place. Return whether there was anything to undo.

    The codes come back exactly. The scales were rounded to bf16 and stay up to 0.4% off; load the model again to have
    them exact. (bitsandbytes' own inverse leaves scales in the wrong order if they are not doubly quantised.)
    """
    parameter = getattr(module, "weight", None)
    if parameter is None or not is_repacked(parameter):
        return False
    theirs = state_on(parameter)
    rows, columns = theirs.shape
    # 32 bytes hold the 64 codes of two neighbouring columns in 32 rows: 32 in the low halves, then 32 in the high ones
    packed = parameter.detach().reshape(-1, ROWS)
    codes = torch.cat([packed & 15, packed >> 4], dim=1)
    codes = codes.view(rows // ROWS, columns // 2, ROWS, 2).transpose(1, 2).reshape(-1, 2)
    scales = theirs.absmax.T.reshape(-1).float()
    state = QuantState(scales, theirs.shape, theirs.original_dtype, theirs.blocksize, theirs.quant_type)
    parameter.data = ((codes[:, 0] << 4) | codes[:, 1]).view(theirs.original_qshape)
    storage = getattr(theirs, "original_storage_type", None)
    if storage is not None:
        parameter.data = parameter.data.view(storage)
    if theirs.original_nested:
        from bitsandbytes.functional import QuantState as Theirs

        state = quantize_scales(state)
        theirs.state2 = Theirs(state.nested_absmax, blocksize=256, code=dynamic_book().clone(), dtype=torch.float32)
        theirs.offset = state.offset
    theirs.absmax, theirs.nested, theirs.dtype = state.absmax, theirs.original_nested, theirs.original_dtype
    theirs.packing_format_for_cpu = False
    return True
