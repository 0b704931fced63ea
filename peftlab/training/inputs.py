"""What is read of the examples, and what is checked before a model sees a batch.

Everything here looks at rows and at tensors on the CPU, so that nothing waits for a GPU: there a label or a token out
of range would end the whole process, with a message that names neither.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.core.records import unwrap
from peftlab.errors import PeftLabError
from peftlab.training.encoding import IGNORE, Collator
from peftlab.training.losses import Loss
from peftlab.training.model_task import (
    PER_TOKEN,
    finds_the_last_token,
    forward_columns,
    inner_model,
    is_tensor_on_cpu,
    output_size,
    position_limit,
    problem_of,
    task_of,
    text_config,
    vocabulary,
)

OTHER_NAMES = ("label", "label_ids")  # of labels: transformers' collators read them so
POSITIONS = ("start_positions", "end_positions")
ALONG_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


class Example(dict):
    """The columns of one example that are used, and its place in the data."""

    place = 0


class Examples(Sequence):
    """Examples of which the columns that the model reads are taken, and each is checked when it is read."""

    def __init__(self, rows: Sequence[Any], inputs: Inputs, name: str) -> None:
        self.rows = inputs.narrowed(rows)
        self.inputs, self.name = inputs, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        example = self.inputs.row(self.rows[index], f"Example {index} of {self.name}")
        example.place = index
        return example

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


class Inputs:
    """Rows and batches as a model reads them.

    Args:
        collate: list of examples -> batch.
        loss: a loss of the user's own, which may read any column; None stands for the loss of the model's task.
        labelled: whether the labels are read.

    Raises:
        PeftLabError: without a loss, the model's task is not known.
    """

    def __init__(self, model: nn.Module, collate: Callable, *, loss: Loss | None = None, labelled: bool = True) -> None:
        self.collate, self.own_loss, self.labelled = collate, loss is not None, labelled
        self.model, self.name = model, type(inner_model(model)).__name__
        self.columns = forward_columns(unwrap(model))
        self.task = None if self.own_loss else task_of(model)
        self.config = text_config(model)
        self.tokens, self.positions = vocabulary(model), position_limit(model)
        self.outputs = output_size(model)
        self.searches = finds_the_last_token(model)
        self.said: set[str] = set()

    # -- one example ---------------------------------------------------------------------------------------------

    def examples(self, rows: Sequence[Any], name: str) -> Examples:
        """The rows, read and checked one by one; what is read already stays as it is."""
        return rows if isinstance(rows, Examples) else Examples(rows, self, name)

    def narrowed(self, rows: Sequence[Any]) -> Sequence[Any]:
        """A ``datasets.Dataset`` without the columns that are not used: it would decode each of them."""
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
        if self.labelled and "labels" not in row:
            other = next((key for key in OTHER_NAMES if key in example), None)
            if other is not None and self._fits("labels", example[other]):
                row["labels"] = example[other]
        self._check_presence(row, example, where)
        for key, value in row.items():
            if value is None or isinstance(value, (str, bytes)):
                raise PeftLabError(f"{where}: {key} is {value!r:.60}, not a number or a list of numbers.")
            if isinstance(value, float) and math.isnan(value):
                raise PeftLabError(f"{where}: {key} is missing (nan).")
        self._check_lengths(row, where)
        return row

    def _is_used(self, name: str) -> bool:
        if name == "labels" or name in POSITIONS:
            return self.labelled
        return self.own_loss or self.columns.reads(name)

    def _fits(self, name: str, value: Any) -> bool:
        """Whether a column that is used for certain, or that only may be, becomes a tensor."""
        return name in self.columns.names or name == "labels" or _is_numeric(value)

    def _check_presence(self, row: Example, example: Mapping[str, Any], where: str) -> None:
        if self.own_loss:
            return
        main = getattr(inner_model(self.model), "main_input_name", None)
        if main is not None:
            missing = [main] if not {main, "inputs_embeds", "input_ids"} & set(row) else []
        else:
            made = {"labels", "attention_mask"} if "input_ids" in row else {"labels"}
            missing = sorted(self.columns.required - set(row) - made)
        if missing:
            raise PeftLabError(
                f"{where} has the columns {', '.join(map(repr, example)) or 'none'}, and {self.name} reads "
                f"{missing[0]!r}. Encode texts with pl.encode_text, encode_completion or encode_classification."
            )

    def _check_lengths(self, row: Example, where: str) -> None:
        ids = row.get("input_ids")
        if ids is None:
            return
        tokens = _length(ids)
        if tokens is None:
            raise PeftLabError(f"{where}: input_ids is one number, {ids!r}, not a list. Put one example into a list.")
        if tokens == 0:
            raise PeftLabError(f"{where} is empty: its input_ids hold no token. Leave such examples out.")
        along = ["attention_mask", "token_type_ids", *(["labels"] if self.task in PER_TOKEN else [])]
        for key in along:
            length = _length(row.get(key))
            if length is not None and length != tokens:
                more = " A tag is needed for each token, not for each word." if key == "labels" else ""
                raise PeftLabError(f"{where} has {tokens} input_ids and {length} {key}; they go together.{more}")
        labels = row.get("labels")
        if self.task == "sequence to sequence" and _length(labels) == tokens and labels[0] == IGNORE:
            learned = [(label, token) for label, token in zip(labels, ids, strict=True) if label != IGNORE]
            if learned and all(label == token for label, token in learned):
                raise PeftLabError(
                    f"{where} has its answer in input_ids, as a decoder needs it, but {self.name} is an "
                    "encoder-decoder: its encoder would read what its decoder is to learn. Encode with "
                    "encode_completion(tokenizer, prompt, completion, model=model): input_ids are the prompt alone, "
                    "labels the answer alone."
                )

    # -- one batch -----------------------------------------------------------------------------------------------

    def __call__(self, examples: Sequence[Any]) -> Any:
        """The batch of these examples, checked and, where the model needs another padding, padded so."""
        batch = self.collate(examples)
        if not isinstance(batch, Mapping):
            if not self.own_loss:
                raise PeftLabError(f"collate gave a {type(batch).__name__}; a batch is a dict of tensors by name.")
            return batch
        batch = dict(batch)
        if not self.own_loss:
            self._turn(batch)
        self._pad(batch)
        self._check_tokens(batch, examples)
        if not self.own_loss and self.labelled:
            self._check_labels(batch, examples)
        return batch

    def _turn(self, batch: dict[str, Any]) -> None:
        """Move padding from the left to the right: there no token's position depends on it, nor under a prompt."""
        mask, ids = batch.get("attention_mask"), batch.get("input_ids")
        if not is_tensor_on_cpu(mask) or not isinstance(ids, Tensor) or mask.ndim != 2 or ids.shape != mask.shape:
            return
        real = mask.bool()
        if real[:, 0].all() or not (real[:, 1:] >= real[:, :-1]).all():
            return
        if self.task == "question answering" and not isinstance(self.collate, Collator):
            return  # a collate of the user's own may have moved the positions already
        order = (~real).long().argsort(dim=1, stable=True)
        for key in (*ALONG_TOKENS, *(["labels"] if self._labels_along_tokens(batch) else [])):
            value = batch.get(key)
            if is_tensor_on_cpu(value) and value.shape == mask.shape:
                batch[key] = value.gather(1, order)

    def _labels_along_tokens(self, batch: Mapping[str, Any]) -> bool:
        labels = batch.get("labels")
        integers = isinstance(labels, Tensor) and not labels.is_floating_point()
        return self.task in PER_TOKEN or (self.task is None and integers)

    def _pad(self, batch: dict[str, Any]) -> None:
        """Put an id where there is padding that the model can read, and at which a classifier stops."""
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if not is_tensor_on_cpu(ids) or ids.ndim != 2:
            return
        known = is_tensor_on_cpu(mask) and mask.shape == ids.shape
        hidden = mask == 0 if known else torch.zeros_like(ids, dtype=torch.bool)
        pad = getattr(self.config, "pad_token_id", None)
        if self.tokens is not None and pad is not None and not 0 <= pad < self.tokens:
            pad = None
        padded = bool(hidden.any())
        if self.searches and pad is None and (len(ids) > 1 or padded):
            given = self._tokenizers_pad(ids, hidden)
            advice = "an id that no text holds" if given is None else f"{given}, the tokenizer's"
            raise PeftLabError(
                f"{self.name} finds the end of a text by config.pad_token_id, which is "
                f"{getattr(self.config, 'pad_token_id', None)}, and cannot take {len(ids)} texts at once. Set "
                f"model.config.pad_token_id = {'...' if given is None else given} ({advice}), or use batch_size=1."
            )
        if padded and self.searches and bool((ids[hidden] != pad).any()):
            self._warn(
                f"The batches are padded with {int(ids[hidden][0])}, but {self.name} looks for the last token of a "
                f"text before config.pad_token_id={pad}; {pad} is put there instead. Pad with {pad} too when you use "
                "the model, or set model.config.pad_token_id to the tokenizer's id."
            )
            ids = batch["input_ids"] = ids.masked_fill(hidden, pad)
        elif padded and self.tokens is not None and bool((hidden & (ids >= self.tokens)).any()):
            ids = batch["input_ids"] = ids.masked_fill(hidden, 0 if pad is None else pad)
        if self.searches and known and pad is not None and self._tokenizers_pad(ids, hidden) != pad:
            places = torch.arange(ids.shape[1])
            if not torch.equal((places * (ids != pad)).argmax(1), (places * mask).argmax(1)):
                self._warn(
                    f"A text ends in the token {pad}, which is config.pad_token_id: {self.name} takes it for padding "
                    "and reads the token before it. Set model.config.pad_token_id to the tokenizer's pad id."
                )

    def _tokenizers_pad(self, ids: Tensor, hidden: Tensor) -> int | None:
        """The id that the tokenizer pads with, if it is known, else the one that was padded with."""
        tokenizer = getattr(self.collate, "tokenizer", None)
        for name in ("pad_token_id", "eos_token_id"):
            if isinstance(getattr(tokenizer, name, None), int):
                return getattr(tokenizer, name)
        return int(ids[hidden][0]) if hidden.any() else None

    def _warn(self, message: str) -> None:
        if message not in self.said:
            self.said.add(message)
            warnings.warn(message, stacklevel=5)

    def _check_tokens(self, batch: Mapping[str, Any], examples: Sequence[Any]) -> None:
        advice = (
            "Is this the model's tokenizer? If it was extended, call model.resize_token_embeddings(len(tokenizer)) "
            "before adapters are attached."
        )
        for key in ("input_ids", "decoder_input_ids"):
            value = batch.get(key)
            if isinstance(value, Tensor) and (value.is_floating_point() or value.dtype == torch.bool):
                raise PeftLabError(f"{key} are whole numbers, found {str(value.dtype).removeprefix('torch.')}.")
            self._check_range(value, self.tokens, key, f"the vocabulary of {self.name}", advice, examples)
        types = getattr(self.config, "type_vocab_size", None) or None
        self._check_range(
            batch.get("token_type_ids"), types, "token_type_ids", f"the token types of {self.name}", "", examples
        )
        ids = batch.get("input_ids")
        if self.positions is not None and isinstance(ids, Tensor) and "position_ids" not in batch:
            length = ids.shape[-1]
            if length > self.positions:
                longest = max(range(len(examples)), key=lambda at: _length(_column(examples[at], "input_ids")) or 0)
                raise PeftLabError(
                    f"{_where(examples, longest)} has {length} tokens, and {self.name} has {self.positions} positions; "
                    f"encode with max_length={self.positions}."
                )

    def _check_labels(self, batch: Mapping[str, Any], examples: Sequence[Any]) -> None:
        labels = batch.get("labels")
        if self.task == "question answering":
            for key in POSITIONS:
                self._check_range(batch.get(key), math.inf, key, "the tokens", "A position counts from 0.", examples)
            return
        if not isinstance(labels, Tensor):
            return  # the loss says that there are none
        problem = problem_of(self.model, self.task, labels)
        if not is_tensor_on_cpu(labels):
            return
        if problem == "regression":
            self._check_values(~torch.isfinite(labels), labels, "is no finite number", examples)
        elif problem == "multi_label_classification":
            reason = "lies outside 0 to 1; for numbers to predict, set model.config.problem_type = 'regression'"
            self._check_values(~((labels >= 0) & (labels <= 1)), labels, reason, examples)
        else:
            limit, what = self._label_limit(problem, batch)
            advice = "Number classes from 0 on, and load the model with num_labels=... for all of them."
            advice = advice if "class" in what else "A token that is not to be learned has the label -100."
            self._check_range(labels, limit, "labels", what, advice, examples, ignored=True)
        self._check_learnable(batch, labels, examples)

    def _label_limit(self, problem: str, batch: Mapping[str, Any]) -> tuple[int | None, str]:
        """(how many labels there are, what they are)."""
        if self.task in ("classification", "token classification"):
            return inner_model(self.model).config.num_labels, f"the classes of {self.name}"
        if self.task == "choice":
            ids = batch.get("input_ids")
            choices = ids.shape[1] if isinstance(ids, Tensor) and ids.ndim == 3 else 2
            return choices, f"the classes of {self.name}"
        if problem == "single_label_classification":
            return None, "the classes"
        return self.outputs, f"the vocabulary of {self.name}"

    def _check_learnable(self, batch: Mapping[str, Any], labels: Tensor, examples: Sequence[Any]) -> None:
        """Labels per token of a model whose task is not known are the tokens themselves; others' must not all be."""
        ids = batch.get("input_ids")
        if not is_tensor_on_cpu(ids) or labels.ndim != 2:
            return
        same = ids.shape == labels.shape and bool(((labels == ids) | (labels == IGNORE)).all())
        if self.task is None and not same:
            raise PeftLabError(
                f"{self.name} is no class of transformers, so its task is not known: its labels are no causal language "
                "model's, whose labels are the input_ids or -100. Pass loss=: peftlab.training.losses.token_loss for a "
                "label of each token, seq2seq_loss, or a function (model, batch) -> (sum, count)."
            )
        if same and self.task == "masked language modelling" and bool((labels != IGNORE).any()):
            self._warn(
                f"{self.name} is a masked language model, and every token that it is to predict stands in input_ids: "
                "it can copy them. Put tokenizer.mask_token_id there."
            )
        if same and self.task == "sequence to sequence" and len(labels) > 1:
            self._warn(
                f"The encoder of {self.name} reads the very tokens that its decoder is to learn (input_ids equal "
                "labels): it can copy them. Give it the prompt alone."
            )

    def _check_values(self, wrong: Tensor, values: Tensor, reason: str, examples: Sequence[Any]) -> None:
        if wrong.any():
            row = int(wrong.reshape(len(values), -1).any(1).nonzero()[0])
            value = values[wrong][0].item()
            raise PeftLabError(f"{_where(examples, row)}: the label {value} {reason}.")

    def _check_range(
        self,
        values: Any,
        limit: float | None,
        key: str,
        what: str,
        advice: str,
        examples: Sequence[Any],
        ignored: bool = False,
    ) -> None:
        if limit is None or not is_tensor_on_cpu(values) or not values.numel() or values.is_floating_point():
            return
        if values.dtype == torch.bool:
            return
        low, high = (int(value) for value in torch.aminmax(values))
        if ignored and low == IGNORE:
            low = int(values.masked_fill(values == IGNORE, 0).min())
        if low >= 0 and high < limit:
            return
        wrong = (values < 0) | (values >= limit)
        if ignored:
            wrong &= values != IGNORE
        row = int(wrong.reshape(len(values), -1).any(1).nonzero()[0])
        end = "" if limit == math.inf else f" to {limit - 1}"
        raise PeftLabError(
            f"{_where(examples, row)}: {key} hold {int(values[wrong][0])}, and {what} go from 0{end}. {advice}".strip()
        )


def example_lengths(examples: Sequence[Any]) -> list[int]:
    """The number of tokens of each example.

    Raises:
        PeftLabError: an example has no tokens to count.
    """
    lengths = [_length(_column(example, "input_ids")) for example in examples]
    if None in lengths:
        raise PeftLabError(
            f"group_by_length needs input_ids, whose lengths it compares; example {lengths.index(None)} has none. "
            "Leave group_by_length out."
        )
    return lengths


def _where(examples: Sequence[Any], row: int) -> str:
    """How a message calls the example in this row of a batch."""
    example = examples[row] if row < len(examples) else None
    return f"Example {example.place} of the data" if isinstance(example, Example) else f"Row {row} of a batch"


def _column(example: Any, name: str) -> Any:
    return example.get(name) if isinstance(example, Mapping) else None


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
