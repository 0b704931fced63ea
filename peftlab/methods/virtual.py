"""Hold what prompts and prefixes share: virtual tokens, which stand for no word, in front of the text.

A prompt stands in front of the input's embeddings. A prefix stands in front of each layer's keys and values. Both have
as many virtual tokens as the config says, and both lengthen the attention mask by that number. In a generation they
enter once; afterwards they are in the model's cache. Positions count virtual tokens, and padding too, as in Hugging
Face peft.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from peftlab.checks import check_fields, one_of, shown, whole
from peftlab.core.interface import Placement
from peftlab.core.records import as_transformer
from peftlab.core.targets import check_names, check_task, refuse_data
from peftlab.errors import PeftLabError
from peftlab.methods.parts import trained_copies

# The name of a task's head in the files of Hugging Face's prompt methods, whose wrapper holds the model directly.
HEAD_KEY = "base_model.{module}"
# The names of embeddings that hold learned positions
POSITIONS = ("wpe", "position_embeddings", "embed_positions")


@dataclass(frozen=True, kw_only=True)
class VirtualTokens:
    """Hold the fields that prompts and prefixes share.

    Attributes:
        num_virtual_tokens: how many virtual tokens there are; a positive whole number.
        modules_to_save: modules trained in full beside them, as for LoRA.
        task_type: Hugging Face's word for the task. `"SEQ_CLS"`, `"TOKEN_CLS"` and `"QUESTION_ANS"` also train the head
            for it.
    """

    num_virtual_tokens: int = 20
    modules_to_save: Iterable[str] | None = None
    task_type: str | None = None

    # Every `Config` has these; few methods change them.
    requires: ClassVar[tuple[str, ...]] = ()
    unsupported: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_fields(self, whole, "num_virtual_tokens", least=1)
        check_names(self, "modules_to_save")
        check_task(self)

    def start_from(self, model: nn.Module, data: Any) -> tuple[Self, Mapping[str, Mapping[str, Tensor]]]:
        """Return this config and nothing: it starts from no data."""
        refuse_data(self, data)
        return self, {}

    def as_stored(self) -> Self:
        """Return this config: an adapter folder holds all that it describes."""
        return self

    def task_heads(self, model: nn.Module) -> Iterator[Placement]:
        """Yield the trained copies of `modules_to_save` and of the task's head."""
        return trained_copies(model, self, key=HEAD_KEY)

    def shared_fields(self, model: nn.Module) -> dict[str, Any]:
        """Return the fields of `adapter_config.json` that Hugging Face's prompt methods share.

        The task is always written if it is known. Without one, peft wraps the model in a class that ignores prompts.
        """
        config, task = model.config, self.task_type
        if task is None and hasattr(model, "prepare_inputs_for_generation"):
            task = "SEQ_2_SEQ_LM" if is_encoder_decoder(model) else "CAUSAL_LM"
        return {
            "task_type": task,
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_transformer_submodules": submodules(model),
            "num_layers": getattr(config, "num_hidden_layers", None),
            "num_attention_heads": getattr(config, "num_attention_heads", None),
            "token_dim": word_embeddings(model).embedding_dim,
        }


class Table(nn.Module):
    """Hold a learned table of rows, which are used as they are."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self) -> Tensor:
        """Return all rows."""
        return self.rows

    def part(self, start: int, end: int) -> Tensor:
        """Return only the columns from `start` to `end`."""
        return self.rows[:, start:end]


def stored_names(source: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Return the `keys` and the `encoder_keys` of a part whose prompt this source makes.

    Hugging Face's file holds the prompt alone. If a network makes the prompt, that network is saved in a second file,
    so that it can be trained further.
    """
    if isinstance(source, Table):
        return {"source.rows": "prompt_embeddings"}, {}
    return {"made": "prompt_embeddings"}, {f"source.{name}": name for name, _ in source.named_parameters()}


def initial_tokens(model: nn.Module, count: int, text: list[int] | None) -> Tensor:
    """Return the `count` token ids to start from: those of a text, cut or repeated; without a text, random ones."""
    embeddings = word_embeddings(model)
    if text is None:
        return torch.randint(0, embeddings.num_embeddings, (count,)).to(embeddings.weight.device)
    ids = list(islice(cycle(text), count))
    if max(ids) >= embeddings.num_embeddings or min(ids) < 0:
        raise PeftLabError(
            f"init_text has the token {max(ids)}; the model's vocabulary has {embeddings.num_embeddings} tokens. "
            "Give the tokenizer of this model."
        )
    return torch.tensor(ids, device=embeddings.weight.device)


def text_ids(config: Any) -> list[int]:
    """Return the token ids of `init_text`."""
    text, tokenizer = config.init_text, config.tokenizer
    if isinstance(text, str):
        if isinstance(tokenizer, str):
            tokenizer = _tokenizer(tokenizer)
        text = list(tokenizer(text)["input_ids"])
    if not text:
        raise PeftLabError(f"init_text {config.init_text!r} has no tokens; give the text to start from.")
    return list(text)


