"""Train the biases of the base (BitFit), or whole modules of it, and add nothing.

    y = W x + b0 + (b - b0) = W x + b,    x: (..., in),  y: (..., out),  b: (out,) trained,  b0 the base's

Paper: Ben Zaken, Ravfogel and Goldberg, *BitFit*, 2022, arXiv:2106.10199, section 3.
Book: section 6.4, "BitFit: only what is added already".

The part is `TrainedBias` in `methods/parts.py`, since LoRA can train biases too. What trains is a copy beside the
base's own parameter, which stays frozen. So detaching, switching, mixing and rows work as for every other method.
`SelectiveConfig` trains copies of whole modules in the same way, as a baseline: the head alone, or the last blocks.
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
    """Say which biases train.

    Attributes:
        target_modules: the modules whose biases train, for example `["query"]`, or the paper's smaller choice
            `["query", "intermediate.dense"]` (section 4.2). `None` means every bias, those of the norms too. In GPT-2
            one bias, `c_attn`, serves queries, keys and values.

    Raises:
        PeftLabError: (when attached) the model or a named module has no biases.

    >>> layer = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 2))
    >>> pl.count_parameters(pl.attach(layer, pl.BitFitConfig())).trainable
    10
    """

    method: ClassVar[str] = "bitfit"
    peft_type: ClassVar[str] = "BITFIT"  # Hugging Face peft has no such method; the folder has its form

    def parts(self, model: nn.Module) -> Iterator[Placement]:
        """Yield a trained bias for each module, and the trained copies."""
        copies = list(trained_copies(model, self))
        hosts = find(model, self, lambda modules: with_biases(model, modules), check_bias)
        instead = "Leave it out (exclude_modules), or use IA3Config or LoRAConfig."
        yield from bias_copies(model, hosts, instead, copied=[copy.path for copy in copies])
        yield from copies

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the targets as they were given; None means every bias, whatever the model."""
        return {"target_modules": as_given(self)}

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return no arguments: this config has only the fields that every config has."""
        return {}


@dataclass(frozen=True, kw_only=True)
class SelectiveConfig(Targets):
    """Say which whole modules of the base train, as copies: the head alone, the last blocks, or those you name.

    `SelectiveConfig(task_type="SEQ_CLS")` trains a classifier's head and nothing else. With `last_layers=1` its last
    block trains too.

    Attributes:
        last_layers: how many of the last blocks train. In a model with two stacks of blocks, this many of each.
        target_modules: the modules that train, with all that is in them; `None` for none.

    Raises:
        PeftLabError: a value is out of range; (when attached) nothing is chosen to train, or the model has no numbered
            blocks.

    >>> model = pl.attach(model, pl.SelectiveConfig(last_layers=1))
    >>> pl.count_parameters(model).trainable
    2336
    """

    last_layers: int = 0

    method: ClassVar[str] = "selective"
    peft_type: ClassVar[str] = "SELECTIVE"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, whole, "last_layers", least=0)
        if self.last_layers and self.target_modules is not None:
            raise PeftLabError(
                f"last_layers is {self.last_layers} and target_modules is {self.target_modules!r}. Give last_layers or "
                "target_modules, not both."
            )

    def parts(self, model: nn.Module) -> Iterator[Placement]:
        """Yield a copy for each chosen module that has parameters of its own, and for each head."""
        copies = list(trained_copies(model, self))
        if self.last_layers or self.target_modules is not None:
            chosen = find(model, self, lambda modules: last_blocks(model, modules, self.last_layers), check_whole)
            leaves = (leaf for path, module in chosen.items() for leaf in leaf_copies(model, path, module))
            yield from {leaf.path: leaf for leaf in leaves}.values()  # one target may lie inside another
        elif not copies:
            raise PeftLabError(
                "Nothing is chosen to train. Name a task_type that has a head, modules_to_save, last_layers or "
                "target_modules."
            )
        yield from copies

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the field that only this config has, and the targets as they were given."""
        return {"last_layers": self.last_layers, "target_modules": as_given(self)}

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for this class: the reverse of `to_peft`."""
        return {"last_layers": fields.get("last_layers", 0)}


def as_given(config: Targets) -> str | list[str] | None:
    """Return a config's targets in the form that a file holds."""
    targets = config.target_modules
    return targets if targets is None or isinstance(targets, str) else sorted(targets)


def with_biases(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return every module that has a bias."""
    found = {path: module for path, module in modules.items() if has_bias(module)}
    if not found:
        raise PeftLabError(
            f"{type(model).__name__} has no biases, so BitFit has nothing to train. Use IA3Config, which trains about "
            "as few parameters, or LoRAConfig with a small r. Or use a model with biases, such as BERT or GPT-2."
        )
    return found


def has_bias(module: nn.Module) -> bool:
    """Say whether a module has a bias of its own."""
    return isinstance(getattr(module, "bias", None), nn.Parameter)


def check_bias(model: nn.Module, path: str, module: nn.Module) -> None:
    """Refuse a module without a bias."""
    if not has_bias(module):
        raise PeftLabError(
            f"{path} has no bias, so BitFit has nothing to train there. Name modules that have one, leave "
            "target_modules out for every bias of the model, or use IA3Config or LoRAConfig."
        )


def check_whole(model: nn.Module, path: str, module: nn.Module) -> None:
    """Refuse a module without parameters, or with quantised ones."""
    parameters = list(module.parameters())
    if not parameters:
        raise PeftLabError(
            f"{path} is a {type(module).__name__} without parameters, so nothing would train; leave it out."
        )
    if any(not parameter.is_floating_point() for parameter in parameters):
        raise PeftLabError(f"{path} is quantised and cannot train; use LoRAConfig there.")


def last_blocks(model: nn.Module, modules: Mapping[str, nn.Module], count: int) -> dict[str, nn.Module]:
    """Return the last `count` blocks of each stack. A stack is a list of modules that lies in no other list."""
    stacks: dict[str, list[str]] = {}
    for path in modules:
        stack, _, name = path.rpartition(".")
        if name.isdigit() and not any(part.isdigit() for part in stack.split(".")):
            stacks.setdefault(stack, []).append(path)
    shortest = min((len(paths) for paths in stacks.values()), default=0)
    if count > shortest:
        raise PeftLabError(
            f"last_layers is {count}, but {type(model).__name__} has {shortest or 'no'} numbered blocks."
            + ("" if shortest else " Name what to train in target_modules.")
        )
    return {path: modules[path] for paths in stacks.values() for path in paths[-count:]}
