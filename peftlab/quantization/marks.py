"""Set the attributes by which transformers and bitsandbytes know a model with adapters, and restore them."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from peftlab.core.hooks import adapters_on, base_modules, hosts, is_adapter_name
from peftlab.core.parameters import coded
from peftlab.core.records import Record, unwrap
from peftlab.errors import PeftLabError, warn
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
    for path, module in base_modules(root).items():
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


def refuse_codes(model: nn.Module) -> None:
    """Refuse to let transformers save a model with 4-bit experts: it would cut up codes as if they were weights."""
    for path, module in model.named_modules():
        if held := coded(module):
            raise PeftLabError(
                f"save_pretrained has no form for {path}.{held[0]}, which is held in four bits. Save the base with "
                "pl.save_quantized(model, folder), or call pl.dequantize_model first."
            )


class Refusing:
    """Stand for the `save_pretrained` of a model with 4-bit experts: refuse, unless they were dequantised since.

    It is a class, since a bound function that is no method of the model's class cannot be pickled.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save as the model's own class does."""
        refuse_codes(self.model)
        kind: Any = type(self.model)
        return kind.save_pretrained(self.model, *args, **kwargs)


def guard_saving(root: nn.Module) -> None:
    """Let the `save_pretrained` of a model that now holds 4-bit experts refuse."""
    for module in root.modules():
        if hasattr(module, "save_pretrained") and any(map(coded, module.modules())):
            module.__dict__["save_pretrained"] = Refusing(module)


def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the model's own `save_pretrained`; the first time, warn that adapters are saved apart."""
    refuse_codes(self)
    activity = next((adapters_on(host).activity for _, host in hosts(self)), None)
    if activity is not None and not activity.merged and not activity.saving_known:
        activity.saving_known = True
        warn(
            "save_pretrained writes the base model without its adapters. Save them with pl.save_adapter(model, "
            "folder); in transformers' Trainer, give it AdapterCallback, which saves them with each checkpoint.",
        )
    return type(self).save_pretrained(self, *args, **kwargs)


# A class, since a deep copy of a model keeps it the same object.
class _ABSENT:
    pass
