"""Set the attributes by which transformers and bitsandbytes know a model with adapters, and restore them."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from peftlab.core.hooks import adapters_on, hosts, is_adapter_name
from peftlab.core.records import Record, unwrap
from peftlab.errors import warn
from peftlab.quantization.weights import REPACKS, layers_that_repack


def set_transformers_attributes(root: nn.Module, record: Record) -> None:
    """Set the attributes that keep transformers and bitsandbytes working on a model with adapters.

    `_keys_to_ignore_on_save`: `save_pretrained` of the model, or of one inside it, then holds no adapter keys.
    `save_pretrained`: the model's own, which first warns, once, that it leaves the adapters out.
    `is_quantized`: `Trainer` refuses "purely quantized models". A model with an adapter is not one. The usual mark for
    that, `_hf_peft_config_loaded`, would also make `save_pretrained` look for peft's own layers, so it is not used.
    `support_avx512bf16_for_cpu`: if it is set, a 4-bit layer repacks its weight at the first forward pass in eval mode.
    Afterwards no gradient passes through it and nothing can be merged into it.
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
        ignored = set(getattr(module, "_keys_to_ignore_on_save", None) or ())
        changes: dict[str, Any] = {"_keys_to_ignore_on_save": ignored | mine}
        if mine:
            changes["save_pretrained"] = MethodType(save_pretrained, module)
        if getattr(module, "is_quantized", False):
            changes["is_quantized"] = False
        for attribute, value in changes.items():
            record.attributes.append((path, attribute, module.__dict__.get(attribute, _ABSENT)))
            setattr(module, attribute, value)


def restore_transformers_attributes(root: nn.Module, record: Record) -> None:
    """Restore the attributes as they were before the last `set_transformers_attributes`."""
    for path, attribute, value in record.attributes:
        module = unwrap(root.get_submodule(path))  # it may have been compiled since
        if value is _ABSENT:
            delattr(module, attribute)
        else:
            setattr(module, attribute, value)
    record.attributes.clear()


def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the model's own `save_pretrained`; the first time, warn that adapters are saved apart."""
    activity = next((adapters_on(host).activity for _, host in hosts(self)), None)
    if activity is not None and not activity.saving_known:
        activity.saving_known = True
        warn(
            "save_pretrained writes the base model without its adapters. Save them with pl.save_adapter(model, "
            "folder); in transformers' Trainer, give it AdapterCallback, which saves them with each checkpoint.",
        )
    return type(self).save_pretrained(self, *args, **kwargs)


# A class, since a deep copy of a model keeps it the same object.
class _ABSENT:
    pass
