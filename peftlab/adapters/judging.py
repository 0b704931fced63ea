"""What an adapter folder's config may ask for: no more than its tensors and this model can bear out.

A config comes from anywhere. It is judged before anything is built from it, so that one line in it (a billion ranks, a
million module names) exhausts neither memory nor patience.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftlab import foreign
from peftlab.core.hooks import base_modules
from peftlab.core.interface import Config, Placement
from peftlab.errors import PeftLabError

# Fields that become a dimension of the adapter's tensors, and of those of the encoder that is saved beside
SIZES = ("r", "num_virtual_tokens", "width")
UNBOUND = ("LOKR", "OFT")  # here a large r makes small tensors: it leaves factors whole, or makes many blocks of few
ENCODER_SIZES = ("encoder_hidden_size",)
ROWS = "trainable_token_indices"
# Fields that may hold a regular expression, which has limits of its own; any other text is a name
PATTERNS = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")
LONGEST = 10_000
# Fields of Hugging Face peft's configs that we need not read, because what an adapter's file computes does not depend
# on them: who made it and when, how it began (its weights are in the file), how it is run, and what other fields refuse
IDLE = {
    "": ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    "LORA": (
        "corda_config", "eva_config", "loftq_config", "lora_ga_config", "runtime_config", "ensure_weight_tying",
        "megatron_config", "megatron_core", "qalora_group_size", "enable_lora", "merge_weights",  # the last two: 2023
    ),
    # AdaLoRA takes over LoRA's fields, and computes nothing by these
    "ADALORA": (
        "r", "use_rslora", "lora_bias", "alpha_pattern", "init_lora_weights", "fan_in_fan_out", "corda_config",
        "eva_config", "loftq_config", "lora_ga_config", "runtime_config", "ensure_weight_tying", "megatron_config",
        "megatron_core", "qalora_group_size",
    ),
    "IA3": ("init_ia3_weights",),
    "OFT": ("fan_in_fan_out",),  # peft sets it to false on every layer that OFT can stand on
    "PROMPT_TUNING": ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    "PREFIX_TUNING": ("init_weights",),
}  # fmt: skip
SIZES_OF_PROMPTS = ("num_transformer_submodules", "num_layers", "num_attention_heads", "token_dim")
Shapes = Mapping[str, tuple[int, ...]]


def check_sizes(folder: Path, fields: Mapping[str, Any], shapes: Shapes, encoder: Shapes) -> None:
    """Refuse a number that no tensor in the folder can have as a dimension.

    What is no whole number at all is for the config itself to refuse.

    Args:
        shapes: of the adapter's tensors. encoder: of those of the encoder beside it.
    """
    bound = fields.get("peft_type") not in UNBOUND
    asked = [(name, fields.get(name)) for name in SIZES if bound or name != "r"]
    if fields.get("peft_type") == "ADALORA":  # its r means nothing, and its init_r is the tensors' only before pruning
        asked = [] if fields.get("rank_pattern") else [("init_r", fields.get("init_r"))]
    rows = fields.get(ROWS)
    tables = rows.values() if isinstance(rows, dict) else [rows]
    asked += [(f"{ROWS} of length", len(tokens)) for tokens in tables if isinstance(tokens, list)]
    _check_dimensions(folder, asked, shapes)
    if encoder:
        _check_dimensions(folder, [(name, fields.get(name)) for name in ENCODER_SIZES], encoder)
        layers = fields.get("encoder_num_layers")
        if isinstance(layers, int) and layers > len(encoder):
            raise PeftLabError(
                f"The config in {folder} has encoder_num_layers {layers}, but its encoder has {len(encoder)} tensors. "
                "Save the adapter again."
            )


def check_ranks(folder: Path, config: Config, shapes: Shapes) -> None:
    """Refuse a rank of `rank_pattern` that no tensor in the folder can have as a dimension.

    Args:
        config: for this model, so without the patterns that mean none of its targets. Those may say any rank.
    """
    if config.peft_type not in (*UNBOUND, "ADALORA"):  # AdaLoRA's table holds masks
        table = getattr(config, "rank_pattern", None) or {}
        _check_dimensions(folder, [(f"rank_pattern[{key[:60]!r}]", rank) for key, rank in table.items()], shapes)


def _check_dimensions(folder: Path, asked: list[tuple[str, Any]], shapes: Shapes) -> None:
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    for name, value in asked:
        if isinstance(value, int) and value > largest:
            raise PeftLabError(
                f"The config in {folder} has {name} {value}, but no tensor beside it has a dimension above {largest}. "
                "The config was edited, or is another adapter's; save or fetch the adapter again."
            )


def check_fields(root: nn.Module, fields: Mapping[str, Any]) -> None:
    """Refuse lists and tables that are longer than anything that names modules of this model can be."""
    most = 1000 + 2 * len(base_modules(root))
    for name, value in fields.items():
        if isinstance(value, str) and len(value) > LONGEST and name not in PATTERNS:
            raise PeftLabError(f"The adapter's {name} has {len(value):,} characters. The config is damaged.")
        if isinstance(value, (list, tuple, dict)) and len(value) > most and name != ROWS:  # that has a tensor's length
            raise PeftLabError(
                f"The adapter's {name} has {len(value):,} entries, and this model has {most // 2 - 500:,} modules. The "
                "config is damaged, or another model's."
            )


class Asked(Mapping[str, Any]):
    """A config that notes which of its fields are asked for."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return self.fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)


def warn_of_unknown(
    folder: Path, fields: Mapping[str, Any], kinds: Iterable[type[Config]], shared: Collection[str]
) -> None:
    """Warn of the fields of a folder's config that nobody reads, with near matches; what is null asks for nothing.

    Args:
        kinds: the classes of the methods that have this `peft_type`. shared: the fields that several methods read.
    """
    asked = Asked(fields)
    known = {*shared, *IDLE[""], *IDLE.get(fields["peft_type"], ())}
    for kind in kinds:
        with contextlib.suppress(PeftLabError):  # what a value means is for the adapter's own class to judge
            kind.from_peft(asked)
        known |= {*kind.requires, *kind.unsupported}
    known |= asked.names
    if "num_virtual_tokens" in known:
        known |= {*SIZES_OF_PROMPTS}
    strange = [name for name, value in fields.items() if name not in known and value is not None]
    advice = "If one of them changes what the adapter computes, load it with the program that made it."
    foreign.warn_of_unknown(f"The config in {folder}", strange, known, advice)


class Allowance:
    """Refuse parts that together hold far more parameters than the folder's tensors, while they are being built."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], encoder: Mapping[str, Tensor]) -> None:
        self.folder, self.built = folder, 0
        self.held = sum(tensor.numel() for tensor in (*tensors.values(), *encoder.values()))

    def __call__(self, placement: Placement) -> None:
        """Count the parameters of a new part."""
        self.built += sum(parameter.numel() for parameter in placement.part.parameters())
        if self.built > 2 * self.held + 10_000_000:  # small ones are built, so that the error can name the tensor
            raise PeftLabError(
                f"The config in {self.folder} asks for more than {self.built:,} parameters on this model, and its "
                f"tensors hold {self.held:,}. It was trained on another model, or the config was edited."
            )
