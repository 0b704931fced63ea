"""The parts of AdaLoRA: an update in the form of an SVD, and what its triplets matter to the loss.

    y = W x + b + s P diag(e) Q x,    x: (..., in),  y: (..., out),  Q: (r, in),  P: (out, r),  e: (r, 1)

See `adalora.py`, which has the whole of the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.core.interface import Part
from peftlab.core.records import own_tensor
from peftlab.core.targets import check_called, is_conv1d, shape_of
from peftlab.errors import PeftLabError
from peftlab.methods.parts import cast, first_input, widened

MATRICES = ("lora_A", "lora_B", "lora_E")
SMALL = 1e-5  # beside the rank, in the divisor of the scaling


class AdaLoRALinear(Part):
    """Add the update s P diag(e) Q x to what a linear layer returns.

    The layer is an `nn.Linear`, a `Conv1D` or a quantised linear.

    Attributes:
        lora_A: Q, (r, in). lora_E: e, (r, 1). lora_B: P, (out, r).
        ranknum: (1,), the rank at the start, by which the update is scaled. It does not train.
        kept: (r,), which triplets the last allocation kept.
        averages: {parameter: (its sensitivity, averaged; how far the sensitivity lies from that average, averaged)}.
    """

    keys = {"rows_A": "{path}.lora_A", "rows_E": "{path}.lora_E", "columns_B": "{path}.lora_B"}
    frozen = ("ranknum",)

    def __init__(self, host: nn.Module, r: int, config: Any) -> None:
        super().__init__()
        outside, inside = self.sizes(host)
        self.alpha, self.dropout = config.alpha, config.dropout
        # Conv1D stores its weight (in, out)
        self.transposed = is_conv1d(host)
        drawn = config.init == "random"
        self.lora_A = nn.Parameter(torch.randn(r, inside) * (1 if drawn else 0.02))
        self.lora_B = nn.Parameter(torch.randn(outside, r) * (1 if drawn else 0.02))
        self.lora_E = nn.Parameter(torch.randn(r, 1) if drawn else torch.zeros(r, 1))
        self.ranknum = nn.Parameter(torch.tensor([float(config.init_r)]), requires_grad=False)
        self.kept = torch.ones(r, dtype=torch.bool)
        self.averages: dict[str, tuple[Tensor, Tensor]] = {}

    def sizes(self, host: Any) -> tuple[int, int]:
        """Return (out, in) of the update as a matrix."""
        inside, outside = shape_of(host)
        return outside, inside

    def after(self, host: nn.Module, args: tuple, kwargs: dict, output: Tensor, base: Tensor) -> Tensor:
        """Add the update. x: (..., in), output: (..., out)."""
        x = cast(first_input(args, kwargs), self.lora_A.dtype)
        x = F.dropout(x, self.dropout, self.training)
        # y = W x + b + s P (diag(e) Q x)
        low = F.linear(x, self.lora_A * self.lora_E)  # (..., r)
        update = F.linear(low, self.lora_B) * self.alpha / (self.ranknum + SMALL)
        return (output + update).to(output.dtype)

    def delta(self) -> Tensor:
        """Return the update of the weight, (out, in), in the adapter's dtype and with gradients."""
        # dW = s P diag(e) Q
        return (self.lora_B @ (self.lora_A * self.lora_E)) * self.alpha / (self.ranknum + SMALL)

    def merged(self, host: nn.Module) -> dict[str, Tensor]:
        """Return the host's weight with the update folded in, not yet rounded to the host's dtype."""
        # W' = W + s P diag(e) Q
        delta = widened(self.lora_B) @ (widened(self.lora_A) * widened(self.lora_E))
        delta = delta * self.alpha / (widened(self.ranknum) + SMALL)
        weight = widened(own_tensor(host, "weight"))
        return {"weight": weight + (delta.T if self.transposed else delta).reshape(weight.shape)}

    # -- what the file holds: only the triplets that compute something ---------------------------------------------

    @property
    def held(self) -> Tensor:
        """Which triplets count, (r,): those that were kept, and those that came back since (their e is not zero)."""
        kept = self.kept.to(self.lora_E.device)
        return kept if kept.all() else kept | (self.lora_E.detach().flatten() != 0)

    @property
    def rows_A(self) -> Tensor:
        """Return Q without pruned rows; Q itself where nothing is pruned."""
        return self.lora_A if self.held.all() else self.lora_A[self.held]

    @property
    def rows_E(self) -> Tensor:
        """Return e without what is pruned."""
        return self.lora_E if self.held.all() else self.lora_E[self.held]

    @property
    def columns_B(self) -> Tensor:
        """Return P without pruned columns."""
        return self.lora_B if self.held.all() else self.lora_B[:, self.held]

    # -- what training asks for ------------------------------------------------------------------------------------

    def gathered(self) -> dict[str, Tensor]:
        """Return the masks and averages, which a killed run needs again."""
        pairs = {
            f"{name}/{kind}": one for name, two in self.averages.items() for kind, one in zip("mu", two, strict=True)
        }
        return {"kept": self.kept, **pairs}

    def take(self, gathered: Mapping[str, Tensor]) -> None:
        """Take what `gathered` returned."""
        self.kept = gathered["kept"].to(self.lora_E.device)
        names = [name for name in MATRICES if f"{name}/m" in gathered]
        self.averages = {
            name: (gathered[f"{name}/m"].to(self.lora_E.device), gathered[f"{name}/u"].to(self.lora_E.device))
            for name in names
        }

    def importance(self) -> Tensor:
        """Return the importance of each triplet, (r,): that of its e, and the means of its row and its column."""
        a, b, e = (mean * spread for mean, spread in (self.averages[name] for name in MATRICES))  # S = m u
        return e.flatten() + (a.mean(1) + b.mean(0))

    @torch.no_grad()
    def prune(self) -> None:
        """Set e to zero where a triplet is not kept."""
        if self.kept.device.type == "cpu" and self.kept.all():  # as it was made: nothing was pruned yet
            return
        self.lora_E.masked_fill_(~self.kept.to(self.lora_E.device)[:, None], 0.0)


