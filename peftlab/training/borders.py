"""Whether, and how, a model keeps the examples of a packed row apart, tried on the model itself.

Two examples x and y stand in one row, once as [x; y] and once as [x'; y] with other tokens in x. What the model says of
y must be the same in both rows, and the same as where y stands first and is read as usual. A model with states that run
on from token to token, a convolution, or an attention that does not look for borders fails this.

Most models find the borders in `position_ids`. To those that do not, but take a mask (b, 1, t, t), it is given, as
transformers makes it for each kind of layer.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate

from peftlab.core.hooks import adapters_on, hosts, prompt_parts
from peftlab.core.modes import device_of, mode, to_device
from peftlab.core.records import record_of, unwrap
from peftlab.errors import PeftLabError
from peftlab.training.model_facts import ModelFacts
from peftlab.training.model_task import call, forward_columns, inner_model, is_known_class
from peftlab.training.packing import pack
from peftlab.training.schedule import borrowed_generators

LENGTH = 7  # tokens of each example
# How far what must be equal may differ by rounding, as a share of the largest logit. Experts and TF32 round otherwise
# in another row; where y stands elsewhere in the row, everything may.
LEAK = {torch.float64: 1e-10, torch.float32: 5e-5}
PLACE = {torch.float64: 1e-8, torch.float32: 1e-3}
LEAK_16, PLACE_16 = 1e-2, 5e-2
ADVICE = "Leave packing out (group_by_length=True saves padding, too)."


def in_one_row(model: nn.Module) -> bool:
    """Whether all examples of a batch must stand in one row: so transformers hands them to flash attention."""
    config: Any = getattr(unwrap(model), "config", None)
    return "flash" in str(getattr(config, "_attn_implementation", ""))


def needs_masks(model: nn.Module, facts: ModelFacts) -> bool:
    """Say whether a model must be given the masks of packed rows, because it does not find borders in `position_ids`.

    Raises:
        PeftLabError: it does, or it is no causal language model, or a prompt or rows of adapters are active.
    """
    core, name = unwrap(model), facts.name
    if facts.task not in ("causal language modelling", None):
        raise PeftLabError(f"packing is for causal language models, and {name} is for {facts.task}. {ADVICE}")
    _check_adapters(core)
    if "position_ids" not in forward_columns(inner_model(core)).names:
        raise PeftLabError(
            f"packing cannot be used: {name} takes no position_ids, which tell where an example of a row begins. A "
            f"state-space model, for example, reads a row as one text. {ADVICE}"
        )
    if getattr(facts.config, "output_router_logits", False):
        raise PeftLabError(
            f"packing cannot be used while {name} balances its experts (output_router_logits in its config): the "
            f"balance would count padding. {ADVICE} Or set model.config.output_router_logits = False."
        )
    types = getattr(facts.config, "layer_types", None) or getattr(facts.config, "layers_block_type", None) or ()
    states = sorted({kind for kind in types if "attention" not in kind or "linear" in kind})
    if states:
        raise PeftLabError(
            f"packing cannot be used: {name} has layers of the kind {states[0]}, whose states run on from one example "
            f"of a row to the next. {ADVICE}"
        )
    refusals: list[PeftLabError] = []
    for masks in (False, True):
        try:
            _try(core, facts, masks)
        except PeftLabError as refusal:
            refusals.append(refusal)
        else:
            return masks
    raise refusals[0]


def with_masks(model: nn.Module, packed: dict[str, Any]) -> dict[str, Any]:
    """The packed rows with a causal mask of blocks for each kind of the model's layers."""
    core: Any = unwrap(model)
    places = packed["position_ids"]
    like = torch.empty((*places.shape, 1), dtype=getattr(core, "dtype", torch.float32))
    known = {
        "config": core.config, "inputs_embeds": like, "input_embeds": like, "attention_mask": None, "cache": None,
        "past_key_values": None, "cache_position": torch.arange(places.shape[1]), "position_ids": places,
    }  # fmt: skip
    takes = inspect.signature(create_masks_for_generate).parameters  # its names change between versions
    given = {name: value for name, value in known.items() if name in takes}
    return {**packed, "attention_mask": create_masks_for_generate(**given)}


def _try(core: nn.Module, facts: ModelFacts, masks: bool) -> None:
    name = facts.name
    alone, after, after_other = _said_of_one(core, facts, masks)
    if not _alike(after, after_other, LEAK.get(after.dtype, LEAK_16)):
        raise PeftLabError(
            f"packing cannot be used: what {name} says of an example changes with the example before it in the row. "
            f"Either something but attention runs on from token to token (a state, a convolution), or its attention "
            f"({getattr(facts.config, '_attn_implementation', 'of its own')}) does not find borders in position_ids. "
            f"{ADVICE}"
        )
    if not _alike(alone, after, PLACE.get(after.dtype, PLACE_16)):
        raise PeftLabError(
            f"packing cannot be used: what {name} says of an example that is second in a row is not what it says of "
            f"it alone. It does not count positions by position_ids from 0 on. {ADVICE}"
        )


def _check_adapters(core: nn.Module) -> None:
    record = record_of(core)
    if record is None or not record.activity.running:
        return
    if record.activity.rows is not None:
        raise PeftLabError(
            "activate named an adapter for each row, and packing puts several examples into a row. Activate one "
            "adapter, or leave packing out."
        )
    for _, host in hosts(core):
        prompts = list(prompt_parts(adapters_on(host), record.activity))
        if prompts:
            raise PeftLabError(
                f"packing cannot be used: the adapter {prompts[0]!r} puts a prompt or a prefix in front of a row, and "
                "the examples that stand further back in it would not have it in front of them. Leave packing out."
            )


def _said_of_one(core: nn.Module, facts: ModelFacts, masks: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The logits of one example (n, V): where it stands first, behind another, and behind another yet."""
    tables = [module.num_embeddings for module in core.modules() if isinstance(module, nn.Embedding)]
    most = min([64, *([facts.tokens] if facts.tokens else tables)])
    first, other, one = ((torch.arange(LENGTH) * step + step) % most for step in (3, 5, 7))
    ones = torch.ones(1, 2 * LENGTH, dtype=torch.long)
    as_usual: dict[str, Any] = {"input_ids": torch.cat([one, first])[None], "attention_mask": ones, "use_cache": False}
    packed = [pack({"input_ids": torch.stack([x, one])}, one_row=True) for x in (first, other)]
    if masks:
        if not is_known_class(core):
            raise PeftLabError(f"{facts.name} is no class of transformers, so its masks are not known.")
        packed = [with_masks(core, batch) for batch in packed]
    device, found = device_of(core), []
    with borrowed_generators(), mode(core, False), torch.no_grad():
        for batch in (as_usual, *packed):
            output = call(core, to_device(batch, device))
            found.append(getattr(output, "logits", output)[0])
    return found[0][:LENGTH], found[1][LENGTH:], found[2][LENGTH:]


def _alike(one: Tensor, other: Tensor, share: float) -> bool:
    return torch.equal(one, other) or float((one - other).abs().max()) <= share * float(one.abs().max())
