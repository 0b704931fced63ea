"""Adapter folders in Hugging Face peft's format, both ways, from one table of keys.

A folder holds `adapter_config.json` and `adapter_model.safetensors`; an adapter that is not called `default` lies in
a subfolder of its name. Each part of an adapter says under which key each of its parameters is stored; saving reads
that table forwards and loading reads it backwards, so the two cannot disagree. Where Hugging Face's format holds only
what a network made (a prompt, say), the network itself lies in a file beside, so that training can go on.

The file's metadata (which Hugging Face peft ignores) also holds SHA-256 sums of the tensors and of the config, and a
few numbers of the base's weights, so that damage, mixed-up files and another base model are noticed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftlab.adapters.injection import add, prepare, settle
from peftlab.adapters.integrity import base_sample, base_tensor, check_base, check_integrity, config_digest, digest
from peftlab.adapters.task_type import task_type_of
from peftlab.catalogue import METHODS, resolve
from peftlab.core.hooks import CHILD, base_modules, hosts
from peftlab.core.interface import Config, Placement
from peftlab.core.records import require_adapter, unwrap
from peftlab.core.targets import ALL_LINEAR, Targets, by_pattern, names_match
from peftlab.core.tensor_files import read_tensors, serialised, write
from peftlab.errors import PeftLabError, did_you_mean

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ENCODER = "adapter_encoder.safetensors"  # ours alone; Hugging Face peft does not look at it
PREFIX = "base_model.model."
TARGET_FIELDS = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "task_type",
)  # fmt: skip


def save_adapter(model: nn.Module, folder: str | os.PathLike, name: str = "default") -> Path:
    """Writes an adapter so that both this package and Hugging Face peft can load it.

    Args:
        folder: where to write; an adapter not called "default" goes into a subfolder of its name.

    Returns:
        The folder that holds the two files.

    Raises:
        PeftLabError: no such adapter, or a parameter that is not finite. Nothing is then written.
    """
    root = unwrap(model)
    config = require_adapter(root, name).configs[name]
    placements = placed(root, name)
    tensors = {}
    for key, parameter in key_table(placements).items():
        if not torch.isfinite(parameter).all():
            raise PeftLabError(f"{key} holds values that are not finite; the adapter was not saved.")
        tensors[key] = parameter.detach().cpu().contiguous().clone()  # shared biases have several keys
    encoder = {key: value.detach().cpu().contiguous().clone() for key, value in encoder_table(placements).items()}

    fields = to_fields(root, config, placements)
    tensors |= embedding_copies(root, fields, placements)
    text = json.dumps(fields, indent=2, sort_keys=True)
    metadata = {
        "format": "pt",
        "peftlab_tensors": digest(tensors),
        "peftlab_config": config_digest(fields),
        "peftlab_base": json.dumps(base_sample(root, *sampled(placements))),
    }
    if encoder:
        metadata["peftlab_encoder"] = digest(encoder)
    folder = Path(folder) if name == "default" else Path(folder) / name
    folder.mkdir(parents=True, exist_ok=True)
    # Each file appears whole or not at all; a folder caught between the two is told by `peftlab_config`.
    if encoder:
        write(folder / ENCODER, serialised(encoder, {"format": "pt"}))
    write(folder / CONFIG, text.encode())
    write(folder / WEIGHTS, serialised(tensors, metadata))
    if not encoder:
        (folder / ENCODER).unlink(missing_ok=True)  # of an adapter that was here before
    return folder


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    name: str = "default",
    *,
    trainable: bool = False,
    adapter_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Loads an adapter folder of this package or of Hugging Face peft, attaches it and makes it the active one.

    Args:
        folder: the folder, or its parent when the adapter lies in a subfolder of its name.
        trainable: whether it goes on training; by default a loaded adapter is frozen. A prompt that a network made
            goes on with that network, if this package saved it; else, and frozen, it is the prompt alone.
        adapter_dtype: as for `attach`.

    Raises:
        PeftLabError: a folder or file that is missing, damaged or pickled, another method or base model, missing,
            extra or misshapen keys, a name in use. The model is then as it was.
    """
    root = unwrap(model)
    saved = read_folder(Path(folder), name)
    config = from_fields(root, saved.fields)
    if not (trainable and saved.encoder):
        config = config.as_stored()
    placements = prepare(root, name, config, adapter_dtype)
    check_fit(root, placements, saved)
    settle(root, placements)
    fill(placements, saved)
    add(root, name, config, placements, trainable=trainable)
    return model