class AdaLoRAConv(AdaLoRALinear):
    """Add the update to a 2D convolution: a weight of its shape, made of the matrix s P diag(e) Q."""

    def sizes(self, host: nn.Conv2d) -> tuple[int, int]:
        """Return (out, in k k)."""
        return host.out_channels, host.in_channels * host.kernel_size[0] * host.kernel_size[1]

    def after(self, host: Any, args: tuple, kwargs: dict, output: Tensor, base: Tensor) -> Tensor:
        """Add the update. x: (batch, in, ...), output: (batch, out, ...)."""
        x = cast(first_input(args, kwargs), self.lora_A.dtype)
        x = F.dropout(x, self.dropout, self.training)
        delta = self.delta().reshape(own_tensor(host, "weight").shape)
        update = F.conv2d(x, delta, None, host.stride, host.padding, host.dilation, host.groups)
        return (output + update).to(output.dtype)

    def merged(self, host: Any) -> dict[str, Tensor]:
        """Return the host's weight with the update folded in."""
        if host.padding_mode != "zeros":
            raise PeftLabError(
                f"The update of a Conv2d with padding_mode={host.padding_mode!r} cannot be merged: it pads with zeros, "
                "in Hugging Face peft as here. Keep the adapter attached."
            )
        return super().merged(host)


def orthogonality(matrices: Sequence[Tensor]) -> Tensor:
    """Return the sum of |M M^T - I| over matrices M, (r, n) each: a scalar with gradients.

    Matrices of one shape are computed together, since a GPU takes no longer for a hundred of them than for one.
    """
    groups: dict[tuple, list[Tensor]] = {}
    for matrix in matrices:
        groups.setdefault((matrix.shape, matrix.device, matrix.dtype), []).append(matrix)
    sums = []
    for group in groups.values():
        m = torch.stack(group)
        m = m.float() if m.dtype in (torch.float16, torch.bfloat16) else m
        eye = torch.eye(m.shape[1], device=m.device, dtype=m.dtype)
        sums.append(torch.linalg.matrix_norm(m @ m.mT - eye).sum().to(matrices[0].device))
    return torch.stack(sums).sum()


@torch.no_grad()
def remember(parts: Sequence[AdaLoRALinear], beta1: float, beta2: float) -> None:
    """Bring the averages of all parts up to date with this step's gradients."""
    places = [(part, name) for part in parts for name in MATRICES]
    parameters: list[Tensor] = [part.get_parameter(name) for part, name in places]
    now = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    # I = |p dL/dp|
    now = list(torch._foreach_abs(torch._foreach_mul(now, parameters)))
    old = [part.averages.get(name) or (torch.zeros_like(p),) * 2 for (part, name), p in zip(places, now, strict=True)]
    # m <- beta1 m + (1 - beta1) I;    u <- beta2 u + (1 - beta2) |I - m|
    means = torch._foreach_add(torch._foreach_mul([m for m, _ in old], beta1), torch._foreach_mul(now, 1 - beta1))
    apart = torch._foreach_abs(torch._foreach_sub(now, means))
    spreads = torch._foreach_add(torch._foreach_mul([u for _, u in old], beta2), torch._foreach_mul(apart, 1 - beta2))
    for (part, name), mean, spread in zip(places, means, spreads, strict=True):
        part.averages[name] = mean, spread


def check_host(model: nn.Module, path: str, host: nn.Module) -> None:
    """Refuse a module that cannot carry AdaLoRA."""
    check_called(model, path)
    if not isinstance(host, (nn.Linear, nn.Conv2d)) and not is_conv1d(host):
        raise PeftLabError(
            f"{path} is a {type(host).__name__}; AdaLoRA stands on Linear, Conv1D and Conv2d layers, in Hugging Face "
            "peft as here. Leave it out, or use LoRAConfig."
        )
    if isinstance(host, nn.Conv2d) and host.groups > 1:
        raise PeftLabError(
            f"{path} is a Conv2d of {host.groups} groups, whose weight the matrix of AdaLoRA's update does not fit, in "
            "Hugging Face peft as here. Leave it out, or use LoRAConfig."
        )
