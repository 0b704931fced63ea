"""How good a model is: accuracy, macro F1, exact match, words in common, and perplexity weighted by tokens."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftlab.core.modes import device_of, mode, to_device
from peftlab.errors import PeftLabError
from peftlab.progress import Bar
from peftlab.training.batching import batches
from peftlab.training.encoding import Collator, encode_text
from peftlab.training.losses import Loss, default_loss


def accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """The share of predictions that equal their reference, between 0 and 1.

    It misleads on unbalanced classes: always answering the class of 95% scores 0.95. Look at ``macro_f1`` beside it.
    """
    _same_length(predictions, references)
    # accuracy = |{i : p_i = r_i}| / n
    return sum(p == r for p, r in zip(_plain(predictions), _plain(references), strict=True)) / len(references)


def macro_f1(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """The mean over classes of F1, the harmonic mean of precision and recall: every class counts the same.

    A class is one that occurs among the references or the predictions.
    """
    _same_length(predictions, references)
    pairs = list(zip(_plain(predictions), _plain(references), strict=True))
    scores = []
    for label in {value for pair in pairs for value in pair}:
        hits = sum(p == label and r == label for p, r in pairs)
        predicted, actual = sum(p == label for p, _ in pairs), sum(r == label for _, r in pairs)
        # F1 = 2 P R / (P + R), with P = hits/predicted and R = hits/actual, is 2 hits / (predicted + actual)
        scores.append(2 * hits / (predicted + actual))
    return sum(scores) / len(scores)


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The share of texts that equal their reference but for white space at both ends, between 0 and 1."""
    _same_length(predictions, references)
    return sum(p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)) / len(references)


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The mean over texts of F1 of their words, between 0 and 1: ROUGE-1 without stemming (Lin 2004).

    Words are runs of letters and digits in lower case; a word that occurs twice has to be found twice. It says that the
    right words are there, not that they make a sentence, nor that it is true.
    """
    _same_length(predictions, references)
    return sum(_words_f1(p, r) for p, r in zip(predictions, references, strict=True)) / len(references)


def _words_f1(prediction: str, reference: str) -> float:
    found, wanted = (Counter(re.findall(r"\w+", text.lower())) for text in (prediction, reference))
    both = (found & wanted).total()
    # F1 = 2 P R / (P + R) with P = both / found and R = both / wanted; two empty texts agree
    size = found.total() + wanted.total()
    return 2 * both / size if size else 1.0


def perplexity(
    model: nn.Module,
    examples: Sequence[str | Mapping[str, Any]],
    tokenizer: Any = None,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool = False,
) -> float:
    """exp of the mean negative log-likelihood **a token**, whatever the batches.

    Args:
        examples: plain texts (every token but the first is predicted, no end token is added), or encoded examples,
            of which the labelled tokens count.
        tokenizer: needed for plain texts; gives the padding id.
        max_length: cut texts after so many tokens.
    """
    if isinstance(examples, str):
        raise PeftLabError("perplexity takes a list of texts; put the one text into a list.")
    encoded = []
    for example in examples:
        if isinstance(example, str):
            if tokenizer is None:
                raise PeftLabError("perplexity of plain texts needs the tokenizer.")
            example = encode_text(tokenizer, example, max_length, end=False)
        encoded.append(example)
    # ppl = exp( sum of nll over all tokens / number of tokens ), not the mean of exp(mean nll) of batches
    mean = mean_loss(model, encoded, Collator(tokenizer), batch_size=batch_size, progress=progress)
    return math.exp(mean) if mean < 700 else math.inf


def mean_loss(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    collate: Callable[[list[Any]], dict[str, Any]],
    *,
    loss: Loss | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> float:
    """The loss a label over all examples, in eval mode and without gradients: sum of losses / number of labels.

    Raises:
        PeftLabError: there is no example, or nothing in them is labelled.
    """
    total, count = 0.0, 0
    device = device_of(model)
    parts = batches(model, [_length(example) for example in examples], batch_size)
    with (
        mode(model, False),
        torch.no_grad(),
        Bar(len(examples), "Evaluating", unit="example", enabled=progress) as bar,
    ):
        for chosen in parts:
            batch = to_device(collate([examples[index] for index in chosen]), device)
            batch_total, batch_count = (loss or default_loss(model, batch.get("labels")))(model, batch)
            total, count = total + float(batch_total), count + int(batch_count)
            bar.update(len(chosen))
    if not count:
        raise PeftLabError(f"Nothing to measure: {len(examples)} examples hold no labelled token to predict.")
    return total / count


def predict_labels(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    tokenizer: Any = None,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> list[int]:
    """The most likely class of each encoded example, in their order; labels in the examples are not looked at."""
    inputs = [{key: value for key, value in example.items() if key != "labels"} for example in examples]
    parts = batches(model, [_length(example) for example in inputs], batch_size)
    collate, device = Collator(tokenizer), device_of(model)
    classes = [0] * len(inputs)
    with mode(model, False), torch.no_grad(), Bar(len(inputs), "Predicting", unit="example", enabled=progress) as bar:
        for chosen in parts:
            output = model(**to_device(collate([inputs[index] for index in chosen]), device))
            best = getattr(output, "logits", output).argmax(-1).tolist()
            for index, label in zip(chosen, best, strict=True):
                classes[index] = label
            bar.update(len(chosen))
    return classes


def _length(example: Mapping[str, Any]) -> int:
    ids = example.get("input_ids")
    return 0 if ids is None else len(ids)


def _plain(values: Any) -> list[Any]:
    """A list of plain values, also from a tensor, an array or a column of a data set."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _same_length(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    if len(predictions) != len(references):
        raise PeftLabError(f"{len(predictions)} predictions do not go with {len(references)} references.")
    if not len(references):
        raise PeftLabError("There is nothing to compare: both lists are empty.")
