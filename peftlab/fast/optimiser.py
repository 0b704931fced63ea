"""Lay all trained matrices into one flat tensor, so that clipping and AdamW take a few kernels instead of hundreds.

The parameters, their gradients and AdamW's states are views of it, each in its own place:

    theta = [A_1, B_1, B_2, ...],    g, m, v likewise

    m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g^2
    theta <- (1 - lr decay) theta - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

From outside it looks like torch's AdamW over the same parameters: its states have the same names and shapes, so that a
run goes on with the one from where it stopped with the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Flat:
    """The trained parameters in one tensor.

    Attributes:
        whole: all of them, with the gradient of all of them in `whole.grad`, in float32 or wider.
        parameters: each, in its order; `gradients`: its part of the gradient.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        first = self.parameters[0]
        self.whole = nn.Parameter(first.detach().new_empty(sum(p.numel() for p in self.parameters)))
        self.whole.grad = torch.zeros_like(self.whole)
        self.gradients = self.views(self.whole.grad)
        self.places = self.views(self.whole.detach())
        self._gather()

    def _gather(self) -> None:
        """Let each parameter be its place in the tensor, with the values that it has now."""
        for parameter, place in zip(self.parameters, self.places, strict=True):
            if parameter.data_ptr() != place.data_ptr():
                place.copy_(parameter.detach())
                parameter.data = place

    def views(self, whole: Tensor) -> list[Tensor]:
        """Return the part of a tensor like `whole` that belongs to each parameter, in its shape."""
        sizes = [p.numel() for p in self.parameters]
        return [part.view(p.shape) for part, p in zip(whole.split(sizes), self.parameters, strict=True)]

    def begin(self) -> None:
        """Set all gradients to zero, and let each parameter's `grad` be its part of them."""
        assert self.whole.grad is not None
        self._gather()  # a callback may have put new values in a parameter's place, p.data = ...
        self.whole.grad.zero_()
        if self.parameters[0].grad is not self.gradients[0]:
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = gradient

    def give_back(self) -> None:
        """Give each parameter memory of its own again."""
        for parameter in self.parameters:
            parameter.grad = None
            parameter.data = parameter.detach().clone()


class FlatAdamW(torch.optim.Optimizer):
    """AdamW over a `Flat`: betas 0.9 and 0.999, eps 1e-8, as in torch and transformers.

    Args:
        groups: one group of all its parameters, as torch's optimisers take it.
    """

    def __init__(self, flat: Flat, groups: Iterable[Mapping[str, Any]], lr: float) -> None:
        fused = flat.whole.device.type == "cuda"
        super().__init__([dict(group) for group in groups], {"lr": lr, "weight_decay": 0.0, "fused": fused})
        self.flat = flat
        self._adamw: Any = torch.optim.AdamW([flat.whole], lr=lr, fused=fused)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closure is used
        """Move the parameters."""
        (group,), (mine,) = self.param_groups, self._adamw.param_groups
        mine |= {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        self._adamw.found_inf = getattr(self, "found_inf", None)  # where it is 1, a fused step changes nothing
        self._adamw.step()
        if not self.state:
            self._show()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Leave the gradients: `Flat.begin` clears them before the next step."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the states of an AdamW over the same parameters."""
        super().load_state_dict(dict(state_dict))
        if not self.state:
            return
        held = [self.state[parameter] for parameter in self.flat.parameters]
        states: dict[str, Tensor] = {"step": torch.as_tensor(held[0]["step"]).clone()}
        if self.defaults["fused"]:
            states["step"] = states["step"].to(self.flat.whole.device)
        for name in ("exp_avg", "exp_avg_sq"):
            states[name] = torch.cat([state[name].reshape(-1) for state in held])
        self._adamw.state[self.flat.whole] = states
        self._show()

    def _show(self) -> None:
        """Let `state` hold each parameter's part of the states."""
        whole = self._adamw.state[self.flat.whole]
        parts = zip(self.flat.views(whole["exp_avg"]), self.flat.views(whole["exp_avg_sq"]), strict=True)
        for parameter, (mean, square) in zip(self.flat.parameters, parts, strict=True):
            self.state[parameter] = {"step": whole["step"], "exp_avg": mean, "exp_avg_sq": square}
