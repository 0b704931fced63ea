"""The config of an adapter's folder: `adapter_config.json` from a config of this package, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Any, cast

from torch import nn

from peftlab.adapters.judging import check_fields
from peftlab.adapters.key_forms import simpler_names
from peftlab.adapters.key_table import base_name, sampled
from peftlab.adapters.task_type import task_type_of
from peftlab.catalogue import METHODS, resolve
from peftlab.core.experts import find_parameters, parameters_of
from peftlab.core.hooks import base_modules
from peftlab.core.interface import BESIDE, Config, InTraining, Placement
from peftlab.core.targets import ALL_LINEAR, Targets, by_pattern, find, names_match, present_layers
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.patterns import bounded

CONFIG = "adapter_config.json"
TARGET_FIELDS = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "task_type",
)  # fmt: skip


def to_fields(root: nn.Module, config: Config, placements: list[Placement]) -> dict[str, Any]:
    """Return a config as the contents of `adapter_config.json`."""
    modules = [placement for placement in placements if placement.part.parameter is None]
    hosts_by_path = {path: root.get_submodule(path) for path, _, _ in modules}
    if isinstance(config, InTraining):
        config = cast(Config, config.as_it_stands(placements))
    if isinstance(config, Targets):
        config = config.for_model(root)
    fields = {name: getattr(config, name, None) for name in TARGET_FIELDS}
    fields["task_type"] = fields["task_type"] or task_type_of(root, sampled(placements)[1])
    targets = fields["target_modules"]
    found_here = isinstance(targets, str) and (
        targets.lower() == ALL_LINEAR or getattr(config, "layers_to_transform", None)
    )
    if not isinstance(config, Targets):  # its adapter stands on the model itself
        fields = {name: fields[name] for name in ("modules_to_save", "task_type")}
    elif modules and (targets is None or found_here):
        # Write the names that were found, so that no library has to guess them again. Also, Hugging Face peft takes
        # layers_to_transform only together with a list.
        adapted = {placement.path for placement in modules if placement.kind not in BESIDE}
        fields["target_modules"] = sorted(adapted)
    elif not modules:
        fields["target_modules"] = []  # it adapts parameters alone; None would mean the default modules in peft
    fields |= config.to_peft(root, hosts_by_path)
    # Some of Hugging Face's configs lack these fields (IA3's those for layers, VeRA's the exclusion), and it warns of
    # each one in a file.
    unset = [name for name in ("layers_to_transform", "layers_pattern", "exclude_modules") if fields.get(name) is None]
    fields = {name: value for name, value in fields.items() if name not in unset}
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return fields | {
        "peft_type": config.peft_type,
        "base_model_name_or_path": base_name(root),
        "inference_mode": True,
    }


def from_fields(root: nn.Module, fields: Mapping[str, Any]) -> Config:
    """Return the contents of `adapter_config.json` as a config for this model."""
    check_fields(root, fields)
    kind = config_class(fields)
    takes = {field.name for field in fields_of(kind)}
    given = {name: fields.get(name) for name in TARGET_FIELDS if name in takes}
    shared = {name: None if value in ([], "") else value for name, value in given.items()}
    targets = shared.get("target_modules")
    if "layers_to_transform" in takes and isinstance(targets, str) and targets.lower() != ALL_LINEAR:
        shared["layers_to_transform"] = None  # peft applies an expression to all layers
    if "layers_to_transform" in takes and shared["layers_to_transform"] is None:
        shared["layers_pattern"] = None  # without layers it has no meaning
    try:
        with bounded():
            return only_present(root, kind(**shared, **kind.from_peft(fields)))
    except PeftLabError:
        raise
    except KeyError as error:
        (missing,) = error.args
        if missing in fields:  # found there, so this is not a damaged folder but a mistake in our code
            raise
        raise PeftLabError(
            f"{CONFIG} lacks the field {missing!r}, which {kind.__name__} reads. The file was edited, or an older "
            "release of the method wrote it; save or fetch the adapter again."
        ) from None
    except (TypeError, AttributeError, ValueError, OverflowError) as error:
        raise PeftLabError(f"{CONFIG} holds a field of a wrong type: {error}.") from None


def config_class(fields: Mapping[str, Any]) -> type[Config]:
    """Return the config class of a folder's method, by its `peft_type` and by the fields it uses.

    DoRA's `peft_type`, for example, is LoRA's; `use_dora` tells them apart.

    Raises:
        PeftLabError: no method here has this `peft_type` and these fields, or more than one has.
    """
    peft_type = fields.get("peft_type")
    alike = [kind for kind in classes_of(fields) if all(map(fields.get, kind.requires))]
    if not alike:
        types = list(dict.fromkeys(resolve(row.config).peft_type for row in METHODS.values() if row.config))
        raise PeftLabError(
            f"The adapter's peft_type is {peft_type!r}; this package loads {', '.join(types)}."
            + did_you_mean(str(peft_type), types)
        )
    fitting = [kind for kind in alike if not any(map(fields.get, kind.unsupported))]
    if not fitting:
        closest = max(alike, key=lambda kind: len(kind.requires))
        name = next(name for name in closest.unsupported if fields.get(name))
        raise PeftLabError(
            f"The adapter uses {name}={fields[name]!r}, which this package does not have. Load it with Hugging Face "
            "peft."
        )
    if len(fitting) > 1:
        raise PeftLabError(
            f"The adapter's fields fit {' and '.join(kind.__name__ for kind in fitting)}. Each of these classes must "
            "name, in `requires` or in `unsupported`, a field that tells its folders from the others'."
        )
    return fitting[0]


def classes_of(fields: Mapping[str, Any]) -> list[type[Config]]:
    """Return the config classes of the methods that have a folder's `peft_type`."""
    paths = dict.fromkeys(row.config for row in METHODS.values() if row.config)  # one class may serve several methods
    return [kind for kind in map(resolve, paths) if kind.peft_type == fields.get("peft_type")]


