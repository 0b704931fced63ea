"""GaLore: full training whose optimiser looks at each gradient in a few directions only.

LoRA keeps the *weight's change* in r directions. GaLore lets the weight move anywhere, and keeps Adam's two states
small instead: it projects the gradient G (out x in) onto r directions, which are computed anew every so often.

    U, S, V^T = svd(G),    P = the first r columns of U                       (every `every` steps)
    R = P^T G,    N = Adam(R),    W <- W - rate * scale * P N                  (R and N: r x in)

Each stretch of `every` steps changes W by a matrix of rank r at most. The next stretch has other directions, so the sum
of all changes can have any rank. If a matrix has fewer columns than rows, the projection is taken on the other side.

See Zhao et al., *GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection*, 2024, arXiv:2403.03507,
algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def directions(gradient: Tensor, r: int) -> Tensor:
    """Return the r directions in which a gradient is largest, as orthonormal columns.

    Args:
        gradient: (out, in).

    Returns:
        (out, r) if out <= in: the left singular vectors of the r largest singular values. Else (in, r), the right ones.

    >>> from peftlab.training.low_rank import directions
    >>> directions(torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 5.0]]), r=1).abs()
    tensor([[0.],
            [1.]])
    """
    out, width = gradient.shape
    wide = gradient if out <= width else gradient.T
    left = torch.linalg.svd(wide.float(), full_matrices=False).U
    return left[:, :r].to(gradient.dtype)


class GaLore(torch.optim.Optimizer):
    """Adam with the states of each matrix in r directions. Groups with `r` None get plain Adam.

    Args:
        groups: parameters, or dicts of `params` and settings of their own.
        lr: the learning rate.
        r: directions per matrix.
        every: steps until the directions are computed anew.
        scale: what the update of a projected matrix is multiplied by.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float,
        r: int | None = 16,
        every: int = 200,
        scale: float = 1.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "r": r, "every": every, "scale": scale})

    @torch.no_grad()
    def step(  # type: ignore[override]  # no closure
        self, closure: None = None
    ) -> None:
        """Make one update of all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, r = self.state[weight], group["r"]
        t = state["step"] = state.get("step", 0) + 1
        low = r is not None and gradient.ndim == 2 and r < min(gradient.shape)
        turned = low and gradient.shape[0] > gradient.shape[1]
        if low:
            if (t - 1) % group["every"] == 0:
                state["directions"] = directions(gradient, r)
            gradient = gradient.T if turned else gradient
            gradient = state["directions"].T @ gradient  # R = P^T G
        if t == 1:
            state["mean"] = torch.zeros_like(gradient)
            state["square"] = torch.zeros_like(gradient)
        mean = state["mean"].lerp_(gradient, 0.1)  # m = 0.9 m + 0.1 g
        # v = 0.999 v + 0.001 g^2
        square = state["square"].lerp_(gradient.square(), 0.001)
        update = mean / (1 - 0.9**t) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)  # N
        if low:
            update = group["scale"] * state["directions"] @ update
        weight.sub_(update.T if turned else update, alpha=group["lr"])
