"""Lengthen the vocabulary of a model where an adapter was trained on a longer one, and shorten it again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftlab.adapters.key_forms import plain
from peftlab.core.embeddings import word_embeddings
from peftlab.core.hooks import CHILD, base_modules
from peftlab.core.interface import Config
from peftlab.core.records import as_transformer
from peftlab.core.targets import ALL_LINEAR, names_match
from peftlab.errors import PeftLabError, out_of_memory, some, warn
from peftlab.methods.tokens import by_path

NEW = "_peftlab_tokens"  # a plain attribute of the model: {path: ids of the tokens that add_tokens added}
SHORT = "_peftlab_rows"  # a plain attribute of the model: how many rows it had before load_adapter lengthened it
WHOLE = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")
AnyConfig = TypeVar("AnyConfig", bound=Config)


def embeddings(root: nn.Module) -> list[tuple[str, Tensor]]:
    """Return (path, weight) of the word embeddings, and of an output head with a weight of its own."""
    words = word_embeddings(root)
    weight = None if words is None else words[1]._parameters.get("weight")
    if words is None or weight is None or not hasattr(root, "resize_token_embeddings"):
        raise PeftLabError(
            f"{type(root).__name__} has no word embeddings that transformers could lengthen; give a model of "
            "transformers that reads tokens, such as pl.load_model returns."
        )
    found: list[tuple[str, Tensor]] = [(words[0], weight)]
    head = as_transformer(root).get_output_embeddings()
    own = None if head is None else head._parameters.get("weight")
    if own is not None and own is not weight and len(own) == len(weight):
        found += [(path, own) for path, module in base_modules(root).items() if module is head]
    return found


def rows_of(root: nn.Module) -> int | None:
    """Return the length of a model's vocabulary; None for a model without one that could change."""
    words = word_embeddings(root) if hasattr(root, "resize_token_embeddings") else None
    weight = None if words is None else words[1]._parameters.get("weight")
    return None if weight is None else len(weight)


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
    if rows_of(root) is None:
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
            f"The adapter in {folder} was trained on a vocabulary of {length} tokens, and {layers[0][0]} has {before}. "
            f"The folder does not hold all the new rows of {some(lacking)}, so they cannot be added here. Give the "
            "model the rows that it had in training, and load then: call "
            f"model.resize_token_embeddings({length}), and start the new rows as they started there; if they were "
            "random, load the model that was saved then."
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


def held_rows(path: str, tokens: tuple[int, ...], tensors: Mapping[str, Tensor], before: int) -> dict[int, Tensor]:
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
