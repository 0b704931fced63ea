"""Give LoRA's two matrices learning rates of their own: LoRA+.

    A <- A - lr dA,    B <- B - ratio lr dB

B starts at zero and its gradient does not shrink as the model gets wider; A's does. One rate for both is then too small
for B or too large for A. The groups are those of Hugging Face peft's `create_loraplus_optimizer`:

| group | its parameters | rate | weight decay |
| --- | --- | --- | --- |
| A | A, and matrices that train in full | lr | yes |
| embedding | A and B of an embedding | `loraplus_lr_embedding` | yes |
| B | B, and vectors, such as DoRA's magnitudes and most norms' scales | ratio lr | yes |
| biases | biases, and the scales of `nn.LayerNorm` | ratio lr | no |

Each rate follows the schedule. Paper: Hayou et al., *LoRA+: Efficient Low Rank Adaptation of Large Models*, 2024,
arXiv:2402.12354, section 3. Book: section *LoRA+* of the chapter on the LoRA family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from peftlab.core.hooks import CHILD
from peftlab.errors import PeftLabError
from peftlab.settings import Settings

LR_EMBEDDING = 1e-6  # peft's default


def loraplus_groups(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], settings: Settings
) -> list[dict[str, Any]] | None:
    """Return the optimiser's groups of a run, without those that are empty; None for a run without LoRA+.

    Args:
        parameters: what trains, by name in the model.

    Raises:
        PeftLabError: nothing that trains is LoRA's.
    """
    ratio, lr = settings.loraplus_lr_ratio, settings.learning_rate
    if ratio is None:
        return None
    kinds = {name: kind_of(model, name, parameter) for name, parameter in parameters.items()}
    if not any("lora_B" in name or kinds[name] == "embedding" for name in parameters):
        first = next(iter(parameters))
        raise PeftLabError(
            f"loraplus_lr_ratio is {ratio:g}, and none of the {len(parameters)} parameters that train is LoRA's B; the "
            f"first is {first}. Train a LoRA (LoRAConfig, DoRAConfig), or leave loraplus_lr_ratio out."
        )
    slow = settings.loraplus_lr_embedding
    rates = {"A": lr, "embedding": LR_EMBEDDING if slow is None else slow, "B": lr * ratio, "biases": lr * ratio}
    groups = []
    for kind, rate in rates.items():
        mine = [parameter for name, parameter in parameters.items() if kinds[name] == kind]
        decay = 0.0 if kind == "biases" else settings.weight_decay
        if mine:
            groups.append({"params": mine, "weight_decay": decay, "lr": rate})
    return groups


def kind_of(model: nn.Module, name: str, parameter: nn.Parameter) -> str:
    """Return the group of a parameter: `"A"`, `"embedding"`, `"B"` or `"biases"`."""
    path, _, own = name.rpartition(".")
    parts = path.split(".")
    if CHILD in parts and own in ("lora_A", "lora_B"):
        host = model.get_submodule(".".join(parts[: parts.index(CHILD)]))
        if isinstance(host, nn.Embedding):
            return "embedding"
    if "lora_B" not in name and parameter.ndim != 1:
        return "A"
    plain = "bias" in name or isinstance(model.get_submodule(path), nn.LayerNorm)
    return "biases" if plain else "B"
