"""Lengthen a model's vocabulary: by new tokens, or because an adapter was trained on a longer one."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftlab.adapters.key_forms import plain
from peftlab.checks import checked, shown
from peftlab.core.embeddings import word_embeddings
from peftlab.core.hooks import CHILD, base_modules
from peftlab.core.interface import Config
from peftlab.core.records import as_transformer, record_of, unwrap
from peftlab.core.sharding import refuse_sharded
from peftlab.core.targets import ALL_LINEAR, names_match
from peftlab.errors import PeftLabError, out_of_memory, some, warn
from peftlab.methods.tokens import by_path

NEW = "_peftlab_tokens"  # a plain attribute of the model: {path: ids of the tokens that add_tokens added}
SHORT = "_peftlab_rows"  # a plain attribute of the model: how many rows it had before load_adapter lengthened it
WHOLE = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")
SPARE = 1024, 0.9  # rows that a model has beyond its tokenizer's entries: few, so that the number suits a GPU
AnyConfig = TypeVar("AnyConfig", bound=Config)


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
    starts = [[mean_row(weight, tokenizer, token, words) for token, words in wanted.items()] for _, weight in layers]
    biases = [bias.detach().float().mean() if bias is not None else None for bias in map(bias_of(root), layers)]
    if max(ids) >= before:
        resize(root, max(ids) + 1)
    with torch.no_grad():
        for (path, _), rows, bias in zip(layers, starts, biases, strict=True):
            module = root.get_submodule(path)
            module.get_parameter("weight")[ids] = torch.stack(rows).to(module.get_parameter("weight"))
            if bias is not None:
                module.get_parameter("bias")[ids] = bias.to(module.get_parameter("bias"))
    tokenizer.add_tokens(list(wanted), special_tokens=special)
    marked = root.__dict__.get(NEW, {})
    object.__setattr__(root, NEW, {path: (*marked.get(path, ()), *ids) for path, _ in layers})
    return ids


def bias_of(root: nn.Module) -> Any:
    """Return a function from (path, weight) to the bias of that module, or None."""
    return lambda layer: root.get_submodule(layer[0])._parameters.get("bias")


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


def embeddings(root: nn.Module) -> list[tuple[str, Tensor]]:
    """Return (path, weight) of the word embeddings, and of an output head with a weight of its own."""
    words = word_embeddings(root)
    weight = None if words is None else words[1]._parameters.get("weight")
    if words is None or weight is None or not hasattr(root, "resize_token_embeddings"):
        raise PeftLabError(
            f"{type(root).__name__} has no word embeddings that transformers could lengthen; give a model of "
            "transformers that reads tokens, such as pl.load_model returns."
        )
    found = [(words[0], weight)]
    head = as_transformer(root).get_output_embeddings()
    own = None if head is None else head._parameters.get("weight")
    if own is not None and own is not weight and len(own) == len(weight):
        found += [(path, own) for path, module in base_modules(root).items() if module is head]
    return found


def rows_of(root: nn.Module) -> list[int]:
    """Return the length of the vocabulary, in a list that is empty for a model without one that could change."""
    words = word_embeddings(root) if hasattr(root, "resize_token_embeddings") else None
    weight = None if words is None else words[1]._parameters.get("weight")
    return [] if weight is None else [len(weight)]


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


def mean_row(weight: Tensor, tokenizer: Any, token: str, words: tuple[str, ...]) -> Tensor:
    """Return the row that a new token starts from: the mean of its words' rows, or of all rows."""
    if not words:
        return weight.detach().float().mean(0)
    ids = []
    for word in words:
        pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
        if not pieces or all(piece == tokenizer.unk_token_id for piece in pieces):
            raise PeftLabError(f"{token!r} is to start from {word!r}, which the tokenizer does not know; give others.")
        ids += pieces
    return weight.detach()[ids].float().mean(0)


def resize(root: nn.Module, rows: int) -> None:
    """Give the word embeddings, and the head, this many rows. Rows that are there keep their bits."""
    before = len(embeddings(root)[0][1])
    try:
        with torch.random.fork_rng(devices=[]):
            as_transformer(root).resize_token_embeddings(rows, mean_resizing=False)
    except Exception as error:  # whatever a foreign model raises
        if len(embeddings(root)[0][1]) != before:
            as_transformer(root).resize_token_embeddings(before, mean_resizing=False)
        if out_of_memory(error) is not None:
            raise
        raise PeftLabError(f"{type(root).__name__} cannot be given {rows} tokens: {error}") from error


