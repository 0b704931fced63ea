"""The table of keys: under which name each parameter of an adapter lies in Hugging Face peft's file.

Each part of an adapter says the key of each of its parameters. Saving reads the table forwards and loading reads it
backwards, so the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.adapters.integrity import base_tensor
from peftlab.core.embeddings import word_embeddings
from peftlab.core.hooks import base_modules
from peftlab.core.interface import BESIDE, Placement
from peftlab.core.records import as_transformer
from peftlab.core.records import placed as placed
from peftlab.core.sharding import whole
from peftlab.core.targets import names_match
from peftlab.errors import PeftLabError

PREFIX = "base_model.model."
LOST_BIASES = (
    " These are all of its trained biases, which Hugging Face peft before 0.21 left out of its files. If the trained "
    'model is at hand, save it again with a newer peft. To read the rest, set "bias" to "none" in adapter_config.json.'
)
TIED = (
    " The adapter uses ensure_weight_tying=True: what it adds to a tied embedding it also adds to the head, which this "
    "package does not do. Load it with Hugging Face peft."
)


def sampled(placements: Iterable[Placement]) -> tuple[list[str], list[str]]:
    """Return (modules whose weights fingerprint the base, modules replaced by trained copies)."""
    copied = [placement.path for placement in placements if placement.kind == "copy"]
    return [placement.path for placement in placements], copied


def key_table(placements: Iterable[Placement]) -> dict[str, Tensor]:
    """Return the one table: {key in Hugging Face's file: our parameter, or the output of an encoder}."""
    return {key: parameter for key, _, _, parameter in entries(placements)}


def drawn_table(placements: Iterable[Placement]) -> dict[str, Tensor]:
    """Return {key: tensor} for what the parts have drawn by themselves, so that their file leaves it out."""
    return {key: tensor for key, _, _, tensor in entries(placements, drawn=True)}


def entries(placements: Iterable[Placement], drawn: bool = False) -> Iterator[tuple[str, Placement, str, Tensor]]:
    """Yield (key, placement, own name, parameter) for all that an adapter file holds, or leaves out as drawn."""
    for placement in placements:
        path, _, part = placement
        for own, keys in (part.drawn_keys if drawn else part.keys).items():
            owner, _, parameter_name = own.rpartition(".")
            parameter = getattr(part.get_submodule(owner), parameter_name)
            for key in (keys,) if isinstance(keys, str) else keys:
                if parameter is not None:
                    yield key.format(path=PREFIX + path, root=PREFIX, module=path), placement, own, parameter


def as_saved(root: nn.Module, placements: list[Placement], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors in the form in which settled parts save them."""
    given = {
        key: placement.part.as_saved(root, placement.path, own, tensors[key])
        for key, placement, own, _ in entries(placements)
        if key in tensors
    }
    taken = set()
    for path, _, part in placements:
        key = f"{PREFIX}{path}.base_layer.weight"
        changed = part.weight_in_peft(root.get_submodule(path)) if key in tensors else None
        if changed is not None and near(tensors[key], changed):
            taken.add(key)
    return {key: tensor for key, tensor in {**tensors, **given}.items() if key not in taken}


def near(found: Tensor, expected: Tensor) -> bool:
    """Say whether two weights are one up to the rounding of 16-bit dtypes."""
    found, expected = found.cpu().float(), expected.cpu().float()
    return found.shape == expected.shape and bool((found - expected).norm() <= 0.01 * expected.norm())


def encoder_table(placements: Iterable[Placement]) -> dict[str, nn.Parameter]:
    """Return {key in the second file: our parameter}, for what Hugging Face's format leaves out."""
    return {key: part.get_parameter(own) for _, _, part in placements for own, key in part.encoder_keys.items()}


def check_keys(
    root: nn.Module, folder: Path, fields: Mapping, placements: Iterable[Placement], tensors: Mapping[str, Tensor]
) -> None:
    """Require exactly the keys that the config implies for this model, in the right shapes."""
    placements = list(placements)
    table, drawn = key_table(placements), drawn_table(placements)
    trained_on = fields.get("base_model_name_or_path") or "an unnamed base"
    origin = f" The adapter was trained on {trained_on!r}; this model is {base_name(root) or type(root).__name__!r}."
    missing = [key for key in table if key not in tensors]
    if missing:
        biases = {key for key, placement, _, _ in entries(placements) if placement.name == "bias"}
        why = LOST_BIASES if biases == set(missing) else origin
        raise PeftLabError(f"{folder} lacks {len(missing)} of {len(table)} keys, the first {missing[0]!r}." + why)
    for key in drawn.keys() & tensors.keys():
        if not alike(drawn[key], tensors[key]):
            raise PeftLabError(
                f"{folder} holds {key!r}, while its config says that these numbers are not saved but drawn from a seed "
                "(VeRA's save_projection), which gives others here. To read the file's, set it to true there."
            )
    known = table.keys() | drawn.keys()
    extra = [key for key in tensors if key not in known and not redundant(root, key, tensors)]
    if extra:
        why = TIED if fields.get("ensure_weight_tying") else origin
        raise PeftLabError(f"{folder} has {len(extra)} keys without a place here, the first {extra[0]!r}." + why)
    for key, parameter in table.items():
        if tensors[key].shape != parameter.shape:
            raise PeftLabError(
                f"{key!r} has shape {tuple(tensors[key].shape)}; this model needs {tuple(parameter.shape)}." + origin
            )
        if tensors[key].is_floating_point() != parameter.is_floating_point():  # a copy would cast it without a word
            raise PeftLabError(
                f"{key!r} in {folder} holds {str(tensors[key].dtype).removeprefix('torch.')} values, and what an "
                "adapter adds is a floating type such as float32 or bfloat16. Save it again in one of these."
            )


def redundant(root: nn.Module, key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Say whether a key only repeats what the model holds already.

    Hugging Face peft saves the base's own weight beside an adapted embedding, and beside any adapter whose vocabulary
    was lengthened. With bias="all" it also saves the inside of its wrapper around a module trained in full.
    """
    twin = PREFIX.removesuffix("model.") + key.rpartition(".")[2]  # a matrix that all layers share, once more for one
    if twin != key and twin in tensors:
        return torch.equal(tensors[twin], tensors[key])
    twin = key.replace(".modules_to_save.", ".")
    if twin != key:
        return twin in tensors and torch.equal(tensors[twin], tensors[key])
    rows = ".token_adapter.trainable_tokens_delta"
    if key.endswith(rows):  # a tied head's, which are the embedding's own
        others = (tensor for other, tensor in tensors.items() if other.endswith(rows) and other != key)
        return any(torch.equal(other, tensors[key]) for other in others)
    path = key.removeprefix(PREFIX)
    for wrapper in (".token_adapter.base_layer.", ".base_layer.", ".original_module."):
        path = path.replace(wrapper, ".")
    module, _, name = path.rpartition(".")
    own = base_tensor(root, module, name) if module in base_modules(root) else None
    return own is not None and alike(own, tensors[key])


def alike(own: Tensor, saved: Tensor) -> bool:
    """Say whether a saved tensor is one of ours, which may have another dtype: compare them in the coarser one."""
    if own.shape != saved.shape:
        return False
    dtype = min(own.dtype, saved.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(saved.to(dtype), whole(own).detach().cpu().to(dtype))


def embedding_copies(root: nn.Module, fields: Mapping[str, Any], placements: list[Placement]) -> dict[str, Tensor]:
    """Return the base's weights that Hugging Face peft saves beside adapted embeddings.

    Its rule: the targets name `embed_tokens` or `lm_head`. A vocabulary that was lengthened before training then
    travels with the adapter.
    """
    targets, names = fields.get("target_modules") or (), ("embed_tokens", "lm_head")
    if isinstance(targets, str):
        paths = (path for path in base_modules(root) if path.rpartition(".")[2] in names)
        named = any(names_match(targets, path) for path in paths)
    else:
        named = any(name in targets for name in names)
    words = word_embeddings(root)
    if not named or words is None:
        return {}
    embeddings = (words[1], as_transformer(root).get_output_embeddings())
    copies = {}
    for placement in placements:
        path = placement.path
        if placement.kind not in BESIDE and any(root.get_submodule(path) is layer for layer in embeddings):
            weight = base_tensor(root, path, "weight")
            assert weight is not None
            copies[f"{PREFIX}{path}.base_layer.weight"] = whole(weight).detach().cpu().contiguous().clone()
    return copies


def base_name(root: nn.Module) -> str | None:
    """Return the base's name or path, as transformers knows it."""
    config = getattr(root, "config", None)
    return getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None) or None
