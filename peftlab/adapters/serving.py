"""What llama.cpp, vLLM and SGLang make of a LoRA folder, and a form of it that all three read alike.

Hugging Face peft scales each module's update by its own alpha and rank, s = alpha / r, or alpha / sqrt(r) for rsLoRA.
The serving programs read less of the config. This is what their sources do (read in November 2026):

| program | the scaling of an update | its rank |
| --- | --- | --- |
| llama.cpp | `lora_alpha` / the tensor's own rank (`get_scale` in src/llama-adapter.h) | may differ |
| vLLM | `lora_alpha / r`, or over sqrt(r) with `use_rslora`, for all modules (vllm/lora/peft_helper.py) | at most r |
| SGLang | `lora_alpha / r` for all modules (srt/lora/lora.py, and issue 40835) | r (srt/lora/mem_pool.py) |

None of them reads `alpha_pattern`. llama.cpp's convert_lora_to_gguf.py takes only `lora_alpha` from the config, and
ends with an error at a tensor that is no A or B. vLLM's helper refuses `modules_to_save`, and its
`parse_fine_tuned_lora_name` refuses a tensor that is no A or B. SGLang's `get_normalized_target_modules` takes a list
of names, no expression, and its `_process_weight` passes over trained copies. The converter's `GPT2Model` transposes
the update of GPT-2's `Conv1D` layers as it does their weights, though Hugging Face stores only the weights transposed.

So the portable form has one rank R and one scale of 1:

    lora_alpha = r = R = the greatest rank,    B' = [s B, 0],  A' = [A; 0],    so that B' A' = s B A

A plain LoRA, of one alpha and one rank, stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftlab.core.targets import ALL_LINEAR, by_pattern, names_match
from peftlab.errors import PeftLabError

PREFIX = "base_model.model."
PAIRS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
PORTABLE = "save it with pl.save_adapter(model, folder, portable=True), or run `peftlab export FOLDER OUT`"
MERGE = "merge the adapter into the base: pl.merge(model, unload=True), then model.save_pretrained(folder)"
VLLM_RANK = 16  # the greatest rank that vLLM serves without --max-lora-rank


class Note(NamedTuple):
    """Say what serving programs make of one field of an adapter.

    Attributes:
        field: the field of `adapter_config.json`.
        text: what the programs do.
        way: what to do about it.
    """

    field: str
    text: str
    way: str


class Module(NamedTuple):
    """Hold the keys of A and B of one adapted module, and how its update is scaled."""

    path: str
    a: str
    b: str
    rank: int
    alpha: float
    scaling: float


def modules_of(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Module]:
    """Return the modules that a LoRA folder adapts, with the ranks of their tensors and the scaling of its config."""
    found = []
    for key in tensors:
        for a, b in PAIRS.items():
            if key.endswith(a) and (other := key.removesuffix(a) + b) in tensors and not of_parameter(fields, key):
                path, rank = key.removesuffix(a).removeprefix(PREFIX), tensors[key].shape[0]
                alpha = by_pattern(fields.get("alpha_pattern") or {}, path, fields["lora_alpha"])
                # s = alpha / r, or alpha / sqrt(r)
                scaling = alpha / math.sqrt(rank) if fields.get("use_rslora") else alpha / rank
                found.append(Module(path, key, other, rank, alpha, scaling))
    return found


def of_parameter(fields: Mapping[str, Any], key: str) -> bool:
    """Say whether a key belongs to an adapted parameter (`target_parameters`), and not to a module."""
    path, lora, _ = key.removeprefix(PREFIX).rpartition(".lora_")
    targets = fields.get("target_modules") or ()
    targets = targets if isinstance(targets, str) else tuple(targets)
    return bool(lora and fields.get("target_parameters")) and not names_match(targets, path)


def notes(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], tied: Collection[str] = ()) -> list[Note]:
    """Return what the serving programs refuse or misread of an adapter for a language model.

    Args:
        fields: the contents of `adapter_config.json`. tensors: those of the file beside it.
        tied: paths of adapted modules whose weight is the word embeddings' own.
    """
    if fields["peft_type"] != "LORA":
        only = f"llama.cpp, vLLM and SGLang serve LoRA only, not {fields['peft_type']}"
        return [Note("peft_type", only, f"if its method can be merged, {MERGE}")]
    modules, told = modules_of(fields, tensors), []
    alpha, r, targets = fields["lora_alpha"], fields["r"], fields.get("target_modules")
    if fields.get("use_rslora") and any(module.rank > 1 for module in modules):
        wrong = "llama.cpp and SGLang pass over use_rslora and apply the update sqrt(r) times too weak"
        told.append(Note("use_rslora", wrong, PORTABLE))
    if any(module.alpha != alpha for module in modules):
        wrong = f"llama.cpp, vLLM and SGLang pass over alpha_pattern and scale every update by lora_alpha={alpha:g}"
        told.append(Note("alpha_pattern", wrong, PORTABLE))
    if any(module.rank != r for module in modules):
        wrong = f"vLLM passes over rank_pattern and divides every scale by r={r}, and SGLang takes no other ranks"
        told.append(Note("rank_pattern", wrong, PORTABLE))
    if isinstance(targets, str) and targets.lower() != ALL_LINEAR:
        told.append(Note("target_modules", "SGLang refuses target_modules that is a regular expression", PORTABLE))
    stuck = obstacles(fields, tensors)
    if stuck:  # the portable form would be refused
        told = [note._replace(way=way(next(iter(stuck)))) for note in told]
    told += [Note(field, text, way(field)) for field, text in stuck.items()]
    if tied:
        wrong = f"llama.cpp's converter refuses an update of {min(tied)}, which is tied to the word embeddings"
        told.append(Note("target_modules", wrong, f"leave {min(tied)} out of target_modules, or serve it elsewhere"))
    return told


def way(field: str) -> str:
    """Return what to do about a field that has no portable form."""
    if field == "lora_bias":  # a layer without a bias has no place for that of B
        return f"where the adapted layers have biases, {MERGE}; elsewhere train without lora_bias"
    return MERGE


def obstacles(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return {field: what the programs do} for what a LoRA folder holds beside the A and B of plain linear layers."""
    taken = {key for module in modules_of(fields, tensors) for key in (module.a, module.b)}
    rest = [key for key in tensors if key not in taken and not key.endswith(".base_layer.weight")]
    found = {}
    if any(key.endswith(".lora_B.bias") for key in rest):
        found["lora_bias"] = "llama.cpp's converter and vLLM refuse lora_bias"
    rest = [key for key in rest if not key.endswith(".lora_B.bias")]
    if any(of_parameter(fields, key) for key in rest):
        found["target_parameters"] = (
            "updates of experts and routers as parameters are read by some releases of vLLM and for some models alone "
            "(its pull requests 41384 and 52194), and as far as is known not by llama.cpp and SGLang"
        )
    rest = [key for key in rest if not of_parameter(fields, key)]
    biases = [key for key in rest if key.endswith(".bias")] if fields.get("bias", "none") != "none" else []
    if biases:
        found["bias"] = "llama.cpp's converter and vLLM refuse trained biases"
    if any(".lora_magnitude_vector" in key for key in rest):
        found["use_dora"] = "llama.cpp's converter and vLLM refuse use_dora"
    if any(".token_adapter." in key for key in rest):
        found["trainable_token_indices"] = (
            "llama.cpp's converter and vLLM refuse trainable_token_indices, trained rows of the embedding"
        )
    rest = [key for key in rest if ".token_adapter." not in key]
    if any(key not in biases and ".lora_magnitude_vector" not in key for key in rest):
        found["modules_to_save"] = (
            "llama.cpp's converter and vLLM refuse modules_to_save, modules trained in full, and SGLang leaves them out"
        )
    if fields.get("fan_in_fan_out"):
        found["fan_in_fan_out"] = (
            "llama.cpp's converter transposes the updates of Conv1D layers (GPT-2), and vLLM and SGLang serve none"
        )
    return found


