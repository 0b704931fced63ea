"""Examples and batches as a model reads them: the columns that are used, checked, and padded as it needs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.errors import PeftLabError, warn
from peftlab.training.borders import in_one_row, needs_masks, with_masks
from peftlab.training.checks import SPAN, answer_in_encoder, check_labels, check_tokens
from peftlab.training.encoding import IGNORE, Collator
from peftlab.training.losses import Loss
from peftlab.training.model_facts import facts_of
from peftlab.training.model_task import PER_TOKEN, inner_model
from peftlab.training.packing import pack
from peftlab.training.padding import pad_to, put_known_id, turn_right

MOST_KEPT = 10_000  # examples: with two tensors of a thousand tokens each, 160 MB
OTHER_NAMES = ("label", "label_ids")  # of labels: transformers' collators read them so


class Example(dict):
    """The columns of one example that are used, and what messages call it."""

    where = "An example"


class Examples(Sequence):
    """Examples of which the columns that the model reads are taken, and each is checked when it is read.

    Those of a list of dicts, which stays as it is, are kept as tensors once they are read. Other data may give another
    example each time (an image cut at random, say).
    """

    def __init__(self, rows: Sequence[Any], inputs: Inputs, name: str) -> None:
        self.rows = inputs.narrowed(rows)
        self.inputs, self.name = inputs, name
        self.listed = isinstance(rows, (list, tuple))
        self.kept: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:  # an int; a Sequence's type has slices too
        if isinstance(index, int) and index in self.kept:
            return self.kept[index]
        example = self.inputs.row(self.rows[index], f"Example {index} of {self.name}")
        if len(self.rows) <= MOST_KEPT and self.same_each_time([index]):
            self.kept[index] = example = as_tensors(example)
        return example

    def same_each_time(self, indices: Sequence[int]) -> bool:
        """Say whether these examples are the same each time they are read: plain dicts in a list."""
        return self.listed and all(type(self.rows[index]) is dict for index in indices)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


class Inputs:
    """Rows and batches as a model reads them.

    Args:
        collate: list of examples -> batch.
        loss: a loss of the user's own, which may read any column; None stands for the loss of the model's task.
        labelled: whether the labels are read.
        packing: whether the examples of a batch share rows; a `Collator` may say so itself.

    Raises:
        PeftLabError: without a loss, the model's task is not known; or the model cannot take packed rows.
    """

    def __init__(
        self,
        model: nn.Module,
        collate: Callable,
        *,
        loss: Loss | None = None,
        labelled: bool = True,
        packing: bool = False,
    ) -> None:
        if not callable(collate):
            raise PeftLabError(
                f"collate is {collate!r}; it makes a batch of a list of examples, as pl.Collator() does."
            )
        self.packing, self.multiple_of = packing, getattr(collate, "multiple_of", 1)
        if isinstance(collate, Collator):  # rows are packed last, when the examples in them have been checked
            self.packing = packing or collate.packing
            collate = replace(collate, packing=False)
        self.collate, self.own_loss, self.labelled = collate, loss is not None, labelled
        # a mask that the examples bring may hide tokens on the left all the same
        self.pads_right = isinstance(collate, Collator) and collate.side == "right"
        self.lengths: tuple[int, ...] = ()  # to which batches are padded
        self.facts = facts_of(model, with_task=loss is None)
        self.main = getattr(inner_model(model), "main_input_name", None)
        self.said: set[str] = set()
        self.one_row = self.packing and in_one_row(model)
        self.masks = self.packing and needs_masks(model, self.facts)

    # -- one example ---------------------------------------------------------------------------------------------

    def examples(self, rows: Sequence[Any], name: str) -> Examples:
        """The rows, read and checked one by one; what is read already stays as it is."""
        return rows if isinstance(rows, Examples) else Examples(rows, self, name)

    def narrowed(self, rows: Sequence[Any]) -> Sequence[Any]:
        """A `datasets.Dataset` without the columns that are not used: it would decode each of them."""
        names = getattr(rows, "column_names", None)
        if self.own_loss or not isinstance(names, list) or not hasattr(rows, "select_columns"):
            return rows
        kept = [name for name in names if self._is_used(name) or name in OTHER_NAMES]
        return rows.select_columns(kept) if kept and len(kept) < len(names) else rows

    def row(self, example: Any, where: str) -> Example:
        """The columns of an example that are used: those that the model's forward names, as in transformers' Trainer.

        Raises:
            PeftLabError: it is no dict, lacks what the model reads, is empty, or its columns do not fit together.
        """
        if not isinstance(example, Mapping):
            raise PeftLabError(
                f"{where} is a {type(example).__name__} ({str(example)[:40]!r}), not a dict such as {{'input_ids': "
                "[...], 'labels': [...]}. Encode texts with pl.encode_text, encode_completion or encode_classification."
            )
        row = Example((key, value) for key, value in example.items() if self._is_used(key) and self._fits(key, value))
        row.where = where
        if self.labelled and "labels" not in row:
            other = next((key for key in OTHER_NAMES if key in example), None)
            if other is not None:
                row["labels"] = example[other]
        if not self.own_loss:
            self._check_presence(row, example)
        for key, value in row.items():
            if value is None or isinstance(value, (str, bytes)) or (isinstance(value, float) and math.isnan(value)):
                raise PeftLabError(f"{where}: {key} is {value!r:.60}, not a number or a list of numbers.")
        self._check_lengths(row)
        return row

    def _is_used(self, name: str) -> bool:
        if name == "labels" or name in SPAN:
            return self.labelled
        return self.own_loss or self.facts.columns.reads(name)

    def _fits(self, name: str, value: Any) -> bool:
        """Whether a column is used for certain; one that only may be is used if it becomes a tensor."""
        return name in self.facts.columns.names or name == "labels" or _is_numeric(value)

    def _check_presence(self, row: Example, example: Mapping[str, Any]) -> None:
        if self.main is not None:
            missing = [self.main] if not {self.main, "inputs_embeds", "input_ids"} & set(row) else []
        else:
            made = {"labels", "attention_mask"} if "input_ids" in row else {"labels"}
            missing = sorted(self.facts.columns.required - set(row) - made)
        if missing:
            raise PeftLabError(
                f"{row.where} has the columns {', '.join(map(repr, example)) or 'none'}, and {self.facts.name} reads "
                f"{missing[0]!r}. Encode texts with pl.encode_text, encode_completion or encode_classification."
            )

    def _check_lengths(self, row: Example) -> None:
        task = self.facts.task
        ids: Any = row.get("input_ids")
        if ids is None:
            return
        tokens = _length(ids)
        if tokens is None:
            raise PeftLabError(
                f"{row.where}: input_ids is one number, {ids!r}, not a list. Put one example into a list."
            )
        if tokens == 0:
            raise PeftLabError(f"{row.where} is empty: its input_ids hold no token. Leave such examples out.")
        for key in ("attention_mask", "token_type_ids", *(["labels"] if task in PER_TOKEN else [])):
            length = _length(row.get(key))
            if length is not None and length != tokens:
                more = " A label is needed for each token, not for each word." if key == "labels" else ""
                raise PeftLabError(f"{row.where} has {tokens} input_ids and {length} {key}; they go together.{more}")
        labels: Any = row.get("labels")
        if task == "sequence to sequence" and _length(labels) == tokens and labels[0] == IGNORE:
            learned = [(label, token) for label, token in zip(labels, ids, strict=True) if label != IGNORE]
            if learned and all(label == token for label, token in learned):
                raise answer_in_encoder(row.where, self.facts.name)

    # -- one batch -----------------------------------------------------------------------------------------------

    def __call__(self, examples: Sequence[Any]) -> Any:
        """The batch of these examples, checked and, where the model needs another padding, padded so."""
        batch = self.collate(examples)
        if not isinstance(batch, Mapping):
            if not self.own_loss:
                raise PeftLabError(f"collate gave a {type(batch).__name__}; a batch is a dict of tensors by name.")
            return batch
        batch = dict(batch)

        def where(row: int) -> str:
            return getattr(examples[row], "where", f"Row {row} of a batch") if row < len(examples) else "A batch"

        if not self.own_loss and not (self.pads_right and "attention_mask" not in examples[0]):
            turn_right(batch, self.facts, self.collate)
        put_known_id(batch, self.facts, self.collate, self._warn)
        check_tokens(batch, self.facts, where)
        if not self.own_loss and self.labelled:
            check_labels(batch, self.facts, where, self._warn)
        if not self.packing:
            return pad_to(batch, self.lengths, self.facts) if self.lengths else batch
        packed = pack(batch, one_row=self.one_row, multiple_of=self.multiple_of)
        return with_masks(self.facts.model, packed) if self.masks else packed

    def _warn(self, message: str) -> None:
        if message not in self.said:
            warn(message)
            self.said.add(message)


def as_tensors(example: Example) -> Example:
    """The example with its lists of whole numbers as tensors; what is a list of anything else stays one."""
    made = Example(example)
    made.where = example.where
    for name, value in example.items():
        if isinstance(value, list) and all(type(one) is int and abs(one) < 1 << 62 for one in value):
            made[name] = torch.tensor(value, dtype=torch.long)
    return made


def example_lengths(examples: Sequence[Any]) -> list[int]:
    """The number of tokens of each example.

    Raises:
        PeftLabError: an example has no tokens to count.
    """
    lengths = [_length(example.get("input_ids") if isinstance(example, Mapping) else None) for example in examples]
    known = [length for length in lengths if length is not None]
    if len(known) < len(lengths):
        raise PeftLabError(
            f"group_by_length needs input_ids, whose lengths it compares; example {lengths.index(None)} has none. "
            "Leave group_by_length out."
        )
    return known


def _length(value: Any) -> int | None:
    """The number of entries of a list, an array or a tensor; None for a single number, or nothing."""
    if getattr(value, "shape", None) == ():
        return None
    return len(value) if hasattr(value, "__len__") else None


def _is_numeric(value: Any) -> bool:
    """Whether a value is a number, or a list, array or tensor of numbers."""
    while isinstance(value, (list, tuple)):
        if not value:
            return True
        value = value[0]
    if isinstance(value, (bool, int, float, Tensor)):
        return True
    return getattr(getattr(value, "dtype", None), "kind", "O") in "biuf"
