"""Prepare a model for training under adapters: four steps, each by choice, each with its cost.

Hugging Face's `prepare_model_for_kbit_training` does them all at once. It casts *every* 16-bit parameter that is not
quantised to float32. For the norms this costs almost nothing. But the embedding and the output head, at a vocabulary of
128,256 and a width of 4,096, then take 2.1 GB each instead of 1.05. Here `attach` freezes and `train` checkpoints
anyway. This module is for your own training loops, and shows what each step does.

Book: section 3.9, "Preparing a model, step by step".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftlab.checks import checked, one_of
from peftlab.core.checkpointing import set_input_gradients, switch_checkpointing
from peftlab.core.embeddings import word_embeddings
from peftlab.core.hooks import is_adapter_name
from peftlab.core.records import as_transformer, unwrap
from peftlab.core.targets import names_match
from peftlab.errors import PeftLabError, did_you_mean
from peftlab.quantization.weights import is_quantized


class Step(NamedTuple):
    """Describe one step of preparing a model.

    Attributes:
        step: what was done.
        modules: how many parameters or modules it was done to.
        bytes: by how much the weights grew.
        costs: what else it costs, in words.
    """

    step: str
    modules: int
    bytes: int
    costs: str


@checked()
def prepare_for_training(
    model: nn.Module,
    *,
    freeze: bool = True,
    norms: bool | Iterable[str] = False,
    input_gradients: bool = False,
    checkpointing: bool | str = False,
) -> list[Step]:
    """Prepare a model for training under adapters, in place, and say what each step did and costs.

    Args:
        freeze: let no parameter of the base require gradients. `attach` does that too.
        norms: hold the weights of the norms in float32: all of them, or those whose names (or endings of paths) are
            given. Llama's norms compute in float32 in any case. A 16-bit weight is the same number in 32 bits.
        input_gradients: let the embedding's output require gradients. Only reentrant checkpointing needs it.
        checkpointing: recompute each block in the backward pass. True is the newer kind; `"reentrant"` is the older
            one, which turns on `input_gradients` too. `train(checkpointing=...)` does this for the time of a run.

    Returns:
        The steps, in the order done.

    Raises:
        PeftLabError: a norm does not exist (with near matches); the model cannot checkpoint, or has no embedding.

    >>> for step in pl.prepare_for_training(model.bfloat16(), norms=True):
    ...     print(step.step, step.modules, step.bytes)
    freeze the base 21 0
    norms to float32 5 160
    """
    root = unwrap(model)
    chosen = find_norms(root, norms) if norms else {}
    checkpointing = one_of("checkpointing", checkpointing, (True, False, "reentrant"))
    steps = []
    if freeze:
        steps.append(freeze_base(root))
    if chosen:
        steps.append(norms_to_float32(chosen))
    if checkpointing:
        steps.append(enable_checkpointing(root, checkpointing == "reentrant"))
    if input_gradients or checkpointing == "reentrant":
        steps.append(require_input_gradients(root))
    return steps


def freeze_base(root: nn.Module) -> Step:
    """Let no parameter of the base require gradients."""
    trained = [p for name, p in root.named_parameters() if p.requires_grad and not is_adapter_name(name)]
    for parameter in trained:
        parameter.requires_grad_(False)
    return Step("freeze the base", len(trained), 0, "nothing: it saves every gradient and optimiser state of the base")


def find_norms(root: nn.Module, wanted: bool | Iterable[str]) -> dict[str, nn.Module]:
    """Return the norms to cast: modules whose class name holds "Norm", with floating weights of their own."""
    norms = {
        path: module
        for path, module in root.named_modules()
        if "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))
    }
    if wanted is True:
        return norms
    if isinstance(wanted, (str, bytes)) or not isinstance(wanted, Iterable):
        raise PeftLabError(f"norms is {wanted!r}; give True, or a list of names such as ['input_layernorm'].")
    wanted = tuple(wanted)
    for name in wanted:
        if not any(names_match((name,), path) for path in norms):
            endings = {path.rpartition(".")[2] for path in norms}
            raise PeftLabError(f"norms names {name!r}, which is no norm of this model.{did_you_mean(name, endings)}")
    return {path: module for path, module in norms.items() if names_match(wanted, path)}


def norms_to_float32(norms: dict[str, nn.Module]) -> Step:
    """Hold norms in float32. Each still answers in the dtype of its input, so nothing after it changes."""
    grown = 0
    for module in norms.values():
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                grown += 2 * parameter.numel()
                parameter.data = parameter.data.float()
        if _in_input_dtype not in module._forward_hooks.values():
            module.register_forward_hook(_in_input_dtype)
    return Step("norms to float32", len(norms), grown, "two casts per norm in each pass; the numbers stay the same")


def _in_input_dtype(module: nn.Module, args: tuple, output: Any) -> Any:
    return output.to(args[0].dtype) if args and isinstance(output, Tensor) else output


def enable_checkpointing(root: nn.Module, reentrant: bool) -> Step:
    """Turn gradient checkpointing on, and the key-value cache off, since the two exclude each other."""
    switch_checkpointing(root, "enable", {"use_reentrant": reentrant})
    if not reentrant:
        set_input_gradients(root, False)  # transformers turns that on for both kinds; only one needs it
    if getattr(getattr(root, "config", None), "use_cache", None):
        as_transformer(root).config.use_cache = False
    on = [path for path, module in root.named_modules() if getattr(module, "gradient_checkpointing", False)]
    blocks = sum(not any(other.startswith(f"{path}.") for other in on) for path in on if path)
    return Step("checkpoint the blocks", blocks, 0, "one more forward pass; of each block only its input is kept")


def require_input_gradients(root: nn.Module) -> Step:
    """Let the embedding's output require gradients, so that reentrant checkpointing passes gradients on."""
    if not hasattr(root, "enable_input_require_grads"):
        raise PeftLabError(
            f"{type(root).__name__} has no enable_input_require_grads; it is no transformers model. Leave "
            "input_gradients out, and use the non-reentrant checkpointing."
        )
    set_input_gradients(root, True)
    return Step("let inputs require gradients", 1, 0, "the backward pass also runs below the lowest adapter")


def kbit_casts(model: nn.Module) -> list[Step]:
    """Return what Hugging Face's `prepare_model_for_kbit_training` would cast to float32. The model is not changed."""
    root = unwrap(model)
    words = word_embeddings(root)
    embedding = None if words is None else words[1]
    head = as_transformer(root).get_output_embeddings() if hasattr(root, "get_output_embeddings") else None
    kinds: dict[str, list[Tensor]] = {"embedding": [], "output head": [], "norms and biases": []}
    seen: set[int] = set()
    for module in root.modules():
        kind = {id(embedding): "embedding", id(head): "output head"}.get(id(module), "norms and biases")
        for parameter in module.parameters(recurse=False):
            half = parameter.dtype in (torch.float16, torch.bfloat16) and not is_quantized(parameter)
            if half and id(parameter) not in seen:
                seen.add(id(parameter))
                kinds[kind].append(parameter)
    note = "float32 instead of 16 bits"
    return [Step(kind, len(found), sum(2 * p.numel() for p in found), note) for kind, found in kinds.items() if found]
