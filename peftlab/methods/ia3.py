"""Multiply keys, values and the feed-forward's inner activations by learned scales l.

    keys, values:               y = l * (W x + b),    x: (..., in),  y: (..., out),  l: (out,)
    the feed-forward's end:     y = W (l * x) + b,    x: (..., in),  y: (..., out),  l: (in,)

l starts at one, so the model starts as it was.

Paper: Liu et al., *Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning*, 2022,
arXiv:2205.05638, section 3.3: "Infused Adapter by Inhibiting and Amplifying Inner Activations".
Book: section 6.1, "A scale instead of a sum"; also 6.3, "Merging a scale".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlab.catalogue import METHODS
from peftlab.checks import check_fields, one_of
from peftlab.core.hooks import base_modules
from peftlab.core.interface import Part, Placement
from peftlab.core.records import own_tensor, tensor_at
from peftlab.core.targets import (
    CONVOLUTIONS,
    Targets,
    check_carrier,
    check_regex,
    find,
    is_carrier,
    is_conv1d,
    linear_endings,
    names_match,
    shape_of,
)
from peftlab.default_targets import ia3, ia3_unknown
from peftlab.errors import PeftLabError
from peftlab.methods.parts import first_input, trained_copies, widened


class IA3Output(Part):
    """Scale the output of a layer feature by feature: l * y. The features of a convolution are its channels.

    Attributes:
        ia3_l: (out, 1), as Hugging Face stores it; of a convolution (1, out, 1, 1).
    """

    keys = {"ia3_l": "{path}.ia3_l"}

    def __init__(self, host: nn.Module, config: IA3Config) -> None:
        super().__init__()
        self.transposed = stores_transposed(host, config)
        size = places(host, host.out_channels) if isinstance(host, CONVOLUTIONS) else (shape_of(host)[1], 1)
        self.ia3_l = nn.Parameter(drawn(size, config.init))

    def after(
        self, host: nn.Module, args: tuple, kwargs: dict, output: Tensor, base: Tensor
    ) -> Tensor:
        """Scale the output. output: (..., out)."""
        # y = l * (W x + b)
        return (output * along(self.ia3_l)).to(output.dtype)

    def merged(self, host: nn.Module) -> dict[str, Tensor]:
        """Return the host's parameters with the scale folded in: diag(l) W and l * b."""
        scale = widened(self.ia3_l)  # (out, 1): a factor for each row of W
        if isinstance(host, CONVOLUTIONS):
            scale = scale.transpose(0, 1)  # (out, 1, 1, 1)
        parameters = {"weight": widened(own_tensor(host, "weight")) * (scale.T if self.transposed else scale)}
        bias = tensor_at(host, "bias")
        if bias is not None:
            parameters["bias"] = widened(bias) * scale.flatten()
        return parameters


