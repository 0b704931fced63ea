"""Greedy answers to many prompts, in batches."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftlab.checks import Tokenizer, checked, whole
from peftlab.core.hooks import text_positions
from peftlab.core.modes import device_of, mode, to_device
from peftlab.core.records import unwrap
from peftlab.errors import PeftLabError
from peftlab.progress import Bar
from peftlab.training.batching import batches
from peftlab.training.conversations import Prompt, encoder_ids, end_ids, prompt_ids
from peftlab.training.encoding import MOST_TOKENS, Collator
from peftlab.training.model_facts import vocabulary
from peftlab.training.model_task import is_encoder_decoder

# Settings of a generation config that choose by chance, or among several answers: greedy decoding has no use for them.
NOT_GREEDY = (
    "temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff penalty_alpha dola_layers num_beam_groups "
    "diversity_penalty length_penalty early_stopping constraints force_words_ids low_memory prompt_lookup_num_tokens "
    "assistant_early_exit use_mtp"
).split()
# Settings of what is returned beside the tokens, and of how many there are at most
NOT_TOKENS = (
    "num_return_sequences output_attentions output_hidden_states output_scores output_logits return_dict_in_generate "
    "max_length max_new_tokens"
).split()


@checked("prompts")
def generate_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Prompt | Sequence[Prompt],
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: bool = True,
) -> list[str]:
    """Continue each prompt with the most likely token, again and again (greedy decoding).

    Prompts of similar length share a batch, which saves padding. They are padded on the left, so that all answers start
    in the same column. Each answer is the same as if its prompt were alone, except where rounding decides a tie. The
    model's mode, its generation config and the tokenizer's padding side do not change.

    The model's generation config is kept: forced and suppressed tokens, penalties, words that are not to be said. Only
    its sampling, its beams and its greatest length are not. An answer ends at the end tokens of both the config and the
    tokenizer.

    Args:
        model: a transformers model with `generate`; compiled or wrapped ones are used without their wrapper.
        prompts: strings, or conversations for a tokenizer with a chat template; one string or one conversation alone
            gives a list of one.
        max_new_tokens: the longest answer, in tokens; an answer ends earlier at the end token.

    Returns:
        One string per prompt, in their order, without the prompt and without special tokens.

    >>> pl.generate_text(model, tokenizer, ["the cat", "a dog"], max_new_tokens=3, progress=False)
    ['...', '...']
    """
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
        raise PeftLabError(f"prompts is {prompts!r:.60}; give a list of texts or of conversations.")
    # One conversation alone looks like a list of prompts to a type checker
    listed: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    if listed and all(isinstance(one, Mapping) and "role" in one for one in listed):
        listed = [listed]
    max_new_tokens = whole("max_new_tokens", max_new_tokens, least=1, ceiling=MOST_TOKENS)
    batch_size = whole("batch_size", batch_size, least=1)
    core: Any = unwrap(model)  # a mixin gives it `generate`
    generate = getattr(core, "generate", None)
    if generate is None:
        raise PeftLabError(f"{type(core).__name__} has no generate(); load a language model, e.g. 'smollm2-135m'.")
    apart = is_encoder_decoder(core)
    # An encoder reads a text to its end token, as in training; a decoder goes on.
    read = encoder_ids if apart else prompt_ids
    encoded = [{"input_ids": read(tokenizer, prompt)} for prompt in listed]
    _check_prompts(core, encoded)
    parts = batches(core, [len(example["input_ids"]) for example in encoded], batch_size)
    # An encoder reads padding on the right as well, and what stands in front of the text stays close to it.
    collate = Collator(tokenizer, side="right" if apart else "left")
    stops = _stops(core, tokenizer)
    answers = [""] * len(listed)
    # transformers finds strings that end an answer by the tokenizer
    more = {"tokenizer": tokenizer} if getattr(core.generation_config, "stop_strings", None) else {}
    with (
        mode(core, False),
        text_positions(core),
        _greedy(core, tokenizer, stops, max_new_tokens),
        Bar(len(listed), "Generating", unit="answer", enabled=progress) as bar,
    ):
        for chosen in parts:
            batch = to_device(collate([encoded[index] for index in chosen]), device_of(core))
            output = core.generate(**batch, **more)
            for index, row in zip(chosen, _new_tokens(core, batch, output), strict=True):
                answers[index] = tokenizer.decode(_until(row, stops), skip_special_tokens=True)
            bar.update(len(chosen))
    return answers


def _new_tokens(model: nn.Module, batch: dict[str, torch.Tensor], output: torch.Tensor) -> list[list[int]]:
    """Return the generated tokens of each row. Only a decoder-only model's output starts with the prompt."""
    if is_encoder_decoder(model):
        return output[:, 1:].tolist()  # the first is the decoder's start token
    return output[:, batch["input_ids"].shape[1] :].tolist()


def _until(row: list[int], stops: list[int]) -> list[int]:
    """Return the tokens before the first end token. Padding follows it, and that need not be a special token."""
    for position, token in enumerate(row):
        if token in stops:
            return row[:position]
    return row


def _check_prompts(model: nn.Module, encoded: Sequence[Mapping[str, list[int]]]) -> None:
    """Refuse prompts without a token, and tokens that the model does not have."""
    size = vocabulary(model)
    for place, example in enumerate(encoded):
        ids = example["input_ids"]
        if not ids:
            raise PeftLabError(f"Prompt {place} has no token; a model needs one to go on from.")
        if size is not None and not 0 <= min(ids) <= max(ids) < size:
            raise PeftLabError(
                f"Prompt {place} has the token {max(ids)}, and the vocabulary of {type(model).__name__} goes from 0 to "
                f"{size - 1}. Is this the model's tokenizer? If it was extended, call "
                "model.resize_token_embeddings(len(tokenizer)) before adapters are attached."
            )


def _stops(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, as they are learned, and those of the generation config."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    if own and tokenizer.eos_token_id is None:
        return own
    return list(dict.fromkeys([*end_ids(tokenizer), *own]))


@contextmanager
def _greedy(core: nn.Module, tokenizer: Any, stops: list[int], max_new_tokens: int) -> Iterator[None]:
    """Make the model's generation config a greedy one for a while, with all else that it says.

    Passing `do_sample=False` beside a config that samples makes transformers warn about each setting that then has no
    effect, so these are left out.
    """
    from transformers import GenerationConfig

    model: Any = core  # a mixin gives it this config
    before, plain = model.generation_config, GenerationConfig()
    greedy = copy.deepcopy(before) or GenerationConfig()
    for name in (*NOT_GREEDY, *NOT_TOKENS):
        if hasattr(greedy, name):
            setattr(greedy, name, getattr(plain, name, None))
    greedy.update(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    model.generation_config = greedy
    try:
        yield
    finally:
        model.generation_config = before
