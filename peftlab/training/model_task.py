"""What a model is made for, told from its class and config as transformers does, and what its call reads.

transformers names its classes after their task, and chooses their loss by that name and by `config.problem_type`.
The same is read here, so that a loss follows the model's task and not the shape of the labels.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from peftlab.core.records import unwrap
from peftlab.errors import PeftLabError

# Endings of class names, the first that fits. None: this class has a loss of its own kind.
ENDINGS: tuple[tuple[str, str | None], ...] = (
    (r"(XLNet|XLMWith|FlaubertWith)LMHeadModel|ProphetNetFor\w+", None),
    (r"ForCausalLM|LMHeadModel|ModelWithLMHead|BertGenerationDecoder", "causal language modelling"),
    (r"ForConditionalGeneration", "generation"),
    (r"EncoderDecoderModel|MTModel", "sequence to sequence"),
    (r"ForMaskedLM", "masked language modelling"),
    (r"ForTokenClassification", "token classification"),
    (r"For(Sequence|Image|Video|Audio)Classification", "classification"),
    (r"ForMultipleChoice|ForNextSentencePrediction", "choice"),
    (r"ForQuestionAnswering(Simple)?", "question answering"),
    (r"ForCTC", "transcription"),
)
PER_TOKEN = ("causal language modelling", "masked language modelling", "token classification")
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
# Read by many models through **kwargs
USUAL = frozenset(
    "input_ids attention_mask token_type_ids position_ids inputs_embeds labels pixel_values input_features "
    "input_values decoder_input_ids decoder_attention_mask start_positions end_positions use_cache".split()
)


class Columns(NamedTuple):
    """What a forward takes: the names it lists, those without a default, and whether others are passed on."""

    names: frozenset[str]
    required: frozenset[str]
    others: bool

    def reads(self, name: str) -> bool:
        """Whether a column of this name reaches the model."""
        return name in self.names or (self.others and (not self.names or name in USUAL))


def inner_model(model: nn.Module) -> nn.Module:
    """The model itself, inside the wrappers of torch and of Hugging Face peft."""
    core = unwrap(model)
    base = getattr(core, "get_base_model", None)
    return base() if callable(base) else core


def forward_columns(model: nn.Module) -> Columns:
    """What the forward of this very module takes."""
    forward = model.forward
    function = getattr(forward, "__func__", forward)
    known = _KNOWN.setdefault(function, {})
    bound = hasattr(forward, "__func__")
    if bound not in known:
        known[bound] = _columns(function, bound)
    return known[bound]


# By function, each as long as it lives: the forward of a model with adapters is an object that holds the model.
_KNOWN: WeakKeyDictionary[Any, dict[bool, Columns]] = WeakKeyDictionary()


def _columns(forward: Any, bound: bool) -> Columns:
    found = list(inspect.signature(forward).parameters.values())[1 if bound else 0 :]
    named = [one for one in found if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    return Columns(
        frozenset(one.name for one in named),
        frozenset(one.name for one in named if one.default is one.empty),
        any(one.kind is one.VAR_KEYWORD for one in found),
    )


def is_known_class(model: nn.Module) -> bool:
    """Whether the model's class is one of transformers' own."""
    return type(inner_model(model)).__module__.startswith("transformers.")


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model's config says that a decoder reads what an encoder made."""
    return bool(getattr(getattr(inner_model(model), "config", None), "is_encoder_decoder", False))


def task_of(model: nn.Module) -> str | None:
    """What the model's class is for; None for a class that is not transformers', nor made from one of those.

    Raises:
        PeftLabError: it is a transformers model of another kind, whose loss is not known here.
    """
    core = inner_model(model)
    kind: type = type(core)
    task, known = task_of_class(kind)
    if task == "generation":
        return "sequence to sequence" if is_encoder_decoder(core) else "causal language modelling"
    if task is None and "return_loss" in forward_columns(core).names:
        return "contrast"  # CLIP and its like compare texts with images
    if task is None and (known or is_known_class(core)):
        raise PeftLabError(
            f"The loss of {type(core).__name__} is not known here. Pass loss=a function (model, batch) -> (sum, number "
            "of labels), or load a class with a head for a task, such as AutoModelForSequenceClassification."
        )
    return task


