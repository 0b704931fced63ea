"""From text to the numbers a model trains on, and from many examples to one batch.

An encoded example is a dict with `input_ids` (list of int) and `labels`: for a language model one label a token,
where -100 means "not learned"; for an encoder-decoder the answer's tokens, which its encoder does not read; for a
classifier one integer, one number or, where several classes may be right, a 0 or 1 for each. Labels are set here, where
the tokens' roles are known, and never derived from the padding id: many tokenizers pad with their end-of-text token,
and a mask made from that id also takes the true end out of the loss, so that the model never learns to stop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from peftlab.checks import Tokenizer, checked, one_of, shown, whole
from peftlab.errors import PeftLabError
from peftlab.training.conversations import (
    Completion,
    Prompt,
    completion_text,
    encoder_ids,
    end_ids,
    prompt_ids,
    text_of,
)
from peftlab.training.model_task import is_encoder_decoder
from peftlab.training.packing import IGNORE, pack

MOST_TOKENS = 100_000_000  # of an example or an answer
MOST_MULTIPLE = 1_000_000  # a batch of one token is padded to so many


@checked("prompt", "completion")
def encode_completion(
    tokenizer: Tokenizer,
    prompt: Prompt,
    completion: Completion,
    max_length: int | None = None,
    *,
    model: nn.Module | None = None,
) -> dict[str, list[int]]:
    """A prompt and the answer to learn: `{"input_ids", "labels"}`.

    For a decoder these are two lists of one length: prompt and answer. The prompt's labels are -100; the answer's
    tokens and the end token behind them are labelled. For an encoder-decoder `input_ids` are the prompt, which its
    encoder reads, and `labels` the answer, which its decoder learns.

    Args:
        prompt, completion: texts, or messages as TRL has them; a completion has one message, the assistant's.
        max_length: the most tokens an example may have, for an encoder-decoder each of both lists. What is too much is
            cut from the prompt's beginning: an answer is never cut, because a cut answer teaches the model not to end.
        model: the model to train. Needed for an encoder-decoder, which its tokenizer does not tell.

    Raises:
        PeftLabError: the answer with its end token, behind one token of prompt, is longer than `max_length`; or
            prompt or completion are no text, or the chat template refuses them.

    >>> pl.encode_completion(tokenizer, "the cat", "runs")
    {'input_ids': [14, 10, 12, 0], 'labels': [-100, -100, 12, 0]}
    """
    max_length = _most(max_length)
    answer = completion_text(completion)
    if model is not None and is_encoder_decoder(model):
        return _encode_for_encoder_decoder(tokenizer, prompt, answer, max_length)
    before = prompt_ids(tokenizer, prompt)
    after = tokenizer(answer, add_special_tokens=False)["input_ids"] + end_ids(tokenizer)[:1]
    if max_length is not None:
        room = max_length - len(after)
        if room < 1:
            raise PeftLabError(
                f"The answer {answer[:40]!r} has {len(after)} tokens with its end token and needs at least one "
                f"token of prompt before it, but max_length is {max_length}. Raise max_length to {len(after) + 1}."
            )
        before = before[-room:]
    return {"input_ids": before + after, "labels": [IGNORE] * len(before) + after}


def _encode_for_encoder_decoder(
    tokenizer: Any, prompt: Prompt, answer: str, max_length: int | None
) -> dict[str, list[int]]:
    before = encoder_ids(tokenizer, prompt)
    # As a target: some tokenizers mark it with its language. The decoder's start is the model's own to put in front.
    after = list(tokenizer(text_target=answer)["input_ids"])
    end = end_ids(tokenizer)[:1]
    if end[0] not in after[-2:]:  # a mark of the language may stand behind the end
        after += end
    if max_length is not None:
        if len(after) > max_length:
            raise PeftLabError(
                f"The answer {answer[:40]!r} has {len(after)} tokens with its end token, but max_length is "
                f"{max_length}. Raise max_length to {len(after)}."
            )
        before = _cut(tokenizer, before, max_length)
    return {"input_ids": before, "labels": after}


def _most(max_length: int | None) -> int | None:
    return whole("max_length", max_length, least=1, ceiling=MOST_TOKENS, optional=True)


def _cut(tokenizer: Any, ids: list[int], most: int) -> list[int]:
    """The last tokens of a text, and the special ones around it."""
    special = set(tokenizer.all_special_ids)
    first = next((at for at, token in enumerate(ids) if token not in special), 0)
    first = first if first < most else 0
    return ids[:first] + ids[max(first, len(ids) - (most - first)) :]


@checked("text")
def encode_text(
    tokenizer: Tokenizer, text: str, max_length: int | None = None, *, end: bool = True
) -> dict[str, list[int]]:
    """Encode a text, every token of which is learned, as `{"input_ids", "labels"}`.

    Args:
        max_length: the most tokens to keep. A cut text gets no end token, because it does not end there.
        end: add the end-of-text token. Pass False to measure perplexity on plain text.

    >>> pl.encode_text(tokenizer, "the cat runs")
    {'input_ids': [14, 10, 12, 0], 'labels': [14, 10, 12, 0]}
    """
    max_length = _most(max_length)
    ids = list(tokenizer(text_of(text, "text"))["input_ids"])
    eos = tokenizer.eos_token_id
    if not end and ids and ids[-1] == eos:
        ids.pop()
    elif end and (not ids or ids[-1] != eos):
        if eos is None:
            raise PeftLabError("The tokenizer has no end token; pass end=False or set tokenizer.eos_token.")
        ids.append(eos)
    ids = ids[:max_length]
    return {"input_ids": ids, "labels": list(ids)}


@checked("text", "label", "pair")
def encode_classification(
    tokenizer: Tokenizer,
    text: str,
    label: int | float | Sequence[float],
    max_length: int | None = None,
    *,
    pair: str | None = None,
) -> dict[str, Any]:
    """Encode a text, or a `pair` of texts, with its class: the tokenizer's fields, and `labels`, one int.

    For a regression `label` may be any number, and where several classes may be right a list, a 0 or 1 for each.
    `max_length` cuts the text as the tokenizer does, special tokens kept.

    >>> pl.encode_classification(tokenizer, "the cat", label=1)
    {'input_ids': [14, 10], 'labels': 1}
    """
    max_length = _most(max_length)
    pair = None if pair is None else text_of(pair, "pair")
    encoded = tokenizer(text_of(text, "text"), pair, truncation=max_length is not None, max_length=max_length)
    example = {key: list(value) for key, value in encoded.items() if key != "attention_mask"}
    if hasattr(label, "tolist"):
        label = label.tolist()
    if isinstance(label, Sequence) and not isinstance(label, (str, bytes)):
        return {**example, "labels": [_label(one) for one in label]}
    return {**example, "labels": _label(label)}


def _label(value: Any) -> int | float:
    """A label as a plain number, a whole one as an int."""
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise PeftLabError(
            f"A label is a number, found {value!r:.60}. Number your classes from 0 on, for example "
            "{name: number for number, name in enumerate(sorted(names))}."
        )
    return int(value) if value == int(value) else float(value)


@dataclass
class Collator:
    """Pad encoded examples to one length and stack them.

    Call it with a list of b examples. It returns a dict of tensors on the CPU:

    - `input_ids` (b, t) int64, padded with the tokenizer's padding id;
    - `attention_mask` (b, t), 1 on real tokens;
    - `labels` (b, t), padded with -100, or (b,) if each example has one label;
    - any other list with one value per token, (b, t), padded with 0.

    With `packing` the b examples fill fewer rows (see `peftlab.training.packing`): instead of the attention mask there
    are `position_ids`, which restart at 0 for each example, and `use_cache`, False. `pl.train`, `mean_loss` and
    `perplexity` also try whether the model keeps the examples of a row apart. In a loop of your own, ask
    `peftlab.training.borders.needs_masks`: some models mix them unless they are given masks.

    Args:
        tokenizer: gives the padding id. If it has none, its end token or 0 is used. The id does not matter, because the
            mask and the labels say what is padding.
        side: `"right"` to train, `"left"` to generate.
        multiple_of: round t up to a multiple of this. 8 suits tensor cores, and a compiled model meets fewer shapes.
        packing: put several examples into a row, for causal language models.

    >>> batch = pl.Collator(tokenizer)([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}])
    >>> batch["labels"].tolist()
    [[5, 6], [7, -100]]
    >>> packed = pl.Collator(packing=True)([{"input_ids": [5, 6, 7, 8]}, {"input_ids": [5, 6]}, {"input_ids": [7, 8]}])
    >>> packed["position_ids"].tolist()
    [[0, 1, 2, 3], [0, 1, 0, 1]]
    """

    tokenizer: Any = None
    side: str = "right"
    multiple_of: int = 1
    packing: bool = False

    def __post_init__(self) -> None:
        one_of("side", self.side, ("left", "right"))
        whole("multiple_of", self.multiple_of, least=1, ceiling=MOST_MULTIPLE)
        one_of("packing", self.packing, (True, False))
        if self.tokenizer is not None and not hasattr(self.tokenizer, "eos_token_id"):
            raise PeftLabError(f"tokenizer must be a tokenizer or None, found {shown(self.tokenizer)}.")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not examples:
            raise PeftLabError("A batch needs at least one example.")
        for example in examples:
            if not isinstance(example, Mapping):
                raise PeftLabError(f"An example is a dict of numbers by name, not a {type(example).__name__}.")
        keys = list(examples[0])
        for example in examples:
            if set(example) != set(keys):
                raise PeftLabError(f"The examples of a batch differ in their fields: {keys} and {list(example)}.")
        batch = {}
        for key in keys:
            rows = _same_kind([_tensor(example[key], key) for example in examples], key)
            if rows[0].ndim == 0:
                batch[key] = torch.stack(rows)
            else:
                fill = {"input_ids": self._pad_id(), "labels": IGNORE}.get(key, 0)
                batch[key] = self._pad(rows, fill)
        if "input_ids" in batch and "attention_mask" not in batch:
            lengths, width = [len(example["input_ids"]) for example in examples], batch["input_ids"].shape[1]
            if all(length == width for length in lengths):
                batch["attention_mask"] = torch.ones(len(examples), width, dtype=torch.long)
            else:
                places = torch.arange(width)
                places = places.flip(0) if self.side == "left" else places
                batch["attention_mask"] = (places < torch.tensor(lengths)[:, None]).long()
        return pack(batch, multiple_of=self.multiple_of) if self.packing else batch

    def _pad_id(self) -> int:
        for name in ("pad_token_id", "eos_token_id"):
            if getattr(self.tokenizer, name, None) is not None:
                return getattr(self.tokenizer, name)
        return 0

    def _pad(self, rows: list[torch.Tensor], fill: int) -> torch.Tensor:
        """Return rows of any lengths as one tensor (b, t). Rows with more dimensions must have equal shapes."""
        if rows[0].ndim > 1:
            return torch.stack(rows)
        longest = max(len(row) for row in rows)
        if not longest:
            raise PeftLabError("The examples of a batch are all empty.")
        if all(len(row) == longest for row in rows):
            padded = torch.stack(rows)
        else:
            padded = pad_sequence(rows, batch_first=True, padding_value=fill, padding_side=self.side)
        missing = -longest % self.multiple_of
        before, after = (missing, 0) if self.side == "left" else (0, missing)
        return F.pad(padded, (before, after), value=fill) if missing else padded


def _tensor(value: Any, name: str) -> torch.Tensor:
    """A number, or a list or array of them, as a tensor.

    Raises:
        PeftLabError: it is something else, or its rows differ in length.
    """
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PeftLabError(
            f"{name} of an example cannot become a tensor: found {value!r:.80} ({' '.join(str(error).split())[:120]})."
        ) from error


def _same_kind(rows: list[torch.Tensor], name: str) -> list[torch.Tensor]:
    """The rows in one dtype, wide enough for all; an empty list has none of its own.

    Raises:
        PeftLabError: they differ in their dimensions.
    """
    if len({row.ndim for row in rows}) > 1 or (rows[0].ndim > 1 and len({row.shape for row in rows}) > 1):
        shapes = ", ".join(str(tuple(row.shape)) for row in rows[:4])
        raise PeftLabError(f"{name} has another shape in each example of a batch: {shapes}; they cannot be stacked.")
    kinds = {row.dtype for row in rows if row.numel()}
    if len(kinds) < 2 and all(row.numel() for row in rows):
        return rows
    kind = next(iter(kinds), rows[0].dtype)
    for other in kinds:
        kind = torch.promote_types(kind, other)
    return [row.to(kind) for row in rows]
