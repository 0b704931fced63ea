"""Batches that a model could not read, or would silently read wrongly, found before it sees them.

Only tensors on the CPU are looked at, so that nothing waits for a GPU: there a label or a token out of range would end
the whole process, with a message that names neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from peftlab.core.records import as_transformer
from peftlab.errors import PeftLabError
from peftlab.training.encoding import IGNORE
from peftlab.training.model_facts import ModelFacts
from peftlab.training.model_task import PER_TOKEN, inner_model, problem_of
from peftlab.training.padding import on_cpu

SPAN = ("start_positions", "end_positions")
Where = Callable[[int], str]  # what messages call the example in a row of the batch


def check_tokens(batch: Mapping[str, Any], facts: ModelFacts, where: Where) -> None:
    """Refuse token ids, token types and positions that the model has no embedding for."""
    advice = (
        "Is this the model's tokenizer? If it was extended, call model.resize_token_embeddings(len(tokenizer)) before "
        "adapters are attached."
    )
    for key in ("input_ids", "decoder_input_ids"):
        value = batch.get(key)
        if isinstance(value, Tensor) and (value.is_floating_point() or value.dtype == torch.bool):
            raise PeftLabError(f"{key} are whole numbers, found {str(value.dtype).removeprefix('torch.')}.")
        _check_range(value, facts.tokens, f"{key} hold", f"the vocabulary of {facts.name} goes", advice, where)
    types = getattr(facts.config, "type_vocab_size", None) or None
    _check_range(
        batch.get("token_type_ids"), types, "token_type_ids hold", f"those of {facts.name} go", "Leave them out.", where
    )
    ids = batch.get("input_ids")
    if facts.positions is not None and isinstance(ids, Tensor) and "position_ids" not in batch:
        if ids.shape[-1] > facts.positions:
            mask = batch.get("attention_mask")
            row = int(mask.sum(-1).argmax()) if on_cpu(mask) and mask.ndim == 2 else 0
            raise PeftLabError(
                f"{where(row)} has {ids.shape[-1]} tokens, and {facts.name} has {facts.positions} positions; encode "
                f"with max_length={facts.positions}."
            )


def check_labels(batch: Mapping[str, Any], facts: ModelFacts, where: Where, warn: Callable[[str], None]) -> None:
    """Refuse labels that are not of the model's task, or that it has no output for."""
    if facts.task == "question answering":
        for key in SPAN:
            _check_range(batch.get(key), math.inf, f"{key} hold", "tokens are counted", "", where)
        return
    labels = batch.get("labels")
    if labels is None or facts.task == "contrast":
        return  # the loss says that there are none
    if not isinstance(labels, Tensor):
        raise PeftLabError(
            f"The labels of a batch are a {type(labels).__name__}; a batch is a dict of tensors by name."
        )
    problem = problem_of(facts.model, facts.task, labels)
    if facts.task in PER_TOKEN:
        _check_one_a_token(batch, labels)
    if not on_cpu(labels):
        return
    if problem == "regression":
        _check_values(~torch.isfinite(labels), labels, "is no finite number", where)
    elif problem == "multi_label_classification":
        reason = "lies outside 0 to 1; for numbers to predict, set model.config.problem_type = 'regression'"
        _check_values(~((labels >= 0) & (labels <= 1)), labels, reason, where)
    else:
        limit, of_classes = _label_limit(batch, facts, problem)
        what = f"the {'classes' if of_classes else 'tokens'} of {facts.name} go"
        advice = (
            "Number classes from 0 on, and load the model with num_labels=... for all of them."
            if of_classes
            else "What is not to be learned has the label -100."
        )
        _check_range(labels, limit, "labels hold", what, advice, where, but=IGNORE)
    _check_learnable(batch, labels, facts, warn)


def _check_one_a_token(batch: Mapping[str, Any], labels: Tensor) -> None:
    """Refuse labels of another length than the tokens: which token one belongs to could only be guessed."""
    for key in ("input_ids", "inputs_embeds"):
        tokens = batch.get(key)
        if isinstance(tokens, Tensor) and tokens.shape[:2] != labels.shape:
            raise PeftLabError(
                f"A batch has labels {tuple(labels.shape)} beside {key} {tuple(tokens.shape)}; each token has one "
                f"label, {IGNORE} where there is nothing to learn."
            )


