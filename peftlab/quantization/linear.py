"""Compute with a linear layer whose weight is frozen in four bits.

    y = x W^T + b,    W = q_i c    x: (..., in),  y: (..., out),  W: (out, in), dequantised for this product only
    dL/dx = dL/dy W                W is dequantised once more

Paper: Dettmers et al., 2023, arXiv:2305.14314, section 3.
Book: section 3.6, "A layer that computes with codes".

W is frozen, so only x and b have gradients. Left to autograd, the product would keep the dequantised W until the
backward pass, and so the 16-bit weights of all layers at once. Here only the codes are kept, which are in memory
anyway. (With `create_graph=True` the backward pass is itself recorded, and W is kept.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.checks import checked
from peftlab.errors import PeftLabError
from peftlab.quantization import compiled
from peftlab.quantization.backends import AUTO, Reference, choose
from peftlab.quantization.blockwise import Quantized, QuantState
from peftlab.quantization.serialised import from_tensors, to_tensors


class _Product(torch.autograd.Function):
    """Compute y = x W^T + b with a frozen W that is kept as codes between the two passes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, backend: Reference, state: QuantState, packed: Tensor
    ) -> Tensor:
        # The codes are not saved by autograd: under checkpointing that takes three calls on the host per tensor, in
        # total a few per cent of a step. The alias keeps the codes of this pass if the layer moves, and `versions`
        # notices if they are written to.
        # y = x W^T + b
        ctx.backend, ctx.state, ctx.packed = backend, state, packed.detach()
        ctx.versions = versions(ctx.packed, state)
        return backend.linear(x, packed, state, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if versions(ctx.packed, ctx.state) != ctx.versions:
            raise RuntimeError(
                "The codes or scales of a 4-bit weight have been modified by an inplace operation between the forward "
                "and the backward pass; run the forward pass again."
            )
        for_x = for_bias = None
        if ctx.needs_input_grad[0]:
            # dL/dx = dL/dy W
            for_x = gradient @ ctx.backend.dequantize(ctx.packed, ctx.state, gradient.dtype)
        if ctx.needs_input_grad[1]:
            for_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return for_x, for_bias, None, None, None


class Linear4bit(nn.Linear):
    """Hold a frozen linear layer in four bits. It computes in the dtype of its input, or in autocast's.

    It is an `nn.Linear`, so whatever looks for linear layers finds it: `attach`, Hugging Face peft, transformers.

    Attributes:
        weight: the codes, (ceil(out in / 2), 1) uint8; `weight.quant_state` says what they stand for.
        quant_state: the same `QuantState`. Casting the model (`half()`, `to(dtype)`) leaves its scales in float32.
        bias: (out,) or None, as it was.
        backend: `"auto"`, `"triton"`, `"bitsandbytes"` or `"reference"`.
    """

    @checked()
    def __init__(self, quantized: Quantized, bias: nn.Parameter | None = None, backend: str = AUTO) -> None:
        nn.Module.__init__(self)  # nn.Linear.__init__ would make a weight of full size
        self.out_features, self.in_features = quantized.shape
        self.weight = nn.Parameter(quantized.packed, requires_grad=False)
        self.register_parameter("bias", bias)
        self.backend = backend
        self.quant_state = quantized.state
        self._link()

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b: (..., in) -> (..., out)."""
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        state = self.quant_state
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if torch.compiler.is_compiling():
            return compiled.linear(x, bias, self.weight, state, self.backend)
        backend = choose(self.backend, state.format, state.block_size, x.device)
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return _Product.apply(x, bias, backend, state, self.weight)
        return backend.linear(x, self.weight, state, bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight that the layer computes with, (out, in)."""
        return Quantized(self.weight.detach(), self.quant_state).dequantize(dtype)

    def extra_repr(self) -> str:
        state = self.quant_state
        scales = "8-bit" if state.nested else "float32"
        held = f"{state.format} in blocks of {state.block_size}, {scales} scales"
        return f"{super().extra_repr()}, {held}, {self.backend}"

    def _link(self) -> None:
        # count_parameters and merging read this from the parameter, as they do for bitsandbytes' layers
        setattr(self.weight, "quant_state", self.quant_state)  # noqa: B010 (a tensor declares no such attribute)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move the scales with the layer, but do not cast them: rounded scales would change the weight."""
        super()._apply(fn, recurse)
        moved = {name: (fn(tensor), tensor) for name, tensor in self.quant_state.tensors().items()}
        kept = {name: new if new.dtype == old.dtype else old.to(new.device) for name, (new, old) in moved.items()}
        self.quant_state = self.quant_state.with_tensors(kept)
        self._link()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()  # a copied parameter loses its attributes

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, tensor in to_tensors(self.quant_state).items():
            destination[f"{prefix}weight.{key}"] = tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        start = f"{prefix}weight."
        mine = {key.removeprefix(start): state_dict.pop(key) for key in list(state_dict) if key.startswith(start)}
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if mine:
            name = f"{prefix}weight"
            state = from_tensors(mine, self.weight.device, name)
            if tuple(state.shape) != (self.out_features, self.in_features):
                raise PeftLabError(
                    f"{name} is stored as {tuple(state.shape)}, and this layer has "
                    f"{(self.out_features, self.in_features)}. Load it into the model that it was saved from."
                )
            self.quant_state = state
            self._link()


def versions(packed: Tensor, state: QuantState) -> list[int]:
    """Return how often codes and scales were written to. Tensors of `torch.inference_mode` do not count it."""
    tensors = (packed, state.absmax, state.nested_absmax, state.offset)
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors if tensor is not None]
