"""Losses as a sum and a count, so that batches of unequal size can be averaged exactly.

A loss is a function `loss(model, batch) -> (total, count)`. `total` is the loss summed over all labels of the batch (a
scalar tensor, float32 or wider), and `count` is the number of these labels. The mean over any set of batches is

    L = sum of totals / sum of counts

It does not depend on how the examples are cut into batches. The mean of batch means does: it gives a token more weight
in a batch with few labels than in a batch with many.
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
    """Return the negative log-likelihood of the next tokens.

    `batch` has input_ids (b, t) and labels (b, t), with -100 where nothing is learned.
    """
    labels = batch["labels"]
    logits = _logits(model, {**batch, **_only_needed(model, labels)})  # (b, k, V), or (b, n + t, V): see below
    # A prompt method may put n virtual tokens in front. They have no labels, but the last of them predicts the first
    # real token. We shift the labels and not the logits, because a slice of the logits costs a copy in the backward
    # pass.
    following = F.pad(labels, (max(0, logits.shape[1] - labels.shape[1]), 1), value=IGNORE)[:, -logits.shape[1] :]
    # nll = - sum over i of log p(x_{i+1} | x_1 .. x_i), only over labelled x_{i+1}
    return _cross_entropy(logits, following)


def _only_needed(model: nn.Module, labels: Tensor) -> dict[str, int]:
    """Return the argument that makes a model skip the logits before the first learned token. They are not needed."""
    learned = (labels != IGNORE).any(0).nonzero()
    first = int(learned[0]) if len(learned) else 0
    if not first or "logits_to_keep" not in inspect.signature(unwrap(model).forward).parameters:
        return {}
    return {"logits_to_keep": labels.shape[1] - first + 1}  # counted from the end, so a prompt in front does not matter


def seq2seq_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihood of an encoder-decoder. It shifts the labels (b, t) itself for its decoder."""
    logits = model(**batch).logits
    return _cross_entropy(logits, batch["labels"])


def classification_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of logits (b, classes) with integer labels (b,)."""
    return _cross_entropy(_logits(model, batch), batch["labels"])


def default_loss(model: nn.Module, labels: Tensor | None) -> Loss:
    """Return the loss that fits the labels: one per token for language models, one per example for classifiers.

    Raises:
        PeftLabError: there are no labels, or they are not integers.
    """
    if labels is None:
        raise PeftLabError("The examples have no 'labels'. Encode them with labels, or pass loss=your own function.")
    if labels.is_floating_point():
        raise PeftLabError("The labels are not integers; pass loss=a function (model, batch) -> (sum, count).")
    if labels.ndim == 1:
        return classification_loss
    config = getattr(unwrap(model), "config", None)
    return seq2seq_loss if getattr(config, "is_encoder_decoder", False) else causal_lm_loss


def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    # Do not pass the labels: the model would compute its own loss, which is a mean and upcasts every logit.
    output = model(**{key: value for key, value in batch.items() if key != "labels"})
    return getattr(output, "logits", output)


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy summed over all labels but -100, and the number of these labels (int64)."""
    learned = labels != IGNORE
    chosen = logits[learned]  # (labels, V): only these rows are upcast, never the logits of a prompt
    if chosen.dtype in (torch.float16, torch.bfloat16):
        chosen = chosen.float()
    return F.cross_entropy(chosen, labels[learned], reduction="sum"), learned.sum()
