"""What is known of a model before it sees a batch: its columns, its ranges, and how it finds the end of a text."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peftlab.core.records import as_transformer, unwrap
from peftlab.training.model_task import (
    Columns,
    forward_columns,
    inner_model,
    is_encoder_decoder,
    task_of,
    task_of_class,
)


@dataclass(frozen=True)
class ModelFacts:
    """What is checked of examples and batches, read off the model once.

    Attributes:
        name: of its class.
        task: what its class is for; None if it is not known, or not asked for.
        columns: what its forward takes.
        config: the part of its config that is about text.
        tokens: how many token ids it reads; None where that cannot be told, as for the next two.
        outputs: how many it predicts.
        positions: how many tokens it has learned positions for.
        searches: whether it looks for the padding id to find the end of a text.
    """

    model: nn.Module
    name: str
    task: str | None
    columns: Columns
    config: Any
    tokens: int | None
    outputs: int | None
    positions: int | None
    searches: bool

    @property
    def pad(self) -> int | None:
        """The padding id in the model's config, if it is one that the model can read."""
        pad = getattr(self.config, "pad_token_id", None)
        return None if pad is not None and self.tokens is not None and not 0 <= pad < self.tokens else pad


def facts_of(model: nn.Module, with_task: bool = True) -> ModelFacts:
    """The facts of a model.

    Raises:
        PeftLabError: its task is asked for and not known.
    """
    return ModelFacts(
        model,
        type(inner_model(model)).__name__,
        task_of(model) if with_task else None,
        forward_columns(unwrap(model)),
        text_config(model),
        vocabulary(model),
        output_size(model),
        position_limit(model),
        finds_the_last_token(model),
    )


def output_size(model: nn.Module) -> int | None:
    """How many tokens a language model can predict; None where that cannot be told."""
    core = inner_model(model)
    head: nn.Module | None
    try:
        head = as_transformer(core).get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    size = getattr(head, "out_features", None)
    if size is None and isinstance(weight := getattr(head, "weight", None), Tensor):
        size = len(weight)
    return size if isinstance(size, int) else getattr(text_config(core), "vocab_size", None)


def text_config(model: nn.Module) -> Any:
    """The part of the model's config that is about its text; None for a module without a config."""
    config: Any = getattr(inner_model(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def vocabulary(model: nn.Module) -> int | None:
    """How many token ids the model can read; None where that cannot be told."""
    try:
        embedding = as_transformer(inner_model(model)).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    size = getattr(embedding, "num_embeddings", None)
    return size if isinstance(size, int) else None


def finds_the_last_token(model: nn.Module) -> bool:
    """Whether the model's own forward looks for the padding id, to find the last token of a text before it."""
    core = inner_model(model)
    kind: type = type(core)
    if task_of_class(kind)[0] != "classification" or is_encoder_decoder(core):
        return False
    for one in kind.__mro__:
        forward = inspect.unwrap(one.__dict__["forward"]) if "forward" in one.__dict__ else None
        code = getattr(forward, "__code__", None)
        if code is not None:
            return "pad_token_id" in code.co_names
    return False


def position_limit(model: nn.Module) -> int | None:
    """How many tokens the model has learned positions for; None where positions are computed and have no end."""
    for path, module in inner_model(model).named_modules():
        if path.rpartition(".")[2] in (
            "wpe",
            "position_embeddings",
            "embed_positions",
            "positions_embed",
        ) and isinstance(module, nn.Embedding):
            # RoBERTa counts from its padding id + 1, and BART and OPT leave two rows free
            spare = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            return module.num_embeddings - (spare if isinstance(spare, int) else 0)
    return None