@lru_cache(maxsize=64)
def task_of_class(kind: type) -> tuple[str | None, bool]:
    """(task, whether a name was found)."""
    for one in kind.__mro__:
        for ending, task in ENDINGS:
            if re.search(f"({ending})$", one.__name__):
                return task, True
    return None, False


def problem_of(model: nn.Module, task: str | None, labels: Tensor) -> str:
    """The task, or for a classifier the kind of its labels, as transformers tells it: one of the keys of `OF_TASKS`.

    Raises:
        PeftLabError: the labels are not of the form that the task has.
    """
    name = type(inner_model(model)).__name__
    whole = not labels.is_floating_point()
    if task == "classification":
        return _kind_of_labels(model, name, labels, whole)
    if task == "choice" or (task is None and labels.ndim == 1):
        if not whole or labels.ndim != 1:
            raise _unfit(name, "one whole number an example", labels)
        return "single_label_classification"
    if task is None and (not whole or labels.ndim != 2):
        raise PeftLabError(
            f"{name} is no class of transformers, so its task is not known, and the labels {_form(labels)} do not tell "
            "it; pass loss=a function (model, batch) -> (sum, count)."
        )
    if not whole or labels.ndim != 2:
        raise _unfit(f"{name} is for {task}", "one whole number a token", labels)
    return task or "causal language modelling"


def _kind_of_labels(model: nn.Module, name: str, labels: Tensor, whole: bool) -> str:
    config: Any = inner_model(model).config
    classes, problem = config.num_labels, getattr(config, "problem_type", None)
    per_example = labels.ndim == 1 or (labels.ndim == 2 and labels.shape[1] == 1)
    if problem is not None and problem not in PROBLEMS:
        raise PeftLabError(f"config.problem_type is {problem!r}; transformers knows {', '.join(PROBLEMS)}.")
    if problem is None:
        if classes == 1:
            problem = "regression"
        else:
            problem = "single_label_classification" if whole and per_example else "multi_label_classification"
    if problem == "single_label_classification":
        if not whole or not per_example:
            raise _unfit(f"{name} has {classes} classes, of which one is right", "one whole number an example", labels)
    elif labels.shape not in ((len(labels), classes), (len(labels),) if classes == 1 else ()):
        wanted = "one number an example" if classes == 1 else f"{classes} numbers an example"
        reason = (
            "for one class of several they are whole numbers; " if labels.is_floating_point() and classes > 1 else ""
        )
        raise _unfit(
            f"{name} has num_labels={classes} ({problem})", f"{wanted} ({reason}see config.problem_type)", labels
        )
    return problem


def _unfit(what: str, wanted: str, labels: Tensor) -> PeftLabError:
    return PeftLabError(
        f"{what}: its labels are {wanted}. Found {_form(labels)}. Encode the labels so, load the model class of your "
        "task, or pass loss=a function (model, batch) -> (sum, count)."
    )


def _form(labels: Tensor) -> str:
    return f"{str(labels.dtype).removeprefix('torch.')} labels {tuple(labels.shape)}"


def call(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """The model's output for those columns of the batch that it reads.

    Raises:
        PeftLabError: the model cannot read the batch; the message names the batch's columns and what was raised.
    """
    columns = forward_columns(unwrap(model))
    inputs = {key: value for key, value in batch.items() if columns.reads(key)}
    try:
        return model(**inputs)
    except PeftLabError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, AttributeError) and not is_known_class(model):
            raise  # a fault in a class of the user's own; of transformers' it is a setting that the config lacks
        if isinstance(error, RuntimeError) and not re.search(r"\b(size|shape|dimension|index|sequence)", reason):
            raise  # no memory left, a kernel that is missing: nothing that other data would mend
        found = ", ".join(
            f"{key} {tuple(value.shape)}" if isinstance(value, Tensor) else key for key, value in inputs.items()
        )
        raise PeftLabError(
            f"{type(inner_model(model)).__name__} cannot read a batch of {found or 'no column that it knows'}: "
            f"{type(error).__name__}: {reason[:300]}"
        ) from error
