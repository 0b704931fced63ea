"""Losses as a sum and a count, so that batches of unequal size can be averaged exactly.

A loss is a function `loss(model, batch) -> (total, count)`: the summed loss of everything labelled in the batch (a
scalar tensor, float32 or better) and how many labels that were. Over any set of batches the mean is

    L = sum of totals / sum of counts,

the same however the examples are cut into batches. The mean of batch means is another number: it gives a token in a
batch with few labels more weight than one in a batch with many.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.core.records import unwrap
from peftlab.errors import PeftLabError
from peftlab.training.encoding import IGNORE

Loss = Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, Tensor]]


def causal_lm_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Next-token negative log-likelihood: `batch` has input_ids (b, t), labels (b, t) with -100 where not learned."""
    labels = batch["labels"]
    logits = _logits(model, {**batch, **_only_needed(model, labels)})  # (b, k, V), or (b, n + t, V): see below
    # A prompt method may put n virtual tokens in front. They are never learned, but the last of them predicts the first
    # real token. The labels are shifted rather than the logits, of which a slice would cost a copy in the backward.
    following = F.pad(labels, (max(0, logits.shape[1] - labels.shape[1]), 1), value=IGNORE)[:, -logits.shape[1] :]
    # nll = - sum over i of log p(x_{i+1} | x_1 .. x_i), over the labelled x_{i+1} alone
    return _cross_entropy(logits, following)


def _only_needed(model: nn.Module, labels: Tensor) -> dict[str, int]:
    """The argument that spares a model the logits before the first learned token: of a prompt, nobody reads them."""
    learned = (labels != IGNORE).any(0).nonzero()
    first = int(learned[0]) if len(learned) else 0
    if not first or "logits_to_keep" not in inspect.signature(unwrap(model).forward).parameters:
        return {}
    return {"logits_to_keep": labels.shape[1] - first + 1}  # counted from the end, whatever stands in front


def seq2seq_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of an encoder-decoder model, which shifts its own labels (b, t) to feed the decoder."""
    logits = model(**batch).logits
    return _cross_entropy(logits, batch["labels"])


def classification_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits (b, classes) with integer labels (b,)."""
    return _cross_entropy(_logits(model, batch), batch["labels"])


def default_loss(model: nn.Module, labels: Tensor | None) -> Loss:
    """The loss that fits the labels: one a token is a language model, one an example a classifier.

    Raises:
        PeftLabError: there are no labels, or they are no integers.
    """
    if labels is None:
        raise PeftLabError("The examples have no 'labels'; encode them with them, or pass loss=your own function.")
    if labels.is_floating_point():
        raise PeftLabError("The labels are no integers; pass loss=a function (model, batch) -> (sum, count).")
    if labels.ndim == 1:
        return classification_loss
    config = getattr(unwrap(model), "config", None)
    return seq2seq_loss if getattr(config, "is_encoder_decoder", False) else causal_lm_loss


def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    # Without labels: the model's own loss is a mean, and computing it would upcast every logit.
    output = model(**{key: value for key, value in batch.items() if key != "labels"})
    return getattr(output, "logits", output)


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy over the labels that are not -100, and their number (int64)."""
    learned = labels != IGNORE
    chosen = logits[learned]  # (labels, V): only these rows are upcast, a prompt's logits never
    if chosen.dtype in (torch.float16, torch.bfloat16):
        chosen = chosen.float()
    return F.cross_entropy(chosen, labels[learned], reduction="sum"), learned.sum()
