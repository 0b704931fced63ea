"""Padding as a model needs it: on the right, and of an id that the model knows for padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from peftlab.errors import PeftLabError
from peftlab.training.encoding import IGNORE, Collator
from peftlab.training.model_facts import ModelFacts
from peftlab.training.model_task import PER_TOKEN

ALONG_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def turn_right(batch: dict[str, Any], facts: ModelFacts, collate: Callable) -> None:
    """Move padding from the left to the right: there no token's position depends on it, nor does it part the text from
    a prompt in front.
    """
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if not on_cpu(mask) or not on_cpu(ids) or mask.ndim != 2 or ids.shape != mask.shape:
        return
    real = mask.bool()
    if real[:, 0].all() or not (real[:, 1:] >= real[:, :-1]).all():
        return
    if facts.task == "question answering" and not isinstance(collate, Collator):
        return  # a collate of the user's own may have moved the positions already
    order = (~real).long().argsort(dim=1, stable=True)
    for key in (*ALONG_TOKENS, *(["labels"] if _labels_along_tokens(batch, facts) else [])):
        value = batch.get(key)
        if on_cpu(value) and value.shape == mask.shape:
            batch[key] = value.gather(1, order)


def pad_to(batch: dict[str, Any], lengths: Sequence[int], facts: ModelFacts) -> dict[str, Any]:
    """Return a batch (b, t) with padding added on the right, so that t is the next of these lengths.

    A batch that is longer than all, or holds something else along its tokens, stays as it is.
    """
    ids = batch.get("input_ids")
    known = {"input_ids": 0 if facts.pad is None else facts.pad, "labels": IGNORE}
    if not isinstance(ids, Tensor) or ids.ndim != 2 or "attention_mask" not in batch:
        return batch
    along = [key for key, value in batch.items() if isinstance(value, Tensor) and value.shape[:2] == ids.shape]
    if not _labels_along_tokens(batch, facts):
        along = [key for key in along if key != "labels"]
    if set(along) - {*ALONG_TOKENS, "labels"}:
        return batch
    if facts.task == "sequence to sequence":
        along = [*along, "labels"] if "labels" not in along else along
    padded = dict(batch)
    for key in along:
        width = batch[key].shape[1]
        wanted = next((length for length in lengths if length >= width), width)
        padded[key] = F.pad(batch[key], (0, wanted - width), value=known.get(key, 0))
    return padded


def _labels_along_tokens(batch: Mapping[str, Any], facts: ModelFacts) -> bool:
    labels = batch.get("labels")
    return facts.task in PER_TOKEN or (
        facts.task is None and isinstance(labels, Tensor) and not labels.is_floating_point()
    )


def put_known_id(batch: dict[str, Any], facts: ModelFacts, collate: Callable, warn: Callable[[str], None]) -> None:
    """Pad with an id that the model can read and, where a classifier searches for it, with the one in its config.

    Raises:
        PeftLabError: a classifier searches for a padding id that its config does not have.
    """
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not on_cpu(ids) or ids.ndim != 2:
        return
    known = mask if on_cpu(mask) and mask.shape == ids.shape else None
    padded, pad = known is not None and not bool(known.all()), facts.pad
    if not padded and not facts.searches:
        return
    hidden = torch.zeros_like(ids, dtype=torch.bool) if known is None else known == 0
    if facts.searches:
        _check_search(ids, hidden, facts, collate)
        if padded and pad is not None and bool((ids[hidden] != pad).any()):
            warn(
                f"The batches are padded with {int(ids[hidden][0])}, but {facts.name} looks for the last token of a "
                f"text before config.pad_token_id={pad}; {pad} is put there instead. Pad with {pad} too when you use "
                "the model, or set model.config.pad_token_id to the tokenizer's id."
            )
            ids = batch["input_ids"] = ids.masked_fill(hidden, pad)
        if known is not None and pad is not None and _pad_of(collate, ids, hidden) != pad:
            places = torch.arange(ids.shape[1])
            if not torch.equal((places * (ids != pad)).argmax(1), (places * known).argmax(1)):
                warn(
                    f"A text ends in the token {pad}, which is config.pad_token_id: {facts.name} takes it for padding "
                    "and reads the token before it. Set model.config.pad_token_id to the tokenizer's pad id."
                )
    elif padded and facts.tokens is not None:
        # What a tokenizer was given to pad with, and the model was not: the mask hides it, but it has no embedding
        strange = hidden & ((ids < 0) | (ids >= facts.tokens))
        if strange.any():
            batch["input_ids"] = ids.masked_fill(strange, 0 if pad is None else pad)


def _check_search(ids: Tensor, hidden: Tensor, facts: ModelFacts, collate: Callable) -> None:
    if facts.pad is not None or (len(ids) == 1 and not hidden.any()):
        return
    given = _pad_of(collate, ids, hidden)
    advice = "... (an id that no text holds)" if given is None else f"{given}, which the tokenizer pads with"
    raise PeftLabError(
        f"{facts.name} finds the end of a text by config.pad_token_id, which is "
        f"{getattr(facts.config, 'pad_token_id', None)}, so it cannot take {len(ids)} texts at once. Set "
        f"model.config.pad_token_id = {advice}; or use batch_size=1."
    )


def _pad_of(collate: Callable, ids: Tensor, hidden: Tensor) -> int | None:
    """The id that the tokenizer pads with, if it is known, else the one that was padded with."""
    tokenizer = getattr(collate, "tokenizer", None)
    for name in ("pad_token_id", "eos_token_id"):
        if isinstance(getattr(tokenizer, name, None), int):
            return getattr(tokenizer, name)
    return int(ids[hidden][0]) if hidden.any() else None


def on_cpu(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a tensor that can be looked at without waiting for a GPU."""
    return isinstance(value, Tensor) and value.device.type == "cpu"
