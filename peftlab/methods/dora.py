"""Train a weight's direction by LoRA, and the length of each of its rows by a number of its own.

    V  = W + s B A,    c = |V| row by row, without a gradient
    W' = (m / c) V,    so that    y = (m / c) (W x + s B A x) + b

    x: (..., in),  y: (..., out),  A: (r, in),  B: (out, r),  m and c: (out,),  s = alpha / r

At the start B is zero and m = c = |W|, so that W' = W. A row of V says which way an output reads its input, and m how
strongly. LoRA changes both together.

Paper: Liu et al., *DoRA: Weight-Decomposed Low-Rank Adaptation*, 2024, arXiv:2402.09353, section 4.1; that c is a
constant in the backward pass is its section 4.3.
Book: section *DoRA* of the chapter on the LoRA family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.core.interface import Part
from peftlab.core.records import own_tensor, tensor_at
from peftlab.core.targets import CONVOLUTIONS
from peftlab.errors import PeftLabError
from peftlab.methods.lora import LoRAConfig, LoRAEmbedding, LoRALinear
from peftlab.methods.lora_conv import LoRAConv, convolution
from peftlab.methods.lora_starts import CONVERT, from_weight
from peftlab.methods.parts import cast, first_input, is_offloaded, is_readable, widened
from peftlab.quantization.weights import dense, is_quantized

MAGNITUDE = "{path}.lora_magnitude_vector"


class WithMagnitude(Part):
    """Hold what DoRA adds to each of LoRA's parts: the magnitude m, and the norms c that it stands for at the start.

    Attributes:
        magnitude: m, (out,); for a convolution (1, out, 1, ...), as Hugging Face peft stores it.
        inner: the dimensions of the stored weight over which a norm is taken: all but that of the outputs.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float
    magnitude: nn.Parameter
    inner: tuple[int, ...]

    def settle(self, host: nn.Module) -> None:
        """Start from the norms that the weight has, so that the model starts as it was."""
        self.magnitude.copy_(self.norms(host))

    def weight(self, host: nn.Module) -> Tensor:
        """Return the host's weight as it is stored, in the adapter's dtype; for 4-bit codes what they stand for."""
        stored = own_tensor(host, "weight")
        dtype = self.lora_A.dtype
        return dense(stored, dtype) if is_quantized(stored) else stored.to(dtype)

    def product(self) -> Tensor:
        """Return B A in the shape of the stored weight, as a tensor of its own and without a gradient."""
        raise NotImplementedError

    def norms(self, host: nn.Module) -> Tensor:
        """Return c = |W + s B A| for each output, in the shape of the magnitude and without a gradient."""
        weight = self.weight(host).detach()
        # V = s B A + W, in place, since it is as large as the weight; under autocast B A has 16 bits
        direction = self.product().to(weight.dtype).mul_(self.scaling).add_(weight)
        return torch.linalg.vector_norm(direction, dim=self.inner).view_as(self.magnitude)

    def ratio(self, host: nn.Module) -> Tensor:
        """Return m / c, in the shape of the magnitude."""
        return self.magnitude / nonzero(self.norms(host))

    def merged(self, host: nn.Module) -> dict[str, Tensor]:
        """Return the host's weight with the update folded in, not yet rounded to the host's dtype."""
        direction = super().merged(host)["weight"]
        # W' = (m / c) (W + s B A)
        norms = torch.linalg.vector_norm(direction, dim=self.inner, keepdim=True)
        return {"weight": direction * (widened(self.magnitude).view_as(norms) / nonzero(norms))}


