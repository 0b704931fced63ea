"""Find the modules of a model that a config names: by name, ending, regular expression or `"all-linear"`.

The rules are those of Hugging Face peft, so a saved `adapter_config.json` selects the same modules in both libraries.
One rule is stricter: every entry has to match. If half of a list matched nothing, less would train than the user
thinks, and nothing would show it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

from torch import Tensor, nn

from peftlab import patterns
from peftlab.checks import one_of, whole
from peftlab.core.experts import shape_of as shape_of_parameter
from peftlab.core.experts import warn_of_experts
from peftlab.core.hooks import base_modules
from peftlab.core.records import as_transformer, own_tensor
from peftlab.default_targets import query_value
from peftlab.errors import PeftLabError, did_you_mean

ALL_LINEAR = "all-linear"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Hugging Face's words for the tasks, and the new heads that each task trains in full beside an adapter.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "CAUSAL_LM": (),
    "SEQ_2_SEQ_LM": (),
    "FEATURE_EXTRACTION": (),
}


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Hold the fields that all methods on chosen modules share.

    Attributes:
        target_modules: `None` (the query and value projections; in a model that reads images or sound and writes text,
            those of the language model alone), `"all-linear"` (every linear layer but the output head, in all parts), a
            list of module names or their endings, or a regular expression for the whole path.
        exclude_modules: names, endings or a regular expression of modules to leave out.
        layers_to_transform: indices of the blocks to adapt; `None` for all.
        layers_pattern: the name (or names) of the list of blocks (`"layers"`, `"h"`) in which `layers_to_transform`
            counts. `None` takes the first number in a path.
        modules_to_save: modules trained in full beside the adapter (a classification head, say): every module whose
            path ends in one of these strings. As in Hugging Face peft, the end may lie within a name: `"norm"` also
            means `input_layernorm`, `".norm"` does not.
        task_type: Hugging Face's word for the task (`"CAUSAL_LM"`, `"SEQ_CLS"`, ...). `"SEQ_CLS"`, `"TOKEN_CLS"` and
            `"QUESTION_ANS"` also train the model's head for that task.
    """

    target_modules: str | Iterable[str] | None = None
    exclude_modules: str | Iterable[str] | None = None
    layers_to_transform: int | Iterable[int] | None = None
    layers_pattern: str | Iterable[str] | None = None
    modules_to_save: Iterable[str] | None = None
    task_type: str | None = None

    # Every `Config` has these; few methods change them.
    requires: ClassVar[tuple[str, ...]] = ()
    unsupported: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            check_names(self, name)
        layers = self.layers_to_transform
        if layers is not None:
            several = isinstance(layers, Iterable) and not isinstance(layers, (str, bytes, Mapping))
            indices: tuple[Any, ...] = tuple(cast(Iterable[int], layers)) if several else (layers,)
            if not indices:
                raise PeftLabError("layers_to_transform is empty; leave it out for all blocks, or name some.")
            layers = tuple(whole("an index in layers_to_transform", index, least=0) for index in indices)
            object.__setattr__(self, "layers_to_transform", layers)
        pattern = self.layers_pattern
        if pattern is not None:
            if layers is None:
                raise PeftLabError(
                    "layers_pattern says in which list layers_to_transform counts; give layers_to_transform too."
                )
            pattern = (pattern,) if isinstance(pattern, str) else tuple(pattern)
            for name in pattern:
                check_regex(name)
            object.__setattr__(self, "layers_pattern", pattern or None)
        check_task(self)

    def start_from(self, model: nn.Module, data: Any) -> tuple[Self, Mapping[str, Mapping[str, Tensor]]]:
        """Return this config and nothing: it starts from no data."""
        refuse_data(self, data)
        return self, {}

    def as_stored(self) -> Self:
        """Return this config: an adapter folder holds all that it describes."""
        return self

    def for_model(self, model: nn.Module) -> Self:
        """Return the config with the names that this model's modules and parameters have. Most methods change none."""
        return self


def check_names(config: Any, name: str) -> None:
    """Bring a field that lists module names to one form: a tuple without repetitions, or None."""
    value = getattr(config, name)
    if value is None or (isinstance(value, str) and name != "modules_to_save"):
        return
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise PeftLabError(f"{name} is {value!r}; give a list of module names, such as ['lm_head'].")
    entries = tuple(dict.fromkeys(value))
    wrong = [entry for entry in entries if not isinstance(entry, str) or not entry]
    if wrong:
        raise PeftLabError(f"{name} holds {wrong[0]!r}; its entries are module names, as strings.")
    if name == "target_modules" and not entries:
        raise PeftLabError("target_modules is empty; leave it out for the method's default, or name modules.")
    object.__setattr__(config, name, entries)


