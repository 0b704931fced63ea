"""Multiply the output of a layer by a learned number for each feature.

    y = s * (W x + b),    x: (..., in),  y: (..., out),  s: (out,)

This is the template of a method: CONTRIBUTING.md says to copy this file to peftlab/methods/, and to write here what the
method does, its formula with shapes, and its paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlab.checks import check_fields, number
from peftlab.core.interface import Part, Placement
from peftlab.core.records import own_tensor, tensor_at
from peftlab.core.targets import Targets, check_carrier, find, is_conv1d, shape_of
from peftlab.errors import PeftLabError
from peftlab.methods.parts import trained_copies, widened


class ToyScale(Part):
    """Scale the output of a layer feature by feature.

    Attributes:
        scale: (out,)
    """

    keys = {"scale": "{path}.scale"}  # its key in the adapter file; peft's own key if peft has the method

    def __init__(self, host: nn.Module, start: float) -> None:
        super().__init__()
        # `shape_of` knows Conv1D and 4-bit layers too, whose weight has another shape or no shape of its own.
        self.scale = nn.Parameter(torch.full((shape_of(host)[1],), float(start)))

    def after(self, host: nn.Module, args: tuple, kwargs: dict, output: Tensor, base: Tensor) -> Tensor:
        """Scale the output. output: (..., out)."""
        # y = s * (W x + b). The scale is float32 beside a 16-bit layer, so the product is cast back.
        return (output * self.scale).to(output.dtype)

    def merged(self, host: nn.Module) -> dict[str, Tensor]:
        """Return the host's parameters with the scale folded in: diag(s) W and s * b."""
        # `widened` gives float64, so that a merge is rounded once, and the values that 4-bit codes stand for.
        scale = widened(self.scale)
        rows = scale if is_conv1d(host) else scale[:, None]  # Conv1D stores its weight as (in, out)
        parameters = {"weight": widened(own_tensor(host, "weight")) * rows}
        bias = tensor_at(host, "bias")
        if bias is not None:
            parameters["bias"] = widened(bias) * scale
        return parameters


@dataclass(frozen=True, kw_only=True)
class ToyConfig(Targets):
    """Say what is scaled, and where the scale starts.

    Attributes:
        target_modules: the modules to scale. `None` takes the output projections of attention, `o_proj`.
        start: where the scale starts. With 1 the model starts as it was.

    Raises:
        PeftLabError: a value is out of range; the message says what was found.

    >>> model = pl.attach(model, pl.ToyConfig())
    >>> pl.count_parameters(model).trainable
    32
    """

    start: float = 1.0

    method: ClassVar[str] = "toy"
    peft_type: ClassVar[str] = "TOY"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, number, "start")

    def parts(self, model: nn.Module) -> Iterator[Placement]:
        """Yield a scale for each target, and the trained copies that modules_to_save and task_type ask for."""
        for path, host in find(model, self, ("o_proj",), check_linear).items():
            yield Placement(path, "toy", ToyScale(host, self.start))
        yield from trained_copies(model, self)

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the fields of `adapter_config.json` that only this method has."""
        return {"start": self.start}

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for this class: the reverse of `to_peft`."""
        return {"start": fields["start"]}


def check_linear(model: nn.Module, path: str, host: nn.Module) -> None:
    """Refuse a module that cannot carry a scale."""
    check_carrier(model, path, host)
    if isinstance(host, nn.Embedding):
        raise PeftLabError(f"{path} is an embedding; this method scales linear layers. Name other modules.")
