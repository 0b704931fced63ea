"""How many parameters a method trains, by arithmetic on a shape's table and the method's tensors.

    >>> count("llama-2-7b", "lora", r=8).trainable
    4194304

Counts are logical: a base held in four bits counts as many parameters as it has weights. ``total`` includes what the
method adds, as ``print_trainable_parameters`` of Hugging Face peft does, and tests hold every number to peft's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peftlab.memory.counting.families import Module
from peftlab.memory.counting.methods import method_name, trained_by
from peftlab.memory.counting.options import Options
from peftlab.memory.counting.shapes import Shape, load_shape


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


def count(
    shape: str | Shape,
    method: str = "lora",
    *,
    r: int | None = None,
    targets: str | Iterable[str] | None = None,
    bias: str = "none",
    virtual_tokens: int = 20,
    reduction_factor: int = 16,
    projection: bool = False,
    encoder: str = "mlp",
    encoder_hidden: int | None = None,
    encoder_layers: int = 2,
    labels: int | None = None,
) -> Count:
    """Count the parameters that ``method`` trains on ``shape``.

    A method takes the options that concern it; the others change nothing.

    Args:
        shape: a built-in name, the path of a ``config.json`` or of its folder, or a ``Shape``.
        method: a method's name, such as ``"lora"``; ``METHODS`` has them all.
        r: the rank of a low-rank update; None: the method's own in peft (8, AdaLoRA 12, VeRA 256).
        targets: names, ``"all-linear"`` or a regular expression (see ``Shape.match``), for the LoRA family and IA3;
            None: query and value, for IA3 peft's own (mostly keys, values and down projection; see ``methods.ia3``).
        bias: ``"none"``, ``"all"`` or ``"lora_only"``, for the LoRA family.
        virtual_tokens: the length of a prompt or prefix.
        reduction_factor: hidden width / width of a bottleneck adapter.
        projection: prefix tuning with the MLP that makes the prefix during training.
        encoder: what makes P-tuning's prompt, ``"mlp"`` or ``"lstm"``.
        encoder_hidden: the inner width of that encoder, or of the prefix MLP; None: as wide as what it makes.
        encoder_layers: layers of the LSTM.
        labels: classes of an encoder's head; None: the configuration's own number, or two.

    Raises:
        PeftLabError: an unknown shape or method, a number that is not positive and whole, a target without a match, or
            a method that this model or target has no place for.
    """
    shape = load_shape(shape, labels)
    name = method_name(method)
    if targets is not None and not isinstance(targets, str):
        targets = tuple(targets)
    options = Options(
        r, targets, bias, virtual_tokens, reduction_factor, projection, encoder, encoder_hidden, encoder_layers
    )
    trained = trained_by(name, shape, options)
    # peft trains a copy of the classification head and keeps the original beside it: both are in the total.
    head = 0 if trained.whole else sum(module.parameters for module in shape.head)
    parameters = [tensor for tensor in trained.added if not tensor.buffer]
    added = sum(tensor.elements for tensor in parameters)
    own = sum(module.weight if part == "weight" else module.outputs for module, part in trained.own)
    return Count(
        shape=shape.name,
        method=name,
        trainable=sum(tensor.elements for tensor in parameters if tensor.trains) + own + head,
        total=shape.parameters + added + head,
        base=shape.parameters,
        added=added,
        head=head,
        adapted=trained.adapted,
    )
