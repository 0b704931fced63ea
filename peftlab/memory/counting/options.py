"""The input of a method's function, `Options`, and its result, `Trained`. See `methods.py`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from peftlab.checks import check_fields, one_of, whole
from peftlab.errors import PeftLabError
from peftlab.memory.counting.config import MOST, MOST_LAYERS
from peftlab.memory.counting.modules import Module


@dataclass(frozen=True)
class Options:
    """The options of all methods. Each method reads the fields that concern it."""

    r: int | None = None  # None takes the default of the method's row in the catalogue
    targets: str | tuple[str, ...] | None = None  # None: query and value; for IA3 those of the family (Family.ia3)
    bias: str = "none"  # for the LoRA family; "lora_only" is called "vera_only" in peft's VeRA
    virtual_tokens: int = 20
    reduction_factor: int = 16  # for bottleneck adapters: hidden width / width of the bottleneck
    projection: bool = False  # for prefix tuning: whether an MLP makes the prefix during training
    encoder: str = "mlp"  # for P-tuning: the network that makes the prompt, "mlp" or "lstm"
    encoder_hidden: int | None = None  # its inner width, also of the prefix MLP; None: the width of its output
    encoder_layers: int = 2  # layers of P-tuning's LSTM; the MLP always has three linear layers
    decompose_factor: int = -1  # for LoKr: the sides of its first factor, where they divide the layer's; -1: alike
    oft_block_size: int | None = None  # for OFT: the side of a rotation; None is 32
    target_parameters: tuple[str, ...] = ()  # for LoRA: parameters to adapt as such, such as "experts.gate_up_proj"
    init: str | None = None  # where the adapter starts; None takes the method's own start

    def __post_init__(self) -> None:
        check_fields(self, whole, "r", "encoder_hidden", "oft_block_size", least=1, ceiling=MOST, optional=True)
        check_fields(self, whole, "virtual_tokens", "reduction_factor", least=1, ceiling=MOST)
        check_fields(self, whole, "decompose_factor", least=-1, ceiling=MOST)
        check_fields(self, whole, "encoder_layers", least=1, ceiling=MOST_LAYERS)
        check_fields(self, one_of, "bias", known=("none", "all", "lora_only"))
        check_fields(self, one_of, "encoder", known=("mlp", "lstm"))

    @property
    def from_weight(self) -> bool:
        """Whether a LoRA starts from a part of the weight, as PiSSA and OLoRA do."""
        return self.init == "olora" or bool(re.fullmatch(r"pissa(_niter_[1-9]\d{0,3})?", str(self.init)))


@dataclass(frozen=True)
class Added:
    """One tensor that a method adds."""

    path: str  # path of the module that it adapts; "" for the whole model
    name: str
    size: tuple[int, ...]
    buffer: bool = False  # it takes memory but is not a parameter: it is neither counted nor trained
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
    named: bool = False  # whether the options name these modules; otherwise they are the method's own places
    whole: bool = False  # the whole model trains, its head included, so no copy of the head is added
    saved: int | None = None  # elements that a file holds of the added tensors; None: all those that train


def names_of(values: Iterable[str] | None) -> tuple[str, ...]:
    """Return names as a tuple; None is no name.

    Raises:
        PeftLabError: a single string, or an entry that is not a string.
    """
    if values is None:
        return ()
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise PeftLabError(f"target_parameters is {values!r}; give a list of names, such as ['experts.down_proj'].")
    values = tuple(values)
    for one in values:
        if not isinstance(one, str) or not one:
            raise PeftLabError(f"target_parameters holds {one!r}; its entries are names, as strings.")
    return values
