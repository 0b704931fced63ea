"""Read an adapter's keys in other forms than Hugging Face peft's files have, where it is certain what they mean.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight                    the form of the file
    module.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight     saved from the model under DDP
    base_model.model._orig_mod.model.layers.0.self_attn.q_proj.lora_A.weight          adapted after torch.compile
    layers.0.self_attn.q_proj.lora_A.weight                                           saved from a model without a head

What wrappers and libraries add is taken away on both sides: from the keys of the file, and from those that the model
asks for. Where exactly one key of the file then stands for each key that is asked for, the file is read. Where none or
several do, the error names the form.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from peftlab.errors import PeftLabError, warn

PREFIX = "base_model.model."
# Modules that hold a whole model or a layer, and what puts them there
WRAPPERS = {
    "module": "'module.', as DistributedDataParallel adds",
    "_orig_mod": "'_orig_mod.', as torch.compile adds",
    "_fsdp_wrapped_module": "'_fsdp_wrapped_module.', as FSDP adds",
    "_checkpoint_wrapped_module": "'_checkpoint_wrapped_module.', as activation checkpointing adds",
    "_forward_module": "'_forward_module.', as Lightning adds",
}
# Parameters that peft keeps under the adapter's name inside a model, and without it in a file
NAMED = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "ia3_l",
         "vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B", "trainable_tokens_delta")  # fmt: skip
LINEAR = ("lora_A", "lora_B")
# Modules in front of all others, by which the same layers are called with and without a head, or inside a pipeline
OUTER = ("model", "base_model", "transformer", "bert", "roberta", "distilbert", "deberta", "electra", "encoder", "unet",
         "text_encoder", "language_model", "backbone")  # fmt: skip
# Forms whose modules have other names or whose matrices lie otherwise: they have to be converted
FOREIGN = {
    r"lora_(unet|te\d?|transformer|prior)_|.*\.lora_(down|up)\.weight$": "kohya-ss (lora_down, lora_up)",
    r".*(\.lora|_lora|\.lora_linear_layer)\.(down|up)\.weight$": "old releases of diffusers (lora.down, lora.up)",
    r"blk\.\d+\..*\.lora_[ab]$": "llama.cpp (GGUF)",
    r".*\.lora_[ab](\.weight)?$": "mlx-lm or torchtune (lora_a, lora_b)",
    r"(.*\.)?prompt_encoder\.": "a prompt's own network, as in model.state_dict()",
}


def check_foreign(folder: Path, keys: Collection[str]) -> None:
    """Refuse the keys of another library, by its name."""
    for pattern, library in FOREIGN.items():
        found = next((key for key in keys if re.match(pattern, key)), None)
        if found is not None:
            raise PeftLabError(
                f"The keys in {folder} are in the form of {library}, such as {found!r}. Only the form of Hugging Face "
                "peft's files is read. Convert the file where it was made, or save the adapter there with Hugging Face "
                "peft's model.save_pretrained(folder)."
            )


def plain(key: str) -> tuple[str, list[str]]:
    """Return a key without what wrappers, libraries and adapter names add, and words for what was taken away.

    >>> plain("module.base_model.model.head.lora_A.default.weight")[0]
    'head.lora_A.weight'
    """
    parts, forms, kept = key.split("."), [], []
    index = 0
    while index < len(parts):
        part = parts[index]
        if part in WRAPPERS:
            forms.append(WRAPPERS[part])
        elif part == "modules_to_save" and index + 2 < len(parts):
            forms.append("adapter names in the keys, such as '.default.', as in model.state_dict()")
            index += 1
        else:
            kept.append(part)
            rest = parts[index + 1 :]
            if part in NAMED and rest and rest[0] not in ("weight", "bias") and len(rest) <= 2:
                forms.append("adapter names in the keys, such as '.default.', as in model.state_dict()")
                index += 1
        index += 1
    if kept[-1] in LINEAR:
        forms.append("'lora_A' and 'lora_B' without '.weight'")
        kept.append("weight")
    name = ".".join(kept)
    while (inner := name.removeprefix(PREFIX)) != name:
        if inner.startswith(PREFIX):
            forms.append(f"{PREFIX!r} twice in front")
        name = inner
    return name, forms


def names_in(key: str) -> str | None:
    """Return the adapter's name inside a key, or None."""
    found = re.search(rf"\.(?:{'|'.join(NAMED)}|modules_to_save)\.([^.]+)(?:\.|$)", key)
    return found[1] if found and found[1] not in ("weight", "bias") else None


