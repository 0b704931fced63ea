"""Train 16-bit parameters with float32 masters.

A bfloat16 number has 8 significant bits. Next to a weight w, a step smaller than w / 512 is rounded away, and most of a
run's steps are. So the optimiser moves a copy in float32, the master, and the model gets the master rounded:

    g = dL/dtheta, in 16 bits           theta is what the model computes with
    master <- optimiser(master, g)      master, m and v in float32
    theta <- round(master)

An adapter then takes 2 bytes per parameter in the model, 2 for the gradient and, with AdamW, 12 in the optimiser: 16
bytes, as in float32. Nothing has to be cast for a product with the 16-bit base any more, which saves time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftlab.core.hooks import is_adapter_name

Groups = list[dict[str, Any]]
MASTER = "master"  # a state's name, in memory and in a checkpoint


def need_masters(parameters: Mapping[str, nn.Parameter]) -> bool:
    """Say whether an adapter trains in bfloat16. A base that was loaded so trains as it is."""
    return any(p.dtype == torch.bfloat16 and is_adapter_name(name) for name, p in parameters.items())


class WithMasters(torch.optim.Optimizer):
    """An optimiser over float32 masters of 16-bit parameters. It moves other parameters themselves.

    Args:
        groups: what torch's optimisers take.
        make: groups -> the optimiser that moves the masters.

    Attributes:
        state: of each parameter what that optimiser keeps, and the master.
    """

    def __init__(self, groups: Groups, make: Callable[[Groups], torch.optim.Optimizer]) -> None:
        every = [p for group in groups for p in group["params"]]
        self.masters = {p: nn.Parameter(p.detach().float()) for p in every if p.dtype == torch.bfloat16}
        self.inner = make([{**group, "params": [self.masters.get(p, p) for p in group["params"]]} for group in groups])
        super().__init__(groups, dict(self.inner.defaults))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closure is used
        """Move the masters, and round them into the parameters."""
        for mine, its in zip(self.param_groups, self.inner.param_groups, strict=True):
            its.update({key: value for key, value in mine.items() if key != "params"})
        moved = [(p, master) for p, master in self.masters.items() if p.grad is not None]
        narrow: list[Tensor] = [p for p, _ in moved]
        wide: list[Tensor] = [master for _, master in moved]
        if moved:
            self._give_gradients(narrow, wide)
        told: Any = self.inner
        told.found_inf = getattr(self, "found_inf", None)  # where it is 1, a fused step changes nothing
        self.inner.step()
        del told.found_inf
        if moved:
            # theta <- round(master)
            torch._foreach_copy_(narrow, wide)
        for master in wide:
            master.grad = None
        self._show()

    @torch.no_grad()
    def follow(self, changed: Sequence[Tensor]) -> None:
        """Take over what was changed in parameters since the step: where a master does not round to it any more."""
        for p in changed:
            master = self.masters.get(cast(nn.Parameter, p))
            if master is not None:
                master.copy_(torch.where(master.to(p.dtype) == p, master, p.float()))

    def _give_gradients(self, narrow: list[Tensor], wide: list[Tensor]) -> None:
        """Let the masters have the parameters' gradients in float32, all in one piece of memory."""
        pieces = wide[0].new_empty(sum(p.numel() for p in wide)).split([p.numel() for p in wide])
        for master, piece in zip(wide, pieces, strict=True):
            master.grad = piece.view_as(master)
        torch._foreach_copy_(list(pieces), [p.grad.reshape(-1) for p in narrow if p.grad is not None])

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the states of an earlier run. Without a master in them it starts from the parameter."""
        every = [p for group in self.param_groups for p in group["params"]]
        states = {index: dict(state) for index, state in state_dict["state"].items()}
        with torch.no_grad():
            for index, p in enumerate(every):
                if p in self.masters:
                    self.masters[p].copy_(states.get(index, {}).pop(MASTER, p))
        self.inner.load_state_dict({**self.inner.state_dict(), "state": states})
        self.state.clear()
        self._show()

    def _show(self) -> None:
        """Let `state` hold what the inner optimiser keeps of each parameter, and its master."""
        for group in self.param_groups:
            for p in group["params"]:
                master = self.masters.get(p)
                held = self.inner.state.get(p if master is None else master)
                own = {} if master is None else {MASTER: master.detach()}
                if held and self.state.get(p) is not held:
                    held.update(own)
                    self.state[p] = held
                elif own and p not in self.state:  # torch's AdamW takes an empty state for one to be made
                    self.state[p] = own