def _tokenizer(name: str) -> Any:
    """A tokenizer by its name or folder, whose own Python is never run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a malformed folder makes anything of transformers' own code
        told = " ".join(str(error).split())[:300]
        if "trust_remote_code" in told:
            told = "it needs Python code from its repository, and peftlab never runs such code"
        raise PeftLabError(
            f"The tokenizer {name!r} cannot be loaded: {told}. Give the tokenizer itself, or token ids as init_text."
        ) from error


def check_start(config: Any, known: tuple[str | None, ...]) -> None:
    """Check `init`, and that a text to start from comes with the tokenizer that it needs."""
    check_fields(config, one_of, "init", known=known)
    if config.init == "text" and config.init_text is None:
        raise PeftLabError("init is 'text' but there is no init_text; give the text to start from.")
    if config.init != "text" and config.init_text is not None:
        raise PeftLabError(f"init_text was given, but init is {config.init!r}; say init='text' to start from it.")
    tokenizer = config.tokenizer
    if not (tokenizer is None or isinstance(tokenizer, str) or hasattr(tokenizer, "eos_token_id")):
        raise PeftLabError(f"tokenizer must be a tokenizer, or the name of one; found {shown(tokenizer)}.")
    if config.init == "text" and isinstance(config.init_text, str) and config.tokenizer is None:
        raise PeftLabError("init_text needs a tokenizer: give the model's, or its name; or give token ids.")


def word_embeddings(model: nn.Module) -> nn.Embedding:
    """Return the input embedding of a transformers model.

    Raises:
        PeftLabError: the model has none.
    """
    found: Any = None  # an nn.Embedding, or a model's own module with the same attributes
    if hasattr(model, "get_input_embeddings") and hasattr(model, "config"):
        try:
            found = as_transformer(model).get_input_embeddings()
        except NotImplementedError:
            found = None
    if not hasattr(found, "embedding_dim"):
        raise PeftLabError(
            f"{type(model).__name__} has no input embedding, which virtual tokens need. Prompts and prefixes work on "
            "transformers models; lora works on any model."
        )
    return found


def require_one_text(model: nn.Module, what: str) -> None:
    """Refuse a model that reads several texts for each example, and joins them to rows inside itself."""
    if type(model).__name__.endswith("ForMultipleChoice"):
        raise PeftLabError(
            f"{type(model).__name__} reads several texts for each example, so it has no {what}. Use lora or ia3."
        )


def is_encoder_decoder(model: nn.Module) -> bool:
    """Say whether the model has an encoder and a decoder that reads its output."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def submodules(model: nn.Module) -> int:
    """Return how many prompts Hugging Face peft counts: one, or two for an encoder-decoder (one for each half)."""
    return 2 if is_encoder_decoder(model) else 1


def path_of(model: nn.Module, module: nn.Module) -> str:
    """Return the path of a module within a model."""
    return next(path for path, other in model.named_modules() if other is module)


def pools_the_last(host: nn.Module) -> bool:
    """Say whether this is a decoder that classifies by the last token of a text."""
    return type(host).__name__.endswith("ForSequenceClassification") and hasattr(host, "score")


def position_limit(model: nn.Module) -> int | None:
    """Return the number of positions if they are learned vectors; None if there is no such limit."""
    config = model.config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None)
    named = (path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, nn.Embedding))
    return limit if limit and any(name in POSITIONS for name in named) else None


def room_for(model: nn.Module, count: int) -> int | None:
    """Return `position_limit`, and refuse virtual tokens that leave no position to a text."""
    limit = position_limit(model)
    if limit is not None and count >= limit:
        raise PeftLabError(
            f"num_virtual_tokens is {count}, and {type(model).__name__} has {limit} positions, so no text would fit "
            "behind them. Choose fewer."
        )
    return limit


def check_room(length: int, count: int, limit: int | None) -> None:
    """Refuse a text that would run past the last learned position."""
    if limit is not None and length + count > limit:
        raise PeftLabError(
            f"{length} tokens and {count} virtual ones are more than the model's {limit} positions; cut the text to "
            f"{limit - count} tokens."
        )


def lengthened(mask: Tensor | None, count: int) -> Tensor | None:
    """Return an attention mask (b, t) with `count` ones in front; None stays None."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise PeftLabError(
            f"The attention mask is {shape}, but virtual tokens can only lengthen a mask (batch, tokens). Pass such a "
            "mask, and generate with a dynamic cache."
        )
    return torch.cat([mask.new_ones(mask.shape[0], count), mask], dim=1)


def in_front(first: Tensor, then: Tensor) -> Tensor:
    """Return [first; then], joined along the tokens, in the dtype of `then`.

    Autocast is off here, since it may know neither dtype.
    """
    kind = then.device.type  # the device "meta" has no autocast
    with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
        return torch.cat([first.to(then.device, then.dtype), then], dim=1)


def cache_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which a base with weights of this dtype stores its keys and values.

    Under autocast, bases with 16-bit weights compute in autocast's dtype.
    """
    kind = device.type  # the device "meta" has no autocast
    if kind != "meta" and torch.is_autocast_enabled(kind) and dtype in (torch.float16, torch.bfloat16):
        return torch.get_autocast_dtype(kind)
    return dtype


def by_name(host: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Return all inputs of a module's call by their names, as a new dict."""
    if not args:
        return dict(kwargs)
    names = [name for name in inspect.signature(type(host).forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}