def method_name(config: Config) -> str:
    """Say by which name the catalogue calls the method of a config."""
    rows = {name: row for name, row in METHODS.items() if row.config and resolve(row.config) is type(config)}
    fixed = [
        name for name, row in rows.items()
        if row.fixed and all(getattr(config, field, None) == value for field, value in row.fixed.items())
    ]  # fmt: skip
    return next(iter([*fixed, *rows]), type(config).__name__)


def only_present(root: nn.Module, config: Config) -> Config:
    """Return the config without the names that this model does not have, and the patterns that mean no target.

    Hugging Face peft saves such names. The keys of the file say what was really trained.
    """
    modules, parameters = list(base_modules(root)), list(parameters_of(root))
    paths = modules

    def here(name: str, matches: Callable[[str, str], bool]) -> str:
        """Return a name as this model has it, also where it was saved from a wrapped or a headless model."""
        return next((one for one in simpler_names(name) if any(matches(one, path) for path in paths)), "")

    changes: dict[str, Any] = {}
    for field in ("target_modules", "modules_to_save", "target_parameters"):
        names = getattr(config, field, None)
        matches = ends_with if field == "modules_to_save" else by_ending
        paths = parameters if field == "target_parameters" else modules
        if isinstance(names, str) and names.lower() != ALL_LINEAR:
            changes[field] = here(names, names_match) or names
        elif names is not None and not isinstance(names, str):
            kept = tuple(dict.fromkeys(filter(None, (here(name, matches) for name in names))))
            changes[field] = kept or (None if field == "modules_to_save" else names)
    tokens, paths = getattr(config, "trainable_tokens", None), modules
    if isinstance(tokens, Mapping):
        changes["trainable_tokens"] = {here(name, ends_with) or name: rows for name, rows in tokens.items()}
    config = replace(config, **changes)
    if isinstance(config, Targets):
        config = replace(config, **present_layers(modules, config))
    paths, changes = adapted_paths(root, config) or modules + parameters, {}
    for field in ("rank_pattern", "alpha_pattern"):
        table = getattr(config, field, None) or {}
        there = {here(key, pattern_matches): value for key, value in table.items()}
        there.pop("", None)
        if there != table:
            changes[field] = there
    return replace(config, **changes)


def adapted_paths(root: nn.Module, config: Config) -> list[str]:
    """Return the modules and parameters that a config names; an empty list where it names none, or cannot be read."""
    if not isinstance(config, Targets) or config.target_modules in (None, ALL_LINEAR):
        return []
    with contextlib.suppress(PeftLabError):  # said when the parts are built
        meant = config.for_model(root)
        parameters = find_parameters(root, getattr(meant, "target_parameters", None) or ())
        return [*(() if meant.target_modules is None else find(root, meant)), *parameters]
    return []


def by_ending(name: str, path: str) -> bool:
    """Say whether a name of `target_modules` means a path."""
    return names_match((name,), path)


def ends_with(name: str, path: str) -> bool:
    """Say whether a name of `modules_to_save` means a path; its end may lie within a name."""
    return path.endswith(name)


def pattern_matches(key: str, path: str) -> bool:
    """Say whether a key of `rank_pattern` or `alpha_pattern` means a path."""
    return bool(by_pattern({key: True}, path, False))
