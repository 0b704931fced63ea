"""Training in a random subspace: a model's weights move only along d random directions.

    W = W0 + P z,    z: (d,), the only trained values;    P: fixed, random, with orthogonal columns

See Li et al., *Measuring the Intrinsic Dimension of Objective Landscapes*, 2018, arXiv:1804.08838, section 2. They draw
a dense P, or one by Fastfood. Here all weights are numbered, and entry j moves with coordinate j mod d, times a random
sign. So P need not be stored, its columns are orthogonal, and each weight moves as far as its coordinate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Along(nn.Module):
    """One weight in the subspace.

    Args:
        z: (d,), the coordinates, shared by all weights.
        offset: the number of entries in the weights before this one, kept modulo d.
    """

    def __init__(self, z: nn.Parameter, weight: Tensor, offset: int, generator: torch.Generator) -> None:
        super().__init__()
        self.signs: Tensor
        self.z, self.offset = z, offset % len(z)
        signs = torch.randint(2, weight.shape, generator=generator, device=weight.device, dtype=torch.int8)
        self.register_buffer("signs", 2 * signs - 1, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """W0 + P z. weight: (out, in)."""
        times = -(-(self.offset + weight.numel()) // len(self.z))
        coordinates = self.z.repeat(times)[self.offset : self.offset + weight.numel()]
        return weight + self.signs * coordinates.view_as(weight)


def move_along(model: nn.Module, dimension: int, seed: int) -> nn.Parameter:
    """Freeze a model, then train its linear weights (except a tied head) only along `dimension` random directions.

    Returns the coordinates z, which start at zero.
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
