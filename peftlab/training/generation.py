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
from peftlab.core.records import unwrap
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
    """Continue each prompt with the most likely token, again and again (greedy decoding).

    Prompts of similar length share a batch, which saves padding. They are padded on the left, so that all answers start
    in the same column. Each answer is the same as if its prompt were alone, except where rounding decides a tie. The
    model's mode, its generation config and the tokenizer's padding side do not change.

    Args:
        model: a transformers model with `generate`. A compiled or wrapped model is used without its wrapper.
        prompts: strings, or conversations if the tokenizer has a chat template. One string gives a list of one answer.
        max_new_tokens: the most tokens of an answer. An answer ends earlier at the end token.

    Returns:
        One string per prompt, in their order, without the prompt and without special tokens.

    >>> pl.generate_text(model, tokenizer, ["the cat", "a dog"], max_new_tokens=3, progress=False)
    ['...', '...']
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    max_new_tokens = whole("max_new_tokens", max_new_tokens, least=1)
    batch_size = whole("batch_size", batch_size, least=1)
    core = unwrap(model)
    if not hasattr(core, "generate"):
        raise PeftLabError(f"{type(core).__name__} has no generate(); load a language model, e.g. 'smollm2-135m'.")
    encoded = [{"input_ids": prompt_ids(tokenizer, prompt)} for prompt in prompts]
    parts = batches(core, [len(example["input_ids"]) for example in encoded], batch_size)
    # An encoder can be padded on the right; then a prompt in front of the text stays next to it.
    collate = Collator(tokenizer, side="right" if getattr(core.config, "is_encoder_decoder", False) else "left")
    stops = end_ids(tokenizer)
    answers = [""] * len(prompts)
    with (
        mode(core, False),
        text_positions(core),
        _greedy(core, tokenizer, stops, max_new_tokens),
        Bar(len(prompts), "Generating", unit="answer", enabled=progress) as bar,
    ):
        for chosen in parts:
            batch = to_device(collate([encoded[index] for index in chosen]), device_of(core))
            output = core.generate(**batch)
            for index, row in zip(chosen, _new_tokens(core, batch, output), strict=True):
                answers[index] = tokenizer.decode(_until(row, stops), skip_special_tokens=True)
            bar.update(len(chosen))
    return answers


def _new_tokens(model: nn.Module, batch: dict[str, torch.Tensor], output: torch.Tensor) -> list[list[int]]:
    """Return the generated tokens of each row. Only a decoder-only model's output starts with the prompt."""
    if getattr(model.config, "is_encoder_decoder", False):
        return output[:, 1:].tolist()  # the first is the decoder's start token
    return output[:, batch["input_ids"].shape[1] :].tolist()


def _until(row: list[int], stops: list[int]) -> list[int]:
    """Return the tokens before the first end token. Padding follows it, and that need not be a special token."""
    for position, token in enumerate(row):
        if token in stops:
            return row[:position]
    return row


@contextmanager
def _greedy(model: nn.Module, tokenizer: Any, stops: list[int], max_new_tokens: int) -> Iterator[None]:
    """Give the model a plain greedy generation config inside the block.

    The model's own config may sample, penalise tokens or limit the length. With `do_sample=False` beside it,
    transformers would warn about each setting that has no effect.
    """
    from transformers import GenerationConfig

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