class DoRALinear(WithMagnitude, LoRALinear):
    """Replace what a linear layer returns by (m / c) (W x + s B A x) + b.

    The layer is an `nn.Linear`, a `Conv1D` or a quantised linear. With dropout, W also reads the dropped input while
    the model trains, as in Hugging Face peft, which takes a second product with W.

    Attributes:
        lora_A: (r, in).
        lora_B: (out, r).
        magnitude: m, (out,).
        scaling: s. `delta()` is s B A, the update of the direction alone.
    """

    keys = {"lora_A": "{path}.lora_A.weight", "lora_B": "{path}.lora_B.weight", "magnitude": MAGNITUDE}

    def __init__(self, host: nn.Module, r: int, scaling: float, config: DoRAConfig) -> None:
        check_weight(host)
        super().__init__(host, r, scaling, config)
        self.inner = (0,) if self.transposed else (1,)
        self.magnitude = nn.Parameter(torch.ones(self.lora_B.shape[0]))

    def product(self) -> Tensor:
        """Return B A, (out, in), or (in, out) for a layer that stores its weight so."""
        a, b = self.lora_A.detach(), self.lora_B.detach()
        return a.T @ b.T if self.transposed else b @ a

    def after(self, host: nn.Module, args: tuple, kwargs: dict, output: Tensor, base: Tensor) -> Tensor:
        """Add the change. x: (..., in), output: (..., out)."""
        x = cast(first_input(args, kwargs), self.lora_A.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
            weight = self.weight(host)
            frozen = F.linear(x, weight.T if self.transposed else weight)  # W x, of the dropped input
        else:
            bias = tensor_at(host, "bias")
            frozen = base if bias is None else base - bias
        ratio = self.ratio(host)
        # y = W x + b + (m/c - 1) W x + (m/c) s B (A x)
        update = ratio * F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling
        return (output + ((ratio - 1) * frozen + update)).to(output.dtype)


class DoRAEmbedding(WithMagnitude, LoRAEmbedding):
    """Scale each feature of an embedding that LoRA changed: y = (m / c) (W[token] + s B A[:, token]).

    The norms are those of the columns of W, one for each feature, over the whole vocabulary. Dropout does not act here.

    Attributes:
        lora_A: (r, vocabulary), zero at the start.
        lora_B: (width, r), normal at the start.
        magnitude: m, (width,).
    """

    keys = {**LoRAEmbedding.keys, "magnitude": MAGNITUDE}
    inner = (0,)

    def __init__(self, host: nn.Embedding, r: int, scaling: float, config: DoRAConfig) -> None:
        check_weight(host)
        super().__init__(host, r, scaling, config)
        self.magnitude = nn.Parameter(torch.ones(self.lora_B.shape[0]))

    def product(self) -> Tensor:
        """Return the transpose of B A, (vocabulary, width)."""
        return self.lora_A.detach().T @ self.lora_B.detach().T

    def after(self, host: nn.Module, args: tuple, kwargs: dict, output: Tensor, base: Tensor) -> Tensor:
        """Add the change. output: (..., width)."""
        ratio = self.ratio(host)
        # y = W[token] + (m/c - 1) W[token] + (m/c) s B A[:, token]
        update = ratio * self.update(host, args, kwargs)
        return (output + ((ratio - 1) * base + update)).to(output.dtype)


class DoRAConv(WithMagnitude, LoRAConv):
    """Replace what a convolution returns by (m / c) (W * x + s B (A * x)) + b, as Hugging Face peft does.

    With groups, A and B stand for no weight of this layer. The norms are then of W plus B A cut into its shape, number
    by number, as there. With dropout, W also reads the dropped input while the model trains, padded with zeros.

    Attributes:
        lora_A: (r, in, k, ...).
        lora_B: (out, r / groups, 1, ...).
        magnitude: m, (1, out, 1, ...).
    """

    keys = {"lora_A": "{path}.lora_A.weight", "lora_B": "{path}.lora_B.weight", "magnitude": MAGNITUDE}

    def __init__(self, host: Any, r: int, scaling: float, config: DoRAConfig) -> None:
        check_weight(host)
        super().__init__(host, r, scaling, config)
        self.shape = tuple(host.weight.shape)
        self.inner = tuple(range(1, len(self.shape)))
        self.magnitude = nn.Parameter(torch.ones(1, self.shape[0], *(1 for _ in self.shape[2:])))

    def product(self) -> Tensor:
        """Return B A in the shape of the weight, (out, in, k, ...)."""
        r = self.lora_A.shape[0]
        return (self.lora_B.detach().view(-1, r) @ self.lora_A.detach().view(r, -1)).view(self.shape)

    def after(self, host: Any, args: tuple, kwargs: dict, output: Tensor, base: Tensor) -> Tensor:
        """Add the change. x: (batch, in, ...), output: (batch, out, ...)."""
        convolve = convolution(host)
        x = cast(first_input(args, kwargs), self.lora_A.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
            frozen = convolve(
                x, self.weight(host), None, host.stride, host.padding, host.dilation, host.groups
            )  # fmt: skip
        else:
            frozen = base if host.bias is None else base - host.bias.view(-1, *(1 for _ in self.shape[2:]))
        low = convolve(x, self.lora_A, stride=host.stride, padding=host.padding)  # (batch, r, ...)
        ratio = self.ratio(host)
        # y = W * x + b + (m/c - 1) W * x + (m/c) s B (A * x)
        update = ratio * convolve(low, self.lora_B, groups=host.groups) * self.scaling
        return (output + ((ratio - 1) * frozen + update)).to(output.dtype)


def nonzero(norms: Tensor) -> Tensor:
    """Return the norms with 1 for those that are 0: such a row has no direction, and stays zero."""
    return torch.where(norms == 0, torch.ones_like(norms), norms)


def check_weight(host: nn.Module) -> None:
    """Refuse a layer whose weight cannot be read after each call, for the norms."""
    stored, kind = own_tensor(host, "weight"), type(host).__name__
    if is_offloaded(host, stored):
        raise PeftLabError(
            f"The weight of a {kind} is offloaded (accelerate brings it in for each call), and DoRA reads it after the "
            "call. Load the model without offloading, quantise it, or use LoRAConfig."
        )
    if not is_readable(stored):
        raise PeftLabError(
            f"The weight of a {kind} is held in {stored.dtype}, of which DoRA can compute no norms. Load the base in "
            "16 or 32 bits, quantise it with quantize_model, or use LoRAConfig."
        )


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(LoRAConfig):
    """Say what DoRA trains and how it starts: all that `LoRAConfig` says, with a magnitude for each output.

    The fields are those of `LoRAConfig`. `lora_bias` and `target_parameters` (experts) stay unset, as in Hugging Face
    peft. Several adapters are mixed as everywhere here, y0 + sum of weight * (y_adapter - y0), whatever their order.
    peft lets each DoRA scale what the ones before it made, so there the order of several active ones counts. And it
    refuses one adapter per row with DoRA, which works here.

    Raises:
        PeftLabError: a value is out of range, or DoRA has no such option; the message says what was found.

    >>> model = pl.attach(model, pl.DoRAConfig(r=4, target_modules=["q_proj"]))
    >>> print(pl.count_parameters(model))
    288 of 6,000 parameters train (4.8000%)
    """

    method: ClassVar[str] = "dora"
    requires: ClassVar[tuple[str, ...]] = ("use_dora",)
    unsupported: ClassVar[tuple[str, ...]] = tuple(name for name in LoRAConfig.unsupported if name != "use_dora")

    def __post_init__(self) -> None:
        super().__post_init__()
        if from_weight(self.init):
            raise PeftLabError(
                f"init={self.init!r} cannot be used with DoRA: what it takes out of the weight would count in the "
                "norms. Use another init, or LoRAConfig."
            )
        if self.lora_bias:
            raise PeftLabError("lora_bias cannot be used with DoRA, in Hugging Face peft as here; leave it out.")
        if self.target_parameters:
            raise PeftLabError(
                "DoRA adapts modules alone, in Hugging Face peft as here, and no parameters such as "
                f"{next(iter(self.target_parameters))} (experts, routers). Use LoRAConfig, or other target_modules."
            )

    def part_for(self, host: nn.Module, r: int, scaling: float) -> Part:
        """Return the part that stands on a target."""
        if isinstance(host, nn.Embedding):
            return DoRAEmbedding(host, r, scaling, self)
        kind = DoRAConv if isinstance(host, CONVOLUTIONS) else DoRALinear
        return kind(host, r, scaling, self)

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the fields of Hugging Face's `adapter_config.json` that only this method has."""
        return {**super().to_peft(model, hosts), "use_dora": True}

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for this class: the reverse of `to_peft`."""
        given = LoRAConfig.from_peft(fields)
        if from_weight(given.get("init")):
            raise PeftLabError(
                f"The adapter is a DoRA that was trained with init_lora_weights={given['init']!r}, so it does not fit "
                f"the base as published. {CONVERT}"
            )
        return given
