"""Losses as a sum and a count, so that batches of unequal size can be averaged exactly.

A loss is a function `loss(model, batch) -> (total, count)`. `total` is the loss summed over all labels of the batch (a
scalar tensor, float32 or wider), and `count` is the number of these labels. The mean over any set of batches is

    L = sum of totals / sum of counts

the same however the examples are cut into batches. The mean of batch means is another number: it gives a token in a
batch with few labels more weight than one in a batch with many.

Which loss a model is trained with follows from its task (`peftlab.training.model_task`): on one batch, each gives
the mean that the model's own `model(**batch).loss` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.checks import shown
from peftlab.core.records import unwrap
from peftlab.errors import PeftLabError
from peftlab.training.encoding import IGNORE
from peftlab.training.labels import readable, sent
from peftlab.training.model_task import call, forward_columns, inner_model, problem_of, task_of
from peftlab.training.positions import counted

Loss = Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, Tensor]]


def sum_and_count(result: Any) -> tuple[Tensor, Tensor]:
    """Check what a loss returned, and return its sum and its count as tensors without dimensions.

    Raises:
        PeftLabError: it gave something else.
    """
    if isinstance(result, (tuple, list)) and len(result) == 2 and isinstance(result[0], Tensor):
        count: Tensor | None = None
        with suppress(TypeError, ValueError, RuntimeError):  # what torch raises for what is no number
            count = torch.as_tensor(result[1])
        if count is not None and result[0].numel() == count.numel() == 1:
            return result[0].reshape(()), count.reshape(())
    raise PeftLabError(
        "loss must return (the sum of the labels' losses as a tensor of one value, the number of labels), found "
        f"{shown(result)}."
    )


def causal_lm_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Next-token negative log-likelihood: `batch` has input_ids (b, t), labels (b, t) with -100 where not learned.

    A mixture of experts that returns its routers' balancing loss (`output_router_logits` in its config) gets it added
    with the weight that its config names, as in the model's own loss.
    """
    labels = readable(batch["labels"])
    output = needed_output(model, batch, only_needed(model, labels != IGNORE))
    logits = _logits(model, output)  # (b, k, V), or (b, n + t, V) behind a prompt
    # nll = - sum over i of log p(x_{i+1} | x_1 .. x_i), over the labelled x_{i+1} alone
    total, count = _cross_entropy(logits, next_labels(labels, logits.shape[1]))
    return with_balance(model, output, total, count)


def needed_output(model: nn.Module, batch: Mapping[str, Any], needed: Mapping[str, int]) -> Any:
    """Return a language model's output for a batch, without what its loss does not need (`only_needed`)."""
    inputs = {**without_full_mask(batch), **needed}
    with counted(inputs):
        return without_labels(model, inputs)


def next_labels(labels: Tensor, positions: int) -> Tensor:
    """Return what each of the last positions predicts, (b, positions): the label of the token after it.

    A prompt method may put n virtual tokens in front. They are never learned, but the last of them predicts the first
    real token. The labels are shifted rather than the logits, of which a slice would cost a copy in the backward.
    """
    return F.pad(labels, (max(0, positions - labels.shape[1]), 1), value=IGNORE)[:, -positions:]


