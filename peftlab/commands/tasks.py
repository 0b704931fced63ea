"""The task of a data set, found from its columns: to answer, to classify, or to continue a text.

| columns | task | trained on | tested by |
| --- | --- | --- | --- |
| `prompt` and `completion` (or `ticket`) | completion | the completion, with its end | exact match of greedy answers |
| `text` and `label` | classification | the label | accuracy |
| `text` alone | text | every token | perplexity |
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftlab.assets.support_desk import score
from peftlab.errors import PeftLabError

HELD_OUT = 10  # one row in this many is kept for the test if a data set has no test split
HELD_OUT_MOST = 500
COMPLETIONS = ("completion", "ticket")
VALIDATION = ("validation", "valid", "dev")


@dataclass(frozen=True)
class Task:
    """A task: its kind, the splits as lists of rows, and the names of the classes (only for classification)."""

    kind: str  # "completion", "classification" or "text"
    answer: str  # the column to learn
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    test: list[dict[str, Any]]
    classes: tuple[str, ...] = ()


def task_of(data: Any, name: str, seed: int = 0, limit: int | None = None) -> Task:
    """Return the task of a `DatasetDict`.

    Without a test split, the validation split is the test. Without either, one row in ten is held out, at most 500,
    chosen by the seed. `limit` is the most rows of the training split.

    Raises:
        PeftLabError: no split to train on, columns of no known task, an empty column, or labels that cannot be used.
    """
    if "train" not in data:
        raise PeftLabError(f"{name} has no split called 'train'; it has {', '.join(map(repr, data))}.")
    columns = data["train"].column_names
    answer = next((column for column in COMPLETIONS if column in columns), None)
    if "prompt" in columns and answer:
        kind = "completion"
    elif "text" in columns:
        kind, answer = ("classification", "label") if "label" in columns else ("text", "text")
    else:
        raise PeftLabError(
            f"{name} has the columns {', '.join(columns)}; it needs prompt and completion, text and label, or text."
        )
    validation = next((data[split] for split in VALIDATION if split in data), None)
    train, test = data["train"], data["test"] if "test" in data else validation
    if test is None:
        train, test = _held_out(train, seed, name)
    if limit is not None:
        train = train.select(range(min(limit, len(train))))
    splits = [[] if part is None else list(part) for part in (train, validation, test)]
    if not splits[0]:
        raise PeftLabError(f"{name} has no rows to train on.")
    texts = ("prompt", answer) if kind == "completion" else ("text",)
    for row in (row for rows in splits for row in rows):
        for column in dict.fromkeys((*texts, answer)):
            row[column] = _cell(row, column, column in texts, name)
    classes: tuple[str, ...] = ()
    if kind == "classification":
        classes = _classes(data["train"], splits, name)
    first, second, third = splits
    return Task(kind, answer, first, second, third, classes)


def check_model(task: Task, model: Any, name: str) -> None:
    """Refuse a model that cannot do the task."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise PeftLabError(f"{name} is an encoder-decoder; peftlab train takes decoders and encoders.")
    if task.kind != "classification" and model.get_output_embeddings() is None:
        raise PeftLabError(
            f"{name} has no language-model head, which {task.kind} data needs; it can learn text and label."
        )


def encode(task: Task, tokenizer: Any, rows: Sequence[dict[str, Any]], max_length: int | None) -> list[dict[str, Any]]:
    """Encode rows as examples for training. Texts that are too long are cut, but never answers."""
    from peftlab.training.encoding import encode_classification, encode_completion, encode_text

    if task.kind == "classification":
        number = {name: index for index, name in enumerate(task.classes)}
        return [encode_classification(tokenizer, row["text"], number[row["label"]], max_length) for row in rows]
    if task.kind == "completion":
        return [encode_completion(tokenizer, row["prompt"], row[task.answer], max_length) for row in rows]
    return [encode_text(tokenizer, row["text"], max_length) for row in rows]


def test(
    task: Task,
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    max_length: int | None,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, float]:
    """Return scores of the model on rows of the test split, the most important one first."""
    from peftlab.training import metrics
    from peftlab.training.encoding import completion_text
    from peftlab.training.generation import generate_text

    if task.kind == "completion":
        answers = generate_text(
            model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        wanted = [completion_text(row[task.answer]) for row in rows]
        if task.answer == "ticket":
            return score(answers, wanted)
        return {"exact_match": metrics.exact_match(answers, wanted)}
    examples = encode(task, tokenizer, rows, max_length)
    if task.kind == "classification":
        found = metrics.predict_labels(model, examples, tokenizer, batch_size=batch_size, progress=True)
        wanted = [example["labels"] for example in examples]
        return {"accuracy": metrics.accuracy(found, wanted), "macro_f1": metrics.macro_f1(found, wanted)}
    return {"perplexity": metrics.perplexity(model, examples, tokenizer, batch_size=batch_size, progress=True)}


def _cell(row: dict[str, Any], column: str, is_text: bool, name: str) -> Any:
    """A row's value as it is learned from: a whole number among texts is a text; a list is a conversation.

    Raises:
        PeftLabError: nothing is there, or something that is no text.
    """
    value = row[column]
    if value is None or value != value:  # not a number
        raise PeftLabError(f"{name} has a row without {column}: {str(row)[:80]}. Fill it in, or take the row out.")
    if not is_text or isinstance(value, (str, list)):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise PeftLabError(f"{name}: {column} is a text, found {value!r:.60} in {str(row)[:80]}. Put it in quotes.")


def _held_out(train: Any, seed: int, name: str) -> tuple[Any, Any]:
    """Return (train, test), with one row in ten, at most 500, for the test."""
    if len(train) < 2:
        raise PeftLabError(f"{name} has {len(train)} rows; at least two are needed, one of them for the test.")
    order = list(range(len(train)))
    random.Random(seed).shuffle(order)
    size = min(HELD_OUT_MOST, max(1, len(train) // HELD_OUT))
    return train.select(sorted(order[size:])), train.select(sorted(order[:size]))


def _classes(train: Any, splits: list[list[dict[str, Any]]], name: str) -> tuple[str, ...]:
    """Return the names of the classes in the order of their numbers, and change the rows' labels to these names.

    Numbers, as of a `ClassLabel` or a plain column, keep their order; other labels are sorted as text.
    """
    named = getattr(train.features["label"], "names", None)
    if not named:
        found = {row["label"] for row in splits[0]}
        wrong = next((label for label in found if not isinstance(label, (int, str))), None)
        if wrong is not None:
            raise PeftLabError(f"{name}: a label is a whole number or a text, found {wrong!r}.")
        numbers = all(isinstance(label, int) for label in found)
        named = [str(label) for label in (sorted(found) if numbers else sorted(found, key=str))]
    else:
        for row in (row for rows in splits for row in rows):
            if 0 <= row["label"] < len(named):
                row["label"] = named[row["label"]]
    if len(named) < 2:
        raise PeftLabError(f"{name} has {len(named)} label ({', '.join(named)}); a classifier needs two or more.")
    for row in (row for rows in splits for row in rows):
        row["label"] = str(row["label"])
        if row["label"] not in named:
            raise PeftLabError(f"{name}: the label {row['label']!r} does not occur among the training rows' labels.")
    return tuple(named)
