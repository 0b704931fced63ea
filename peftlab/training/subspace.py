"""Training in a random subspace: the weights of a model moved along d random directions and no others.

    W = W0 + P z,    z: (d,), all that trains;    P: fixed, random, with orthogonal columns

Li et al., *Measuring the Intrinsic Dimension of Objective Landscapes*, 2018, arXiv:1804.08838, section 2. They draw P
dense or by Fastfood; here entry j of all weights takes coordinate j mod d with a random sign, so that P is not stored,
its columns are orthogonal, and each weight moves by as much as a coordinate does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Along(nn.Module):
    """One weight of the subspace. z: (d,), shared by all weights; offset: the number of entries before this weight."""

    def __init__(self, z: nn.Parameter, weight: Tensor, offset: int, generator: torch.Generator) -> None:
        super().__init__()
        self.signs: Tensor
        self.z, self.start = z, offset % len(z)
        signs = torch.randint(2, weight.shape, generator=generator, device=weight.device, dtype=torch.int8)
        self.register_buffer("signs", 2 * signs - 1, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """W0 + P z. weight: (out, in)."""
        times = -(-(self.start + weight.numel()) // len(self.z))
        coordinates = self.z.repeat(times)[self.start : self.start + weight.numel()]
        return weight + self.signs * coordinates.view_as(weight)


def move_along(model: nn.Module, dimension: int, seed: int) -> nn.Parameter:
    """Freezes a model and lets the weights of its linear layers (the tied head not) move along `dimension` directions.

    Returns z, zero at the start.
    """
    model.requires_grad_(False)
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) not in tied]
    device = linears[0].weight.device
    z = nn.Parameter(torch.zeros(dimension, device=device))
    generator = torch.Generator(device).manual_seed(seed)
    offset = 0
    for linear in linears:
        size = linear.weight.numel()
        parametrize.register_parametrization(linear, "weight", Along(z, linear.weight, offset, generator))
        offset += size
    return z
