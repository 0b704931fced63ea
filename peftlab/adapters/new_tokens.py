"""Add new tokens to a model and its tokenizer: rows that start from known words, and are marked to be trained."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.adapters.vocabulary import NEW, embeddings, resize
from peftlab.checks import checked, shown
from peftlab.core.records import record_of, unwrap
from peftlab.core.sharding import refuse_sharded
from peftlab.errors import PeftLabError, some

SPARE = 1024, 0.9  # rows that a model has beyond its tokenizer's entries: few, so that the number suits a GPU


@checked("tokens")
def add_tokens(
    model: nn.Module,
    tokenizer: Any,
    tokens: Mapping[str, str | Iterable[str] | None] | Iterable[str],
    *,
    special: bool = False,
) -> list[int]:
    """Add new tokens to a tokenizer and to its model, start them from known words, and mark them to be trained.

    The embedding gets a row for each token, and so does an output head with a weight of its own, unless spare rows are
    there already. Then the next `attach` of a `LoRAConfig` without `trainable_tokens` trains just these rows, and
    `save_adapter` saves them. Save the tokenizer beside the adapter (`tokenizer.save_pretrained(folder)`):
    `load_adapter` lengthens a fresh model by itself, but sees no tokenizer.

    Args:
        model: a transformers model without adapters; it is changed in place.
        tokenizer: its tokenizer; it is changed in place.
        tokens: the new tokens. A mapping gives the words that each starts from: `{"<refund>": ["money", "back"]}`. Its
            row is the mean of the rows of all tokens that these words consist of, read as they stand: in the middle of
            a text a word is mostly `" money"`, with a space. Without words (a list, or None in the mapping), it is the
            mean of all rows, so that the token is no likelier at first than the others.
        special: whether they are special tokens, which `skip_special_tokens=True` leaves out of decoded text.

    Returns:
        The ids of the new tokens, in order.

    Raises:
        PeftLabError: a token is there already, a word has no known tokens, the tokenizer does not fit the model, or
            adapters are attached. Model and tokenizer are then as they were.

    >>> ids = pl.add_tokens(model, tokenizer, {"<refund>": ["cat", "dog"], "<order>": None})
    >>> model = pl.attach(model, pl.LoRAConfig(r=4))
    >>> pl.attached(model)["default"].trainable_tokens == {"model.embed_tokens": tuple(ids), "lm_head": tuple(ids)}
    True
    """
    root = unwrap(model)
    refuse_sharded(root, "add_tokens cannot lengthen its pieces", "Add the tokens first, then call fully_shard.")
    record = record_of(root)
    if record is not None and record.configs:
        raise PeftLabError(
            f"Adapters are attached ({some(list(record.configs))}), which stand on the vocabulary as it is. Call "
            "add_tokens first and attach then; detach takes them off."
        )
    wanted = as_table(tokens)
    layers = embeddings(root)
    before = len(layers[0][1])
    check_tokenizer(root, tokenizer, wanted, before)
    trial = copy.deepcopy(tokenizer)  # shows the ids, and what goes wrong, while nothing is changed yet
    added = trial.add_tokens(list(wanted), special_tokens=special)
    ids = trial.convert_tokens_to_ids(list(wanted))
    if added != len(wanted) or len(set(ids)) < len(ids):
        raise PeftLabError(f"The tokenizer took {added} of {len(wanted)} tokens; some are the same to it. Rename them.")
    pieces = [pieces_of(tokenizer, token, words) for token, words in wanted.items()]
    starts = {path: start_rows(weight, pieces) for path, weight in layers}
    if max(ids) >= before:
        resize(root, max(ids) + 1)
    with torch.no_grad():
        for path, rows in starts.items():
            weight = root.get_submodule(path).get_parameter("weight")
            weight[ids] = rows.to(weight)
    tokenizer.add_tokens(list(wanted), special_tokens=special)
    marked = root.__dict__.get(NEW, {})
    object.__setattr__(root, NEW, {path: (*marked.get(path, ()), *ids) for path, _ in layers})
    return ids


def as_table(tokens: Any) -> dict[str, tuple[str, ...]]:
    """Return {token: words that it starts from}, without words where it starts from the mean of all rows."""
    if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Iterable):
        raise PeftLabError(f"tokens is {shown(tokens)}; give a list such as ['<refund>'], or a mapping to words.")
    listed = list(tokens)
    wrong = [token for token in listed if not isinstance(token, str) or not token.strip()]
    if wrong or not listed:
        raise PeftLabError(f"tokens holds {shown(wrong[0])}; give texts." if wrong else "tokens is empty; give some.")
    if len(set(listed)) < len(listed):
        twice = next(token for token in listed if listed.count(token) > 1)
        raise PeftLabError(f"tokens holds {twice!r} twice; name each token once.")
    table = {}
    for token in listed:
        words = tokens[token] if isinstance(tokens, Mapping) else None
        words = (words,) if isinstance(words, str) else () if words is None else words
        if isinstance(words, (bytes, Mapping)) or not isinstance(words, Iterable):
            raise PeftLabError(f"The words for {token!r} are {shown(words)}; give a text, a list of texts, or None.")
        table[token] = tuple(words)
        wrong = [word for word in table[token] if not isinstance(word, str) or not word.strip()]
        if wrong:
            raise PeftLabError(f"The words for {token!r} hold {shown(wrong[0])}; give texts.")
    return table


def check_tokenizer(root: nn.Module, tokenizer: Any, wanted: Iterable[str], rows: int) -> None:
    """Refuse what is no tokenizer, one of another model, and tokens that it has."""
    if not all(hasattr(tokenizer, name) for name in ("add_tokens", "get_vocab", "convert_tokens_to_ids")):
        raise PeftLabError(
            f"tokenizer is {shown(tokenizer)}; give the model's own, such as pl.load_model returns beside the model."
        )
    known = tokenizer.get_vocab()
    there = next((token for token in wanted if token in known), None)
    if there is not None:
        more = f" Lengthen the model first: model.resize_token_embeddings({max(known.values()) + 1})."
        raise PeftLabError(
            f"The tokenizer has {there!r} already, with the id {known[there]}. To train it, give its id to the config: "
            f"LoRAConfig(trainable_tokens=[{known[there]}])." + (more if known[there] >= rows else "")
        )
    largest = max(known.values(), default=-1)
    few, share = SPARE
    if largest >= rows or len(known) < min(rows - few, share * rows):
        raise PeftLabError(
            f"The tokenizer does not fit the model: it has {len(known)} tokens, the last of which has the id "
            f"{largest}, and the embedding of {type(root).__name__} has {rows} rows. Give the model's own tokenizer. "
            "(If you have added tokens to it already, call model.resize_token_embeddings(len(tokenizer)), and name "
            "their ids in LoRAConfig(trainable_tokens=[...]).)"
        )


def pieces_of(tokenizer: Any, token: str, words: Iterable[str]) -> list[int]:
    """Return the ids of all tokens that some words consist of."""
    ids: list[int] = []
    for word in words:
        pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
        if not pieces or all(piece == tokenizer.unk_token_id for piece in pieces):
            raise PeftLabError(f"{token!r} is to start from {word!r}, which the tokenizer does not know; give others.")
        ids += pieces
    return ids


@torch.no_grad()
def start_rows(weight: Tensor, pieces: Iterable[list[int]]) -> Tensor:
    """Return a row for each list of ids: the mean of their rows, or of all rows where there are none."""
    typical = weight.float().mean(0)
    return torch.stack([weight[ids].float().mean(0) if ids else typical for ids in pieces])
