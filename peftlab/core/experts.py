"""Find the experts of a mixture, and the parameters that a config names.

transformers 5 holds all experts of a block in parameters of three dimensions, such as `mlp.experts.gate_up_proj`, and
the router in a small module with a `weight`. Neither is a linear layer, so names of modules do not reach them. Until
transformers 4 each expert had linear layers of its own, and the names that people and folders use come from there.
Hugging Face peft brings them to the new form (`convert_peft_config_for_transformers`), and so do we, by its rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from peftlab.core.hooks import base_modules
from peftlab.errors import PeftLabError, did_you_mean, warn


class Target(NamedTuple):
    """Hold a parameter that an adapter changes.

    Attributes:
        host_path: the path of its module.
        host: that module.
        name: its name there.
    """

    host_path: str
    host: nn.Module
    name: str


class OldNames(NamedTuple):
    """Say what the linear layers of a mixture were called before they were fused.

    Attributes:
        now: {old name of a module: the parameter that holds it now}.
        fused: {parameter: the old names that it holds together}.
    """

    now: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]]


ROUTER = {"gate": "gate.weight"}
MIXTRAL = OldNames(
    {**ROUTER, "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}, {"gate_up_proj": ("w1", "w3")}
)
QWEN = OldNames(
    {**ROUTER, "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"},
    {"gate_up_proj": ("gate_proj", "up_proj")},
)
# The model types for which Hugging Face peft 0.21 does this with transformers 5.24. (Qwen2-MoE itself is not among
# them, nor is gpt-oss.)
OLD_NAMES = dict.fromkeys(("mixtral", "minimax", "minimax_m2"), MIXTRAL) | dict.fromkeys(
    (
        "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
        "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe",
        "longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text",
        "qwen3_omni_moe_thinker", "sarvam_mla", "solar_open",
    ),
    QWEN,
)  # fmt: skip


def old_names(model: nn.Module) -> OldNames | None:
    """Return what a model's fused layers were called, or None where peft converts nothing."""
    return OLD_NAMES.get(getattr(getattr(model, "config", None), "model_type", None) or "")


def linear_outside(model: nn.Module, old: OldNames, linear: Iterable[str]) -> tuple[str, ...]:
    """Return those of a model's linear layers, by path, that "all-linear" means beside the experts and the router.

    As in Hugging Face peft, a linear layer that has the name of an expert's is not among them, such as those of shared
    experts and of dense blocks: the name means the experts. A warning says so.
    """
    linear = tuple(linear)
    left = [path for path in linear if path.rpartition(".")[2] in old.now]
    if left:
        warn_of_names(model, left)
    return tuple(path for path in linear if path not in left)


def warn_of_names(model: nn.Module, left: list[str]) -> None:
    """Warn of linear layers that have the name of an expert's, and so are not adapted."""
    warn(
        f"In {type(model).__name__} the names of {len(left)} linear layers mean the experts or the router, as in "
        f"Hugging Face peft, so these layers get no adapter: {left[0]}, for one. To adapt them too, name them in a "
        "regular expression as target_modules, and the experts in target_parameters."
    )


def renamed(model: nn.Module, names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, int]]:
    """Return (the names that stay, the parameters that the others mean, how many layers each fused one holds).

    Raises:
        PeftLabError: only one of two layers is named that are fused into one parameter.
    """
    old, names = old_names(model), tuple(names)
    if old is None:
        return names, (), {}
    meant: dict[str, set[str]] = {}
    stay = []
    for name in names:
        last = next((one for one in old.now if name == one or name.endswith("." + one)), None)
        if last is None:
            stay.append(name)
        else:
            meant.setdefault(old.now[last], set()).add(last)
    for parameter, together in old.fused.items():
        named = meant.get(parameter, set())
        if named and len(named) < len(together):
            missing = ", ".join(name for name in together if name not in named)
            raise PeftLabError(
                f"target_modules names {', '.join(sorted(named))} and not {missing}; in this model both are fused into "
                f"{parameter}. Name both, or give target_parameters=[{parameter!r}]."
            )
    own = parameters_of(model)
    there = [
        name for name in dict.fromkeys(old.now.values()) if name in meant and any(_means(name, path) for path in own)
    ]
    return tuple(stay), tuple(there), {name: len(old.fused[name]) for name in there if name in old.fused}


def parameters_of(model: nn.Module) -> dict[str, Target]:
    """Return all parameters of a model's modules by path."""
    return {
        f"{path}.{name}": Target(path, module, name)
        for path, module in base_modules(model).items()
        if path
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def find_parameters(model: nn.Module, names: Iterable[str]) -> dict[str, Target]:
    """Return the parameters with these names or endings, by path, in the model's order.

    Raises:
        PeftLabError: a name matches nothing (with near matches).
    """
    own, names = parameters_of(model), tuple(names)
    for name in names:
        if not any(_means(name, path) for path in own):
            if name in model._parameters:
                raise PeftLabError(
                    f"target_parameters names {name!r}, which lies on the model itself, and only parameters of the "
                    "modules in it can be adapted, as in Hugging Face peft."
                )
            raise PeftLabError(_no_match(model, name, own))
    return {path: target for path, target in own.items() if any(_means(name, path) for name in names)}


def _means(name: str, path: str) -> bool:
    return path == name or path.endswith("." + name)


def _no_match(model: nn.Module, name: str, own: Mapping[str, Target]) -> str:
    """Return the error for a name that is no parameter's, with near matches of the same length in parts."""
    depth = name.count(".") + 1
    endings = list(dict.fromkeys(".".join(path.rsplit(".", depth)[-depth:]) for path in own))
    near = did_you_mean(name, endings) or did_you_mean(
        name.rpartition(".")[2], {path.rpartition(".")[2] for path in own}
    )
    fused = dict.fromkeys(".".join(path.split(".")[-2:]) for path in expert_parameters(model))
    modules = [path for path in base_modules(model) if path == name or path.endswith("." + name)]
    hint = f" It is a module; give it in target_modules, or {name + '.weight'!r} here." if modules else ""
    held = f" The experts here lie in {', '.join(fused)}." if fused else ""
    return f"target_parameters names {name!r}, which matches no parameter.{near}{hint}{held}"


def expert_parameters(model: nn.Module) -> dict[str, Target]:
    """Return the parameters that hold all experts of a block, by path."""
    found: dict[str, Target] = {}
    for path, module in base_modules(model).items():
        if re.search("expert|moe", f"{path} {type(module).__name__}", re.IGNORECASE):
            if isinstance(module, nn.modules.conv._ConvNd):
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None and len(shape_of(parameter)) == 3:
                    found[f"{path}.{name}".lstrip(".")] = Target(path, module, name)
    return found


def shape_of(parameter: Any) -> tuple[int, ...]:
    """Return the shape of a parameter, also if it is held as codes."""
    state = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if state is None else state.shape)


def warn_of_experts(model: nn.Module, what: str, instead: str) -> None:
    """Warn that the fused experts of a mixture are left alone, and say how much of the model they are."""
    targets = expert_parameters(model)
    if targets:
        held = sum(math.prod(shape_of(target.host._parameters[target.name])) for target in targets.values())
        share = held / sum(math.prod(shape_of(parameter)) for parameter in model.parameters())
        modules = list(dict.fromkeys(target.host_path for target in targets.values()))
        names = list(dict.fromkeys(target.name for target in targets.values()))
        warn(
            f"{what} the experts of {type(model).__name__} ({modules[0]} and {len(modules) - 1} more), which hold "
            f"{share:.0%} of its weights. {instead.format(names=names)}",
        )
