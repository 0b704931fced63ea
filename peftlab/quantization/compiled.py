"""The product with a 4-bit weight as one operation of torch, for `torch.compile`.

    y = x W^T + b,  dL/dx = dL/dy W    x: (..., in),  y: (..., out),  W: (out, in), as in `peftlab.quantization.linear`

torch.compile follows Python code into every function that it calls. What it cannot follow (a cache of code books, the
choice of a backend, a foreign kernel) breaks its graph, and each break costs time on the host and keeps operations from
being fused. An operation of torch is not followed: the compiler sees its name, the shapes of its results and its
gradient. So a compiled `Linear4bit` calls the operation below, and an uncompiled one calls the backend itself.

The compiled pass keeps the codes and scales as autograd does, which raises an error if they are written to between the
two passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftlab.quantization.backends import choose
from peftlab.quantization.blockwise import QuantState


def linear(x: Tensor, bias: Tensor | None, packed: Tensor, state: QuantState, backend: str) -> Tensor:
    """Return x W^T + b, (..., in) -> (..., out), with gradients for x and b, as a node of a compiled graph."""
    return _linear(
        x, bias, list(state.shape), packed, state.absmax, state.nested_absmax, state.offset,
        state.block_size, state.format, backend,
    )  # fmt: skip


# torch reads the signatures of operations, and they take tensors and plain values only: so a state comes in pieces


@torch.library.custom_op("peftlab::linear4bit", mutates_args=())
def _linear(
    x: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    format: str,
    backend: str,
) -> Tensor:
    # y = x W^T + b
    state = QuantState(absmax, torch.Size(shape), x.dtype, block_size, format, nested_absmax, offset)
    return choose(backend, format, block_size, x.device).linear(x, packed, state, bias)


@torch.library.custom_op("peftlab::linear4bit_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    shape: Sequence[int],
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    format: str,
    backend: str,
) -> Tensor:
    # dL/dx = dL/dy W
    state = QuantState(absmax, torch.Size(shape), gradient.dtype, block_size, format, nested_absmax, offset)
    chosen = choose(backend, format, block_size, gradient.device)
    return gradient @ chosen.dequantize(packed, state, gradient.dtype)


@_linear.register_fake
def _(x: Tensor, bias: Tensor | None, shape: Sequence[int], *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


@_backward.register_fake
def _(gradient: Tensor, shape: Sequence[int], *rest: Any) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], shape[1])


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, _, ctx.shape, *tensors, block_size, format, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.rest = block_size, format, backend


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    for_x = for_bias = None
    if ctx.needs_input_grad[0]:
        for_x = _backward(gradient, ctx.shape, *ctx.saved_tensors, *ctx.rest)
    if ctx.needs_input_grad[1]:
        for_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return for_x, for_bias, *[None] * 8


_linear.register_autograd(_gradients, setup_context=_keep)