class Saved(NamedTuple):
    """An adapter's folder, read: where it lies, its config's fields, its tensors, the file's metadata, and what made
    those tensors, where that was saved beside."""

    folder: Path
    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    encoder: dict[str, Tensor] = {}  # noqa: RUF012


def read_folder(folder: Path, name: str) -> Saved:
    """Reads an adapter's two files and checks that they are whole and belong together."""
    folder = locate(folder, name)
    fields = read_config(folder)
    tensors, metadata = read_tensors(folder / WEIGHTS)
    check_integrity(folder / CONFIG, folder / WEIGHTS, fields, tensors, metadata)
    encoder: dict[str, Tensor] = {}
    if "peftlab_encoder" in metadata and (folder / ENCODER).is_file():
        encoder, _ = read_tensors(folder / ENCODER)
        if digest(encoder) != metadata["peftlab_encoder"]:
            raise PeftLabError(
                f"{folder / ENCODER} and {WEIGHTS} were not saved together, or one was changed. Save the adapter "
                f"again, or delete {ENCODER}, which only further training needs."
            )
    return Saved(folder, fields, tensors, metadata, encoder)


def check_fit(root: nn.Module, placements: Iterable[Placement], saved: Saved) -> None:
    """Requires that a folder's base, keys and shapes are those of this model and these parts."""
    check_base(root, saved.folder, saved.metadata, base_name(root) or type(root).__name__)
    check_keys(root, saved.folder, saved.fields, key_table(placements), saved.tensors)
    encoder = encoder_table(placements)
    if encoder and {key: tensor.shape for key, tensor in saved.encoder.items()} != {
        key: parameter.shape for key, parameter in encoder.items()
    }:
        raise PeftLabError(
            f"{saved.folder} holds what the adapter's encoder made, but no {ENCODER} with that encoder, so its "
            "training cannot go on here. Save it with this package, or attach the adapter without an encoder."
        )


@torch.no_grad()
def fill(placements: Iterable[Placement], saved: Saved) -> None:
    """Copies saved tensors into an adapter's parts, where they replace what the parts started with."""
    # The output of an encoder is not copied: it follows from the encoder's own weights, which are.
    for key, parameter in key_table(p for p in placements if not p.part.encoder_keys).items():
        parameter.copy_(saved.tensors[key])
    for key, parameter in encoder_table(placements).items():
        parameter.copy_(saved.encoder[key])


def check_config(root: nn.Module, name: str, placements: list[Placement], saved: Saved) -> None:
    """Requires that an attached adapter computes with a folder's weights what the saved one did.

    What it is placed on is for `check_keys`; both configs are brought to one form, since peft may write another.
    """
    attached, other = to_fields(root, require_adapter(root, name).configs[name], placements), saved.fields
    mine, theirs = (to_fields(root, from_fields(root, fields), placements) for fields in (attached, other))
    for field in mine.keys() - {*TARGET_FIELDS}:
        if mine[field] != theirs.get(field):
            raise PeftLabError(
                f"The adapter in {saved.folder} has {field}={theirs.get(field)!r}; the attached {name!r} has "
                f"{mine[field]!r}. Attach it with the config that was saved."
            )


def sampled(placements: Iterable[Placement]) -> tuple[list[str], list[str]]:
    """Returns (paths of the hosts, by whose weights the base is recognised; those of them with a trained copy)."""
    copied = [placement.path for placement in placements if placement.name == "copy"]
    return [placement.path for placement in placements], copied


def placed(root: nn.Module, name: str) -> list[Placement]:
    """The parts of an attached adapter and where they stand, in the model's order."""
    return [
        Placement(path, part_name, part)
        for path, host in hosts(root)
        if name in host._modules[CHILD]
        for part_name, part in host._modules[CHILD][name].items()
    ]


def key_table(placements: Iterable[Placement]) -> dict[str, Tensor]:
    """The one table: {key in Hugging Face's file: our parameter, or what an encoder makes}."""
    table = {}
    for path, _, part in placements:
        for own, keys in part.keys.items():
            owner, _, parameter_name = own.rpartition(".")
            parameter = getattr(part.get_submodule(owner), parameter_name)
            for key in (keys,) if isinstance(keys, str) else keys:
                if parameter is not None:
                    table[key.format(path=PREFIX + path, root=PREFIX, module=path)] = parameter
    return table


def encoder_table(placements: Iterable[Placement]) -> dict[str, nn.Parameter]:
    """{key in the file beside: our parameter}, for what Hugging Face's format leaves out."""
    return {key: part.get_parameter(own) for _, _, part in placements for own, key in part.encoder_keys.items()}


