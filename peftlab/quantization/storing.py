"""Save and load a 4-bit base: one safetensors file with bitsandbytes' keys, and the model's config, without adapters.

`load_quantized` needs no bitsandbytes. With it, transformers' `from_pretrained` opens the same folder. The file holds
the codes, not the weights that they stand for. So it has a quarter of the size of the 16-bit file, and nothing is
rounded again. It carries the sums that adapter folders carry, and both files are written together (`peftlab.files`).
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlab import checks
from peftlab.checks import checked
from peftlab.core.experts import expert_parameters, shape_of
from peftlab.core.hooks import is_adapter_name
from peftlab.core.parameters import Coded
from peftlab.core.records import as_transformer, record_of, unwrap
from peftlab.core.sums import check_sums, with_sums
from peftlab.core.targets import linear_shape
from peftlab.core.tensor_files import read_shapes, read_tensors, serialised
from peftlab.errors import PeftLabError, warn
from peftlab.files import read_settled, settled, write_together
from peftlab.foreign import check_code, read_fields, warn_of_unknown
from peftlab.quantization.backends import AUTO, check_backend
from peftlab.quantization.blockwise import Quantized
from peftlab.quantization.linear import Linear4bit
from peftlab.quantization.marks import guard_saving
from peftlab.quantization.model import mark, replace
from peftlab.quantization.serialised import EXPERTS, MARK, from_tensors, packed_codes, to_tensors
from peftlab.quantization.stacks import ExpertCodes, hold, read_state
from peftlab.quantization.weights import is_quantized, quantized

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FILES = (WEIGHTS, CONFIG)  # the order in which they are put in place; other programs look for the config first
# What a folder with a model holds, and what no other library's model may lie beside
MODELS = (CONFIG, "model*.safetensors", "model*.safetensors.index.json", "pytorch_model*")


@checked()
def save_quantized(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write a transformers model with 4-bit layers, this package's or bitsandbytes', without its adapters.

    Returns:
        The folder, which holds `config.json` and `model.safetensors`.

    Raises:
        PeftLabError: no layer is quantised, the model is no transformers model, it is merged, or the folder holds
            another model. Nothing is then written.

    >>> folder = pl.save_quantized(pl.quantize_model(model), "four-bits")
    >>> sorted(file.name for file in folder.iterdir())
    ['config.json', 'model.safetensors']
    """
    root = unwrap(model)
    config: Any = getattr(root, "config", None)
    if not hasattr(config, "to_dict"):
        raise PeftLabError(
            f"{type(root).__name__} has no transformers config, and without one it cannot be loaded again. Save its "
            "state_dict yourself."
        )
    record = record_of(root)
    if record is not None and record.activity.merged:
        raise PeftLabError("The model is merged; call unmerge(model) first: the base and the adapter are saved apart.")
    held = {name: p for name, p in root.named_parameters() if is_quantized(p)}
    if not held:
        raise PeftLabError(f"No layer of this {type(root).__name__} is quantised; use its own save_pretrained.")
    tensors = {name: t.detach() for name, t in root.state_dict().items() if not is_adapter_name(name)}
    for name, parameter in held.items():  # bitsandbytes' own saving would change a repacked weight
        if isinstance(parameter, Coded):  # its module's state dict has all of it
            continue
        value = quantized(parameter)
        tensors |= {f"{name}.{key}": tensor for key, tensor in to_tensors(value.state).items()} | {name: value.packed}
    first = quantized(next(iter(held.values()))).state
    if not hasattr(config, "quantization_config"):
        mark(root, first.format, first.nested)
    for name in getattr(root, "_tied_weights_keys", None) or ():
        if getattr(config, "tie_word_embeddings", False):
            tensors.pop(name, None)
    # auto_map names Python files that are not saved here
    fields = {name: value for name, value in config.to_dict().items() if name != "auto_map"}
    text = json.dumps(fields | {"architectures": [type(root).__name__]}, indent=2, sort_keys=True, default=str)
    contents = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = with_sums(contents, json.loads(text), {"format": "pt"})
    folder = Path(folder)
    _check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_together(folder, {WEIGHTS: serialised(contents, metadata), CONFIG: text.encode()})
    return folder


