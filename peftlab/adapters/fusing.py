"""Read adapters of a mixture whose experts were linear layers: until transformers 4 each expert had its own.

    ...experts.E.w1, ...experts.E.w3   ->   gate_up_proj:  A = [A1; A3],  B = [[B1, 0], [0, B3]]   for each expert E
    ...experts.E.w2                    ->   down_proj:     A = A2,        B = B2

So a fused parameter gets the sum of the ranks, and with the sum of the alphas the same scaling. Hugging Face peft reads
such folders in the same way (`convert_peft_adapter_state_dict_for_transformers`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.adapters.key_forms import PREFIX
from peftlab.core.experts import OldNames, expert_parameters, old_names, renamed
from peftlab.errors import PeftLabError

Layers = dict[tuple[int, str, str], Tensor]  # by expert, old name and "A" or "B"


def fused(
    root: nn.Module, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an adapter's fields and tensors with the layers of the experts brought to this model's parameters.

    Without such layers they are returned as they are.

    Raises:
        PeftLabError: some experts have a layer and others lack it, or a layer is there without one it is fused with.
    """
    old, names = old_names(root), fields.get("target_modules")
    key = re.compile(rf"(.+)\.experts\.(\d+)\.({'|'.join(old.now)})\.lora_([AB])\.weight") if old is not None else None
    if old is None or key is None or not isinstance(names, list) or not any(map(key.fullmatch, tensors)):
        return dict(fields), dict(tensors)
    # {path of a block: that of its experts in this model}; the last name of a block changed in some models
    blocks = {path.rsplit(".", 3)[0]: target.host_path for path, target in expert_parameters(root).items()}
    found: dict[str, Layers] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = key.fullmatch(name)
        above, _, inner = (match[1] if match else name.partition(".gate.lora_")[0]).rpartition(".")
        host = blocks.get(above.removeprefix(PREFIX))
        if match and host is not None:
            found.setdefault(host, {})[int(match[2]), match[3], match[4]] = tensor
        elif host is not None and ".gate.lora_" in name:
            rest[name.replace(f".{inner}.gate.", f".{host.split('.')[-2]}.gate.")] = tensor
        else:
            rest[name] = tensor
    for host, layers in found.items():
        rest |= _together(root, host, layers, old)
    stay, meant, counts = renamed(root, names)
    r, alpha = fields.get("r", 8), fields.get("lora_alpha", 8)
    return {
        **fields,
        "target_modules": list(stay),
        "target_parameters": list(meant),
        "rank_pattern": {**(fields.get("rank_pattern") or {}), **{rf".*\.{one}": r * n for one, n in counts.items()}},
        "alpha_pattern": {
            **(fields.get("alpha_pattern") or {}),
            **{rf".*\.{one}": alpha * n for one, n in counts.items()},
        },
    }, rest


def _together(root: nn.Module, host: str, layers: Layers, old: OldNames) -> dict[str, Tensor]:
    """Return the tensors of one block's experts under the keys of the fused form."""
    own = root.get_submodule(host)._parameters
    experts, there = {e for e, _, _ in layers}, {name for _, name, _ in layers}
    parameters = [one for one in own if any(old.now[name] == one for name in there)]
    made = {}
    for place, parameter in enumerate(parameters):
        names = [name for name, now in old.now.items() if now == parameter]
        missing = [(e, name, side) for e in experts for name in names for side in "AB" if (e, name, side) not in layers]
        if missing or experts != set(range(len(experts))):
            e, name, side = missing[0] if missing else (min(set(range(len(experts))) - experts), names[0], "A")
            raise PeftLabError(
                f"The adapter lacks lora_{side} of {host}.{e}.{name}, which is fused with others into {parameter} in "
                f"this model. Adapt all experts, and {' and '.join(names)} together."
            )
        each = sorted(experts)
        a = torch.stack([torch.cat([layers[e, name, "A"] for name in names]) for e in each])  # (experts, r, in)
        b = torch.stack([torch.block_diag(*(layers[e, name, "B"] for name in names)) for e in each])  # (., out, r)
        path = PREFIX + host + ".base_layer" * (len(parameters) - 1 - place)
        made[f"{path}.lora_A.weight"] = a.flatten(0, 1)
        made[f"{path}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1)
    return made
