"""Add LoRA's update to a convolution, and draw the A and B that LoRA starts from.

A convolution is a linear layer on the patches of its input, so the update is one of the weight seen as a matrix:

    y = conv(x, W) + b + s conv1(conv(x, A), B),    W: (out, in, k, k),  A: (r, in, k, k),  B: (out, r, 1, 1)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.core.interface import Part
from peftlab.core.records import own_tensor, tensor_at
from peftlab.core.targets import CONVOLUTIONS
from peftlab.errors import PeftLabError
from peftlab.methods.parts import cast, first_input, widened

CONVOLVE = dict(zip(CONVOLUTIONS, (F.conv1d, F.conv2d, F.conv3d), strict=True))


class LoRAConv(Part):
    """Add the update s B * (A * x) to what a convolution returns, as Hugging Face peft does.

    A has the layer's kernel, stride and padding, and reads all channels at each place. It has neither the layer's
    dilation nor its padding mode. B has a kernel of 1, and the layer's groups.

    Attributes:
        lora_A: (r, in, k, ...).
        lora_B: (out, r / groups, 1, ...).
        lora_B_bias: (out,) or None.
        scaling: s.
    """

    keys = {"lora_A": "{path}.lora_A.weight", "lora_B": "{path}.lora_B.weight", "lora_B_bias": "{path}.lora_B.bias"}

    def __init__(self, host: Any, r: int, scaling: float, config: Any) -> None:
        super().__init__()
        if r % host.groups:
            raise PeftLabError(
                f"A {type(host).__name__} of {host.groups} groups takes a rank that these divide, and r is {r}. Choose "
                "another r (rank_pattern gives it to this layer alone), or leave the layer out (exclude_modules)."
            )
        if dilated(host) and host.padding != "same":
            raise PeftLabError(
                f"A {type(host).__name__} with dilation {host.dilation} and kernel {host.kernel_size} cannot carry "
                "LoRA: the update has no dilation, in Hugging Face peft as here, so it would be of another size than "
                "the output. Leave the layer out (exclude_modules)."
            )
        kernel = host.kernel_size
        self.scaling, self.dropout = scaling, config.dropout
        self.lora_A = nn.Parameter(torch.empty(r, host.in_channels, *kernel))
        self.lora_B = nn.Parameter(torch.zeros(host.out_channels, r // host.groups, *(1 for _ in kernel)))
        self.lora_B_bias = nn.Parameter(torch.zeros(host.out_channels)) if config.lora_bias else None
        start(self.lora_A, self.lora_B, config.init)

    def after(self, host: Any, args: tuple, kwargs: dict, output: Tensor, base: Tensor) -> Tensor:
        """Add the update. x: (batch, in, ...), output: (batch, out, ...)."""
        convolve = convolution(host)
        x = cast(first_input(args, kwargs), self.lora_A.dtype)
        x = F.dropout(x, self.dropout, self.training)
        low = convolve(x, self.lora_A, stride=host.stride, padding=host.padding)  # (batch, r, ...)
        update = convolve(low, self.lora_B, self.lora_B_bias, groups=host.groups) * self.scaling
        return (output + update).to(output.dtype)

    def merged(self, host: Any) -> dict[str, Tensor]:
        """Return the host's parameters with the update folded in, not yet rounded to the host's dtype."""
        if host.groups > 1 or dilated(host) or host.padding_mode != "zeros":
            raise PeftLabError(
                f"The update of a {type(host).__name__} with groups={host.groups}, dilation={host.dilation} and "
                f"padding_mode={host.padding_mode!r} cannot be merged: A reads all channels, without dilation, and "
                "pads with zeros, so no weight of this layer computes the same. Keep the adapter attached."
            )
        weight = widened(own_tensor(host, "weight"))
        # W' = W + s B A, all three as matrices: (out, in k k), (out, r), (r, in k k)
        delta = widened(self.lora_B).flatten(1) @ widened(self.lora_A).flatten(1) * self.scaling
        parameters = {"weight": weight + delta.view_as(weight)}
        if self.lora_B_bias is not None:
            parameters["bias"] = biased(host, self.lora_B_bias, self.scaling)
        return parameters


def convolution(host: Any) -> Callable[..., Tensor]:
    """Return torch's function for a convolution of this layer's dimensions."""
    return next(function for kind, function in CONVOLVE.items() if isinstance(host, kind))


def dilated(host: Any) -> bool:
    """Say whether a convolution leaves out places between those it reads."""
    return any(size > 1 and step > 1 for size, step in zip(host.kernel_size, host.dilation, strict=True))


def biased(host: nn.Module, bias: Tensor, scaling: float) -> Tensor:
    """Return the host's bias with that of B folded in."""
    own = tensor_at(host, "bias")
    if own is None:
        raise PeftLabError(
            "lora_bias cannot be merged into a layer without a bias; keep the adapter unmerged, or train it without "
            "lora_bias."
        )
    return widened(own) + widened(bias) * scaling


def start(lora_A: Tensor, lora_B: Tensor, init: str) -> None:
    """Draw A, (r, in, ...), and for `"random"` and `"orthogonal"` also B, (out, r, ...).

    A must not be zero, or B gets no gradient. B A must be zero, or the model starts from another function.
    """
    r = lora_A.shape[0]
    if init == "orthogonal":
        if lora_B.shape[1] != r:
            raise PeftLabError("init='orthogonal' is for layers without groups. Use init='kaiming'.")
        # the rows of Q are orthonormal: A has the odd ones' span and B the even ones', so B A = 0 with neither zero
        q = torch.linalg.qr(torch.randn(r, r)).Q
        odd, even = q[0::2], q[1::2]
        a = torch.randn(lora_A[0].numel(), len(odd)) @ odd / 10
        b = torch.randn(len(even), len(lora_B)).T @ even / 10
        lora_A.data.copy_(a.T.reshape(lora_A.shape))
        lora_B.data.copy_(b.reshape(lora_B.shape))
    elif init == "gaussian":
        nn.init.normal_(lora_A, std=1 / r)
    elif init not in ("kaiming", "random", "eva", "loftq"):  # EVA's and LoftQ's follow
        raise PeftLabError(
            f"init={init!r} starts a plain LoRA on linear layers, and this adapter stands on parameters, or is a "
            "variant of LoRA. Use init='kaiming'."
        )
    else:
        # U(-1/sqrt(in), 1/sqrt(in)): Kaiming's bound sqrt(6 / ((1 + a^2) in)) at a = sqrt(5)
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    if init == "random":
        nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
