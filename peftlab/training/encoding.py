"""From text to the numbers a model trains on, and from many examples to one batch.

An encoded example is a dict with `input_ids` (list of int) and `labels`. A language model has one label per token, and
-100 means "not learned". A classifier has one integer.

Labels are set here, where the role of each token is known. They are never derived from the padding id. Many tokenizers
pad with their end-of-text token, so a mask made from that id would also remove the true end from the loss, and the
model would never learn to stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftlab.checks import one_of, whole
from peftlab.errors import PeftLabError

IGNORE = -100  # the label that torch's cross-entropy leaves out
_PROBE = "peftlab-probe"  # stands for an answer, to find out what a chat template writes after one

Prompt = str | Sequence[Mapping[str, str]]


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Return the tokens that a model reads before it answers.

    Args:
        tokenizer: a transformers tokenizer. With a chat template the prompt becomes a user's turn, followed by the
            opening of the assistant's; without one it is the plain text.
        prompt: a string, or, with a chat template, a list of `{"role": ..., "content": ...}`.
    """
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has added the special tokens
    if not isinstance(prompt, str):
        raise PeftLabError("This tokenizer has no chat template, so a prompt is one string, not a list of messages.")
    ids = tokenizer(prompt)["input_ids"]
    # Encoders and T5 end every text with an end token, but a prompt goes on.
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def end_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: first the one to learn (in a chat, end of turn), then end-of-text.

    If both are the same token, it is listed once.

    Raises:
        PeftLabError: the tokenizer has no end token, so a model could never learn to stop.
    """
    ids = []
    if tokenizer.chat_template is not None:
        conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        # After an answer the template writes the end of the turn. Take it if it is one special token.
        after = tokenizer(text.rpartition(_PROBE)[2], add_special_tokens=False)["input_ids"]
        if after and after[0] in tokenizer.all_special_ids:
            ids.append(after[0])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise PeftLabError("The tokenizer has no end token; set tokenizer.eos_token before you encode answers.")
    return ids


def encode_completion(
    tokenizer: Any, prompt: Prompt, completion: str, max_length: int | None = None
) -> dict[str, list[int]]:
    """Encode a prompt and the answer to learn as `{"input_ids", "labels"}`, two lists of equal length.

    The prompt's labels are -100. The answer's tokens and the end token after them are labelled.

    Args:
        max_length: the most tokens that an example may have. A longer one loses tokens at the beginning of its prompt.
            An answer is never cut, because a cut answer teaches the model not to stop.

    Raises:
        PeftLabError: the answer, its end token and one token of prompt are together longer than `max_length`.

    >>> pl.encode_completion(tokenizer, "the cat", "runs")
    {'input_ids': [14, 10, 12, 0], 'labels': [-100, -100, 12, 0]}
    """
    before = prompt_ids(tokenizer, prompt)
    answer = tokenizer(completion, add_special_tokens=False)["input_ids"] + end_ids(tokenizer)[:1]
    if max_length is not None:
        room = max_length - len(answer)
        if room < 1:
            raise PeftLabError(
                f"The answer {completion[:40]!r} has {len(answer)} tokens with its end token and needs at least one "
                f"token of prompt before it, but max_length is {max_length}. Raise max_length to {len(answer) + 1}."
            )
        before = before[-room:]
    return {"input_ids": before + answer, "labels": [IGNORE] * len(before) + answer}


def encode_text(tokenizer: Any, text: str, max_length: int | None = None, *, end: bool = True) -> dict[str, list[int]]:
    """Encode a text, every token of which is learned, as `{"input_ids", "labels"}`.

    Args:
        max_length: the most tokens to keep. A cut text gets no end token, because it does not end there.
        end: add the end-of-text token. Pass False to measure perplexity on plain text.

    >>> pl.encode_text(tokenizer, "the cat runs")
    {'input_ids': [14, 10, 12, 0], 'labels': [14, 10, 12, 0]}
    """
    ids = list(tokenizer(text)["input_ids"])
    eos = tokenizer.eos_token_id
    if not end and ids and ids[-1] == eos:
        ids.pop()
    elif end and (not ids or ids[-1] != eos):
        if eos is None:
            raise PeftLabError("The tokenizer has no end token; pass end=False or set tokenizer.eos_token.")
        ids.append(eos)
    ids = ids[:max_length]
    return {"input_ids": ids, "labels": list(ids)}


def encode_classification(
    tokenizer: Any, text: str, label: int, max_length: int | None = None, *, pair: str | None = None
) -> dict[str, Any]:
    """Encode a text, or a `pair` of texts, with its class: the tokenizer's fields, and `labels`, one int.

    Args:
        max_length: the most tokens to keep. The tokenizer cuts the text and keeps its special tokens.

    >>> pl.encode_classification(tokenizer, "the cat", label=1)
    {'input_ids': [14, 10], 'labels': 1}
    """
    encoded = tokenizer(text, pair, truncation=max_length is not None, max_length=max_length)
    example = {key: list(value) for key, value in encoded.items() if key != "attention_mask"}
    return {**example, "labels": int(label)}


@dataclass
class Collator:
    """Pad encoded examples to one length and stack them.

    Call it with a list of b examples. It returns a dict of tensors on the CPU:

    - `input_ids` (b, t) int64, padded with the tokenizer's padding id;
    - `attention_mask` (b, t), 1 on real tokens;
    - `labels` (b, t), padded with -100, or (b,) if each example has one label;
    - any other list with one value per token, (b, t), padded with 0.

    Args:
        tokenizer: gives the padding id. If it has none, its end token or 0 is used. The id does not matter, because the
            mask and the labels say what is padding.
        side: `"right"` to train, `"left"` to generate.
        multiple_of: round t up to a multiple of this. 8 suits tensor cores, and a compiled model meets fewer shapes.

    >>> batch = pl.Collator(tokenizer)([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}])
    >>> batch["labels"].tolist()
    [[5, 6], [7, -100]]
    """

    tokenizer: Any = None
    side: str = "right"
    multiple_of: int = 1

    def __post_init__(self) -> None:
        one_of("side", self.side, ("left", "right"))
        whole("multiple_of", self.multiple_of, least=1)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if not examples:
            raise PeftLabError("A batch needs at least one example.")
        keys = list(examples[0])
        for example in examples:
            if set(example) != set(keys):
                raise PeftLabError(f"The examples of a batch differ in their fields: {keys} and {list(example)}.")
        batch = {}
        for key in keys:
            rows = [torch.as_tensor(example[key]) for example in examples]
            if rows[0].ndim == 0:
                batch[key] = torch.stack(rows)
            else:
                fill = {"input_ids": self._pad_id(), "labels": IGNORE}.get(key, 0)
                batch[key] = self._pad(rows, fill)
        if "input_ids" in batch and "attention_mask" not in batch:
            ones = [torch.ones(len(example["input_ids"]), dtype=torch.long) for example in examples]
            batch["attention_mask"] = self._pad(ones, 0)
        return batch

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
        longest += -longest % self.multiple_of
        padded = torch.full((len(rows), longest), fill, dtype=rows[0].dtype)
        for target, row in zip(padded, rows, strict=True):
            start = longest - len(row) if self.side == "left" else 0
            target[start : start + len(row)] = row
        return padded
