"""Learning from pairs of answers, a better and a worse one: direct preference optimisation (DPO).

DPO (Rafailov et al., 2023) compares the model with a reference, the model as it was before. For a prompt x with the
better answer y+ and the worse one y-,

    L = - log sigmoid(beta [ (log p(y+|x) - log p_ref(y+|x)) - (log p(y-|x) - log p_ref(y-|x)) ])

An attached model is its own reference: inside `pl.disabled(model)` it is its base, so no second model is needed. The
section sec-recipes-dpo of the book derives the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.checks import number
from peftlab.errors import PeftLabError
from peftlab.training.packing import IGNORE


def answer_log_probability(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return log p(answer | prompt) of each row of a batch, summed over its labelled tokens.

    Args:
        model: a causal language model, with or without adapters.
        batch: `input_ids` and `labels`, both (b, t), -100 where a token does not belong to the answer; an
            `attention_mask` if there is padding. `pl.Collator` makes it.

    Returns:
        A tensor (b,), float32 or wider. Gradients flow through it.

    Raises:
        PeftLabError: the batch has no labels, or labels of another shape than its tokens.

    >>> from peftlab.training.preferences import answer_log_probability
    >>> batch = pl.Collator(tokenizer)([pl.encode_completion(tokenizer, "the cat", "runs")])
    >>> answer_log_probability(model.eval(), batch).shape
    torch.Size([1])
    """
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.shape != labels.shape or ids.ndim != 2:
        shapes = [None if value is None else tuple(getattr(value, "shape", ())) for value in (ids, labels)]
        raise PeftLabError(
            f"An answer is read from input_ids and labels of one shape (b, t); found {shapes[0]} and {shapes[1]}. "
            "pl.Collator makes such a batch of encoded examples."
        )
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    logits = logits[:, -ids.shape[1] : -1]  # virtual tokens stand in front; the last token predicts nothing
    following = labels[:, 1:]
    answer = following != IGNORE
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # log p(y|x) = sum over the answer's tokens of log p(y_i | x, y_1 .. y_{i-1})
    scores = logits.log_softmax(-1).gather(-1, following.clamp(min=0)[..., None])[..., 0]
    return (scores * answer).sum(-1)


def dpo_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Return the loss of each pair of answers, and its margin.

    Args:
        chosen, rejected: log-probabilities of the better and of the worse answers under the trained model, (b,).
        reference_chosen, reference_rejected: the same under the reference.
        beta: how strongly the model is held to the reference; the smaller, the further it may go.

    Returns:
        `(losses, margins)`, both (b,). A margin is beta times how much more the better answer has gained than the
        worse one. It is 0, and the loss log 2, where model and reference agree.

    Raises:
        PeftLabError: the four tensors have different shapes, or beta is not above 0.

    >>> from peftlab.training.preferences import dpo_loss
    >>> losses, margins = dpo_loss(*torch.tensor([[-4.0], [-9.0], [-6.0], [-8.0]]))
    >>> margins.round(decimals=3), losses.round(decimals=3)
    (tensor([0.3000]), tensor([0.5540]))
    """
    number("beta", beta, above=0)
    shapes = [tuple(given.shape) for given in (chosen, rejected, reference_chosen, reference_rejected)]
    if len(set(shapes)) > 1:
        raise PeftLabError(f"The log-probabilities have the shapes {shapes}; give four of one shape.")
    margins = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -F.logsigmoid(margins), margins