def refuse_data(config: Any, data: Any) -> None:
    """Refuse data for a start that reads none."""
    if data is not None:
        init = getattr(config, "init", None)
        raise PeftLabError(
            f"data was given, and {type(config).__name__}{'' if init is None else f'(init={init!r})'} starts from no "
            "data. Leave data out, or use LoRAConfig(init='eva') or init='loftq'."
        )


def check_task(config: Any) -> None:
    """Bring `task_type` to Hugging Face's word for it."""
    if config.task_type is not None:
        task = str(getattr(config.task_type, "value", config.task_type)).upper()
        object.__setattr__(config, "task_type", one_of("task_type", task, TASK_HEADS))


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a layer that LoRA can stand beside, or `None` for any other module.

    An embedding counts as a linear layer from one-hot vectors: (vocabulary, width).
    """
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if is_conv1d(module):
        stored = own_tensor(module, "weight")
        return stored.shape[0], stored.shape[1]
    # A quantised linear packs its weight, so the shape is read from the attributes of nn.Linear.
    inside, outside = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inside, int) and isinstance(outside, int) and hasattr(module, "weight"):
        return inside, outside
    return None


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a layer that `check_carrier` has let through."""
    shape = linear_shape(module)
    assert shape is not None
    return shape


def is_conv1d(module: nn.Module) -> bool:
    """Say whether a module is GPT-2's `Conv1D`, a linear layer whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_carrier(module: nn.Module) -> bool:
    """Say whether a low-rank update can stand beside a module: a linear layer, an embedding or a convolution."""
    return linear_shape(module) is not None or isinstance(module, CONVOLUTIONS)


def names_match(spec: str | Iterable[str], path: str) -> bool:
    """Say whether a path matches a regular expression (a string), or one of a list of names and endings."""
    if isinstance(spec, str):
        return patterns.fullmatch(spec, path)
    return any(path == name or path.endswith("." + name) for name in spec)


def heads(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """Return the modules trained in full beside an adapter, by path.

    They are those that `modules_to_save` names, and the head that a task implies.

    Raises:
        PeftLabError: a name matches nothing (with near matches), or a module lies inside another one that is named too.
    """
    modules = {path: module for path, module in base_modules(model).items() if path}
    named, implied = config.modules_to_save or (), TASK_HEADS.get(config.task_type, ())
    found: dict[str, nn.Module] = {}
    for name in (*named, *implied):
        matched = {path: module for path, module in modules.items() if path.endswith(name)}
        if name in named and not matched:
            raise no_match_error(name, modules, f"modules_to_save names {name!r}, which matches no module")
        found |= matched
    if implied and not found:
        raise PeftLabError(
            f"task_type is {config.task_type!r}, but {type(model).__name__} has no head called "
            f"{' or '.join(implied)}. Load the model with num_labels, or name its head in modules_to_save."
        )
    for path in found:
        outer = [other for other in found if path.startswith(other + ".")]
        if outer:
            raise PeftLabError(f"modules_to_save names {path} and {outer[0]}, which holds it; name one of them.")
    return found


def find(
    model: nn.Module,
    config: Targets,
    default: Iterable[str] | Callable[[dict[str, nn.Module]], dict[str, nn.Module]] | None = None,
    check: Callable[[nn.Module, str, nn.Module], None] | None = None,
) -> dict[str, nn.Module]:
    """Return the modules that a config names, by path, in the model's order.

    Args:
        default: the modules for a config without `target_modules`: their names or endings, or a function that picks
            them. Without it, the query and value projections. Names that the model does not have are passed over, as
            long as it has one of them.
        check: raises for a module that cannot carry the method; without it, `check_carrier`.

    Raises:
        PeftLabError: an entry, an index or a pattern matches nothing (with near matches); the model has no module that
            the method takes by default; a module is of a kind that cannot carry a low-rank update, or something other
            than the module's own call uses its weight.
    """
    modules = {path: module for path, module in base_modules(model).items() if path}
    spec = config.target_modules
    if spec is None:
        own = writing_modules(model, modules)
        taken = ""
        if callable(default):
            matched = default(own)
        else:
            names = default_targets(own) if default is None else tuple(default)
            matched = {path: module for path, module in own.items() if names_match(names, path)}
            taken = f" ({', '.join(names)})"
        if not matched:
            raise PeftLabError(
                f"target_modules is not set, and {type(model).__name__} has none of the modules that "
                f"{type(config).__name__} takes by default{taken}. Name the modules to adapt; "
                f"its linear layers end in {', '.join(linear_endings(own)) or 'nothing'}."
            )
    elif isinstance(spec, str) and spec.lower() == ALL_LINEAR:
        matched = all_linear(model, modules)
        if not matched:
            raise PeftLabError(f"'all-linear' found no linear layer in {type(model).__name__}.")
        warn_of_experts(
            model,
            "'all-linear' does not adapt",
            "They are no linear layers. LoRA adapts them by target_parameters={names}.",
        )
    else:
        matched = {path: module for path, module in modules.items() if names_match(spec, path)}
        if isinstance(spec, str) and not matched:
            hint = (
                f"; as a name, give it in a list: [{spec!r}]" if any(names_match((spec,), p) for p in modules) else ""
            )
            what = f"target_modules is the expression {spec!r}, which matches no module's whole path{hint}"
            raise no_match_error(spec, modules, what)
        for entry in () if isinstance(spec, str) else spec:
            if not any(names_match((entry,), path) for path in matched):
                raise no_match_error(entry, modules, f"target_modules names {entry!r}, which matches no module")
    if config.exclude_modules is not None:
        excluded = config.exclude_modules
        matched = {path: module for path, module in matched.items() if not names_match(excluded, path)}
    trained_whole = heads(model, config)
    matched = {
        path: module
        for path, module in matched.items()
        if not any(path == head or path.startswith(head + ".") for head in trained_whole)
    }
    matched = in_layers(matched, config)
    if not matched:
        raise PeftLabError(
            "exclude_modules, modules_to_save and layers_to_transform leave no target module; exclude fewer, or name "
            "other target_modules."
        )
    for path, module in matched.items():
        (check or check_carrier)(model, path, module)
    return matched


def writing_modules(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules without those that read images or sound, of a model that reads these to write text.

    Such a part has a config of its own inside the model's. A model that is built around images or sound alone, or that
    compares them with text and writes none, keeps all its modules. So does Whisper, whose two halves share a config.
    """
    config: Any = getattr(model, "config", None)
    head = getattr(model, "get_output_embeddings", None)
    if not hasattr(config, "get_text_config") or head is None or head() is None:
        return modules
    text = config.get_text_config(decoder=True)
    inner = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    others = {id(one): name for name, one in inner.items() if one is not None and one is not text}
    reading = []
    for path, module in modules.items():
        name = others.get(id(getattr(module, "config", None)), "")
        # A bare "encoder" may read text, too. Some parts for images do not say what they read, but their config does.
        reads = getattr(module, "main_input_name", "input_ids")
        if name and (re.search("vision|image|audio", name) or reads != "input_ids"):
            reading.append(path)
    return {
        path: module
        for path, module in modules.items()
        if not any(path == part or path.startswith(part + ".") for part in reading)
    }


