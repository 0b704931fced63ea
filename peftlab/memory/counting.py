"""How many parameters a method trains, by arithmetic on a shape's table.

    >>> count("llama-2-7b", "lora", r=8).trainable
    4194304

Counts are logical: a base held in four bits counts as many parameters as it has weights. ``total`` includes what the
method adds, as ``print_trainable_parameters`` of Hugging Face peft does, and tests hold every number to peft's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from peftlab.errors import PeftLabError, did_you_mean
from peftlab.memory.families import Module
from peftlab.memory.shapes import Shape, load_shape


@dataclass(frozen=True)
class Options:
    """What the methods can be told; each reads the fields that concern it."""

    r: int = 8
    targets: str | tuple[str, ...] | None = None
    bias: str = "none"


@dataclass(frozen=True)
class Trained:
    """What a method trains, apart from a classification head."""

    added: int = 0  # parameters that the method adds to the model
    own: int = 0  # parameters that the model had before, and that the method unfreezes
    adapted: tuple[Module, ...] = ()  # the modules that it adapts
    whole: bool = False  # everything trains, the head in its place, so no copy of the head is added


@dataclass(frozen=True)
class Count:
    """Parameters of a model under a method. ``total`` holds the added ones and the trained copy of a head."""

    shape: str
    method: str
    trainable: int
    total: int
    base: int
    added: int
    head: int
    adapted: tuple[Module, ...]

    @property
    def percent(self) -> float:
        """100 x trainable / total."""
        return 100.0 * self.trainable / self.total

    def as_dict(self) -> dict[str, int | float]:
        """``{"trainable": n, "total": n, "percent": x}``, as ``peftlab count --json`` prints it."""
        return {"trainable": self.trainable, "total": self.total, "percent": self.percent}


def _full(shape: Shape, options: Options) -> Trained:
    """Full fine-tuning: every parameter trains and none is added."""
    return Trained(own=shape.parameters, whole=True)


def _lora(shape: Shape, options: Options) -> Trained:
    """LoRA: A is (r, d_in) and B is (d_out, r), so each module adds r (d_in + d_out).

    An embedding counts its rows as d_in. ``bias="lora_only"`` unfreezes the biases of the adapted modules,
    ``bias="all"`` every bias of the model outside a classification head, which trains anyway.
    """
    _whole_number("r", options.r)
    adapted = shape.match(options.targets)
    added = sum(options.r * (module.inputs + module.outputs) for module in adapted)
    unfrozen: dict[str, Iterable[Module]] = {
        "none": (),
        "lora_only": adapted,
        "all": (module for module in shape.modules if module.role != "head"),
    }
    if options.bias not in unfrozen:
        hint = did_you_mean(str(options.bias), unfrozen)
        raise PeftLabError(f"bias is one of none, all, lora_only; found {options.bias!r}.{hint}")
    own = sum(module.outputs for module in unfrozen[options.bias] if module.bias)
    return Trained(added, own, adapted)


# A method is one function and one line here. QLoRA trains what LoRA trains: only the base is held otherwise.
METHODS: dict[str, Callable[[Shape, Options], Trained]] = {
    "full": _full,
    "lora": _lora,
    "qlora": _lora,
}


def count(
    shape: str | Shape,
    method: str = "lora",
    *,
    r: int = 8,
    targets: str | Iterable[str] | None = None,
    bias: str = "none",
    labels: int | None = None,
) -> Count:
    """Count the parameters that ``method`` trains on ``shape``.

    Args:
        shape: a built-in name, the path of a ``config.json`` or of its folder, or a ``Shape``.
        method: a name in ``METHODS``.
        r: the rank of a low-rank update.
        targets: names, ``"all-linear"`` or a regular expression (see ``Shape.match``); None: query and value.
        bias: ``"none"``, ``"all"`` or ``"lora_only"``.
        labels: classes of an encoder's head; None: the configuration's own number, or two.

    Raises:
        PeftLabError: an unknown shape or method, a rank that is no positive whole number, a target without a match.
    """
    shape = load_shape(shape, labels)
    name = str(method).lower()
    if name not in METHODS:
        hint = did_you_mean(name, METHODS)
        raise PeftLabError(f"Unknown method {method!r}.{hint} Known: {', '.join(METHODS)}.")
    if targets is not None and not isinstance(targets, str):
        targets = tuple(targets)
    trained = METHODS[name](shape, Options(r, targets, bias))
    # peft trains a copy of the classification head and keeps the original beside it: both are in the total.
    head = 0 if trained.whole else sum(module.parameters for module in shape.head)
    return Count(
        shape=shape.name,
        method=name,
        trainable=trained.added + trained.own + head,
        total=shape.parameters + trained.added + head,
        base=shape.parameters,
        added=trained.added,
        head=head,
        adapted=trained.adapted,
    )


def _whole_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PeftLabError(f"{name} must be a positive whole number, found {value!r}.")