def read_as(expected: Collection[str], tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return a file's tensors under the keys that a model expects, whatever form they are in.

    Tensors without a place keep their plain names, for `check_keys` to judge.

    Raises:
        PeftLabError: the keys are in another form, and what they stand for is not certain.
    """
    if all(key in tensors for key in expected):
        return dict(tensors)
    wanted = {plain(key)[0]: key for key in expected}
    found, forms = by_plain_name(tensors, folder)
    if any(key.startswith(PREFIX) for key in expected) and not any(PREFIX in key for key in tensors):
        forms.append(f"{PREFIX!r} missing in front")
    # what belongs to no module of the model has no module's name in front
    inner = [name for name, key in wanted.items() if key.startswith(PREFIX)] or list(wanted)
    fronts = outer_names(inner, found)
    ways = [
        (front, back)
        for front, back in fronts
        if all(name.startswith(front) and back + name.removeprefix(front) in found for name in inner)
        and all(name in found for name in wanted.keys() - {*inner})
    ]
    if len(wanted) < len(expected) or len(ways) != 1:
        if not wanted.keys() & found.keys():  # not one key fits as it is
            forms += [outer_form(front, back) for front, back in fronts if front or back]
        if forms:
            missing = next(key for key in expected if key not in tensors)
            raise PeftLabError(
                f"The keys in {folder} are in another form than Hugging Face peft's files have "
                f"({'; '.join(forms)}), and it is not certain what they stand for here: nothing, or more than one, "
                f"stands for {missing!r}. Save the adapter again from the unwrapped model, with pl.save_adapter or "
                "Hugging Face peft's save_pretrained."
            )
        return dict(tensors)
    front, back = ways[0]
    if front or back:
        forms.append(outer_form(front, back))
    if forms:
        warn(
            f"The keys in {folder} are in another form than Hugging Face peft's files have ({'; '.join(forms)}). They "
            "fit this model without that, so they are read. Hugging Face peft would not read them; to mend the folder, "
            "save the adapter again with pl.save_adapter.",
        )
    renamed = {
        key: found.pop(back + name.removeprefix(front) if name in inner else name) for name, key in wanted.items()
    }
    return renamed | {PREFIX + front + name.removeprefix(back): tensor for name, tensor in found.items()}


def by_plain_name(tensors: Mapping[str, Tensor], folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors by their plain names, and the forms that their keys are in.

    Raises:
        PeftLabError: the file holds several adapters, or different tensors for one name.
    """
    names = list(dict.fromkeys(name for name in map(names_in, tensors) if name))
    if len(names) > 1:
        raise PeftLabError(
            f"The keys in {folder} are in another form than Hugging Face peft's files have: they hold the names of "
            f"{len(names)} adapters ({', '.join(names)}). Save each adapter into a folder of its own."
        )
    found: dict[str, Tensor] = {}
    forms: dict[str, None] = {}
    trained = {key.partition(".modules_to_save.")[0] for key in tensors if ".modules_to_save." in key}
    for key, tensor in tensors.items():
        if key.partition(".original_module.")[0] in trained and ".original_module." in key:
            continue  # the base's own module, which a trained copy replaces
        name, told = plain(key)
        forms |= dict.fromkeys(told)
        if name in found and not torch.equal(found[name], tensor):
            raise PeftLabError(
                f"The keys in {folder} are in another form than Hugging Face peft's files have ({'; '.join(forms)}), "
                f"and two of them stand for {name!r}, with different values. Save the adapter again."
            )
        found[name] = tensor
    return found, list(forms)


def outer_names(wanted: Collection[str], found: Collection[str]) -> list[tuple[str, str]]:
    """Return what may stand in front of all wanted names alone, or of all found names alone: usually nothing."""
    fronts = {("", "")}
    first = min(wanted, default="")
    for name in found:
        for longer, shorter, front in ((first, name, True), (name, first, False)):
            outer = longer.removesuffix(shorter) if longer.endswith("." + shorter) else ""
            if outer and set(outer.rstrip(".").split(".")) <= set(OUTER):
                fronts.add((outer, "") if front else ("", outer))
    return sorted(fronts)


def outer_form(front: str, back: str) -> str:
    """Return words for what is missing, or added, in front of the modules."""
    return f"{(front or back)!r} {'missing' if front else 'added'} in front of the modules"


def in_file_form(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return a file's tensors under the keys of Hugging Face's form, where no model tells which keys are expected."""
    found, forms = by_plain_name(tensors, folder)
    if not forms and any(key.startswith(PREFIX) for key in tensors):
        return dict(tensors)
    return {PREFIX + name: tensor for name, tensor in found.items()}


def simpler_names(name: str) -> Iterator[str]:
    """Yield a name or pattern of modules as it is, then without wrappers, then without outer modules one by one.

    >>> list(simpler_names("module.model.layers.0.q_proj"))
    ['module.model.layers.0.q_proj', 'model.layers.0.q_proj', 'layers.0.q_proj']
    """
    yield name
    plain_name = re.sub(rf"(?<![^.\\])(?:{'|'.join(WRAPPERS)})\\?\.", "", name)
    if plain_name != name:
        yield plain_name
    while (inner := re.sub(rf"^(?:{'|'.join(OUTER)})\\?\.", "", plain_name)) != plain_name:
        plain_name = inner
        yield plain_name
