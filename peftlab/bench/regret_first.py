r"""The first step of LoRA, derived and measured: why the best rate need not depend on the rank.

A weight W (out, in) has the gradient G, with rows g_j. LoRA adds s B A, B is zero, and A has rows a_i (i = 1..r) with
independent entries of variance sigma^2 = 1 / (3 d_in) (Kaiming's rule). So:

1. The gradient of B is s G A^T: entry (j, i) is s g_j . a_i. The gradient of A is zero, because B is. A stays.
2. Adam's first step is the rate times the sign: B_ji = -lr sign(g_j . a_i).
3. dW_jk = s sum_i B_ji a_ik = -s lr sum_i sign(g_j . a_i) a_ik. It has r terms.
4. Are these terms of one sign, or of random signs? Both. The mean of sign(g_j . a) a_k over a is
   sqrt(2 / pi) sigma g_jk / |g_j|, exactly so if a is Gaussian. The r terms share this part, which grows as r. What is
   left of each term has the variance sigma^2 (1 - (2 / pi) (g_jk / |g_j|)^2) and a random sign. It grows as sqrt(r).
5. The mean of (g_jk / |g_j|)^2 over the row is 1 / d_in. So

       RMS(dW) = s lr sigma sqrt(r + (2 / pi) r (r - 1) / d_in).

   The random part is the larger one until r reaches pi d_in / 2, which is 905 here: dW grows as sqrt(r).
6. But the random part is as likely to raise the loss as to lower it. To first order the loss falls by

       -<dW, G> = s lr sum_ij |g_j . a_i| = s lr r sigma sqrt(2 / pi) sum_j |g_j|,

   which grows as s r. With s = alpha / r this is alpha: the rank drops out. With alpha = 2 r it grows as r.

So if the fall of the loss decides, the best rate is the same for all ranks with a constant alpha, and falls as 1 / r
with alpha = 2 r. If the size of dW decides, the best rate grows as sqrt(r) with a constant alpha, and falls as
1 / sqrt(r) with alpha = 2 r. The section "rank" says which.

Later A moves, too. Its entries begin at sigma, 0.024 here, and each step moves them by up to lr. When they are mostly
what was learned, both factors of s B A grow with the rate, and the part of dW along the gradient grows as s r lr^2.
With a constant alpha the rank still drops out. With alpha = 2 r the best rate then falls as 1 / sqrt(r). A run has both
phases, so the power should lie between -1 and -1/2.

Full fine-tuning moves each entry by the rate: RMS(dW) = lr, and the loss falls by lr sum_jk |G_jk|. If the entries of
G are Gaussian, that is lr sqrt(2 / pi) sqrt(d_in) sum_j |g_j|. The two falls are equal if LoRA's rate is
sqrt(d_in) / (alpha sigma) = sqrt(3) d_in / alpha times that of full fine-tuning.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import Tensor

import peftlab as pl
from peftlab.bench import family, family_why, lora
from peftlab.bench.family_variants import SEEDS, run
from peftlab.bench.regret_plan import RANKS
from peftlab.core.modes import device_of
from peftlab.core.records import own_tensor

Row = dict[str, Any]

RATE = 1e-3
MESSAGES = 8


def points() -> Iterator[Row]:
    """Yield one step for each rank under both rules, in three draws of A, and one of full fine-tuning."""
    for seed in SEEDS:
        for r in RANKS:
            for rule, alpha in (("alpha = 16", 16), ("alpha = 2 r", 2 * r)):
                yield run("first", "desk", "LoRA", {"alpha": alpha, "r": r}, RATE, seed, steps=1, rule=rule)
    yield run("first", "desk", "full", {}, RATE, SEEDS[0], steps=1)


def measure(point: Row) -> Iterator[Row]:
    """Take one step, and yield for the queries and for the values the size of dW and how far the loss falls by it.

    `fall` is -<dW, G> over all layers: the fall of the loss to first order, in nats per token.
    """
    model, _ = family.trained(
        point, family.encoded("desk", "train")[:MESSAGES], warmup=0.0, schedule="constant", max_grad_norm=None
    )
    sums: dict[str, Row] = {}
    for _, module, path in family_why.looked_at(every=1):
        g = gradients()[path]
        change = (family_why.weight_of(model.get_submodule(path)) - family_why.weight_of(base_of(path))).double()
        found = {"entries": g.numel(), "squares": float(change.square().sum()), "fall": -float((change * g).sum()),
                 "gradient": float(g.square().sum()), **predicted(point, g)}  # fmt: skip
        so_far = sums.setdefault(module, dict.fromkeys(found, 0.0))
        sums[module] = {name: so_far[name] + value for name, value in found.items()}
    for module, total in sums.items():
        yield {
            **point, "module": module, "rms": math.sqrt(total["squares"] / total["entries"]),
            "rms_predicted": math.sqrt(total["squares_predicted"] / total["entries"]), "fall": total["fall"],
            "fall_predicted": total["fall_predicted"],
            "cosine": total["fall"] / math.sqrt(total["squares"] * total["gradient"]),
        }  # fmt: skip


def predicted(point: Row, g: Tensor) -> Row:
    """Return the sum of the squares of dW and the fall of the loss, as derived above."""
    (out, d_in), rate = g.shape, point["learning_rate"]
    if point["method"] == "full":
        return {"squares_predicted": out * d_in * rate**2, "fall_predicted": rate * float(g.abs().sum())}
    r, sigma = point["r"], 1 / math.sqrt(3 * d_in)
    step = point["alpha"] / r * rate * sigma
    return {
        "squares_predicted": out * d_in * step**2 * (r + 2 / math.pi * r * (r - 1) / d_in),
        "fall_predicted": step * r * math.sqrt(2 / math.pi) * float(g.norm(dim=1).sum()),
    }


def base_of(path: str) -> Any:
    """Return a layer of the untrained model."""
    return lora.base()[0].get_submodule(path)


@cache
def gradients() -> dict[str, Tensor]:
    """Return the gradients of the queries' and values' weights on the messages of the step, in float64 on the CPU."""
    model, tokenizer = copy.deepcopy(lora.base()[0]), lora.base()[1]
    model.requires_grad_(False)
    weights = {path: own_tensor(model.get_submodule(path), "weight").requires_grad_(True)
               for _, _, path in family_why.looked_at(every=1)}  # fmt: skip
    batch = pl.Collator(tokenizer)(family.encoded("desk", "train")[:MESSAGES])
    model(**{name: tensor.to(device_of(model)) for name, tensor in batch.items()}).loss.backward()
    return {path: weight.grad.double().cpu() for path, weight in weights.items() if weight.grad is not None}
