"""The optimisers by name, and which parameters decay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import PeftLabError, did_you_mean

Groups = list[dict[str, Any]]


def adamw(groups: Groups, lr: float, device: torch.device) -> torch.optim.Optimizer:
    """AdamW with betas 0.9 and 0.999 and eps 1e-8 as in torch and transformers: two states a trainable parameter."""
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=device.type == "cuda")


def sgd(groups: Groups, lr: float, device: torch.device) -> torch.optim.Optimizer:
    """Gradient descent without momentum: no state at all."""
    return torch.optim.SGD(groups, lr=lr)


# A new optimiser is one function here: (groups, learning rate, device) -> torch.optim.Optimizer.
OPTIMIZERS: dict[str, Callable[[Groups, float, torch.device], torch.optim.Optimizer]] = {"adamw": adamw, "sgd": sgd}


def make_optimizer(
    name: str, parameters: Mapping[str, nn.Parameter], lr: float, weight_decay: float, device: torch.device
) -> torch.optim.Optimizer:
    """The optimiser of that name over two groups: what decays, and what does not."""
    if name not in OPTIMIZERS:
        raise PeftLabError(f"optimizer is one of {list(OPTIMIZERS)}, not {name!r}.{did_you_mean(name, OPTIMIZERS)}")
    return OPTIMIZERS[name](decay_groups(parameters, weight_decay), lr, device)


def decay_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> Groups:
    """Matrices decay; biases, the weights of norms and everything else of one dimension do not.

    Decay pulls towards zero. For a matrix that is a preference for small weights; for a norm's scale, whose neutral
    value is one, or for a bias, it would only be wrong.
    """
    decayed = [p for name, p in parameters.items() if _decays(name, p)]
    others = [p for name, p in parameters.items() if not _decays(name, p)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not name.endswith("bias")