def linear_endings(modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the last names of the paths of all linear layers and embeddings, each once, in the model's order."""
    return list(dict.fromkeys(path.rpartition(".")[2] for path, module in modules.items() if linear_shape(module)))


def default_targets(modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Return the names of the query and value projections of a known architecture."""
    return query_value(linear_endings(modules), "this model", "target_modules")


def all_linear(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return all linear layers except the output head. (A task's head is trained in full, so `find` drops it too.)"""
    head = as_transformer(model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        path: module
        for path, module in modules.items()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and module is not head
    }


def in_layers(matched: dict[str, nn.Module], config: Targets) -> dict[str, nn.Module]:
    """Return the modules whose block index is in `layers_to_transform`, and those that are named by their whole path.

    Hugging Face peft counts no blocks for a whole path such as "lm_head".
    """
    wanted: Any = config.layers_to_transform  # `Targets` has made a tuple of a single number
    if wanted is None:
        return matched
    index, whole_paths = blocks_of(matched, config)
    missing = sorted(set(wanted) - set(index.values()))
    if missing:
        there = sorted(set(index.values()))
        span = f"blocks {there[0]} to {there[-1]}" if there else "no numbered blocks"
        raise PeftLabError(f"layers_to_transform names block {missing[0]}; the target modules lie in {span}.")
    return {path: module for path, module in matched.items() if path in whole_paths or index.get(path) in wanted}


def blocks_of(matched: Iterable[str], config: Targets) -> tuple[dict[str, int], set[str]]:
    """Return the index of the block in which each path lies, where it lies in one, and the paths named whole."""
    before = rf"(?:^|.*?\.)(?:{'|'.join(config.layers_pattern)})" if config.layers_pattern else r".*?\.[^.]*"
    # so a block itself counts too
    found = {path: patterns.match(rf"{before}\.(?P<index>\d+)\.", path + ".") for path in matched}
    spec = config.target_modules
    named = () if spec is None or isinstance(spec, str) else spec
    return {path: int(match.group("index")) for path, match in found.items() if match}, set(named) & set(matched)


def present_layers(paths: Iterable[str], config: Targets) -> dict[str, Any]:
    """Return the changes to a folder's config that leave out blocks without a target, which Hugging Face peft ignores.

    Where no block is left, only the modules that are named by their whole path are meant.
    """
    spec, wanted = config.target_modules, config.layers_to_transform
    if wanted is None or spec is None or isinstance(spec, str):
        return {}
    index, whole_paths = blocks_of([path for path in paths if names_match(spec, path)], config)
    there = tuple(block for block in cast(tuple[int, ...], wanted) if block in index.values())
    if there or not whole_paths:
        return {"layers_to_transform": there or wanted}
    return {"layers_to_transform": None, "layers_pattern": None, "target_modules": tuple(sorted(whole_paths))}


def check_carrier(model: nn.Module, path: str, module: nn.Module) -> None:
    """Refuse a module that cannot carry a low-rank update, and say which modules inside it can."""
    check_called(model, path)
    if not is_carrier(module):
        raise PeftLabError(
            f"{path} is a {type(module).__name__}; this adapter stands only beside Linear, Conv1D, Embedding and "
            "convolution layers." + (_layers_within(path, module) or as_parameters(path, module))
        )


def check_called(model: nn.Module, path: str) -> None:
    """Refuse a module whose weight is read without calling it: an adapter on it would never run."""
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise PeftLabError(
            f"{path} belongs to nn.MultiheadAttention, which reads its weight without calling it, so an adapter there "
            "would never run. Leave it out (exclude_modules), or use an attention made of separate linear layers."
        )


def _layers_within(path: str, module: nn.Module) -> str:
    within = [name for name, child in module.named_modules() if name and is_carrier(child)]
    return f" Inside it: {', '.join(within[:8])}." if within else ""


def as_parameters(path: str, module: nn.Module) -> str:
    """Return how LoRA adapts a module that has matrices, or stacks of them, and is no layer."""
    block = ".".join(path.split(".")[-2:])
    names = [
        f"{block}.{name}"
        for name, p in module._parameters.items()
        if p is not None and len(shape_of_parameter(p)) in (2, 3)
    ]
    return f" LoRA adapts its parameters by target_parameters={names}." if names else ""


def check_regex(spec: str | Iterable[str]) -> None:
    """Refuse an expression that does not compile, or that is too large."""
    if isinstance(spec, str):
        patterns.check(spec)


def no_match_error(entry: str, modules: Mapping[str, nn.Module], what: str) -> PeftLabError:
    """Return the error for a name that matches nothing, with the names that the model has."""
    endings = linear_endings(modules)
    suggestion = did_you_mean(entry, endings) or did_you_mean(entry, modules)
    if any(entry.rpartition(".")[2] in module._parameters for module in modules.values()):
        suggestion = f" It is the name of a parameter; LoRA adapts it by target_parameters=[{entry!r}]."
    return PeftLabError(
        f"{what}.{suggestion} Linear and embedding layers here end in {', '.join(endings) or 'nothing'}."
    )


def by_pattern(table: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the value for a path in `rank_pattern` or `alpha_pattern`: that of the first key that matches its end."""
    for key, value in table.items():
        if patterns.ends(key, path):
            return value
    return default


def check_patterns(config: Any, targets: Iterable[str], parameters: Iterable[str] = ()) -> None:
    """Refuse a key of `rank_pattern` or `alpha_pattern` that matches no target module and no target parameter."""
    beside = list(parameters)
    paths = [*targets, *beside]
    for key in (*config.rank_pattern, *config.alpha_pattern):
        if not any(by_pattern({key: True}, path, False) for path in paths):
            raise PeftLabError(
                f"The pattern {key!r} matches none of the {len(paths)} target modules"
                f"{' and parameters' if beside else ''}, the first of which is {paths[0]}."
            )


def in_any_order(table: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """Return a pattern table that means the same after its keys are sorted, as they are in a file.

    The first key that matches counts. If sorting would change which one that is, each path gets a key of its own.
    """
    wanted = {path: by_pattern(table, path, None) for path in paths}
    if all(by_pattern(dict(sorted(table.items())), path, None) == value for path, value in wanted.items()):
        return dict(table)
    return {re.escape(path): value for path, value in wanted.items() if value is not None}
