"""BitFit and its neighbours: methods that add nothing and only choose which of the base's own parameters train.

BitFit trains the biases (Ben Zaken, Ravfogel and Goldberg 2022, arXiv:2106.10199, section 3). The baselines train whole
modules: the head alone, or the last blocks. What trains is a copy beside the base's own parameter, which stays frozen,
so that detaching, switching, mixing and rows need no special case.

    y = W x + b0 + (b - b0) = W x + b,    b trained, b0 the base's
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from peftlab.checks import check_fields, whole
from peftlab.core.interface import Placement
from peftlab.core.targets import Targets, find
from peftlab.errors import PeftLabError
from peftlab.methods.parts import bias_copies, leaf_copies, trained_copies


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(Targets):
    """Which biases train.

    Attributes:
        target_modules: `None` means every bias, those of the norms too; otherwise the modules whose biases train, for
            example `["query"]`, or the paper's smaller choice `["query", "intermediate.dense"]` (section 4.2). In GPT-2
            one bias, `c_attn`, serves queries, keys and values.

    Raises:
        PeftLabError: (when attached) a model or a module without biases.
    """

    method: ClassVar[str] = "bitfit"
    peft_type: ClassVar[str] = "BITFIT"  # Hugging Face peft has no such method; the folder has the form of its own

    def parts(self, model: nn.Module) -> Iterator[Placement]:
        """Yields a trained bias for each module, and the trained copies."""
        copies = list(trained_copies(model, self))
        hosts = find(model, self, lambda modules: with_biases(model, modules), check_bias)
        instead = "Leave it out (exclude_modules), or use IA3Config or LoRAConfig."
        yield from bias_copies(model, hosts, instead, copied=[copy.path for copy in copies])
        yield from copies

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """The targets as they were given: None means every bias, whatever the model."""
        return {"target_modules": as_given(self)}

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing but what every config has."""
        return {}


@dataclass(frozen=True, kw_only=True)
class SelectiveConfig(Targets):
    """Whole modules of the base, trained as copies: the head alone, the last blocks, or what you name.

    Attributes:
        last_layers: how many of the last blocks train (of each stack, where there are two).
        target_modules: modules that train, with all that is in them; `None` for none.

    `SelectiveConfig(task_type="SEQ_CLS")` trains a classifier's head and nothing else; with `last_layers=1` its last
    block too.

    Raises:
        PeftLabError: a value that is out of range; (when attached) nothing to train, a model without numbered blocks.
    """

    last_layers: int = 0

    method: ClassVar[str] = "selective"
    peft_type: ClassVar[str] = "SELECTIVE"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, whole, "last_layers", least=0)
        if self.last_layers and self.target_modules is not None:
            raise PeftLabError("Give last_layers or target_modules, not both.")

    def parts(self, model: nn.Module) -> Iterator[Placement]:
        """Yields a copy for each module with parameters of its own, and for each head."""
        copies = list(trained_copies(model, self))
        if self.last_layers or self.target_modules is not None:
            chosen = find(model, self, lambda modules: last_blocks(model, modules, self.last_layers), check_whole)
            leaves = (leaf for path, module in chosen.items() for leaf in leaf_copies(model, path, module))
            yield from {leaf.path: leaf for leaf in leaves}.values()  # targets may lie within one another
        elif not copies:
            raise PeftLabError(
                "Nothing is chosen to train. Name a task_type that has a head, modules_to_save, last_layers or "
                "target_modules."
            )
        yield from copies

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """The field that only this config has, and the targets as they were given."""
        return {"last_layers": self.last_layers, "target_modules": as_given(self)}

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """The reverse of `to_peft`: the keyword arguments for this class."""
        return {"last_layers": fields.get("last_layers", 0)}


def as_given(config: Targets) -> str | list[str] | None:
    """A config's targets for a file."""
    targets = config.target_modules
    return targets if targets is None or isinstance(targets, str) else sorted(targets)


def with_biases(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Every module that has a bias."""
    found = {path: module for path, module in modules.items() if has_bias(module)}
    if not found:
        raise PeftLabError(
            f"{type(model).__name__} has no biases, so BitFit has nothing to train. Use IA3Config, which trains about "
            "as few parameters, or LoRAConfig with a small r; or a model with biases, such as BERT or GPT-2."
        )
    return found


def has_bias(module: nn.Module) -> bool:
    """Says whether a module has a bias of its own."""
    return isinstance(getattr(module, "bias", None), nn.Parameter)


def check_bias(model: nn.Module, path: str, module: nn.Module) -> None:
    """Refuses a module without a bias."""
    if not has_bias(module):
        raise PeftLabError(
            f"{path} has no bias, so BitFit has nothing to train there. Name modules that have one, leave "
            "target_modules out for every bias of the model, or use IA3Config or LoRAConfig."
        )


def check_whole(model: nn.Module, path: str, module: nn.Module) -> None:
    """Refuses a module without parameters, or with quantised ones."""
    parameters = list(module.parameters())
    if not parameters:
        raise PeftLabError(f"{path} is a {type(module).__name__} without parameters, so nothing would train.")
    if any(not parameter.is_floating_point() for parameter in parameters):
        raise PeftLabError(f"{path} is quantised and cannot train; use LoRAConfig there.")


def last_blocks(model: nn.Module, modules: Mapping[str, nn.Module], count: int) -> dict[str, nn.Module]:
    """The last `count` blocks of each stack: the members of lists that lie in no other list."""
    stacks: dict[str, list[str]] = {}
    for path in modules:
        stack, _, name = path.rpartition(".")
        if name.isdigit() and not any(part.isdigit() for part in stack.split(".")):
            stacks.setdefault(stack, []).append(path)
    shortest = min((len(paths) for paths in stacks.values()), default=0)
    if count > shortest:
        raise PeftLabError(
            f"last_layers is {count}, and {type(model).__name__} has {shortest or 'no'} numbered blocks."
            + ("" if shortest else " Name what to train in target_modules.")
        )
    return {path: modules[path] for paths in stacks.values() for path in paths[-count:]}
