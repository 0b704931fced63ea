"""What a model with adapters tells transformers and bitsandbytes about itself, and how that is taken back."""

from __future__ import annotations

import warnings
from types import MethodType
from typing import Any

from torch import nn

from peftlab.core.hooks import CHILD, hosts, is_adapter_name
from peftlab.core.records import Record, unwrap
from peftlab.quantization.weights import REPACKS, layers_that_repack


def set_transformers_attributes(root: nn.Module, record: Record) -> None:
    """Keeps transformers and bitsandbytes working on an attached model, with the attributes that they read for that.

    `_keys_to_ignore_on_save`: `save_pretrained` of the model, or of one inside it, then holds no adapter keys.
    `save_pretrained`: the model's own, which first warns, once, that the adapters are not in what it writes.
    `is_quantized`: `Trainer` refuses "purely quantized models"; with an adapter the model is none, but the mark by
    which it would know (`_hf_peft_config_loaded`) also makes `save_pretrained` look for peft's own layers.
    `support_avx512bf16_for_cpu`: a 4-bit layer that has it repacks its weight at the first forward pass in eval mode,
    after which nothing passes a gradient through it and nothing can be merged into it.
    """
    restore_transformers_attributes(root, record)
    for path, layer in layers_that_repack(root):
        record.attributes.append((path, REPACKS, layer.__dict__.get(REPACKS, _ABSENT)))
        setattr(layer, REPACKS, False)
    ours = [name for name, _ in (*root.named_parameters(), *root.named_buffers()) if is_adapter_name(name)]
    for path, module in root.named_modules():
        if not hasattr(module, "save_pretrained"):
            continue
        prefix = path + "." if path else ""
        mine = {name.removeprefix(prefix) for name in ours if name.startswith(prefix)}
        changes = {"_keys_to_ignore_on_save": set(getattr(module, "_keys_to_ignore_on_save", None) or ()) | mine}
        if mine:
            changes["save_pretrained"] = MethodType(save_pretrained, module)
        if getattr(module, "is_quantized", False):
            changes["is_quantized"] = False
        for attribute, value in changes.items():
            record.attributes.append((path, attribute, module.__dict__.get(attribute, _ABSENT)))
            setattr(module, attribute, value)


def restore_transformers_attributes(root: nn.Module, record: Record) -> None:
    """Restores the attributes as they were before the last `set_transformers_attributes`."""
    for path, attribute, value in record.attributes:
        module = unwrap(root.get_submodule(path))  # it may have been compiled since
        if value is _ABSENT:
            delattr(module, attribute)
        else:
            setattr(module, attribute, value)
    record.attributes.clear()


def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls the model's own `save_pretrained`; the first time, warns that adapters are saved apart."""
    activity = next((host._modules[CHILD].activity for _, host in hosts(self)), None)
    if activity is not None and not activity.saving_known:
        activity.saving_known = True
        warnings.warn(
            "save_pretrained writes the base model without its adapters. Save them with pl.save_adapter(model, "
            "folder); in transformers' Trainer, give it AdapterCallback, which saves them with each checkpoint.",
            stacklevel=2,
        )
    return type(self).save_pretrained(self, *args, **kwargs)


# A class, so that a deep copy of a model still finds it to be the same object.
class _ABSENT:
    pass
