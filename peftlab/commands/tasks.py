"""The task of a data set, found from its form (`peftlab.commands.formats`): to answer, to classify, to continue a text.

| task | trained on | tested by |
| --- | --- | --- |
| chat | the assistant's turns, each with its end | perplexity of these turns |
| completion | the completion, with its end | exact match of greedy answers |
| classification | the label | accuracy |
| text | every token | perplexity |
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peftlab.assets.support_desk import score
from peftlab.commands.formats import changed, form_of, unused
from peftlab.commands.reading import Row, Rows, splits_of
from peftlab.errors import PeftLabError
from peftlab.evaluation import scores

HELD_OUT = 10  # one row in this many is kept for the test if a data set has no test split
HELD_OUT_MOST = 500
VALIDATION = ("validation", "valid", "dev")


@dataclass(frozen=True)
class Task:
    """A task: its kind, the splits as lists of rows, and the names of the classes (only for classification)."""

    kind: str  # "chat", "completion", "classification" or "text"
    answer: str  # the column to learn
    train: list[Any]
    validation: list[Any]
    test: list[Any]
    classes: tuple[str, ...] = ()
    told: str = ""  # what was found and what is done with it
    train_on: str = "assistant"  # of a chat: see `encode_chat`


def task_of(data: Any, name: str, seed: int = 0, limit: int | None = None, train_on: str | None = None) -> Task:
    """Return the task of a `DatasetDict`, or of splits that `peftlab.commands.reading` has read.

    Without a test split, the validation split is the test. Without either, one row in ten is held out, at most 500,
    chosen by the seed. `limit` is the most rows of the training split.

    Raises:
        PeftLabError: no split to train on, columns of no known form, an empty column, or labels that cannot be used.
    """
    if "train" not in data:
        raise PeftLabError(f"{name} has no split called 'train'; it has {', '.join(map(repr, data))}.")
    found = splits_of(data, name)
    train, columns = found["train"], found["train"].columns
    if not train:
        raise PeftLabError(f"{name} has no rows to train on.")
    form = form_of(columns, name)
    blank = 0
    if form.kind == "text":
        blank = sum(_leave_out_blank(rows) for rows in found.values())
        if not train:
            raise PeftLabError(f"{name} has no rows to train on: each text is blank.")
    if train_on is not None and form.kind != "chat":
        raise PeftLabError(f"--train-on is for chats, and {name} holds {form.name}. Leave it out.")
    validation = next((found[split] for split in VALIDATION if split in found), None)
    test = found["test"] if "test" in found else validation
    if test is None:
        train, test = _held_out(train, seed, name)
    splits = [[] if part is None else list(part) for part in (train[:limit], validation, test)]
    splits = [[changed(row, form, name) for row in rows] for rows in splits]
    classes: tuple[str, ...] = ()
    if form.kind == "classification":
        classes = _classes(found["train"].classes, splits, name)
    first, second, third = splits
    left = unused(columns, form)
    told = f"{name} holds {form.name}: {form.told}" + (f" (not used: {', '.join(left)})" if left else "")
    told += f"; {blank:,} blank ones are left out" if blank else ""
    return Task(form.kind, form.answer, first, second, third, classes, told, train_on or "assistant")


def _leave_out_blank(rows: Rows) -> int:
    """Take out the texts with nothing to learn in them, such as the empty lines between paragraphs; say how many."""
    before = len(rows)
    rows[:] = [row for row in rows if not isinstance(row.get("text"), str) or row["text"].strip()]
    return before - len(rows)


def check_model(task: Task, model: Any, name: str) -> None:
    """Refuse a model that cannot do the task."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise PeftLabError(f"{name} is an encoder-decoder; peftlab train takes decoders and encoders.")
    if task.kind != "classification" and model.get_output_embeddings() is None:
        raise PeftLabError(
            f"{name} has no language-model head, which {task.kind} data needs; it can learn text and label."
        )