def to_fields(root: nn.Module, config: Config, placements: list[Placement]) -> dict[str, Any]:
    """A config as the contents of `adapter_config.json`."""
    hosts_by_path = {path: root.get_submodule(path) for path, _, _ in placements}
    fields = {name: getattr(config, name, None) for name in TARGET_FIELDS}
    fields["task_type"] = fields["task_type"] or task_type_of(root, sampled(placements)[1])
    targets = fields["target_modules"]
    found_here = isinstance(targets, str) and (targets.lower() == ALL_LINEAR or config.layers_to_transform)
    if not isinstance(config, Targets):  # it stands on the model itself
        fields = {name: fields[name] for name in ("modules_to_save", "task_type")}
    elif targets is None or found_here:
        # The names that were found, so that no library has to guess them again; and Hugging Face peft takes
        # layers_to_transform only beside a list.
        adapted = {path for path, part_name, _ in placements if part_name not in ("bias", "copy")}
        fields["target_modules"] = sorted(adapted)
    # Hugging Face's IA3 has no fields for layers, and warns about each that it finds in a file.
    unset = [name for name in ("layers_to_transform", "layers_pattern") if fields.get(name) is None]
    fields = {name: value for name, value in fields.items() if name not in unset}
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return fields | {
        "peft_type": config.peft_type,
        "base_model_name_or_path": base_name(root),
        "inference_mode": True,
        **config.to_peft(root, hosts_by_path),
    }


def from_fields(root: nn.Module, fields: Mapping[str, Any]) -> Config:
    """The contents of `adapter_config.json` as a config for this model."""
    kind = config_class(fields)
    takes = {field.name for field in fields_of(kind)}
    given = {name: fields.get(name) for name in TARGET_FIELDS if name in takes}
    shared = {name: None if value in ([], "") else value for name, value in given.items()}
    if "layers_to_transform" in takes and shared["layers_to_transform"] is None:
        shared["layers_pattern"] = None  # without layers to count it says nothing
    try:
        return only_present(root, kind(**shared, **kind.from_peft(fields)))
    except (TypeError, AttributeError) as error:
        raise PeftLabError(f"{CONFIG} holds a field of a wrong type: {error}.") from None


def config_class(fields: Mapping[str, Any]) -> type[Config]:
    """Chooses a folder's method by its `peft_type` and by the fields it uses: DoRA's is LoRA's, and `use_dora`.

    Raises:
        PeftLabError: no method here has this `peft_type` and these fields, or more than one has.
    """
    paths = dict.fromkeys(row.config for row in METHODS.values() if row.config)  # one class may serve several methods
    kinds = [resolve(path) for path in paths]
    peft_type = fields.get("peft_type")
    alike = [kind for kind in kinds if kind.peft_type == peft_type and all(map(fields.get, kind.requires))]
    if not alike:
        types = list(dict.fromkeys(kind.peft_type for kind in kinds))
        raise PeftLabError(
            f"The adapter's peft_type is {peft_type!r}; this package loads {', '.join(types)}."
            + did_you_mean(str(peft_type), types)
        )
    fitting = [kind for kind in alike if not any(map(fields.get, kind.unsupported))]
    if not fitting:
        closest = max(alike, key=lambda kind: len(kind.requires))
        name = next(name for name in closest.unsupported if fields.get(name))
        raise PeftLabError(f"The adapter uses {name}={fields[name]!r}, which this package does not have.")
    if len(fitting) > 1:
        raise PeftLabError(
            f"The adapter's fields fit {' and '.join(kind.__name__ for kind in fitting)}. Each of these classes must "
            "name, in `requires` or in `unsupported`, a field that tells its folders from the others'."
        )
    return fitting[0]


def only_present(root: nn.Module, config: Config) -> Config:
    """Leaves out names and patterns that this model does not have: Hugging Face peft saves them, and the keys of the
    file say what was trained."""
    paths = list(base_modules(root))
    changes: dict[str, Any] = {}
    for field in ("target_modules", "modules_to_save"):
        names = getattr(config, field, None)
        if names is not None and not isinstance(names, str):
            ends = names_match if field == "target_modules" else lambda spec, path: path.endswith(spec)
            there = tuple(name for name in names if any(ends((name,), path) for path in paths))
            changes[field] = there or (names if field == "target_modules" else None)
    for field in ("rank_pattern", "alpha_pattern"):
        table = getattr(config, field, None) or {}
        there = {key: value for key, value in table.items() if any(by_pattern({key: 1}, path, 0) for path in paths)}
        if there != table:
            changes[field] = there
    return replace(config, **changes)