def with_balance(model: nn.Module, output: Any, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Add the routers' balancing loss of a mixture of experts, where its output has one."""
    balance = getattr(output, "aux_loss", None)
    weight = 0.0 if balance is None else _router_weight(model)
    return (total, count) if balance is None or not weight else (total + weight * balance * count, count)


def without_full_mask(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the batch without a mask that hides nothing: transformers would wait for a GPU to find that out."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.is_cuda and hides_nothing(batch):
        return {key: value for key, value in batch.items() if key != "attention_mask"}
    return batch


def hides_nothing(batch: Mapping[str, Any]) -> bool:
    """Say whether a batch has a padding mask (b, t) of ones that can be left out. A mask on a GPU is not looked at.

    A mask of four dimensions also says which tokens see later ones. And where positions are given, transformers reads
    borders between packed examples out of them if there is no mask.
    """
    mask = batch.get("attention_mask")
    mask = readable(mask) if isinstance(mask, Tensor) and mask.ndim == 2 else None
    return mask is not None and not mask.is_cuda and batch.get("position_ids") is None and bool(mask.all())


def only_needed(model: nn.Module, learned: Tensor) -> dict[str, int]:
    """Return the argument that makes a model skip the logits before the first learned token. They are not needed.

    learned: (b, t), True where a token has a label.
    """
    if bool(learned[:, :1].any()) or "logits_to_keep" not in forward_columns(unwrap(model)).names:
        return {}
    places = learned.any(0).nonzero()
    first = int(places[0]) if len(places) else 0
    # counted from the end, so a prompt in front does not matter
    return {"logits_to_keep": learned.shape[1] - first + 1} if first else {}


def _router_weight(model: nn.Module) -> float:
    """The weight of the routers' balancing loss in the model's own loss."""
    config = getattr(inner_model(model), "config", None)
    return float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0)


def token_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token's own label (b, t), not shifted: tagging, and masked language models."""
    labels = batch["labels"]
    logits = _logits(model, without_labels(model, batch))
    return _cross_entropy(logits[:, -labels.shape[1] :], labels)  # virtual tokens, if kept, stand in front


def seq2seq_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of an encoder-decoder model, which shifts its own labels (b, t) to feed the decoder."""
    return _cross_entropy(_logits(model, call(model, batch)), batch["labels"])


def classification_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits (b, classes) with integer labels (b,)."""
    logits = _logits(model, without_labels(model, batch))
    labels = batch["labels"].reshape(-1)
    if logits.shape[:-1] != labels.shape:
        raise PeftLabError(
            f"{type(unwrap(model)).__name__} gives logits {tuple(logits.shape)}, which do not go with labels "
            f"{tuple(labels.shape)}, one an example; pass loss=a function (model, batch) -> (sum, count)."
        )
    return _cross_entropy(logits, labels)


def multi_label_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of logits (b, classes) with labels (b, classes) from 0 to 1; each class of each row counts.

    With p = sigmoid(logit) it is - sum of y log p + (1 - y) log(1 - p).
    """
    logits = _wide(_logits(model, without_labels(model, batch)))
    labels = batch["labels"].to(logits.dtype)
    total = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    return total, torch.tensor(labels.numel(), device=logits.device)


def regression_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Squared error of outputs (b, 1) or (b, k) against as many numbers; each number counts: sum of (f(x) - y)^2."""
    logits = _wide(_logits(model, without_labels(model, batch)))
    labels = batch["labels"].to(logits.dtype)
    return F.mse_loss(logits, labels.reshape(logits.shape), reduction="sum"), torch.tensor(
        labels.numel(), device=logits.device
    )


def question_answering_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of an answer's first and last token, `start_positions` and `end_positions` (b,).

    Each of both counts as one label. A position behind the text's end, where the text was cut, counts as none.
    """
    inputs = {key: value for key, value in batch.items() if key not in ("start_positions", "end_positions", "labels")}
    output = call(model, inputs)
    totals, counts = [], []
    for side in ("start", "end"):
        logits = getattr(output, f"{side}_logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise PeftLabError(
                f"{type(unwrap(model)).__name__} has no plain {side}_logits, so its loss is not known here; pass "
                "loss=a function (model, batch) -> (sum, count)."
            )
        tokens = batch["input_ids"].shape[1] if "input_ids" in batch else logits.shape[1]
        position = readable(batch[f"{side}_positions"]).reshape(-1)
        position = position.masked_fill(position >= tokens, IGNORE)
        total, count = _cross_entropy(logits[:, -tokens:], position)
        totals.append(total)
        counts.append(count)
    return totals[0] + totals[1], counts[0] + counts[1]


def transcription_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Connectionist temporal classification, the model's own loss of its labels (b, t); each example counts as one.

    Where `config.ctc_loss_reduction` is "mean", the loss of an example is divided by the number of its labels.
    """
    loss, rows = _own_loss(model, batch, {}), len(batch["labels"])
    summed = getattr(inner_model(model).config, "ctc_loss_reduction", "sum") == "sum"
    return loss if summed else loss * rows, torch.tensor(rows, device=loss.device)


def contrast_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """CLIP's loss, the model's own: which text goes with which image of the batch. Each pair counts as one.

    It depends on what else is in the batch, so that two batches of four are no batch of eight.
    """
    rows = next(len(value) for value in batch.values() if isinstance(value, Tensor))
    loss = _own_loss(model, batch, {"return_loss": True})
    return loss * rows, torch.tensor(rows, device=loss.device)


def _own_loss(model: nn.Module, batch: Mapping[str, Any], more: dict[str, Any]) -> Tensor:
    loss = getattr(call(model, {**batch, **more}), "loss", None)
    if not isinstance(loss, Tensor):
        raise PeftLabError(
            f"{type(unwrap(model)).__name__} gives no loss for a batch of {sorted(batch)}; pass loss=your own function."
        )
    return _wide(loss)


OF_TASKS: dict[str, Loss] = {
    "causal language modelling": causal_lm_loss,
    "masked language modelling": token_loss,
    "token classification": token_loss,
    "sequence to sequence": seq2seq_loss,
    "question answering": question_answering_loss,
    "transcription": transcription_loss,
    "single_label_classification": classification_loss,
    "multi_label_classification": multi_label_loss,
    "regression": regression_loss,
}


def default_loss(model: nn.Module, batch: Mapping[str, Any]) -> Loss:
    """The loss of the model's task, as transformers has it.

    A module that transformers does not know is taken for a classifier where there is one integer an example, and for a
    causal language model where there is one a token (`peftlab.training.inputs` checks that these labels are the
    tokens themselves).

    Raises:
        PeftLabError: the task is not known, or the batch has no labels of its kind.
    """
    task = task_of(model)
    if task == "contrast":
        return contrast_loss
    if task == "question answering":
        missing = {"start_positions", "end_positions"} - set(batch)
        if missing:
            raise PeftLabError(
                f"{type(unwrap(model)).__name__} answers questions: its examples need start_positions and "
                f"end_positions, the first and the last token of the answer. Found {sorted(batch)}."
            )
        return question_answering_loss
    labels = batch.get("labels")
    if labels is None:
        raise PeftLabError(
            f"The examples have no 'labels'; they have {sorted(batch)}. Encode them with labels, or pass loss=your own "
            "function."
        )
    return OF_TASKS[problem_of(model, task, labels)]


def without_labels(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Return the model's output for a batch without its labels. Its own loss is a mean, and upcasts every logit."""
    return call(model, {key: value for key, value in batch.items() if key != "labels"})


def _logits(model: nn.Module, output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise PeftLabError(
            f"{type(unwrap(model)).__name__} gives {type(output).__name__}, which has no logits: it has no head for a "
            "task. Load the class with one, such as AutoModelForSequenceClassification, or pass loss=your own function."
        )
    return logits


def _wide(logits: Tensor) -> Tensor:
    """16-bit numbers as float32: a loss is summed in float32 or better."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy summed over all labels but -100, and the number of these labels (int64).

    logits: (..., V), labels: (...), on the same device or on the CPU, where nothing has to wait for them.
    """
    chosen, wanted = learned_rows(logits, labels, logits.shape[-1])
    total = F.cross_entropy(_wide(chosen), wanted, reduction="sum")  # only these rows are upcast
    return total, torch.tensor(len(wanted))


class Learned(NamedTuple):
    """Hold which rows of an output (..., d) have a label, and these labels, both on the output's device.

    Attributes:
        shape: the output's shape without d.
        contiguous: whether the output is.
        places: if it is, one tensor (n,) with the numbers of the rows among all rows; if not, one index (n,) for each
            dimension.
        labels: (n,) int64.
    """

    shape: tuple[int, ...]
    contiguous: bool
    places: tuple[Tensor, ...]
    labels: Tensor

    def rows(self, values: Tensor) -> Tensor | None:
        """Return these rows of an output, (n, d); None if they were not found for an output such as this one."""
        found = tuple(values.shape[:-1]), values.device, values.is_contiguous()
        if found != (self.shape, self.labels.device, self.contiguous):
            return None
        if not self.contiguous:
            return values[self.places]
        # The gradient of a row is added at its place. That of `values[places]` would first be sorted by place.
        return values.view(-1, values.shape[-1]).index_select(0, self.places[0])


def find_learned(labels: Tensor, classes: int, device: torch.device, *, contiguous: bool) -> Learned:
    """Find the rows of an output that have a label other than -100.

    labels: (...), read on the CPU where they are known there. contiguous: whether the output will be. A slice is not:
    its rows are found by dimension, so that it need not be copied.

    Raises:
        PeftLabError: a label is no class.
    """
    shape, labels = tuple(labels.shape), readable(labels)
    labels = labels.reshape(-1) if contiguous else labels
    learned = (labels != IGNORE).nonzero(as_tuple=True)
    wanted = labels[learned].long()
    if wanted.device.type == "cpu" and len(wanted):
        least, most = (int(label) for label in torch.aminmax(wanted))
        if not 0 <= least <= most < classes:
            wrong = most if most >= classes else least
            raise PeftLabError(f"A label is {wrong}, and the model tells {classes} classes apart, from 0 on.")
    *places, wanted = sent(device, *learned, wanted)
    return Learned(shape, contiguous, tuple(places), wanted)


def learned_rows(values: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return the rows of values (..., d) with a label other than -100, (n, d), and these labels (n,).

    labels: (...). They are returned on the device of the values.

    Raises:
        PeftLabError: a label is no class, or there is not one for each row.
    """
    if labels.shape != values.shape[:-1]:
        raise PeftLabError(f"The labels {tuple(labels.shape)} do not go with outputs {tuple(values.shape)}, one a row.")
    learned = find_learned(labels, classes, values.device, contiguous=values.is_contiguous())
    rows = learned.rows(values)
    assert rows is not None
    return rows, learned.labels
