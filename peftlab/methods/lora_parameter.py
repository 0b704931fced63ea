"""Add a trained product of two thin matrices to a parameter itself: to each expert of a mixture, or to its router.

    W_e' = W_e + s B_e A_e,    W: (experts, out, in),  A_e: (r, in),  B_e: (out, r),  s = alpha / r

Each expert e has an update of its own. The module computes as it always does, with W' in the place of W. So every
implementation of the experts (eager, batched or grouped products) gives what it would give with a merged weight. Each
call adds the updates of all experts, also of those that get no token. In training that is little; merge to generate.

Paper: Hu et al., 2021, arXiv:2106.09685, section 4.1. Hugging Face peft calls this `target_parameters`.
Book: section *LoRA on experts* of the chapter on the LoRA family.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftlab.core.experts import shape_of
from peftlab.core.interface import Part
from peftlab.core.parameters import Coded
from peftlab.core.records import own_tensor
from peftlab.errors import PeftLabError
from peftlab.methods.lora_conv import start
from peftlab.methods.parts import is_offloaded, is_readable, widened
from peftlab.quantization.weights import is_quantized


class LoRAParameter(Part):
    """Add the update s B A to a parameter of two dimensions, or s B_e A_e to each expert of one of three.

    Attributes:
        lora_A: (experts r, in): A_e is the e-th r rows.
        lora_B: (out, r experts): B_e is every experts-th column from the e-th on, as Hugging Face peft stores it.
        scaling: s.
        experts: their number, or None for a parameter of two dimensions.
        transposed: whether the parameter is stored (experts, in, out), as in gpt-oss.
    """

    def __init__(
        self, path: str, host: nn.Module, name: str, r: int, scaling: float, config: Any, depth: int = 0
    ) -> None:
        super().__init__()
        stored = own_tensor(host, name)
        shape = shape_of(stored)
        if len(shape) not in (2, 3):
            raise PeftLabError(
                f"{path} has {len(shape)} dimensions; an update of low rank needs a matrix, or one for each expert."
            )
        if is_quantized(stored) and not isinstance(stored, Coded):
            raise PeftLabError(f"{path} is the 4-bit weight of a layer; name the layer in target_modules instead.")
        if not is_readable(stored):
            raise PeftLabError(
                f"{path} is held in {stored.dtype}, and an update cannot be added to that. Load the base in 16 or 32 "
                "bits, or quantise it with quantize_model."
            )
        if is_offloaded(host, stored):
            raise PeftLabError(
                f"{path} is offloaded (accelerate brings it in for each call), and an adapter on a parameter needs it "
                "in memory. Load the model without offloading, or quantise it."
            )
        self.parameter, self.scaling = name, scaling
        self.experts = shape[0] if len(shape) == 3 else None
        self.transposed = len(shape) == 3 and bool(getattr(host, "is_transposed", False))
        inside, outside = (shape[-2], shape[-1]) if self.transposed else (shape[-1], shape[-2])
        count = self.experts or 1
        self.lora_A = nn.Parameter(torch.empty(count * r, inside))
        self.lora_B = nn.Parameter(torch.zeros(outside, r * count))
        for e in range(count):
            start(
                self.lora_A.data[e * r : (e + 1) * r],
                self.lora_B.data[:, e::count],
                "kaiming" if config.init == "random" else config.init,
            )
        if config.init == "random":
            start(self.lora_A.data, self.lora_B.data, "random")
        # Hugging Face peft puts one wrapper for each parameter of a module around the other.
        wrapped = "{path}" + ".base_layer" * depth
        self.keys = {"lora_A": f"{wrapped}.lora_A.weight", "lora_B": f"{wrapped}.lora_B.weight"}

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return two stacks of thin matrices, (experts, ., r) and (experts, r, .), whose products are B A as stored."""
        assert self.experts is not None
        a = self.lora_A.reshape(self.experts, -1, self.lora_A.shape[1])  # (experts, r, in)
        b = self.lora_B.reshape(self.lora_B.shape[0], -1, self.experts).permute(2, 0, 1)  # (experts, out, r)
        a, b = a.to(dtype), b.to(dtype)
        return (a.mT, b.mT) if self.transposed else (b, a)

    def value(self, stored: Tensor) -> Tensor:
        """Return the parameter with its update added, in the parameter's dtype."""
        if self.experts is None:
            # W' = W + s B A; under autocast the product has 16 bits, as in a layer
            return stored + ((self.lora_B @ self.lora_A) * self.scaling).to(stored.dtype)
        # W_e' = W_e + s B_e A_e; under autocast all of it would be rounded to 16 bits, the parameter too
        left, right = self.factors(stored.dtype)
        kind = stored.device.type  # the device "meta" has no autocast
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
            return torch.baddbmm(stored, left, right, alpha=self.scaling)

    def delta(self) -> Tensor:
        """Return the update of the parameter, in its shape, in the adapter's dtype and with gradients."""
        if self.experts is None:
            return (self.lora_B @ self.lora_A) * self.scaling
        left, right = self.factors(self.lora_A.dtype)
        return (left @ right) * self.scaling

    def merged(self, host: nn.Module) -> dict[str, Tensor]:
        """Return the host's parameter with the update folded in, not yet rounded to its dtype."""
        assert self.parameter is not None
        base = widened(own_tensor(host, self.parameter))
        if self.experts is None:
            return {self.parameter: base + (widened(self.lora_B) @ widened(self.lora_A)) * self.scaling}
        left, right = self.factors(base.dtype)
        return {self.parameter: torch.baddbmm(base, left, right, alpha=self.scaling)}
