"""PEFT Lab: the small, exact package behind an executable book on parameter-efficient fine-tuning.

The public names are listed here. Each is loaded when it is first used, so `import peftlab`, the command line and
`peftlab.memory` start without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from peftlab.catalogue import METHODS as _METHODS
from peftlab.errors import did_you_mean
from peftlab.optional import PACKAGES, missing

__version__ = "0.1.0"

_PLACES = {
    "assets.fetch": "fetch",
    "assets.models": "load_model",
    "assets.data": "load_data",
    "adapters.quantized_starts": "quantize_and_attach",
    "adapters.injection": "attach detach attached count_parameters ParameterCount",
    "adapters.activation": "activate disabled",
    "adapters.new_tokens": "add_tokens",
    "methods": "METHODS",
    "adapters.merging": "merge unmerge MergeReport",
    "adapters.intruders": "find_intruders reduce_intruders IntruderReport",
    "quantization.blockwise": "quantize quantize_nf4 Quantized",
    "quantization.model": "quantize_model dequantize_model",
    "quantization.storing": "save_quantized load_quantized",
    "quantization.preparing": "prepare_for_training",
    "adapters.checkpoint": "save_adapter load_adapter",
    "adapters.exporting": "export_adapter",
    "training.encoding": "encode_completion encode_text encode_classification Collator",
    "training.chat": "encode_chat",
    "core.steps": "added_loss after_step",
    "methods.adalora": "adalora_ranks",
    "training": "train History TrainingError",
    "training.generation": "generate_text",
    "training.metrics": "perplexity mean_loss predict_labels",
    "evaluation.scores": "accuracy macro_f1 exact_match token_f1 bleu chrf",
    "evaluation.intervals": "binomial_interval mean_interval",
    "evaluation.comparisons": "mcnemar two_proportion_test paired_bootstrap adjust_p_values items_needed",
    "evaluation.judges": "win_rate position_bias",
    "memory.costs": "run_cost",
    "guide.recommend": "recommend",
    "kit.measurements": "results",
    "kit.notebook": "show_source glue table expect provenance",
    "kit.exercises": "check",
    "adapters.trainer_callback": "AdapterCallback",
    "errors": "PeftLabError",
}
# Modules that the book calls by a short name, such as `pl.figures`. `from peftlab import figures` works too, but
# `import peftlab.figures` does not, because there is no such file.
_MODULES = {
    "support_desk": "assets.support_desk",
    **{name: f"kit.{name}" for name in ("exercises", "figures", "measurements", "notebook", "tables", "widgets")},
}
_WHERE = {name: module for module, names in _PLACES.items() for name in names.split()} | {
    str(row.config_name): row.config.partition(":")[0].removeprefix("peftlab.")
    for row in _METHODS.values()
    if row.config
}

__all__ = sorted([*_WHERE, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"peftlab.{_WHERE[name]}"), name)
    module = f"peftlab.{_MODULES.get(name, name)}"
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            if error.name in PACKAGES:  # matplotlib for `pl.figures`, say
                raise missing(error.name) from None
            raise
    raise AttributeError(f"module 'peftlab' has no attribute {name!r}.{did_you_mean(name, _WHERE)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
