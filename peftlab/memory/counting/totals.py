"""How many parameters a method trains, from the table of a shape and the tensors of a method.

    >>> count("llama-2-7b", "lora", r=8).trainable
    4194304

Counts are logical: a weight held in four bits is one parameter. `total` includes what the method adds, as in
`print_trainable_parameters` of Hugging Face peft. Tests compare every number with peft's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peftlab.checks import checked
from peftlab.memory.counting.methods import check_options, method_name, trained_by
from peftlab.memory.counting.modules import Module
from peftlab.memory.counting.options import Options, Trained, names_of
from peftlab.memory.counting.shapes import Shape, load_shape


@dataclass(frozen=True)
class Count:
    """The parameters of a model under a method. `total` includes the added ones and the trained copy of a head."""

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
        """Return `{"trainable": n, "total": n, "percent": x}`, as `peftlab count --json` prints it."""
        return {"trainable": self.trainable, "total": self.total, "percent": self.percent}


@checked(
    "r", "virtual_tokens", "reduction_factor", "decompose_factor", "oft_block_size", "encoder_hidden", "encoder_layers",
    "labels",
)  # fmt: skip
def count(
    shape: str | os.PathLike[str] | dict[str, Any] | Shape,
    method: str = "lora",
    *,
    r: int | None = None,
    targets: str | Iterable[str] | None = None,
    target_parameters: Iterable[str] | None = None,
    bias: str = "none",
    virtual_tokens: int = 20,
    reduction_factor: int = 16,
    decompose_factor: int = -1,
    oft_block_size: int | None = None,
    projection: bool = False,
    encoder: str = "mlp",
    encoder_hidden: int | None = None,
    encoder_layers: int = 2,
    init: str | None = None,
    labels: int | None = None,
) -> Count:
    """Count the parameters that `method` trains on `shape`.

    Args:
        shape: a built-in name, the path of a `config.json` or of its folder, or a `Shape`.
        method: a method's name, such as `"lora"`; `METHODS` has them all.
        r: the rank of a low-rank update. None takes the method's default in peft (8; AdaLoRA 12, VeRA 256).
        targets: names, `"all-linear"` or a regular expression (see `Shape.match`), for the LoRA family, IA3, BitFit and
            the bottleneck adapters. None takes query and value; for IA3 peft's defaults (mostly keys, values and the
            down projection; see `methods.ia3`), for BitFit every bias, for adapters the places of their papers.
        target_parameters: for LoRA, parameters to adapt as such, by the ends of their paths, such as
            `["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]` for fused experts.
        bias: `"none"`, `"all"` or `"lora_only"`, for the LoRA family.
        virtual_tokens: the length of a prompt or prefix.
        reduction_factor: hidden width / width of a bottleneck adapter.
        decompose_factor: for LoKr, the sides of the first factor, where they divide those of the layer. -1 makes both
            factors as alike as can be.
        oft_block_size: for OFT, the side of a rotation, or the nearest number that divides the layer's input. None: 32.
        projection: whether prefix tuning computes the prefix with an MLP during training.
        encoder: the network that makes P-tuning's prompt, `"mlp"` or `"lstm"`.
        encoder_hidden: the inner width of that network, or of the prefix MLP. None takes the width of its output.
        encoder_layers: layers of the LSTM.
        init: where the adapter starts; it changes no count.
        labels: classes of an encoder's head. None takes the configuration's number, or two.

    Raises:
        PeftLabError: an unknown shape or method, a number that is not positive and whole, a target without a match, an
            option that the method does not take, or a method that this model or target cannot have.

    >>> pl.memory.count("llama-2-7b", "lora", r=8).trainable
    4194304
    """
    shape = load_shape(shape, labels)
    name = method_name(method)
    if targets is not None and not isinstance(targets, str):
        targets = tuple(targets)
    options = Options(
        r, targets, bias, virtual_tokens, reduction_factor, projection, encoder, encoder_hidden, encoder_layers,
        decompose_factor=decompose_factor, oft_block_size=oft_block_size, target_parameters=names_of(target_parameters),
        init=init,
    )  # fmt: skip
    check_options(name, options)
    return count_trained(shape, name, trained_by(name, shape, options))


def count_trained(shape: Shape, method: str, trained: Trained) -> Count:
    """Count what a method trains, from the list of it."""
    # peft trains a copy of the classification head and also keeps the original. The total includes both.
    head = 0 if trained.whole else sum(module.parameters for module in shape.head)
    parameters = [tensor for tensor in trained.added if not tensor.buffer]
    added = sum(tensor.elements for tensor in parameters)
    own = sum(module.weight if part == "weight" else module.outputs for module, part in trained.own)
    return Count(
        shape=shape.name,
        method=method,
        trainable=sum(tensor.elements for tensor in parameters if tensor.trains) + own + head,
        total=shape.parameters + added + head,
        base=shape.parameters,
        added=added,
        head=head,
        adapted=trained.adapted,
    )