def _label_limit(batch: Mapping[str, Any], facts: ModelFacts, problem: str) -> tuple[int | None, bool]:
    """(how many labels there are, whether they are classes and not tokens)."""
    if facts.task in ("classification", "token classification"):
        return as_transformer(inner_model(facts.model)).config.num_labels, True
    if facts.task == "choice":
        ids = batch.get("input_ids")
        return ids.shape[1] if isinstance(ids, Tensor) and ids.ndim == 3 else 2, True
    return (None, True) if problem == "single_label_classification" else (facts.outputs, False)


def _check_learnable(batch: Mapping[str, Any], labels: Tensor, facts: ModelFacts, warn: Callable[[str], None]) -> None:
    """Compare labels with the tokens that are read: what is to be predicted must not be shown to the model.

    For a model whose task is not known, labels that are the tokens themselves tell that it is a causal language model.
    """
    ids = batch.get("input_ids")
    if not on_cpu(ids) or labels.ndim != 2 or facts.task in ("causal language modelling", "token classification"):
        return
    alike = ids.shape == labels.shape
    shown = ((labels == ids) | (labels == IGNORE)).all(1) if alike else torch.zeros(len(labels), dtype=torch.bool)
    if facts.task is None and not shown.all():
        raise PeftLabError(
            f"{facts.name} is no class of transformers, so its task is not known: its labels are no causal language "
            "model's, whose labels are the input_ids or -100. Pass loss=: peftlab.training.losses.token_loss for a "
            "label of each token, seq2seq_loss, or a function (model, batch) -> (sum, count)."
        )
    if facts.task == "masked language modelling" and shown.all() and (labels != IGNORE).any():
        warn(
            f"{facts.name} is a masked language model, and every token that it is to predict stands in input_ids: it "
            "can copy them. Put tokenizer.mask_token_id there."
        )
    if facts.task == "sequence to sequence":
        if alike and (shown & (labels[:, 0] == IGNORE) & (labels != IGNORE).any(1)).any():
            raise answer_in_encoder(f"A batch of {facts.name}", facts.name)
        if shown.all() and len(labels) > 1:
            warn(
                f"The encoder of {facts.name} reads the very tokens that its decoder is to learn (input_ids equal "
                "labels): it can copy them. Give it the prompt alone."
            )


def answer_in_encoder(where: str, name: str) -> PeftLabError:
    """The error that an encoder-decoder was given an example in a decoder's form."""
    return PeftLabError(
        f"{where} has its answer in input_ids, as a decoder needs it, but {name} is an encoder-decoder: its encoder "
        "would read what its decoder is to learn. Encode with encode_completion(tokenizer, prompt, completion, "
        "model=model): input_ids are the prompt alone, labels the answer alone."
    )


def _check_values(wrong: Tensor, values: Tensor, reason: str, where: Where) -> None:
    if wrong.any():
        row = int(wrong.reshape(len(values), -1).any(1).nonzero()[0])
        raise PeftLabError(f"{where(row)}: the label {values[wrong][0].item()} {reason}.")


def _check_range(
    values: Any, limit: float | None, found: str, what: str, advice: str, where: Where, but: int | None = None
) -> None:
    """Require whole numbers from 0 to below a limit; `but` is one that is allowed beside them."""
    if limit is None or not on_cpu(values) or not values.numel():
        return
    if values.is_floating_point() or values.dtype == torch.bool:
        return
    low, high = (int(value) for value in torch.aminmax(values))
    if but is not None and low == but:
        low = int(values.masked_fill(values == but, 0).min())
    if low >= 0 and high < limit:
        return
    wrong = (values < 0) | (values >= limit)
    if but is not None:
        wrong &= values != but
    row = int(wrong.reshape(len(values), -1).any(1).nonzero()[0])
    end = " on" if limit == math.inf else f" to {limit - 1}"
    raise PeftLabError(f"{where(row)}: {found} {int(values[wrong][0])}, and {what} from 0{end}. {advice}".strip())
