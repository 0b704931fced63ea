"""What a model gives on examples: its perplexity per token, its mean loss, its labels. Scores are in `evaluation`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftlab.checks import checked
from peftlab.core.modes import device_of, mode, to_device
from peftlab.core.records import as_transformer
from peftlab.errors import PeftLabError
from peftlab.progress import Bar
from peftlab.training.batching import batches
from peftlab.training.encoding import Collator, encode_text
from peftlab.training.inputs import Inputs
from peftlab.training.labels import moved
from peftlab.training.losses import Loss, default_loss, sum_and_count
from peftlab.training.model_task import PROBLEMS, call, inner_model, task_of
from peftlab.training.rows import rows_of

LANGUAGE = ("causal language modelling", "masked language modelling", "sequence to sequence")


@checked("examples")
def perplexity(
    model: nn.Module,
    examples: Sequence[str | Mapping[str, Any]],
    tokenizer: Any = None,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool = False,
) -> float:
    """Return exp of the mean negative log-likelihood **per token**. How the examples are batched does not matter.

    Args:
        examples: plain texts, or encoded examples. In a plain text every token but the first is predicted, and no end
            token is added. In an encoded example the labelled tokens count.
        tokenizer: needed for plain texts; gives the padding id.
        max_length: cut texts after so many tokens.

    Raises:
        PeftLabError: the model predicts no tokens; or plain texts are given to one that does not predict a text's next
            token from those before it.

    >>> round(pl.perplexity(model, ["the cat runs"], tokenizer))
    34
    """
    if isinstance(examples, str):
        raise PeftLabError("perplexity takes a list of texts; put the one text into a list.")
    task = task_of(model)
    if task is not None and task not in LANGUAGE:
        raise PeftLabError(f"{type(inner_model(model)).__name__} is for {task}; perplexity is of a language model.")
    encoded = []
    for example in rows_of(examples, "examples"):
        if isinstance(example, str):
            if tokenizer is None:
                raise PeftLabError("perplexity of plain texts needs the tokenizer.")
            if task not in (None, LANGUAGE[0]):
                raise PeftLabError(
                    f"{type(inner_model(model)).__name__} reads a text whole before it predicts its tokens, so a plain "
                    "text has no perplexity under it; give encoded examples whose labels are not in their input_ids."
                )
            example = encode_text(tokenizer, example, max_length, end=False)
        encoded.append(example)
    # ppl = exp( sum of nll over all tokens / number of tokens ), not the mean of exp(mean nll) of batches
    mean = mean_loss(model, encoded, Collator(tokenizer), batch_size=batch_size, progress=progress)
    return math.exp(mean) if mean < 700 else math.inf


@checked("examples")
def mean_loss(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    collate: Callable[[list], dict[str, Any]],
    *,
    loss: Loss | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> float:
    """Return the mean loss per label over all examples: sum of losses / number of labels.

    The model runs in eval mode and without gradients.

    Args:
        examples: encoded examples, in any form that `peftlab.train` takes.
        collate: list of examples -> batch, for example `Collator(tokenizer)`.
        loss: `(model, batch) -> (sum, number of labels)`; by default that of the model's task.

    Raises:
        PeftLabError: there is no example, or no example has a label.

    >>> examples = [pl.encode_text(tokenizer, "the cat runs"), pl.encode_text(tokenizer, "a dog sleeps")]
    >>> round(pl.mean_loss(model, examples, pl.Collator(tokenizer)), 1)
    3.4
    """
    total, count = 0.0, 0
    device = device_of(model)
    inputs = collate if isinstance(collate, Inputs) else Inputs(model, collate, loss=loss)
    examples = rows_of(examples, "examples")
    if isinstance(collate, Collator):  # a collate of your own gets the rows as they are
        examples = inputs.examples(examples, "the examples")
    parts = batches(model, [_length(example) for example in examples], batch_size)
    with (
        mode(model, False),
        torch.no_grad(),
        Bar(len(examples), "Evaluating", unit="example", enabled=progress) as bar,
    ):
        for chosen in parts:
            batch = moved(inputs([examples[index] for index in chosen]), device)
            batch_total, batch_count = sum_and_count((loss or default_loss(model, batch))(model, batch))
            total, count = total + float(batch_total), count + int(batch_count)
            bar.update(len(chosen))
    if not count:
        raise PeftLabError(f"Nothing to measure: {len(examples)} examples hold no labelled token to predict.")
    return total / count


@checked("examples")
def predict_labels(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any = None,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> list[Any]:
    """What a classifier says of each encoded example, in their order; labels in the examples are not needed.

    That is the most likely class, an int; for a tagger a list of ints, one a token; for a regression a number, or a
    list of them; and where several classes may be right (`config.problem_type`, or labels in the examples with a
    number for each class) a list with 1 for each class above one half and 0 for the others.

    Raises:
        PeftLabError: the model predicts tokens, not classes.

    >>> from transformers import LlamaForSequenceClassification
    >>> model.config.pad_token_id = tokenizer.pad_token_id
    >>> classifier = LlamaForSequenceClassification(model.config)
    >>> examples = [pl.encode_classification(tokenizer, text, label=0) for text in ("the cat", "a dog")]
    >>> len(pl.predict_labels(classifier, examples, tokenizer))
    2
    """
    inputs = Inputs(model, Collator(tokenizer), labelled=False)
    name, task = inputs.facts.name, inputs.facts.task
    if task not in (None, "classification", "token classification", "choice"):
        raise PeftLabError(f"{name} is for {task}; predict_labels is for classifiers and taggers.")
    rows = rows_of(examples, "examples")
    problem = _problem(model, rows) if task == "classification" else None
    rows = inputs.examples(rows, "the examples")
    parts = batches(model, [_length(example) for example in rows], batch_size)
    device = device_of(model)
    found: list[Any] = [0] * len(rows)
    with mode(model, False), torch.no_grad(), Bar(len(rows), "Predicting", unit="example", enabled=progress) as bar:
        for chosen in parts:
            batch = inputs([rows[index] for index in chosen])
            output = call(model, to_device(batch, device))
            logits = getattr(output, "logits", output)
            if not isinstance(logits, torch.Tensor):
                raise PeftLabError(
                    f"{inputs.facts.name} gives {type(output).__name__}, which has no logits of classes."
                )
            for index, row, answer in zip(chosen, range(len(chosen)), _answers(logits, problem), strict=True):
                if logits.ndim == 3 and "attention_mask" in batch:  # not what is said of padding, nor of a prompt
                    tokens = int(batch["attention_mask"][row].sum())
                    answer = answer[len(answer) - batch["attention_mask"].shape[1] :][:tokens]
                found[index] = answer
            bar.update(len(chosen))
    return found


def _problem(model: nn.Module, rows: Sequence[Any]) -> str:
    """What kind of labels a classifier has, from its config or, without one there, from the first example's."""
    config = as_transformer(inner_model(model)).config
    known = getattr(config, "problem_type", None)
    if known in PROBLEMS:
        return known
    if config.num_labels == 1:
        return "regression"
    first = rows[0] if len(rows) and isinstance(rows[0], Mapping) else {}  # others are refused with the examples
    found = (first[key] for key in ("labels", "label", "label_ids") if key in first)
    labels: Any = next(found, None) if first else None
    several = labels is not None and getattr(labels, "shape", None) != () and hasattr(labels, "__len__")
    return "multi_label_classification" if several and len(labels) == config.num_labels else PROBLEMS[0]


def _answers(logits: torch.Tensor, problem: str | None) -> list[Any]:
    if problem == "multi_label_classification":
        return (logits > 0).long().tolist()  # sigmoid(x) > 1/2 where x > 0
    if problem == "regression":
        return (logits.squeeze(1) if logits.shape[1] == 1 else logits).tolist()
    return logits.argmax(-1).tolist()


def _length(example: Mapping[str, Any]) -> int:
    ids = example.get("input_ids")
    return 0 if ids is None else len(ids)
