"""Hold what methods share that compute a whole update of a weight: y = W x + b + dW x.

    dW: the shape of W, (out, in), or of a convolution (out, in / groups, k, ...)

LoRA multiplies the input by two thin matrices. An update that is no product of thin matrices (LoHa, LoKr) is made in
full and multiplied by the input. It is as large as the weight, so it is not kept for the backward pass: `Remade` keeps
the factors and the input, and makes dW again. In memory such a layer costs what LoRA's does, and for a moment dW.
Around the product of a convolution torch's checkpointing does the same, which takes more time between operations.

In training two dropouts may act, as in Hugging Face peft. `module_dropout` leaves the whole update of a layer out of a
step. `rank_dropout` leaves rows of dW out, that is, outputs of the layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftlab.checks import LARGEST, check_fields, check_kinds, number, one_of, whole
from peftlab.core.interface import Part
from peftlab.core.records import own_tensor
from peftlab.core.targets import (
    Targets,
    check_carrier,
    check_regex,
    default_targets,
    find,
    in_any_order,
    is_conv1d,
    names_match,
    shape_of,
)
from peftlab.errors import PeftLabError
from peftlab.methods.parts import cast, first_input, widened

Pull = Callable[[Tensor], tuple[Tensor, ...]]
CONVOLVE = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d}


class Remade(torch.autograd.Function):
    """Compute x dW^T / s. Only x and the factors of dW are kept; the backward pass makes dW again."""

    @staticmethod
    def forward(ctx: Any, part: DeltaWeight, x: Tensor, *factors: Tensor) -> Tensor:
        """Return x dW^T / s, (..., out). x: (..., in)."""
        ctx.part, ctx.dtype = part, dtype_of_product(x, factors[0])
        ctx.save_for_backward(x, *factors)
        return F.linear(x.to(ctx.dtype), part.product(*(factor.to(ctx.dtype) for factor in factors)))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the factors. gradient: that of x dW^T / s, (..., out)."""
        x, *factors = ctx.saved_tensors
        of_x, of_factors = None, [None] * len(factors)
        delta, pull = ctx.part.product_and_pull(*(factor.to(ctx.dtype) for factor in factors))
        gradient = gradient.reshape(-1, len(delta))
        if ctx.needs_input_grad[1]:
            # dL/dx = dL/dy dW
            of_x = (gradient @ delta).view(x.shape).to(x.dtype)
        del delta
        if any(ctx.needs_input_grad[2:]):
            # dL/ddW = (dL/dy)^T x
            pulled = pull(gradient.T @ x.reshape(-1, x.shape[-1]).to(ctx.dtype))
            of_factors = [mine.to(factor.dtype) for mine, factor in zip(pulled, factors, strict=True)]
        return None, of_x, *of_factors


def dtype_of_product(x: Tensor, parameter: Tensor) -> torch.dtype:
    """Return the dtype in which an adapter computes: that of autocast where it acts, or that of its parameters."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and parameter.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return parameter.dtype


class DeltaWeight(Part):
    """Add dW x to what a layer returns. A subclass has the parameters and computes dW from them.

    Attributes:
        shape: of the layer's weight as a linear layer stores it, (out, in), or (out, in / groups, k, ...).
        rank_dropout, module_dropout: the probabilities of dropping a row of dW, and the whole update.
        rescales: whether the rows that stay are divided by their share, so that the update keeps its size.
        scaling: s.
    """

    rescales: bool = True
    scaling: float

    def __init__(self, host: nn.Module, config: Any) -> None:
        super().__init__()
        self.shape = weight_shape(host)
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout
        self.skips = self.module_dropout > 0

    def factors(self, own: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the small tensors that dW is made from, given the part's parameters by name."""
        raise NotImplementedError

    def product(self, *factors: Tensor) -> Tensor:
        """Return dW / s. Where the layer is a convolution, its shape is given to it afterwards."""
        raise NotImplementedError

    def product_and_pull(self, *factors: Tensor) -> tuple[Tensor, Pull]:
        """Return dW / s of a linear layer, and a function from its gradient to those of the factors."""
        raise NotImplementedError

    def own(self) -> dict[str, Tensor]:
        """Return the part's parameters by name."""
        return {name: parameter for name, parameter in self._parameters.items() if parameter is not None}

    def update(self, own: Mapping[str, Tensor]) -> Tensor:
        """Return dW from the part's parameters, or from tensors that stand for them, by name."""
        return self.product(*self.factors(own)) * self.scaling

    def delta(self) -> Tensor:
        """Return dW in the shape of the weight, in the adapter's dtype and with gradients."""
        return self.update(self.own()).reshape(self.shape)

    def after(self, host: Any, args: tuple, kwargs: dict, output: Tensor, base: Tensor) -> Tensor:
        """Add the update. x: (..., in), output: (..., out); of a convolution (batch, channels, ...)."""
        own = self.own()
        rows = None
        if self.training and (self.module_dropout or self.rank_dropout):
            # peft draws one number for the module, and then one for each row; equal seeds give equal masks
            if not torch.rand(1) > self.module_dropout:
                return output
            rows = self.kept_rows(next(iter(own.values())).dtype) if self.rank_dropout else None

        x = first_input(args, kwargs)
        if len(self.shape) == 2:
            update = Remade.apply(self, x, *self.factors(own))
        elif torch.is_grad_enabled():
            update = checkpoint(self.convolved, host, x, use_reentrant=False, preserve_rng_state=False)
        else:
            update = self.convolved(host, x)
        if rows is not None:  # a row of dW is an output of the layer
            update = update * rows[..., 0].to(update.device)
        # y = W x + b + s (dW / s) x
        return torch.add(output, update, alpha=self.scaling).to(output.dtype)

    def convolved(self, host: Any, x: Tensor) -> Tensor:
        """Return what a convolution with dW / s gives. x: (batch, channels, ...)."""
        delta = self.product(*self.factors(self.own())).reshape(self.shape)
        convolve = next(function for kind, function in CONVOLVE.items() if isinstance(host, kind))
        return convolve(cast(x, delta.dtype), delta, None, host.stride, host.padding, host.dilation, host.groups)

    def kept_rows(self, dtype: torch.dtype) -> Tensor:
        """Draw which rows of dW stay: (out, 1, ...), ones and zeros, divided by the share of ones if `rescales`."""
        rows = (torch.rand(self.shape[0]) > self.rank_dropout).to(dtype)
        if self.rescales:
            rows = rows / rows.mean().clamp_min(1 / len(rows))  # with no row left, peft would divide by zero
        return rows.view(-1, *[1] * (len(self.shape) - 1))

    def merged(self, host: nn.Module) -> dict[str, Tensor]:
        """Return the host's weight with the update folded in, not yet rounded to the host's dtype."""
        if getattr(host, "padding_mode", "zeros") != "zeros":
            raise PeftLabError(
                f"The update of a {type(host).__name__} with padding_mode={host.padding_mode!r} cannot be merged: it "
                "pads its input with zeros, as in Hugging Face peft, and so does not compute what a changed weight "
                "would. Keep the adapter attached."
            )
        # W' = W + dW
        delta = self.update({name: widened(parameter) for name, parameter in self.named_parameters()})
        return {"weight": widened(own_tensor(host, "weight")) + delta.reshape(self.shape)}


