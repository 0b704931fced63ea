"""What goes into a method's function, ``Options``, and what comes out of it, ``Trained``: see ``methods.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from peftlab.checks import check_fields, one_of, whole
from peftlab.memory.counting.families import Module


@dataclass(frozen=True)
class Options:
    """What the methods can be told; each reads the fields that concern it."""

    r: int | None = None  # None: the default of the method's row in the catalogue
    targets: str | tuple[str, ...] | None = None  # None: query and value, for IA3 the family's own (see Family.ia3)
    bias: str = "none"  # of the LoRA family; "lora_only" is what peft calls "vera_only" for VeRA
    virtual_tokens: int = 20
    reduction_factor: int = 16  # of bottleneck adapters: hidden width / width of the bottleneck
    projection: bool = False  # prefix tuning: an MLP makes the prefix during training
    encoder: str = "mlp"  # P-tuning: what makes the prompt, "mlp" or "lstm"
    encoder_hidden: int | None = None  # its inner width, and that of the prefix MLP; None: the width of what it makes
    encoder_layers: int = 2  # P-tuning's LSTM; the MLP always has three linear layers

    def __post_init__(self) -> None:
        check_fields(self, whole, "r", "encoder_hidden", least=1, optional=True)
        check_fields(self, whole, "virtual_tokens", "reduction_factor", "encoder_layers", least=1)
        check_fields(self, one_of, "bias", known=("none", "all", "lora_only"))
        check_fields(self, one_of, "encoder", known=("mlp", "lstm"))


@dataclass(frozen=True)
class Added:
    """One tensor that a method brings."""

    path: str  # of the module that it adapts; "" for the whole model
    name: str
    size: tuple[int, ...]
    buffer: bool = False  # held in memory, but no parameter: neither counted nor trained
    trains: bool = True  # False: a parameter that is counted but never trained

    @property
    def elements(self) -> int:
        """The product of its sizes."""
        return math.prod(self.size)


@dataclass(frozen=True)
class Trained:
    """What a method trains, apart from a classification head."""

    added: tuple[Added, ...] = ()
    own: tuple[tuple[Module, str], ...] = ()  # the model's own tensors that it unfreezes: (module, "weight" or "bias")
    adapted: tuple[Module, ...] = ()  # the modules that it adapts
    whole: bool = False  # everything trains, the head in its place, so no copy of the head is added
    saved: int | None = None  # elements in a file of what it adds; None: of all that trains of it
