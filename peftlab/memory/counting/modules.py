"""A model as a table: one row for each module, or lone parameter, that holds parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Rows whose elements are inputs x outputs. A "router" is a linear map that is no `nn.Linear`.
MATRICES = ("linear", "conv1d", "embedding", "router", "experts", "convolution")


@dataclass(frozen=True)
class Module:
    """One module that holds parameters, or one parameter that belongs to no such module.

    `inputs` and `outputs` are the two sizes of its weight: the features of a linear layer, or the rows and the width of
    an embedding. A norm has `outputs` weights. A `bias` adds `outputs` more. transformers holds the experts of a block
    in parameters of three dimensions. Each of these is a row of the kind `"experts"`, whose path is the parameter's. A
    `"vector"` is a parameter of `outputs` elements, such as attention sinks or the biases of experts. A `"convolution"`
    has as inputs the channels that it reads x the size of its kernel. A `"bias"` is a module that has only a bias.
    """

    path: str
    kind: str  # "linear", "conv1d", "embedding", "norm", "router", "experts", "vector", "convolution" or "bias"
    inputs: int
    outputs: int
    bias: bool = False
    tied: bool = False  # its weight is another module's, and is counted there
    role: str = "body"  # "body", "output" (a language-model head) or "head" (a classification head)
    layer: int | None = None  # the number of the block it belongs to; None outside the blocks
    experts: int = 1  # how many matrices of inputs x outputs the parameter holds
    transposed: bool = False  # whether the parameter of experts has the shape (experts, inputs, outputs)
    groups: int = 1  # of a convolution: each output reads inputs / groups
    frozen: bool = False  # whether transformers makes its weight one that does not train, such as sines of positions
    uncalled: bool = False  # whether its weight and bias are read without a call, so that nothing beside it would run
    asked: bool = False  # whether the model asks for the dtype of its weight, so that it is not quantised
    ranks: int = 1  # of an adapted row: how many projections it fuses, each of which peft gives a rank of its own

    @property
    def weight(self) -> int:
        """The number of elements of its own weight; 0 if the weight is another module's (tied)."""
        if self.tied or self.kind == "bias":
            return 0
        if self.kind not in MATRICES:
            return self.outputs
        return self.experts * self.inputs * self.outputs // self.groups

    @property
    def parameters(self) -> int:
        """The number of elements of the weight and the bias."""
        return self.weight + (self.outputs if self.bias else 0)


def linear(path: str, inputs: int, outputs: int, bias: bool = False, **more: Any) -> Module:
    """Return the row of a linear layer."""
    return Module(path, "linear", inputs, outputs, bias, **more)


def rms(path: str, width: int, **more: Any) -> Module:
    """Return the row of a norm without a bias."""
    return Module(path, "norm", width, width, **more)


def layer_norm(path: str, width: int, **more: Any) -> Module:
    """Return the row of a norm with a bias."""
    return Module(path, "norm", width, width, True, **more)


def vector(path: str, elements: int, **more: Any) -> Module:
    """Return the row of a lone parameter."""
    return Module(path, "vector", 1, elements, **more)