def warning(told: Iterable[Note]) -> str:
    """Return what the programs do, and what to do about it, as one text."""
    told = list(told)
    ways = dict.fromkeys(note.way for note in told)
    return (
        f"Serving programs would not read this adapter as it is: {'; '.join(note.text for note in told)}. To serve it, "
        f"{'; and '.join(ways)}."
    )


def serving_lines(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], told: Iterable[Note]) -> list[str]:
    """Return the lines of a language model's card about serving."""
    if fields.get("task_type") != "CAUSAL_LM":
        return []
    told = list(told)
    lines = [f"- `{note.field}`: {note.text}. To serve it, {note.way}." for note in told]
    if not lines:
        lines = [
            "llama.cpp (by its convert_lora_to_gguf.py), vLLM and SGLang read this folder as it is, "
            "where they serve the base model."
        ]
    ranks = [module.rank for module in modules_of(fields, tensors)] if fields["peft_type"] == "LORA" else []
    if (rank := max(ranks, default=0)) > VLLM_RANK:
        lines += ["", f"vLLM needs `--max-lora-rank {rank}` or more."]
    return lines


def portable(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], modules: Iterable[str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors of the same adapter in a form that all three programs read rightly.

    Args:
        modules: the paths of all modules of the model, if it is known. The targets are then short names where these
            mean the same modules.

    Raises:
        PeftLabError: it is no LoRA, or holds more than the A and B of plain linear layers.
    """
    if fields["peft_type"] != "LORA":
        raise PeftLabError(
            f"llama.cpp, vLLM and SGLang serve LoRA only, and this adapter is {fields['peft_type']}, so it has no "
            f"portable form. If its method can be merged, {MERGE}."
        )
    stuck = obstacles(fields, tensors)
    if stuck:
        ways = dict.fromkeys(map(way, stuck))
        raise PeftLabError(
            f"This adapter has no portable form: {'; '.join(stuck.values())}. To serve it, {'; and '.join(ways)}."
        )
    adapted = modules_of(fields, tensors)
    ranks, alphas = {module.rank for module in adapted}, {module.alpha for module in adapted}
    rank = max(ranks, default=fields["r"])
    same = len(ranks) <= 1 and len(alphas) <= 1 and not (fields.get("use_rslora") and rank > 1)
    alpha = alphas.pop() if same and alphas else rank
    folded: dict[str, Tensor] = {}
    for module in adapted:
        b = tensors[module.b] if same else scaled(tensors[module.b], module.scaling)
        # B' = [s B, 0],  A' = [A; 0]
        folded[module.a] = padded(tensors[module.a], 0, rank)
        folded[module.b] = padded(b, 1, rank)
    if any(folded[module.b].dtype != tensors[module.b].dtype for module in adapted):
        folded = {key: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for key, tensor in folded.items()}
    left_out = ("layers_to_transform", "layers_pattern")  # the targets are named one by one
    return {
        **{name: value for name, value in fields.items() if name not in left_out},
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": targets_of(fields, [module.path for module in adapted], modules),
        "exclude_modules": None,
        "bias": "none",
        "lora_bias": False,
        "modules_to_save": None,
    }, folded


def scaled(b: Tensor, scaling: float) -> Tensor:
    """Return s B, rounded once: in B's dtype if that holds it exactly, and otherwise in at least float32.

    A power of two changes no bits of B, and in 16 bits any other number would cost accuracy.
    """
    exact = b.double() * scaling
    rounded = exact.to(b.dtype)
    return rounded if torch.equal(rounded.double(), exact) else exact.to(torch.promote_types(b.dtype, torch.float32))


def padded(tensor: Tensor, dimension: int, size: int) -> Tensor:
    """Return a matrix with zeros behind it, up to a size."""
    shape = list(tensor.shape)
    shape[dimension] = size - shape[dimension]
    return torch.cat([tensor, tensor.new_zeros(shape)], dimension).contiguous() if shape[dimension] else tensor


def targets_of(fields: Mapping[str, Any], paths: Collection[str], modules: Iterable[str] | None) -> list[str]:
    """Return a plain list of names that means exactly the adapted modules: short names if they do, else whole paths."""
    given = fields.get("target_modules")
    named = given if isinstance(given, (list, tuple)) else ()
    named = [name for name in named if any(names_match((name,), path) for path in paths)]
    if modules is None:  # then only the names that were given are known to mean these modules and no other
        chosen = any(fields.get(name) for name in ("exclude_modules", "layers_to_transform"))
        return sorted(paths) if chosen or not named else sorted(named)
    there = list(modules)
    for names in ({path.rpartition(".")[2] for path in paths}, named):
        if {path for path in there if names_match(tuple(names), path)} == set(paths):
            return sorted(names)
    return sorted(paths)
