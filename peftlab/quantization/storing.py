"""Save and load a 4-bit base: one safetensors file with bitsandbytes' keys, and the model's config, without adapters.

`load_quantized` needs no bitsandbytes. With it, transformers' `from_pretrained` opens the same folder. The file holds
the codes, not the weights that they stand for. So it has a quarter of the size of the 16-bit file, and nothing is
rounded again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftlab.core.hooks import is_adapter_name
from peftlab.core.records import as_transformer, record_of, unwrap
from peftlab.core.tensor_files import read_tensors, serialised, write
from peftlab.errors import PeftLabError
from peftlab.quantization.backends import AUTO, check_backend
from peftlab.quantization.blockwise import Quantized
from peftlab.quantization.linear import Linear4bit
from peftlab.quantization.model import mark, replace
from peftlab.quantization.serialised import MARK, from_tensors, to_tensors
from peftlab.quantization.weights import is_quantized, quantized

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_quantized(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write a transformers model with 4-bit layers, this package's or bitsandbytes', without its adapters.

    Returns:
        The folder, which holds `config.json` and `model.safetensors`.

    Raises:
        PeftLabError: no layer is quantised, the model is no transformers model, or it is merged. Nothing is then
            written.

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
        value = quantized(parameter)
        tensors |= {f"{name}.{key}": tensor for key, tensor in to_tensors(value.state).items()} | {name: value.packed}
    first = quantized(next(iter(held.values()))).state
    if not hasattr(config, "quantization_config"):
        mark(root, first.format, first.nested)
    for name in getattr(root, "_tied_weights_keys", None) or ():
        if getattr(config, "tie_word_embeddings", False):
            tensors.pop(name, None)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fields = config.to_dict() | {"architectures": [type(root).__name__]}
    write(folder / CONFIG, json.dumps(fields, indent=2, sort_keys=True, default=str).encode())
    contents = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    write(folder / WEIGHTS, serialised(contents, {"format": "pt"}))
    return folder


def load_quantized(
    folder: str | os.PathLike, *, backend: str = AUTO, device: torch.device | str = "cpu"
) -> nn.Module:
    """Load a folder that `save_quantized`, or transformers with bitsandbytes, wrote.

    Codes and scales are equal bit for bit.

    Args:
        backend: as for `quantize_model`.
        device: where the model goes.

    Raises:
        PeftLabError: a file is missing or damaged, or holds no 4-bit model; a key is missing or has no place.

    >>> folder = pl.save_quantized(pl.quantize_model(model), "four-bits")
    >>> same = pl.load_quantized(folder)
    >>> same.model.layers[0].mlp.up_proj.weight.numel()  # bytes, for 512 weights
    256
    """
    import transformers

    folder, device = Path(folder), torch.device(device)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise PeftLabError(f"{folder} lacks {CONFIG} or {WEIGHTS}; save_quantized writes both.")
    config = transformers.AutoConfig.from_pretrained(folder)
    kind: Any = getattr(transformers, (config.architectures or [""])[0], None)
    tensors, _ = read_tensors(folder / WEIGHTS)
    layers = {key.partition(f".weight.{MARK}")[0] for key in tensors if f".weight.{MARK}" in key}
    if kind is None or not layers:
        raise PeftLabError(f"{folder} holds no 4-bit model of a class that transformers has ({config.architectures}).")
    plain, dtype = dict(tensors), getattr(torch, str(config.dtype).removeprefix("torch."), torch.float32)
    with torch.device("meta"):
        model = kind._from_config(config, dtype=dtype)
    for path in sorted(layers):
        start = f"{path}.weight."
        mine = {key.removeprefix(start): plain.pop(key) for key in list(plain) if key.startswith(start)}
        held = Quantized(plain.pop(f"{path}.weight"), from_tensors(mine, torch.device("cpu")))
        check_backend(backend, held.state.format, held.state.block_size, device)
        bias = plain.pop(f"{path}.bias", None)
        bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        replace(model, path, Linear4bit(held, bias, backend))
    _fill(model, plain, folder)
    return model.to(device).eval()


def _fill(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Put the tensors of the file that are not quantised into a model on the meta device.

    Its other buffers are made from the config.
    """
    own = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
    extra = sorted(set(tensors) - own)
    if extra:
        raise PeftLabError(f"{folder} has {len(extra)} keys without a place in its model, the first {extra[0]!r}.")
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


def _smaller(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config with one layer. A model of it has the same buffers as the whole model."""
    import copy

    config = copy.deepcopy(config)
    for name in ("num_hidden_layers", "n_layer"):
        if hasattr(config, name):
            setattr(config, name, 1)
    return config