class IA3Input(Part):
    """Scale the input of a layer feature by feature: W (l * x). The features of a convolution are its channels.

    Attributes:
        ia3_l: (1, in), as Hugging Face stores it; of a convolution (1, in, 1, 1).
    """

    keys = {"ia3_l": "{path}.ia3_l"}

    def __init__(self, host: nn.Module, config: IA3Config) -> None:
        super().__init__()
        self.transposed = stores_transposed(host, config)
        size = places(host, host.in_channels) if isinstance(host, CONVOLUTIONS) else (1, shape_of(host)[0])
        self.ia3_l = nn.Parameter(drawn(size, config.init))

    def before(self, host: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Scale the input. x: (..., in)."""
        x = first_input(args, kwargs)
        # y = W (l * x) + b
        scaled = (x.to(self.ia3_l.dtype) * along(self.ia3_l)).to(x.dtype)
        return ((scaled, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): scaled})

    def merged(self, host: nn.Module) -> dict[str, Tensor]:
        """Return the host's weight with the scale folded in: W diag(l)."""
        weight = widened(own_tensor(host, "weight"))
        scale = widened(self.ia3_l)  # (1, in): a factor for each column of W
        if isinstance(host, CONVOLUTIONS):  # W: (out, in / groups, k, k); each group of rows reads its own channels
            scale = scale.view(host.groups, 1, -1, *scale.shape[2:])
            return {"weight": (weight.view(host.groups, -1, *weight.shape[1:]) * scale).view_as(weight)}
        return {"weight": weight * (scale.T if self.transposed else scale)}


@dataclass(frozen=True, kw_only=True)
class IA3Config(Targets):
    """Say what IA3 scales.

    Attributes:
        target_modules: the modules to scale. `None` takes the paper's: keys, values, and the input of the
            feed-forward's last layer. On a BERT, `output.dense` is also the last layer of attention, so that layer's
            input is scaled too, as in Hugging Face peft.
        feedforward_modules: the targets whose input is scaled instead of their output. Give a list of strings in which
            a path may end (`"dense"` also means `output.dense`), or a regular expression. `None` takes those of a known
            architecture.
        fan_in_fan_out: detected automatically for Linear and Conv1D (the flag is ignored there). Set it only for custom
            layers that store their weight as (in, out).
        init: `"ones"`; or `"random"`, which changes the model's output before the first step and is for tests.

    Raises:
        PeftLabError: a value is out of range; the message says what was found.

    >>> model = pl.attach(model, pl.IA3Config())
    >>> pl.count_parameters(model).trainable
    96
    """

    feedforward_modules: str | Iterable[str] | None = None
    fan_in_fan_out: bool = False
    init: str = "ones"

    method: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, one_of, "init", known=METHODS["ia3"].starts)
        check_fields(self, one_of, "fan_in_fan_out", known=(True, False))
        modules = self.feedforward_modules
        if isinstance(modules, str):
            check_regex(modules)
        elif modules is not None:
            if not isinstance(modules, Iterable) or not all(isinstance(name, str) and name for name in modules):
                raise PeftLabError(f"feedforward_modules is {modules!r}; give a list of module names.")
            names = tuple(dict.fromkeys(modules))
            object.__setattr__(self, "feedforward_modules", names)
            targets = self.target_modules
            if isinstance(targets, tuple):
                strange = [name for name in names if not is_of(name, targets)]
                if strange:
                    raise PeftLabError(
                        f"feedforward_modules names {strange[0]!r}, which is not in target_modules "
                        f"({', '.join(targets)}); name it there as well."
                    )

    def parts(self, model: nn.Module) -> Iterator[Placement]:
        """Yield a scale for each target, and the trained copies."""
        inputs = self.inputs(model)
        for path, host in find(model, self, lambda modules: default(model, modules), check_linear).items():
            layer = IA3Input if scales_input(inputs, path) else IA3Output
            yield Placement(path, "ia3", layer(host, self))
        yield from trained_copies(model, self)

    def inputs(self, model: nn.Module) -> str | tuple[str, ...]:
        """Return the modules whose input is scaled: those the config names, or a known architecture's."""
        if self.feedforward_modules is not None:
            named = self.feedforward_modules
            return named if isinstance(named, str) else tuple(named)
        known = architecture(model, base_modules(model))
        return known[1] if known else ()

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the fields of Hugging Face's `adapter_config.json` that only IA3 has."""
        inputs = self.inputs(model)
        stored: str | list[str]
        if isinstance(inputs, str):
            stored = inputs
        else:
            named = self.target_modules if isinstance(self.target_modules, tuple) else ()
            scaled = sorted(path for path in hosts if scales_input(inputs, path) and is_carrier(hosts[path]))
            if set(inputs) <= set(named):
                stored = sorted(inputs)
            # If both are lists, peft wants a subset of target_modules. Whole paths are not in a list of short names.
            else:
                stored = "|".join(map(re.escape, scaled)) if named and scaled else scaled
        return {
            "feedforward_modules": stored,
            "fan_in_fan_out": self.fan_in_fan_out or any(is_conv1d(host) for host in hosts.values()),
            "init_ia3_weights": True,
        }

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for this class: the reverse of `to_peft`."""
        inputs = fields.get("feedforward_modules")
        return {
            "feedforward_modules": inputs if isinstance(inputs, str) else tuple(inputs or ()),
            "fan_in_fan_out": bool(fields.get("fan_in_fan_out", False)),
        }


def is_of(name: str, targets: Iterable[str]) -> bool:
    """Say whether a name can mean one of the targets: one of the two ends in the other."""
    return any(target.endswith(name) or name.endswith(target) for target in targets)


def architecture(model: nn.Module, paths: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Return (the targets, those of them whose input is scaled) of a known architecture, or None."""
    return ia3(paths, getattr(getattr(model, "config", None), "model_type", None))


def default(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the targets of a config that names none."""
    known = architecture(model, modules)
    if known is None:
        raise ia3_unknown(linear_endings(modules), type(model).__name__, "target_modules")
    return {path: module for path, module in modules.items() if names_match(known[0], path)}


def scales_input(inputs: str | tuple[str, ...], path: str) -> bool:
    """Say whether a module counts as feed-forward: by the end of its path as a string, as in Hugging Face peft."""
    return names_match(inputs, path) if isinstance(inputs, str) else path.endswith(inputs)


def check_linear(model: nn.Module, path: str, host: nn.Module) -> None:
    """Refuse a module that cannot carry a scale."""
    check_carrier(model, path, host)
    if isinstance(host, nn.Embedding):
        raise PeftLabError(f"{path} is an embedding; IA3 scales linear layers. Leave it out, or use LoRAConfig.")
    if isinstance(host, nn.Conv1d):
        raise PeftLabError(
            f"{path} is a Conv1d, for which Hugging Face peft's IA3 has no form; it scales linear layers, Conv2d and "
            "Conv3d. Leave it out, or use LoRAConfig."
        )


def stores_transposed(host: nn.Module, config: IA3Config) -> bool:
    """Say whether the layer stores its weight as (in, out), as Conv1D does."""
    return is_conv1d(host) or (config.fan_in_fan_out and not isinstance(host, (nn.Linear, *CONVOLUTIONS)))


def places(host: Any, channels: int) -> tuple[int, ...]:
    """Return the shape of a scale for the channels of a convolution: (1, channels, 1, ...)."""
    return (1, channels, *(1 for _ in host.kernel_size))


def along(scale: Tensor) -> Tensor:
    """Return a scale in the shape that multiplies features: (features,), or (channels, 1, ...) of a convolution."""
    return scale.flatten() if scale.dim() == 2 else scale[0]


def drawn(size: tuple[int, ...], init: str) -> Tensor:
    """Return ones; for tests, ones plus noise."""
    return torch.ones(size) if init == "ones" else 1 + 0.3 * torch.randn(size)