def encode(
    task: Task,
    tokenizer: Any,
    rows: Sequence[Any],
    max_length: int | None,
    tell: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Encode rows as examples for training. Texts that are too long are cut, but never answers.

    Args:
        tell: gets a line that says how many were cut.

    Raises:
        PeftLabError: a row cannot be encoded; the message says where it stands.
    """
    if task.kind == "chat" and getattr(tokenizer, "chat_template", None) is None:
        raise PeftLabError(
            "The data holds chats, and the model's tokenizer has no chat template, which says how a chat is written. "
            "Take a chat model (its name often ends in -Instruct), or give data with prompt and completion."
        )
    if tell is not None and rows and "plain" in rows[0] and _prompt(rows[0], tokenizer) == rows[0]["plain"]:
        tell("The tokenizer has no chat template: prompts are written with ### Instruction: and ### Response:")
    examples, cut, lost = [], 0, 0
    for row in rows:
        try:
            example = _encoded(task, tokenizer, row, None)
            if max_length is not None and len(example["input_ids"]) > max_length:
                shorter = _encoded(task, tokenizer, row, max_length)
                cut += 1
                lost += _answers(example) - _answers(shorter) if task.kind == "chat" else 0
                example = shorter
        except PeftLabError as error:
            raise PeftLabError(f"{row.where}: {error}" if isinstance(row, Row) else str(error)) from error
        examples.append(example)
    if cut and tell is not None:
        side = {"chat": "at the beginning of their context", "completion": "at the beginning of their prompts"}
        fell = f"; {lost:,} earlier answers fell out with it" if lost else ""
        tell(
            f"{cut:,} of {len(examples):,} examples are longer than {max_length} tokens and were cut "
            f"{side.get(task.kind, 'at their end')}{fell} (--max-length)"
        )
    return examples


def _encoded(task: Task, tokenizer: Any, row: Any, most: int | None) -> dict[str, Any]:
    from peftlab.training.chat import encode_chat
    from peftlab.training.encoding import encode_classification, encode_completion, encode_text

    if task.kind == "chat":
        return encode_chat(tokenizer, row["messages"], task.train_on, most, tools=row["tools"])
    if task.kind == "classification":
        return encode_classification(tokenizer, row["text"], task.classes.index(row["label"]), most)
    if task.kind == "completion":
        return encode_completion(tokenizer, _prompt(row, tokenizer), row[task.answer], most)
    return encode_text(tokenizer, row["text"], most)


def _prompt(row: Any, tokenizer: Any) -> Any:
    """A row's prompt; without a chat template, which would part it from the answer, the one with headings."""
    plain = row.get("plain") if getattr(tokenizer, "chat_template", None) is None else None
    return row["prompt"] if plain is None else plain


def _answers(example: dict[str, Any]) -> int:
    """How many stretches of tokens are learned."""
    learned = [label != -100 for label in example["labels"]]
    return sum(now and not before for before, now in zip([False, *learned], learned, strict=False))


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
            model,
            tokenizer,
            [_prompt(row, tokenizer) for row in rows],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        wanted = [completion_text(row[task.answer]) for row in rows]
        if task.answer == "ticket":
            return score(answers, wanted)
        return {"exact_match": scores.exact_match(answers, wanted)}
    examples = encode(task, tokenizer, rows, max_length)
    if task.kind == "classification":
        found = metrics.predict_labels(model, examples, tokenizer, batch_size=batch_size, progress=True)
        wanted = [example["labels"] for example in examples]
        return {"accuracy": scores.accuracy(found, wanted), "macro_f1": scores.macro_f1(found, wanted)}
    return {"perplexity": metrics.perplexity(model, examples, tokenizer, batch_size=batch_size, progress=True)}


def _held_out(train: Rows, seed: int, name: str) -> tuple[Any, Any]:
    """Return (train, test), with one row in ten, at most 500, for the test."""
    if len(train) < 2:
        raise PeftLabError(f"{name} has {len(train)} rows; at least two are needed, one of them for the test.")
    order = list(range(len(train)))
    random.Random(seed).shuffle(order)
    size = min(HELD_OUT_MOST, max(1, len(train) // HELD_OUT))
    return [train[place] for place in sorted(order[size:])], [train[place] for place in sorted(order[:size])]


def _classes(named: Any, splits: list[list[Any]], name: str) -> tuple[str, ...]:
    """Return the names of the classes in the order of their numbers, and change the rows' labels to these names.

    Numbers, as of a `ClassLabel` or a plain column, keep their order; other labels are sorted as text.
    """
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
