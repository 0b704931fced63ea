"""The optimisers by name, and which parameters have weight decay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftlab import optional
from peftlab.checks import one_of
from peftlab.errors import warn
from peftlab.fast.groups import Flat
from peftlab.training.masters import WithMasters, need_masters

Groups = list[dict[str, Any]]


def adamw(groups: Groups, lr: float, device: torch.device) -> torch.optim.Optimizer:
    """Make AdamW with betas 0.9 and 0.999 and eps 1e-8, as in torch and transformers. Two states per parameter."""
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=device.type == "cuda")


def sgd(groups: Groups, lr: float, device: torch.device) -> torch.optim.Optimizer:
    """Make gradient descent without momentum. It keeps no state."""
    return torch.optim.SGD(groups, lr=lr)


def adamw8bit(groups: Groups, lr: float, device: torch.device) -> torch.optim.Optimizer:
    """Make bitsandbytes' AdamW, whose two states take 2 bytes per trained parameter instead of 8.

    The states are stored in 8 bits, with one scale for each 256 of them (Dettmers et al., 2021, arXiv:2110.02861).
    Tensors below 4,096 elements keep 32-bit states. If bitsandbytes is missing or has no such kernel, `adamw` runs
    instead, and a warning says so.
    """
    return _eight_bit("AdamW8bit", groups, lr, device)


def paged_adamw8bit(groups: Groups, lr: float, device: torch.device) -> torch.optim.Optimizer:
    """Make `adamw8bit` with its states in unified memory: when the GPU is full, the driver moves them to main memory.

    See Dettmers et al., 2023, arXiv:2305.14314, section 3. It helps at a peak of memory and saves nothing otherwise.
    Without CUDA there is no unified memory, so `adamw8bit` runs instead, and a warning says so.
    """
    if device.type == "cuda":
        return _eight_bit("PagedAdamW8bit", groups, lr, device)
    warn(
        f"optimizer='paged-adamw8bit' pages between a GPU's memory and the computer's, and the model is on {device}: "
        "its states stay where they are (adamw8bit).",
    )
    return adamw8bit(groups, lr, device)


def _eight_bit(kind: str, groups: Groups, lr: float, device: torch.device) -> torch.optim.Optimizer:
    library: Any = optional.available("bitsandbytes")
    reason = "bitsandbytes is not installed (pip install bitsandbytes)" if library is None else None
    if library is not None and device.type != "cuda":
        # Whether there are kernels for this device depends on the release. Try a small step.
        probe = nn.Parameter(torch.zeros(8192, device=device))
        probe.grad = torch.ones_like(probe)
        try:
            library.optim.AdamW8bit([probe], lr=1.0).step()
        except Exception as error:  # whatever a missing kernel raises
            reason = f"bitsandbytes {library.__version__} has no 8-bit AdamW for {device} ({type(error).__name__})"
    if reason:
        states = "adamw runs instead, whose states take 8 bytes per trained parameter, not 2"
        warn(f"{reason}; {states}.")
        return adamw(groups, lr, device)
    return getattr(library.optim, kind)(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8)


# A new optimiser is one function here: (groups, learning rate, device) -> torch.optim.Optimizer.
OPTIMIZERS: dict[str, Callable[[Groups, float, torch.device], torch.optim.Optimizer]] = {
    "adamw": adamw, "adamw8bit": adamw8bit, "paged-adamw8bit": paged_adamw8bit, "sgd": sgd,
}  # fmt: skip


def make_optimizer(
    name: str,
    parameters: Mapping[str, nn.Parameter],
    lr: float,
    weight_decay: float,
    device: torch.device,
    groups: Groups | None = None,
) -> torch.optim.Optimizer:
    """Make the optimiser of that name over two groups of parameters: those with weight decay and those without.

    An adapter in bfloat16 gets float32 masters (`peftlab.training.masters`).

    Args:
        groups: other groups of the same parameters, with learning rates of their own (`peftlab.training.loraplus`).
    """
    kind = OPTIMIZERS[one_of("optimizer", name, OPTIMIZERS)]
    groups = decay_groups(parameters, weight_decay) if groups is None else groups
    if need_masters(parameters):
        return WithMasters(groups, lambda masters: kind(masters, lr, device))
    return kind(groups, lr, device)


def skips_when_told(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Say whether a GPU can decide by itself that this optimiser makes no step: torch's fused ones can."""
    return device.type == "cuda" and bool(optimizer.defaults.get("fused"))


def note_wrong(wrong: Tensor, numbers: Tensor, one: Tensor) -> None:
    """Set `wrong` to 1 if one of the numbers is not finite.

    The device does this by itself, in the one kernel by which a `GradScaler` looks at gradients. That kernel also
    multiplies the numbers, here by `one`. All are on one device; `wrong` and `one` are float32 scalars.
    """
    torch._amp_foreach_non_finite_check_and_unscale_([numbers], wrong, one)


def step_unless(wrong: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Make a step unless `wrong`, a scalar on the GPU, is 1. Parameters and states then stay as they are.

    The CPU does not wait to know it. A fused optimiser of torch reads the attribute, as under a loss scale.
    """
    told: Any = optimizer
    told.found_inf = wrong
    optimizer.step()
    del told.found_inf


def decay_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> Groups:
    """Return two groups: matrices, which decay, and everything else (biases, norms, vectors), which does not.

    Decay pulls values towards zero. For a matrix this prefers small weights. It would harm the scale of a norm, whose
    neutral value is one, and a bias.
    """
    decayed = [p for name, p in parameters.items() if _decays(name, p)]
    others = [p for name, p in parameters.items() if not _decays(name, p)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not name.endswith("bias")


def flattened(plain: torch.optim.Optimizer, flat: Flat) -> torch.optim.Optimizer:
    """Return AdamW over a flat tensor, with the plain one's states and settings; another optimiser as it is."""
    if type(plain) is not torch.optim.AdamW or len(plain.param_groups) > 1:
        return plain
    return FlatAdamW(flat, plain)


class FlatAdamW(torch.optim.Optimizer):
    """AdamW in a few kernels instead of dozens, because all that is trained is one flat tensor.

        theta = [A_1, B_1, A_2, ...],    g, m, v likewise

        m <- b1 m + (1 - b1) g,    v <- b2 v + (1 - b2) g^2
        theta <- (1 - lr decay) theta - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    From outside it looks like torch's AdamW over the same parameters: its states have the same names and shapes, so
    that a run goes on with the one from where it stopped with the other.

    Args:
        plain: torch's AdamW over the same parameters in one group, whose settings and states are taken over.
    """

    def __init__(self, flat: Flat, plain: torch.optim.AdamW) -> None:
        super().__init__([dict(group) for group in plain.param_groups], plain.defaults)
        self.flat = flat
        self._adamw: Any = torch.optim.AdamW([flat.whole], lr=plain.defaults["lr"], fused=plain.defaults["fused"])
        self.load_state_dict(plain.state_dict())

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