def with_new_tokens(root: nn.Module, config: AnyConfig) -> AnyConfig:
    """Return the config with the tokens that `add_tokens` added, where it names no others and does not train them."""
    new: dict[str, tuple[int, ...]] = root.__dict__.get(NEW, {})
    settings: Any = config
    if not new or getattr(config, "trainable_tokens", None) is not None:
        return config
    spec = getattr(config, "target_modules", None)
    if isinstance(spec, str) and spec.lower() == ALL_LINEAR:
        spec = None
    copied = tuple(config.modules_to_save or ())
    left = {
        path: ids for path, ids in new.items() if not (spec and names_match(spec, path)) and not path.endswith(copied)
    }
    if left and not hasattr(config, "trainable_tokens"):
        warn(
            f"The tokens that add_tokens added do not train with {type(config).__name__}, and an adapter folder will "
            f"not hold their rows. Use LoRAConfig, or modules_to_save={list(left)}."
        )
        return config
    return replace(settings, trainable_tokens=left or None)


@contextmanager
def lengthened(
    root: nn.Module, folder: Path, tokens: Any, tensors: Mapping[str, Tensor], recorded: str
) -> Iterator[None]:
    """Lengthen the vocabulary to that of an adapter's training, inside the block and after it; not if the block fails.

    The folder must hold the new rows: as trained tokens, or as the whole embedding, which Hugging Face peft saves.

    Args:
        tokens: the config's `trainable_tokens`.
        recorded: how many rows there were when the adapter was saved; "" if the folder does not say so.

    Raises:
        PeftLabError: the folder does not hold them; the message says how to go on. Or other adapters stand there.
    """
    if not rows_of(root):
        yield
        return
    layers = embeddings(root)
    before = len(layers[0][1])
    named_tokens = by_path(root, tokens)
    held = {path: held_rows(path, named_tokens.get(path, ()), tensors, before) for path, _ in layers}
    named = max((1 + token for path, _ in layers for token in named_tokens.get(path, ())), default=0)
    named = max(named, *(before + len(rows) for rows in held.values()))
    named = max(named, *(a.shape[1] for path, _ in layers for a in matrices(f"{path}.lora_embedding_A", tensors)), 0)
    length = max(named, int(recorded) if re.fullmatch("[0-9]{1,9}", recorded) else 0)
    if length <= before:
        yield
        return
    lacking = [path for path, rows in held.items() if len(rows) < length - before]
    if lacking:
        error = PeftLabError(
            f"The adapter in {folder} was trained on a vocabulary of {length} tokens, and this model has {before}. The "
            f"folder does not hold all the new rows of {some(lacking)}, so they cannot be added here. Give the model "
            f"the rows that it had in training, and load then: call model.resize_token_embeddings({length}), and start "
            "the new rows as they started there; if they were random, load the model that was saved then."
        )
        if named > before:
            raise error
        yield  # what else may be wrong is told first
        raise error
    hosting = [path for path, _ in layers if CHILD in root.get_submodule(path)._modules]
    if hosting:
        raise PeftLabError(
            f"The adapter in {folder} was trained on a vocabulary of {length} tokens, and this model has {before}. "
            f"Another adapter stands on {some(hosting)}, so it cannot be lengthened now. Detach that one, and load the "
            "one with the longest vocabulary first."
        )
    frozen = {path: weight.requires_grad for path, weight in layers}
    resize(root, length)
    try:
        with torch.no_grad():
            for path, rows in held.items():
                weight = root.get_submodule(path).get_parameter("weight")
                weight.requires_grad_(frozen[path])
                for index, row in rows.items():
                    weight[index] = row.to(weight)
        yield
    except BaseException:
        resize(root, before)
        raise
    root.__dict__.setdefault(SHORT, before)


def shorten(root: nn.Module) -> None:
    """Take away the rows that `load_adapter` added."""
    rows = root.__dict__.pop(SHORT, None)
    if rows is not None:
        resize(root, rows)


def keep_rows(root: nn.Module) -> None:
    """Keep the rows that `load_adapter` added: what was trained is merged into them."""
    root.__dict__.pop(SHORT, None)


def held_rows(
    path: str, tokens: tuple[int, ...], tensors: Mapping[str, Tensor], before: int
) -> dict[int, Tensor]:
    """Return the rows beyond the first `before` that an adapter's file holds of an embedding or head."""
    rows: dict[int, Tensor] = {}
    for trained in matrices(f"{path}.token_adapter.trainable_tokens_delta", tensors):
        # where tokens and rows do not go together, that is refused later
        rows |= {token: row for token, row in zip(tokens, trained, strict=False) if token >= before}
    for name in WHOLE:  # the base's own, from before they were trained
        for whole in matrices(f"{path}.{name}", tensors):
            rows |= {index: whole[index] for index in range(before, len(whole))}
    return rows


def matrices(name: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the matrix in a file that has this name, with or without the names of outer modules in front."""
    plainly = {plain(key)[0]: tensor for key, tensor in tensors.items()}
    found = [one for one in plainly if one == name or one.endswith(f".{name}") or name.endswith(f".{one}")]
    return [plainly[one] for one in found if plainly[one].dim() == 2] if len(found) == 1 else []