def locate(folder: Path, name: str) -> Path:
    """The folder that holds an adapter's two files."""
    for candidate in (folder / name, folder) if name != "default" else (folder,):
        if (candidate / CONFIG).is_file() and (candidate / WEIGHTS).is_file():
            return candidate
    if not folder.is_dir():
        near = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        raise PeftLabError(f"There is no adapter folder {str(folder)!r}.{did_you_mean(folder.name, near)}")
    if any(folder.glob("adapter_model.bin")):
        raise PeftLabError(
            f"{folder} holds adapter_model.bin, a pickle, which can run code when it is opened. "
            "Convert it to adapter_model.safetensors where you trust it."
        )
    there = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    hint = f" It holds adapters named {', '.join(map(repr, there))}; give one as name." if there else ""
    raise PeftLabError(f"{folder} lacks {CONFIG} or {WEIGHTS}.{hint}")


def read_config(folder: Path) -> dict[str, Any]:
    """Reads `adapter_config.json`."""
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PeftLabError(f"{folder / CONFIG} cannot be read: {error}.") from None
    if not isinstance(fields, dict):
        raise PeftLabError(f"{folder / CONFIG} holds a {type(fields).__name__}, not the fields of a config.")
    return fields


def check_keys(
    root: nn.Module, folder: Path, fields: Mapping, table: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Requires exactly the keys that the config implies for this model, in the right shapes."""
    trained_on = fields.get("base_model_name_or_path") or "an unnamed base"
    origin = f" The adapter was trained on {trained_on!r}; this model is {base_name(root) or type(root).__name__!r}."
    missing = [key for key in table if key not in tensors]
    if missing:
        raise PeftLabError(f"{folder} lacks {len(missing)} of {len(table)} keys, the first {missing[0]!r}." + origin)
    extra = [key for key in tensors if key not in table and not redundant(root, key, tensors)]
    if extra:
        raise PeftLabError(f"{folder} has {len(extra)} keys without a place here, the first {extra[0]!r}." + origin)
    for key, parameter in table.items():
        if tensors[key].shape != parameter.shape:
            raise PeftLabError(
                f"{key!r} has shape {tuple(tensors[key].shape)}; this model needs {tuple(parameter.shape)}." + origin
            )


def redundant(root: nn.Module, key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Says whether a key only repeats what is known: Hugging Face peft saves the base's own weight beside an adapted
    embedding, and, with bias="all", the insides of its wrapper around a module trained in full."""
    twin = key.replace(".modules_to_save.", ".")
    if twin != key:
        return twin in tensors and torch.equal(tensors[twin], tensors[key])
    path = key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")
    module, _, name = path.rpartition(".")
    own = base_tensor(root, module, name) if module in base_modules(root) else None
    if own is None or own.shape != tensors[key].shape:
        return False
    # The base may have been loaded in another dtype: equal in the coarser of the two is equal.
    dtype = min(own.dtype, tensors[key].dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(tensors[key].to(dtype), own.detach().cpu().to(dtype))


def embedding_copies(root: nn.Module, fields: Mapping[str, Any], placements: list[Placement]) -> dict[str, Tensor]:
    """The base's weights that Hugging Face peft saves beside adapted embeddings, by its rule: the targets name
    `embed_tokens` or `lm_head`. A vocabulary that was lengthened before training then travels with the adapter."""
    targets, names = fields.get("target_modules") or (), ("embed_tokens", "lm_head")
    if isinstance(targets, str):
        paths = (path for path in base_modules(root) if path.rpartition(".")[2] in names)
        named = any(re.fullmatch(targets, path) for path in paths)
    else:
        named = any(name in targets for name in names)
    if not named or not hasattr(root, "get_input_embeddings"):
        return {}
    embeddings = (root.get_input_embeddings(), root.get_output_embeddings())
    copies = {}
    for path, part_name, _ in placements:
        if part_name not in ("bias", "copy") and any(root.get_submodule(path) is layer for layer in embeddings):
            weight = base_tensor(root, path, "weight")
            copies[f"{PREFIX}{path}.base_layer.weight"] = weight.detach().cpu().contiguous().clone()
    return copies


def base_name(root: nn.Module) -> str | None:
    """The base's name or path, as transformers knows it."""
    config = getattr(root, "config", None)
    return getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None) or None
