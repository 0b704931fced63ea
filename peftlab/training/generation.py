"""Greedy answers to many prompts, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftlab.checks import whole
from peftlab.core.hooks import text_positions
from peftlab.core.modes import device_of, mode, to_device
from peftlab.core.records import as_transformer, unwrap
from peftlab.errors import PeftLabError
from peftlab.progress import Bar
from peftlab.training.batching import batches
from peftlab.training.encoding import Collator, Prompt, end_ids, prompt_ids


def generate_text(
    model: nn.Module,
    tokenizer: Any,
    prompts: Prompt | Sequence[Prompt],
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: bool = True,
) -> list[str]:
    """The model's most likely continuation of each prompt, token by token (greedy decoding).

    Prompts of like length share a batch, so little is spent on padding; prompts are padded on the left, so that every
    answer starts in the same column. The answers are those of one prompt at a time, up to ties within rounding. The
    model's mode, its generation config and the tokenizer's padding side are what they were before.

    Args:
        model: a transformers model with ``generate``; compiled or wrapped ones are used without their wrapper.
        prompts: strings, or conversations for a tokenizer with a chat template; one string alone gives a list of one.
        max_new_tokens: the longest answer, in tokens; an answer ends earlier at the end token.

    Returns:
        One string a prompt, in the order of the prompts, without the prompt and without special tokens.
    """
    # A list of messages alone looks like one of prompts to a type checker, so the kind is named here.
    listed: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    max_new_tokens = whole("max_new_tokens", max_new_tokens, least=1)
    batch_size = whole("batch_size", batch_size, least=1)
    core = unwrap(model)
    generate = getattr(core, "generate", None)
    if generate is None:
        raise PeftLabError(f"{type(core).__name__} has no generate(); load a language model, e.g. 'smollm2-135m'.")
    encoded = [{"input_ids": prompt_ids(tokenizer, prompt)} for prompt in listed]
    parts = batches(core, [len(example["input_ids"]) for example in encoded], batch_size)
    # An encoder reads padding on the right as well, and what stands in front of the text stays close to it.
    collate = Collator(tokenizer, side="right" if getattr(core.config, "is_encoder_decoder", False) else "left")
    stops = end_ids(tokenizer)
    answers = [""] * len(listed)
    with (
        mode(core, False),
        text_positions(core),
        _greedy(core, tokenizer, stops, max_new_tokens),
        Bar(len(listed), "Generating", unit="answer", enabled=progress) as bar,
    ):
        for chosen in parts:
            batch = to_device(collate([encoded[index] for index in chosen]), device_of(core))
            output = generate(**batch)
            for index, row in zip(chosen, _new_tokens(core, batch, output), strict=True):
                answers[index] = tokenizer.decode(_until(row, stops), skip_special_tokens=True)
            bar.update(len(chosen))
    return answers


def _new_tokens(model: nn.Module, batch: dict[str, torch.Tensor], output: torch.Tensor) -> list[list[int]]:
    """The generated tokens of each row: all that follows the prompt, or all of it where a decoder has its own."""
    if getattr(model.config, "is_encoder_decoder", False):
        return output[:, 1:].tolist()  # the first is the decoder's start token
    return output[:, batch["input_ids"].shape[1] :].tolist()


def _until(row: list[int], stops: list[int]) -> list[int]:
    """The tokens before the first end token. What follows is padding, which need not be a special token."""
    for position, token in enumerate(row):
        if token in stops:
            return row[:position]
    return row


@contextmanager
def _greedy(core: nn.Module, tokenizer: Any, stops: list[int], max_new_tokens: int) -> Iterator[None]:
    """Give the model a plain greedy generation config for a while.

    The model's own may sample, penalise or limit the length; passing ``do_sample=False`` beside it makes transformers
    warn about each setting that then has no effect.
    """
    from transformers import GenerationConfig

    model: Any = as_transformer(core)  # a mixin gives it `generate` and this config
    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        bos_token_id=before.bos_token_id,
        decoder_start_token_id=before.decoder_start_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = before
