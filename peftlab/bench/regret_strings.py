"""How much an adapter can learn by heart: random digits, stored until the loss stops falling.

A string is a key, a token that no other string has, and eight random digits. The key is given, the digits are learned.
Nothing helps to guess a digit, so it can only be remembered. The model is smollm2-135m with the digits' rows as head.

Stored bits. Without any memory the best code for a digit takes log2(10) bits, because digits are drawn evenly. The
model's code takes -log2 p. So the stored bits are the sum of log2(10) + log2(p) over all digits. They are below zero
for a model that is sure of wrong digits, as the untrained one is (`base_stored`).

Why digits. They are few, and the model expects each about as often: it begins 0.3 bits per digit above log2(10). Of
4,096 tokens out of the whole vocabulary it began 6 bits per token above, and small adapters spent all of 500 steps on
learning which tokens come at all.

Why the last blocks. What enters the first block with an adapter never changes. It is computed once, and a step of one
block takes a thirtieth of the time. So there are enough steps to wait for the end: see `Plateau`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftlab as pl
from peftlab.bench import family, lora, rungs
from peftlab.core.modes import device_of
from peftlab.training.precision import autocast

Row = dict[str, Any]

CHOICES = 10
AT_ONCE = 256  # strings that go through the lower blocks at once
WINDOW, GAIN, CUTS, CUT = 250, 0.005, 4, 3.0  # of `Plateau`


class Plateau:
    """The rule by which a run ends. It looks at nothing but the loss on the strings, which are trained on.

    After each window of 250 steps: if the mean stored bits of the window are not 0.005 per parameter above the best
    window so far, the rate is divided by 3. The run ends with the fourth such window.
    """

    def __init__(self, rate: float) -> None:
        self.rate, self.best, self.cuts = rate, -math.inf, 0

    def goes_on(self, per_parameter: float) -> bool:
        """Take in a window's stored bits per parameter. Change the rate, and say whether to go on."""
        if not per_parameter >= self.best + GAIN:  # so that a loss that is no number ends a run
            self.cuts, self.rate = self.cuts + 1, self.rate / CUT
        self.best = max(self.best, per_parameter)
        return self.cuts < CUTS


def measure(point: Row) -> Row:
    """Train until the loss stops falling, and return the row.

    `curve` has the stored bits per parameter of each window, `taken` the number of steps, and `ended` says which came
    first: the end of the fall ("floor") or the last step that was allowed ("steps").
    """
    torch.manual_seed(point["seed"])
    keys, digits = strings(point["strings"], point["length"], point["seed"])
    body, hidden, head = upper(point), before(keys, digits, point["last"]), head_rows()
    count, trainable = partial(bits, body, hidden, digits.to(hidden.device), head), pl.count_parameters(body).trainable
    with torch.no_grad():
        untrained = float(count())
    rule, curve = learn(body, count, point, trainable)
    with torch.no_grad():
        stored = float(count())
    every = digits.numel() * math.log2(CHOICES)
    loss = lora.finite((every - stored) / digits.numel() * math.log(2))
    return {
        **point, "trainable": trainable, "choices": CHOICES, "bits": every, "base_stored": untrained,
        "stored": None if loss is None else stored, "per_parameter": None if loss is None else stored / trainable,
        "validation_loss": loss, "taken": len(curve) * WINDOW, "ended": "floor" if rule.cuts == CUTS else "steps",
        "curve": ",".join(f"{value:.3f}" for value in curve),
    }  # fmt: skip


def strings(number: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the keys (n) and the digits (n, length) of so many strings."""
    model: Any = lora.base()[0]
    drawn = torch.Generator().manual_seed(seed)
    keys = torch.randperm(model.get_input_embeddings().num_embeddings, generator=drawn)[:number]
    return keys, torch.randint(CHOICES, (number, length), generator=drawn)


@cache
def tokens() -> Tensor:
    """Return the tokens of the ten digits."""
    tokenizer = lora.base()[1]
    return torch.tensor([tokenizer(str(digit), add_special_tokens=False)["input_ids"][0] for digit in range(CHOICES)])


@torch.no_grad()
def before(keys: Tensor, digits: Tensor, last: int) -> Tensor:
    """Return what enters the last blocks of the untrained model when it reads the strings, (n, length, d).

    The last digit is not read, because nothing comes after it.
    """
    model: Any = lora.base()[0]
    ids = torch.cat([keys[:, None], tokens()[digits[:, :-1]]], 1).to(device_of(model))
    read = (model.model(input_ids=part, output_hidden_states=True, use_cache=False) for part in ids.split(AT_ONCE))
    return torch.cat([one.hidden_states[-1 - last] for one in read])


def upper(point: Row) -> nn.Module:
    """Return the last blocks and the final norm, with the point's adapter. They read what `before` returns."""
    model: Any = copy.deepcopy(lora.base()[0])
    model.model.layers = model.model.layers[-point["last"] :]
    pl.attach(model, family.config_of(point))
    model.model.embed_tokens = nn.Identity()
    return model.model


def head_rows() -> Tensor:
    """Return the head's rows for the ten digits, (10, d)."""
    model: Any = lora.base()[0]
    weight = model.get_output_embeddings().weight.detach()
    return weight[tokens().to(weight.device)]


def bits(body: nn.Module, hidden: Tensor, digits: Tensor, head: Tensor, precision: str = "fp32") -> Tensor:
    """Return the stored bits of all strings together. A CUDA graph may record it: nothing is copied from the CPU."""
    with autocast(hidden.device, precision):
        read = rungs.hidden_states(body, hidden)
    logits = read @ head.T  # in float32: a step of bfloat16 would be 0.1 here
    nats = F.cross_entropy(logits.flatten(0, 1), digits.flatten(), reduction="sum")
    return digits.numel() * math.log2(CHOICES) - nats / math.log(2)


def learn(body: nn.Module, count: Callable[..., Tensor], point: Row, trainable: int) -> tuple[Plateau, list[float]]:
    """Train on all strings at once until `Plateau` ends it. Return it, and the bits per parameter of each window."""
    rule, curve, device = Plateau(point["learning_rate"]), list[float](), device_of(body)
    total, rate = torch.zeros((), device=device), torch.tensor(rule.rate, device=device)
    flat = rungs.Flat([parameter for parameter in body.parameters() if parameter.requires_grad])
    flat.adamw.param_groups[0].update(lr=rate, weight_decay=0.0)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(flat.master, 1.0)

    def loss(*_: Any) -> Tensor:
        found = count(precision=point["precision"])
        total.add_(found.detach())
        return -found / (point["strings"] * point["length"])

    flat.adamw.register_step_pre_hook(clip)
    step: Callable[[], Any] = rungs.loop(body, {}, loss, flat)
    step = rungs.in_one_graph(step) if device.type == "cuda" else step
    going = True
    while going and len(curve) * WINDOW < point["steps"]:
        total.zero_()
        for _ in range(WINDOW):
            step()
        curve.append(float(total) / WINDOW / trainable)
        going = rule.goes_on(curve[-1])
        rate.fill_(rule.rate)
    return rule, curve
