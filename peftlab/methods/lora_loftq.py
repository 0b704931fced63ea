"""Start LoRA from what four bits have lost of a weight (LoftQ), or quantise what a start has left of it (QPiSSA).

    Q = quant(W - s B A),    s B A = the best rank-r approximation of W - Q          again and again, from B A = 0

so that Q + s B A, with which training begins, is nearer to W than quant(W) is. The first round has Q = quant(W): a base
that is quantised already stays as it is, and only A and B are new (`start`). More rounds quantise another weight
(`alternate`). QPiSSA starts the rounds from PiSSA's A and B, and no round at all leaves these as they are.

Hugging Face peft does not divide by s, so that its start is right for alpha = r only.

Papers: Li et al., *LoftQ*, 2023, arXiv:2310.08659, section 3.2, algorithm 1; Meng et al., *PiSSA*, 2024,
arXiv:2404.02948, section 4 (QPiSSA).
Book: section *Other starts* of the chapter on the LoRA family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.core.records import own_tensor
from peftlab.core.targets import by_pattern, find, is_conv1d, shape_of
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.methods.lora_starts import check_linear, factors
from peftlab.quantization.weights import dense, is_quantized


@torch.no_grad()
def started(config: Any, model: nn.Module, data: Any) -> dict[str, dict[str, Tensor]]:
    """Return {path: {"lora_A": A, "lora_B": B}}, with s B A the best approximation of what four bits lost there.

    Args:
        config: a LoRA's. data: the model before it was quantised, or its `state_dict()`.

    Raises:
        PeftLabError: a target is not in four bits, or `data` does not hold its weight.
    """
    if config.target_parameters:
        raise PeftLabError("init='loftq' starts linear layers; leave target_parameters out, or use init='kaiming'.")
    given = dict(data.named_parameters()) if isinstance(data, nn.Module) else data
    if not isinstance(given, Mapping):
        raise PeftLabError(
            "init='loftq' starts from what four bits have lost: pl.attach(model, config, data=whole), where whole is "
            "the model before it was quantised, or its state_dict()."
        )
    starts = {}
    for path, host in find(model, config).items():
        held, key = own_tensor(host, "weight"), f"{path}.weight"
        if not is_quantized(held):
            raise PeftLabError(
                f"{path} is not in four bits, so init='loftq' has nothing to make good there. Quantise the model "
                "first, or leave that layer out."
            )
        whole = given.get(key)
        if not isinstance(whole, Tensor) or is_quantized(whole) or whole.is_meta:
            near = did_you_mean(key, [name for name in given if isinstance(name, str)])
            raise PeftLabError(f"data does not hold {key} in full precision.{near}")
        inside, outside = shape_of(host)
        q = dense(held, torch.float32)
        w = whole.detach().to(q)
        if w.shape != (outside, inside):  # a Conv1D that became a linear layer
            w = w.T
        if w.shape != (outside, inside):
            raise PeftLabError(f"{key} in data is {tuple(whole.shape)}, and the model's is {(outside, inside)}.")
        r = by_pattern(config.rank_pattern, path, config.r)
        check_linear(host, r, config.init)
        a, b = factors(w - q, r, config.scaling(path), "pissa")
        starts[path] = {"lora_A": a, "lora_B": b}
    return starts


def alternate(
    weight: Tensor, r: int, scaling: float, init: str, rounds: int, quantised: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, B and the weight to quantise, W - s B A, after so many rounds.

    Args:
        weight: W, (out, in) in float32.
        init: `"loftq"` starts the rounds from B A = 0, `"pissa"` and `"olora"` from theirs.
        quantised: a weight as its four bits will give it back.

    >>> from peftlab.methods.lora_loftq import alternate
    >>> weight = torch.diag(torch.tensor([1.3, 3.0]))
    >>> a, b, rest = alternate(weight, 1, 1.0, "loftq", 1, torch.round)
    >>> rest.round() + b @ a
    tensor([[1.3000, 0.0000],
            [0.0000, 3.0000]])
    """
    if init == "loftq":
        a, b = weight.new_zeros(r, weight.shape[1]), weight.new_zeros(weight.shape[0], r)
    else:
        a, b = factors(weight, r, scaling, init)
    rest = weight - scaling * b @ a
    for round in range(rounds):
        if round:
            rest = weight - scaling * b @ a
        # s B A = the r largest singular values and vectors of W - Q
        a, b = factors(weight - quantised(rest), r, scaling, "pissa")
    return a, b, rest


def as_stored(host: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight, (out, in), as its layer stores it."""
    return weight.T if is_conv1d(host) else weight
