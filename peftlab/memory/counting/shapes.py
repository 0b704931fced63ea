"""Shapes: a model as a table of its modules, made from a built-in name or from a `config.json`.

>>> load_shape("gpt2").parameters
124439808
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from peftlab import default_targets, patterns
from peftlab.checks import checked, shown, whole
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.memory.counting.builtin import BUILT_IN
from peftlab.memory.counting.config import MOST, Config
from peftlab.memory.counting.decoders import Decoder
from peftlab.memory.counting.families import FAMILIES, alike, of_the_same_name, task_of
from peftlab.memory.counting.modules import Module

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Shape:
    """A model's architecture: everything that counting needs to know about it, without the weights.

    `architectures` in the configuration decides which head is included. Without it, decoders include their
    language-model head, encoders a classification head (two labels unless the configuration says otherwise), T5, BART
    and Whisper their tied head, and CLIP both towers without a head. This is what `AutoModelForCausalLM`,
    `AutoModelForSequenceClassification` (or its like for images) and `AutoModelForSeq2SeqLM` build. Of a model of
    several parts, such as Gemma 3 with images, it is the language model.
    """

    name: str
    family: str  # transformers' model_type
    kind: str  # "decoder", "encoder" or "encoder-decoder"
    modules: tuple[Module, ...] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    task: str = "language model"  # one of the values of `families.TASKS`
    layout: Decoder | None = field(default=None, repr=False)  # what the table was made from, for decoders

    @property
    def parameters(self) -> int:
        """The number of all parameters; a tied weight counts once."""
        return sum(module.parameters for module in self.modules)

    @property
    def head(self) -> tuple[Module, ...]:
        """The classification head, all of which trains beside an adapter. Empty for language models."""
        return tuple(module for module in self.modules if module.role == "head")

    @property
    def query_value(self) -> tuple[str, ...]:
        """The names of the query and value projections: the default targets of the LoRA family."""
        return default_targets.query_value(self.linear_names(), self.name, "targets")

    @cached_property
    def paths(self) -> dict[str, None]:
        """The paths of all modules in the order of the model, with those that only hold others."""
        found: dict[str, None] = {}
        for module in self.modules:
            parts = module.path.split(".")
            if module.kind in ("experts", "vector"):  # the path is a parameter's
                parts.pop()
            found.update(dict.fromkeys(".".join(parts[:i]) for i in range(1, len(parts) + 1)))
        return found

    def match(
        self,
        targets: str | Iterable[str] | None = None,
        default: Iterable[str] | None = None,
        parameters: Iterable[str] | None = None,
        norms: bool = False,
    ) -> tuple[Module, ...]:
        """Return the modules that `targets` selects, by the rules of Hugging Face peft.

        `targets` may be

        - a list of names, each a whole path or the end of one (`"q_proj"`, `"mlp.c_proj"`);
        - `"all-linear"`: every linear layer except the output head;
        - any other string: a regular expression for whole paths;
        - None: query and value, or the names in `default`, if a method has its own. Names that this model does not have
          are passed over, as long as it has one of them.

        A classification head never matches, because all of it trains anyway.

        Args:
            parameters: for methods that adapt parameters too: names, or ends of paths, of fused experts and routers
                (Hugging Face's `target_parameters`). In some mixtures peft also reads `"all-linear"`, and the names
                that the experts' layers once had, as these parameters, and gives fused ones the rank of all. None: the
                method adapts modules alone.
            norms: whether the method stands on norms too.

        Raises:
            PeftLabError: a name matches nothing, or a module that is neither a linear nor an embedding layer; the model
                has none of the names in `default`.
        """
        if parameters is not None:
            return self._match_parameters(targets, tuple(parameters))
        body = [m for m in self.modules if m.role != "head" and m.kind not in ("experts", "vector", "bias")]
        if targets is None and default is None:
            targets = self.query_value
        elif targets is None:
            named = tuple(default or ())
            targets = [name for name in named if any(_ends_with(module.path, name) for module in body)]
            if not targets:
                raise PeftLabError(
                    f"{self.name} has none of the modules that the method adapts by default ({', '.join(named)}). Name "
                    f"others in targets (--targets).{self._names()}"
                )
        if isinstance(targets, str):
            if targets.lower() == ALL_LINEAR:
                called = (m for m in body if m.role != "output" and not m.uncalled)
                return tuple(m for m in called if m.kind in ("linear", "conv1d"))
            with patterns.bounded():
                _check_expression(targets)
                found = [module for module in body if patterns.fullmatch(targets, module.path)]
            if not found:
                raise PeftLabError(f"The expression {targets!r} matches no module of {self.name}.{self._names()}")
        else:
            names = list(targets)
            if not names:
                raise PeftLabError(f"No targets are named; {self.name} needs at least one.{self._names()}")
            found = [m for m in body if any(_ends_with(m.path, name) for name in names)]
            for name in names:
                if not any(_ends_with(module.path, name) for module in found):
                    raise PeftLabError(self._nothing(name))
        for module in found:
            if module.kind == "router" or (module.kind == "norm" and not norms):
                hint = f" LoRA adapts it by target_parameters={[_parameter(module, 2)]}."
                raise PeftLabError(
                    f"Target {module.path} of {self.name} is a {module.kind}, not a linear layer."
                    f"{hint if module.kind == 'router' else ''}{self._names()}"
                )
        return tuple(found)

    def _match_parameters(self, targets: str | Iterable[str] | None, named: tuple[str, ...]) -> tuple[Module, ...]:
        """Return the modules and the parameters that LoRA adapts, as peft does."""
        fused = FAMILIES[self.family].fused
        ranks: dict[str, int] = {}
        if targets is None and named:  # parameters alone, as in peft
            return tuple(self._parameter_rows(named, ranks))
        wanted: list[str] = []
        if fused and targets is not None and (not isinstance(targets, str) or targets.lower() == ALL_LINEAR):
            linear = isinstance(targets, str)
            names = [m.path for m in self.match(ALL_LINEAR)] if linear else list(targets)
            meant = [*fused] if linear else [old for old in fused if any(_ends_with(name, old) for name in names)]
            for new in dict.fromkeys(fused[old] for old in meant):
                olds = [old for old, other in fused.items() if other == new]
                missing = [old for old in olds if old not in meant]
                if missing:
                    raise PeftLabError(
                        f"{self.name} holds {' and '.join(olds)} of all experts in one parameter, {new}. Name "
                        f"{' and '.join(missing)} too."
                    )
                ranks[new] = len(olds)
                if not linear or any(_ends_with(_parameter(m), new) for m in self.modules):
                    wanted.append(new)
            targets = [name for name in names if not any(_ends_with(name, old) for old in fused)]
            if linear:  # peft keeps the last names alone
                targets = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in targets))
        rows = self.match(targets) if targets is None or targets or not wanted else ()
        return (*rows, *self._parameter_rows((*wanted, *named), ranks))

    def _parameter_rows(self, named: Iterable[str], ranks: dict[str, int]) -> Iterator[Module]:
        """Yield the rows of the parameters that are named by the ends of their paths."""
        named = tuple(named)
        rows = [m for m in self.modules if m.kind in ("experts", "router", "linear", "conv1d") and m.role == "body"]
        for name in named:
            if not any(_ends_with(_parameter(module), name) for module in rows):
                known = dict.fromkeys(_parameter(m, 2) for m in rows if m.kind in ("experts", "router"))
                told = f" Those of its experts are {', '.join(known)}." if known else " It has no experts."
                raise PeftLabError(f"No matrix or set of experts of {self.name} is a parameter {name!r}.{told}")
        for module in rows:
            found = [name for name in named if _ends_with(_parameter(module), name)]
            if found:
                yield replace(module, ranks=max(ranks.get(name, 1) for name in found))

    def linear_names(self) -> list[str]:
        """Return the last names of the paths of all layers that can be adapted, in the order of the model."""
        ends = [m.path.rsplit(".", 1)[-1] for m in self.modules if m.kind in ("linear", "conv1d") and m.role == "body"]
        return list(dict.fromkeys(ends))

    def _names(self) -> str:
        return f" Its linear layers are {', '.join(self.linear_names())}."

    def _nothing(self, name: Any) -> str:
        if any(_ends_with(m.path, name) or m.path.split(".")[0] == name for m in self.head):
            return f"Target {name!r} is the classification head of {self.name}, which always trains as a whole."
        experts = [m for m in self.modules if m.kind == "experts" and _ends_with(m.path, name)]
        if experts:
            return (
                f"Target {name!r} of {self.name} is a parameter that holds all experts, not a module. LoRA adapts it "
                f"by target_parameters={[_parameter(experts[0], 2)]}.{self._names()}"
            )
        known = self.linear_names() + [m.path.rsplit(".", 1)[-1] for m in self.modules]
        return f"Target {name!r} matches no module of {self.name}.{did_you_mean(name, known)}{self._names()}"


def _parameter(module: Module, words: int | None = None) -> str:
    """Return the path of a row's weight, or the last words of it."""
    path = module.path if module.kind == "experts" else f"{module.path}.weight"
    return path if words is None else ".".join(path.split(".")[-words:])


def _ends_with(path: str, name: Any) -> bool:
    return path == name or path.endswith(f".{name}")


def _check_expression(text: str) -> None:
    try:
        patterns.check(text)
    except PeftLabError as error:
        raise PeftLabError(f"Targets {text[:60]!r} are not a valid regular expression: {error}") from None


@checked("labels")
def load_shape(shape: str | os.PathLike[str] | dict[str, Any] | Shape, labels: int | None = None) -> Shape:
    """Make a shape from a built-in name, the path of a `config.json` or of its folder, or the dict that it holds.

    Args:
        shape: for example `"llama-2-7b"`, `"model/config.json"` or `{"model_type": "bert", ...}`.
        labels: classes of an encoder's head. None takes the configuration's number, or two.

    Raises:
        PeftLabError: an unknown name (with near matches), no such file, or a configuration that cannot be read.

    >>> pl.memory.load_shape("gpt2").parameters
    124439808
    """
    if isinstance(shape, Shape):
        if labels is None:
            return shape
        return _from_config(shape.config, shape.name, labels)
    if isinstance(shape, dict):
        return _from_config(shape, str(shape.get("_name_or_path") or shape.get("model_type") or "config"), labels)
    name = os.fspath(shape)
    if name.lower() in BUILT_IN:
        return _from_config(BUILT_IN[name.lower()], name.lower(), labels)
    path = Path(name).expanduser()
    if len(name) > 1000 or "\0" in name:  # no path; asking the system about it fails
        raise PeftLabError(f"Unknown shape {shown(name)}; it is neither a built-in name nor a config.json.")
    if path.is_dir() and name:
        path = path / "config.json"
        if not path.is_file():
            raise PeftLabError(f"Folder {name!r} holds no config.json.")
    if not path.is_file():
        if name.endswith(".json") or name.startswith((".", os.sep, "~")):
            raise PeftLabError(f"No file {name!r}; a shape is a built-in name or the path of a config.json.")
        near = did_you_mean(name, [known for known in BUILT_IN if alike(name.rsplit("/", 1)[-1], known)])
        hint = near or f" Known: {', '.join(BUILT_IN)}."
        raise PeftLabError(f"Unknown shape {name!r}; it is neither a built-in name nor a config.json.{hint}")
    return _from_config(_read(path), str(shape), labels)


class UnknownFamilyError(PeftLabError):
    """A configuration of a family that is not among the known ones. Of some families only parameters are counted."""

    def __init__(self, name: str, family: str, known: Iterable[str]):
        known = tuple(known)
        near = of_the_same_name(family, known)
        super().__init__(f"{name}: model_type {family!r} is not known.{near} Known: {', '.join(known)}.")
        self.name, self.family = name, family


JSON_KINDS = {
    type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list",
}  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PeftLabError(f"{path} cannot be read: {error}.") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise PeftLabError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(values, dict):
        raise PeftLabError(f"{path} holds {JSON_KINDS[type(values)]}, not the object of a model configuration.")
    return values


def _from_config(values: dict[str, Any], name: str, labels: int | None) -> Shape:
    family = values.get("model_type")
    if not isinstance(family, str):
        raise PeftLabError(f"{name}: model_type is missing or is not a string, so the architecture is not known.")
    text = values.get("text_config")
    if family not in FAMILIES and isinstance(text, dict) and isinstance(text.get("model_type"), str):
        return _from_config(text, f"{name} (its text part)", labels)
    if family not in FAMILIES:
        raise UnknownFamilyError(name, family, FAMILIES)
    if labels is not None:
        values = {**values, "id2label": None, "num_labels": whole("labels", labels, least=1, ceiling=MOST)}
    entry, config = FAMILIES[family], Config(values, name)
    task = task_of(config, entry, labels is not None)
    layout, modules = entry.table(config, task)
    return Shape(name, family, entry.kind, modules, values, task, layout)