def weight_shape(host: Any) -> tuple[int, ...]:
    """Return the shape of a layer's weight: (out, in), also of a 4-bit one, or that of a convolution."""
    if isinstance(host, (nn.Conv1d, nn.Conv2d)):
        return (host.out_channels, host.in_channels // host.groups, *host.kernel_size)
    inside, outside = shape_of(host)
    return outside, inside


def find_plain(model: nn.Module, config: Targets, name: str) -> dict[str, nn.Module]:
    """Return the modules that a config names, all of them layers that such a method has a form for.

    Args:
        name: the method's, for errors.
    """
    return find_by_default(model, config, functools.partial(check_plain, name))


def find_by_default(
    model: nn.Module, config: Targets, check: Callable[[nn.Module, str, nn.Module], None]
) -> dict[str, nn.Module]:
    """Return the modules that a config names; by default the query and value projections that are no Conv1D."""

    def default(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        names = default_targets(modules)
        return {path: host for path, host in modules.items() if names_match(names, path) and not is_conv1d(host)}

    return find(model, config, default, check)


def check_plain(name: str, model: nn.Module, path: str, host: nn.Module) -> None:
    """Refuse a layer for which Hugging Face peft's form of the method does not exist."""
    check_carrier(model, path, host)
    if is_conv1d(host) or isinstance(host, (nn.Embedding, nn.Conv3d)):
        kind = "an embedding" if isinstance(host, nn.Embedding) else f"a {type(host).__name__}"
        raise PeftLabError(
            f"{path} is {kind}, for which {name} has no form, in Hugging Face peft as here; it stands on Linear, "
            "Conv1d and Conv2d layers. Name other layers in target_modules, or use LoRAConfig."
        )


def check_settings(config: Any) -> None:
    """Check the fields that these methods share, and bring the tables of patterns to plain numbers."""
    check_kinds(config, "rank_pattern", "alpha_pattern")
    for key in (*config.rank_pattern, *config.alpha_pattern):
        check_regex(key)
    check_fields(config, whole, "r", least=1, usual="4 to 32")
    check_fields(config, number, "alpha", above=0, usual="r to 2 r")
    check_fields(config, number, "rank_dropout", "module_dropout", least=0, below=1)
    check_fields(config, one_of, "use_effective_conv2d", known=(True, False))
    ranks = {key: whole(f"rank_pattern[{key!r}]", r, least=1) for key, r in config.rank_pattern.items()}
    alphas = {
        key: number(f"alpha_pattern[{key!r}]", a, above=0, ceiling=LARGEST) for key, a in config.alpha_pattern.items()
    }
    object.__setattr__(config, "rank_pattern", ranks)
    object.__setattr__(config, "alpha_pattern", alphas)


def shared_fields(config: Any, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return the fields of Hugging Face's `adapter_config.json` that these methods share."""
    names = ("r", "alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights")
    patterns = ("rank_pattern", "alpha_pattern")
    tables = {name: in_any_order(getattr(config, name), hosts) for name in patterns}
    return {name: getattr(config, name) for name in names} | tables


def shared_arguments(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments for the fields that these methods share: the reverse of `shared_fields`."""
    return {
        "r": fields.get("r", 8),
        "alpha": fields.get("alpha", 8),
        "rank_dropout": fields.get("rank_dropout", 0.0),
        "module_dropout": fields.get("module_dropout", 0.0),
        "use_effective_conv2d": bool(fields.get("use_effective_conv2d", False)),
        "rank_pattern": fields.get("rank_pattern") or {},
        "alpha_pattern": fields.get("alpha_pattern") or {},
    }