def _check_place(folder: Path) -> None:
    """Refuse a folder with other files of these names, such as the model before it was quantised."""
    if folder.exists() and not folder.is_dir():
        raise PeftLabError(f"{folder} is a file; save_quantized writes into a folder. Give another path.")
    there = [path.name for pattern in MODELS for path in sorted(folder.glob(pattern))]
    file = settled(folder, FILES).get(WEIGHTS)
    if not there or (file is not None and (layers_in(read_shapes(file)) or experts_in(read_shapes(file)))):
        return
    raise PeftLabError(
        f"{folder} holds {', '.join(there[:4])} of something else than a 4-bit model, and save_quantized would "
        "overwrite it. Save into another folder, or move that away."
    )


@checked()
def load_quantized(
    folder: str | os.PathLike, *, backend: str = AUTO, device: torch.device | str = "cpu"
) -> nn.Module:
    """Load a folder that `save_quantized`, or transformers with bitsandbytes, wrote.

    Codes and scales are equal bit for bit.

    No Python of the folder is ever run. A folder of transformers carries no sums, so a warning says that damage to its
    numbers cannot be noticed; what can be checked without sums is checked in every folder.

    Args:
        backend: as for `quantize_model`.
        device: where the model goes.

    Raises:
        PeftLabError: a file is missing or damaged, or is no 4-bit model; a key is missing or has no place; the model
            is of a class that transformers does not have.

    >>> folder = pl.save_quantized(pl.quantize_model(model), "four-bits")
    >>> same = pl.load_quantized(folder)
    >>> same.model.layers[0].mlp.up_proj.weight.numel()  # bytes, for 512 weights
    256
    """
    folder, place = Path(folder), checks.device(device, torch)
    fields, tensors, summed = read_settled(folder, FILES, lambda paths: _read(folder, paths))
    check_layers(folder, fields, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    held = _states(folder, tensors, backend, place)
    kind, config = model_class(folder, fields)
    _warn_of_unknown(folder, fields)
    try:
        with torch.device("meta"):
            model = kind._from_config(config, dtype=_dtype(config))
    except PeftLabError:
        raise
    except Exception as error:  # whatever a malformed config makes of transformers' own code
        raise PeftLabError(
            f"{folder / CONFIG} makes no {kind.__name__}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    for path, (value, bias) in held.items():
        _check_layer(folder, model, path, value, bias)
        replace(model, path, Linear4bit(value, bias, backend))
    _hold_experts(folder, model, tensors, backend, place)
    _fill(model, tensors, folder)
    if not summed:
        warn(
            f"{folder} carries no sums, as save_quantized writes them. Its shapes, types and scales were checked, but "
            "numbers that changed since it was saved cannot be noticed. To have sums, save it with save_quantized.",
        )
    guard_saving(model)
    return model.to(place).eval()


def _read(folder: Path, paths: dict[str, Path]) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    """Return the config's fields, the tensors, and whether there were sums, which then were right."""
    if len(paths) < len(FILES):
        raise PeftLabError(f"{folder} lacks {CONFIG} or {WEIGHTS}; save_quantized writes both.")
    fields = read_fields(paths[CONFIG], infinite=True)
    tensors, metadata = read_tensors(paths[WEIGHTS])
    codes = [*(f"{path}.weight" for path in layers_in(tensors)), *experts_in(tensors)]
    return fields, tensors, check_sums(folder / CONFIG, folder / WEIGHTS, fields, tensors, metadata, codes=codes)


def _warn_of_unknown(folder: Path, fields: dict[str, Any]) -> None:
    """Warn of settings of the quantisation that are not bitsandbytes'; what transformers' configs hold is open."""
    from transformers import BitsAndBytesConfig

    given = fields.get("quantization_config")
    if isinstance(given, dict):
        known = {name.lstrip("_") for name in BitsAndBytesConfig().to_dict()}
        strange = [name for name, value in given.items() if value is not None and name.lstrip("_") not in known]
        where = f"quantization_config in {folder / CONFIG}"
        warn_of_unknown(where, strange, known, "The states beside the codes say how the weights are quantised.")


def model_class(folder: Path, fields: dict[str, Any]) -> tuple[Any, Any]:
    """Return the class of transformers that a config names, and the config as an object of its class.

    Raises:
        PeftLabError: transformers has no such model; it would take Python from the folder or from the hub.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    check_code(folder, fields)
    model_type, named = fields.get("model_type"), fields.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    kind = getattr(transformers, name, None) if name.isidentifier() else None
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or not (
        isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    ):  # fmt: skip
        code = " It names Python files (auto_map), and peftlab never runs such code." if "auto_map" in fields else ""
        raise PeftLabError(
            f"{folder} holds no 4-bit model of a class that transformers has: model_type {model_type!r}, "
            f"architectures {named!r}.{code}"
        )
    try:
        config = CONFIG_MAPPING[model_type].from_dict({n: v for n, v in fields.items() if n != "auto_map"})
    except Exception as error:  # whatever a malformed config makes of transformers' own code
        told = " ".join(str(error).split())[:300]
        raise PeftLabError(f"{folder / CONFIG} is no config of a {model_type}: {told}") from error
    made_from: Any = getattr(kind, "config_class", None)
    if not isinstance(made_from, type) or not issubclass(type(config), made_from):
        needs = f"a {made_from.__name__}" if isinstance(made_from, type) else "no config: it is no whole model"
        raise PeftLabError(
            f"{folder / CONFIG} has model_type {model_type!r}, and its class {kind.__name__} is built from {needs}. "
            "The config was edited; fetch or save the folder again."
        )
    config._name_or_path = str(folder)
    return kind, config


def _dtype(config: Any) -> torch.dtype:
    """Return the dtype of the weights that are not quantised."""
    named = getattr(torch, str(config.dtype).removeprefix("torch."), None)
    return named if isinstance(named, torch.dtype) and named.is_floating_point else torch.float32


def layers_in(keys: Iterable[str]) -> list[str]:
    """Return the paths of the 4-bit layers among the keys of a file."""
    return sorted({key.partition(f".weight.{MARK}")[0] for key in keys if f".weight.{MARK}" in key})


def experts_in(keys: Iterable[str]) -> list[str]:
    """Return the paths of the parameters of 4-bit experts among the keys of a file."""
    end = f".{MARK}{EXPERTS}"
    return sorted(key.removesuffix(end) for key in keys if key.endswith(end))


def _hold_experts(
    folder: Path, model: nn.Module, tensors: dict[str, Tensor], backend: str, device: torch.device
) -> None:
    """Take the 4-bit experts out of a file's tensors, check them, and put them into the model."""
    wanted = expert_parameters(model)
    for path in experts_in(tensors):
        target, start = wanted.get(path), f"{path}."
        mine = {key.removeprefix(start): tensors.pop(key) for key in list(tensors) if key.startswith(start)}
        packed = tensors.pop(path, None)
        if target is None or packed is None:
            raise PeftLabError(
                f"{folder} holds 4-bit experts {path}, "
                + ("without their codes" if target is not None else f"and its {type(model).__name__} has none there")
                + f". {CONFIG} and {WEIGHTS} do not belong together; fetch or save them again."
            )
        state = read_state(mine, shape_of(target.host._parameters[target.name]), path)
        count, size = state.shape[0], -(math.prod(state.shape[1:]) // -2)
        if packed.dtype != torch.uint8 or tuple(packed.shape) != (count, size):
            raise PeftLabError(
                f"{path} in {folder} is {tuple(packed.shape)} of {packed.dtype}; its codes are {(count, size)} bytes. "
                "The file is damaged; fetch or save it again."
            )
        check_backend(backend, state.format, state.block_size, device)
        hold(target.host, target.name, ExpertCodes(packed, state, backend))


def _states(
    folder: Path, tensors: dict[str, Tensor], backend: str, device: torch.device
) -> dict[str, tuple[Quantized, nn.Parameter | None]]:
    """Take the 4-bit layers out of a file's tensors, and check them.

    Returns:
        {path: (codes with their state, bias)}.
    """
    layers = layers_in(tensors)
    if not layers and not experts_in(tensors):
        raise PeftLabError(f"{folder} holds no 4-bit model: no layer in {WEIGHTS} is quantised.")
    held = {}
    for path in layers:
        start, name = f"{path}.weight.", f"{path}.weight"
        mine = {key.removeprefix(start): tensors.pop(key) for key in list(tensors) if key.startswith(start)}
        state = from_tensors(mine, torch.device("cpu"), name)
        if name not in tensors:
            raise PeftLabError(f"{folder} lacks the codes of {name}. The file is damaged; fetch or save it again.")
        value = Quantized(packed_codes(tensors.pop(name), state, name), state)
        check_backend(backend, state.format, state.block_size, device)
        bias = tensors.pop(f"{path}.bias", None)
        held[path] = value, None if bias is None else nn.Parameter(bias, requires_grad=False)
    return held


def check_layers(folder: Path, fields: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a config with more layers or experts than the file can hold, before one of them is built."""
    layers = max(1000, len(shapes))
    experts = max(layers, *(size for shape in shapes.values() for size in shape), 0)
    for name, value in fields.items():
        most = layers if "layer" in name else experts if "expert" in name else None
        size = len(value) if isinstance(value, (list, dict)) else value
        if most is not None and isinstance(size, int) and size > most:
            raise PeftLabError(
                f"{folder / CONFIG} has {name} {size}, and {WEIGHTS} holds {len(shapes)} tensors. The config was "
                "edited, or is another model's; fetch or save the folder again."
            )
        if isinstance(value, dict):
            check_layers(folder, value, shapes)


def _check_layer(folder: Path, model: nn.Module, path: str, value: Quantized, bias: nn.Parameter | None) -> None:
    """Require a linear layer of this shape at this path of the model."""
    layer = dict(model.named_modules()).get(path)
    found = None if layer is None else linear_shape(layer)
    wanted = (value.shape[1], value.shape[0]) if len(value.shape) == 2 else None
    if found is None or isinstance(layer, nn.Embedding) or found != wanted:
        here = "no linear layer" if found is None else f"a layer of {found[0]} inputs and {found[1]} outputs"
        raise PeftLabError(
            f"{folder} holds a 4-bit weight {tuple(value.shape)} for {path}, where its model has {here}. {CONFIG} and "
            f"{WEIGHTS} do not belong together; fetch or save them again."
        )
    if bias is not None and (tuple(bias.shape) != (value.shape[0],) or not bias.is_floating_point()):
        raise PeftLabError(
            f"{folder} holds a bias {tuple(bias.shape)} of {bias.dtype} for {path}, which has {value.shape[0]} outputs."
        )


def _fill(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Put the tensors of the file that are not quantised into a model on the meta device.

    Its other buffers are made from the config.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_meta}
    extra = sorted(set(tensors) - set(own))
    if extra:
        raise PeftLabError(f"{folder} has {len(extra)} keys without a place in its model, the first {extra[0]!r}.")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape or tensor.is_floating_point() != own[name].is_floating_point():
            raise PeftLabError(
                f"{name} in {folder} is {tuple(tensor.shape)} of {tensor.dtype}; its model needs "
                f"{tuple(own[name].shape)} of {own[name].dtype}. The files do not belong together; save them again."
            )
    model.load_state_dict(tensors, strict=False, assign=True)
    as_transformer(model).tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise PeftLabError(f"{folder} lacks {len(missing)} of its model's weights, the first {missing[0]!r}.")
    fresh = {name for name, buffer in model.named_buffers() if buffer.is_meta}
    if fresh:  # buffers that are not in the file, such as rotary frequencies: the config determines them
        twin = type(as_transformer(model))._from_config(_smaller(as_transformer(model).config))
        values = dict(twin.named_buffers())
        for name in fresh:
            path, _, last = name.rpartition(".")
            model.get_submodule(path)._buffers[last] = values[name].clone()


def _smaller(config: Any) -> Any:
    """Return the config with one layer. A model of it has the same buffers as the whole model."""
    config = copy.deepcopy(config)
    for name in ("num_hidden_layers", "n_layer"):
        if hasattr(config, name):
            setattr(config, name, 1)
    return config
