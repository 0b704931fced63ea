"""Hold the parts that several methods share: a bias or a module of the base, trained as a copy; and small helpers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.core.entry import unguard
from peftlab.core.hooks import CHILD, base_modules, remove
from peftlab.core.interface import Part, Placement
from peftlab.core.records import own_tensor, tensor_at
from peftlab.core.targets import check_called, heads, is_carrier, is_conv1d
from peftlab.errors import PeftLabError
from peftlab.methods.caches import cache_argument
from peftlab.quantization.weights import dense, is_quantized

BIAS_MODES = ("none", "lora_only", "all")
BIAS_ADDED = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm,
)  # fmt: skip


class TrainedBias(Part):
    """Train a copy of the base's bias: y + (bias - host.bias). The base's own bias never moves.

    The part holds the whole bias, not the change. So it is saved, loaded and decayed as the base's own bias would be.
    The book derives it in section 6.4.
    """

    replaces_base_parameters = True

    def __init__(self, host: nn.Module, keys: tuple[str, ...]) -> None:
        super().__init__()
        self.bias = nn.Parameter(own_tensor(host, "bias").detach().clone())
        self.keys = {"bias": keys}

    def after(self, host: nn.Module, args: tuple, kwargs: dict, output: Tensor, base: Tensor) -> Tensor:
        """Replace the bias. output: (..., out). In convolutions and norms of images, the channels lie further left."""
        # y + (b - b0)
        change = self.bias - own_tensor(host, "bias").detach().to(self.bias.dtype)
        right_of_channels = 0
        kernel = getattr(host, "kernel_size", None)
        if kernel is not None:
            right_of_channels = len(kernel)
        elif isinstance(host, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
            right_of_channels = output.dim() - 2
        return (output + change.view(-1, *(1,) * right_of_channels)).to(output.dtype)

    def merged(self, host: nn.Module) -> dict[str, Tensor]:
        """Return the trained bias."""
        return {"bias": self.bias}


class TrainedValue(Part):
    """Train a copy of a parameter, which its module computes with: exact whatever the module does with it.

    For parameters of a module around others (the sinks of gpt-oss' attention), and for biases of modules that are not
    known to add them last.
    """

    replaces_base_parameters = True

    def __init__(self, host: nn.Module, name: str, keys: str | tuple[str, ...]) -> None:
        super().__init__()
        self.parameter = name
        self.trained = nn.Parameter(own_tensor(host, name).detach().clone())
        self.keys = {"trained": keys}

    def value(self, stored: Tensor) -> Tensor:
        """Return the trained copy, in the dtype of the base's parameter."""
        return self.trained.to(stored.dtype)

    def merged(self, host: nn.Module) -> dict[str, Tensor]:
        """Return the trained copy."""
        assert self.parameter is not None
        return {self.parameter: self.trained}


class TrainedCopy(Part):
    """Train a module in full beside an adapter (`modules_to_save`): its copy answers instead of it.

    The base's module still runs first, so that rows, mixtures and `disabled` work as for any part. A head is small, so
    this costs little.
    """

    def __init__(self, host: nn.Module, key: str = "{path}") -> None:
        super().__init__()
        self.module = copy.deepcopy(host)
        for module in self.module.modules():
            remove(module)  # the copy is of the base, without the parts of other adapters
            unguard(module)
        self.keys = {f"module.{name}": f"{key}.{name}" for name in self.module.state_dict()}

    def after(self, host: nn.Module, args: tuple, kwargs: dict, output: Any, base: Any) -> Any:
        """Return the copy's answer, in the base's dtype."""
        parameter = next(self.module.parameters())

        def cast(value: Any, dtype: torch.dtype) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if floating else value

        args = tuple(cast(value, parameter.dtype) for value in args)
        answer = self.module(*args, **{name: cast(value, parameter.dtype) for name, value in kwargs.items()})
        return cast(answer, base.dtype) if isinstance(base, Tensor) else answer

    def merged(self, host: nn.Module) -> dict[str, Tensor]:
        """Return the copy's parameters and buffers."""
        return self.module.state_dict()


def trained_biases(
    model: nn.Module, mode: str, targets: Mapping[str, nn.Module], copied: Iterable[str] = ()
) -> Iterator[Placement]:
    """Yield a trained bias for each target (`"lora_only"`) or each module (`"all"`) that has one.

    Modules in `copied` are left out: they are trained in full already, bias and all. Several modules may share one
    bias. It is then one parameter that is saved under several keys. If one of those modules only passes the bias to
    another, as BERT's language head does, the trained bias stands on the other.

    Raises:
        PeftLabError: a module does not simply add its bias to its output, so a copy cannot be trained beside it.
    """
    if mode != "none":
        modules = base_modules(model) if mode == "all" else targets
        instead = f"bias={mode!r} means it; use bias='lora_only' or 'none'."
        yield from bias_copies(model, modules, instead, copied, wrapped=targets)


def bias_copies(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    instead: str,
    copied: Iterable[str] = (),
    wrapped: Iterable[str] = (),
) -> Iterator[Placement]:
    """Yield a trained bias for each of these modules that has one, as `trained_biases` describes.

    Args:
        instead: what to do about a bias that cannot be trained, for the error.
        copied: paths of modules that are trained in full already.
        wrapped: paths of modules that Hugging Face peft would wrap, which changes the name of their bias in its files.
    """
    sharing: dict[int, list[str]] = {}
    for path, host in modules.items():
        if isinstance(getattr(host, "bias", None), nn.Parameter):
            if not any(path == whole or path.startswith(whole + ".") for whole in copied):
                sharing.setdefault(id(host.bias), []).append(path)
    for paths in sharing.values():
        # Hugging Face's names differ: a wrapped module's bias is called `base_layer.bias` there.
        names = [f"{path}.base_layer.bias" if path in wrapped else f"{path}.bias".lstrip(".") for path in paths]
        # A weight may be made by a parametrization. The bias is still added as it is.
        users = [path for path in paths if set(modules[path]._modules) <= {CHILD, "parametrizations"}]
        users = [path for path in users if not is_router(modules[path])]
        parents = [model.get_submodule(path.rpartition(".")[0]) for path in users]
        if not users or any(isinstance(parent, nn.MultiheadAttention) for parent in parents):
            raise PeftLabError(
                f"{names[0]} of {type(modules[paths[0]]).__name__} is not simply added to what that module returns, "
                f"so it cannot be trained beside it. {instead}"
            )
        host, keys = modules[users[0]], tuple("{root}" + name for name in names)
        added = all(adds_its_bias(modules[path]) for path in users)
        bias = TrainedBias(host, keys) if added else TrainedValue(host, "bias", keys)
        yield from (Placement(path, "bias", bias) for path in users)


def is_router(host: nn.Module) -> bool:
    """Say whether a module has a matrix and is no layer: what it returns is not the product with its bias added."""
    weight = tensor_at(host, "weight")
    return weight is not None and weight.dim() > 1 and not is_carrier(host) and not adds_its_bias(host)


def adds_its_bias(host: nn.Module) -> bool:
    """Say whether a module is known to add its bias to its output: torch's layers and norms, Conv1D, 4-bit layers."""
    forward = type(host).forward
    added = any(forward is kind.forward for kind in BIAS_ADDED)
    return added or is_conv1d(host) or is_quantized(host._parameters.get("weight"))


def trained_copies(model: nn.Module, config: Any, key: str = "{path}") -> Iterator[Placement]:
    """Yield a trained copy for each module that `modules_to_save` names, and for the head that a task implies.

    Args:
        key: the module's name in Hugging Face's file.
    """
    for path, host in heads(model, config).items():
        if not any(True for _ in host.parameters()):
            raise PeftLabError(
                f"modules_to_save names {path}, a {type(host).__name__} without parameters; leave it out."
            )
        if type(host).forward is nn.Module.forward:  # ModuleList and ModuleDict are never called
            within = ", ".join(f"{path}.{name}" for name, _ in list(host.named_children())[:4])
            raise PeftLabError(
                f"modules_to_save names {path}, a {type(host).__name__}, which is a list. Name {within}."
            )
        if any(not p.is_floating_point() for p in host.parameters()):
            raise PeftLabError(
                f"modules_to_save names {path}, which is quantised and cannot train; skip it when you quantise."
            )
        if any(cache_argument(module) for module in base_modules(host).values()):
            yield from leaf_copies(model, path, host, key)
        else:
            yield Placement(path, "copy", TrainedCopy(host, key))


def leaf_copies(model: nn.Module, path: str, module: nn.Module, key: str = "{path}") -> Iterator[Placement]:
    """Yield a trained copy for each module inside a module that has parameters of its own.

    A copy runs after the base's module. A whole block that ran twice would fill the cache twice. Its layers may run
    twice. Of a module around others the copy is of its own parameters alone, for the others have copies too.
    """
    for inner, leaf in base_modules(module).items():
        own = [name for name, _ in leaf.named_parameters(recurse=False)]
        whole_path = f"{path}.{inner}".rstrip(".")
        if own:
            check_called(model, whole_path)
        if set(leaf._modules) - {CHILD} or cache_argument(leaf):
            for name in own:
                yield Placement(whole_path, f"copy_{name}", TrainedValue(leaf, name, f"{key}.{name}"))
        elif own:
            yield Placement(whole_path, "copy", TrainedCopy(leaf, key))


def first_input(args: tuple, kwargs: dict) -> Tensor:
    """Return the tensor that a layer was called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an input in the adapter's dtype.

    Under autocast the input is returned unchanged, since autocast chooses each product's dtype.
    """
    kind = x.device.type  # the device "meta" has no autocast
    return x if kind != "meta" and torch.is_autocast_enabled(kind) else x.to(dtype)


def is_offloaded(host: nn.Module, stored: Tensor) -> bool:
    """Say whether accelerate keeps a weight elsewhere and brings it in for each call alone."""
    return stored.is_meta and hasattr(host, "_hf_hook")


def is_readable(stored: Tensor) -> bool:
    """Say whether a stored weight can be read as numbers: 4-bit codes that we know, or at least 16 bits each."""
    return is_quantized(stored) or (stored.is_floating_point() and stored.dtype.itemsize > 1)


def widened(weight: Tensor) -> Tensor:
    """Return a stored weight in float64, so that a merged sum is rounded once (float32 on devices without float64).

    For a quantised weight, return what its codes stand for, computed in float32 first.
    """
    if is_quantized(weight):
        weight = dense(weight, torch.float32)
    return weight.detach().to(torch.float32 if weight.device.type == "mps" else torch.float64)
