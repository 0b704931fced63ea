"""Prompts and answers as texts or as messages, and the tokens that a tokenizer and its chat template make of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from peftlab.errors import PeftLabError

_PROBE = "peftlab-probe"  # stands for an answer when a chat template is asked what follows one

Prompt = str | Sequence[Mapping[str, str]]
Completion = str | Sequence[Mapping[str, str]]


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The tokens a model reads before it answers.

    Args:
        tokenizer: a transformers tokenizer. With a chat template the prompt becomes a user's turn, followed by the
            opening of the assistant's; without one it is the plain text.
        prompt: a string, or, with a chat template, a list of `{"role": ..., "content": ...}`.

    Raises:
        PeftLabError: the prompt is neither, or the chat template refuses it.
    """
    ids = encoder_ids(tokenizer, prompt)
    # Encoders and T5 close every text with an end token; a prompt goes on.
    plain = tokenizer.chat_template is None
    return ids[:-1] if plain and ids and ids[-1] == tokenizer.eos_token_id else ids


def encoder_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The tokens of a prompt that an encoder reads whole, to its end token where the tokenizer writes one."""
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else messages_of(prompt, "prompt")
        text = from_template(tokenizer, messages, add_generation_prompt=True)
        # the template wrote the special tokens
        return list(tokenizer(text_of(text, "conversation"), add_special_tokens=False)["input_ids"])
    if not isinstance(prompt, str) and isinstance(prompt, Sequence):
        raise PeftLabError("This tokenizer has no chat template, so a prompt is one string, not a list of messages.")
    return list(tokenizer(text_of(prompt, "prompt"))["input_ids"])


def end_ids(tokenizer: Any) -> list[int]:
    """The tokens that end an answer: first the one to learn (end of turn, in a chat), then end-of-text if it differs.

    Raises:
        PeftLabError: the tokenizer has no end token, so a model could never learn to stop.
    """
    ids = []
    if tokenizer.chat_template is not None:
        conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        text = from_template(tokenizer, conversation)
        # What the template writes after an answer begins with the end of the turn; it counts if it is one special token
        after = tokenizer(text.rpartition(_PROBE)[2], add_special_tokens=False)["input_ids"]
        if after and after[0] in special_ids(tokenizer):
            ids.append(after[0])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise PeftLabError("The tokenizer has no end token; set tokenizer.eos_token before you encode answers.")
    return ids


def special_ids(tokenizer: Any) -> set[int]:
    """The special tokens: those that the tokenizer's settings name, and those that were added to it as such."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    return {*tokenizer.all_special_ids, *(token for token, about in added if about.special)}


def completion_text(completion: Completion) -> str:
    """The text of an answer, which may be given as messages: one, the assistant's.

    Raises:
        PeftLabError: it is no text, several messages, or another's.
    """
    if isinstance(completion, (str, int, float, type(None))) or not isinstance(completion, Sequence):
        return text_of(completion, "completion")
    messages = messages_of(completion, "completion")
    roles = [message["role"] for message in messages]
    if roles != ["assistant"]:
        raise PeftLabError(
            f"A completion as messages is one message of the assistant; found the roles {', '.join(map(str, roles))}. "
            "Put what comes before the last answer into the prompt."
        )
    content = messages[0]["content"]
    if isinstance(content, (list, tuple)) and all(isinstance(part, Mapping) and "text" in part for part in content):
        content = "".join(part["text"] for part in content)
    return text_of(content, "completion's content")


def text_of(value: Any, what: str) -> str:
    """The value, if it is a text.

    Raises:
        PeftLabError: it is none; the message says what it is.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise PeftLabError(
                f"A {what} holds half a character ({value[error.start]!a} at place {error.start}), which no tokenizer "
                "takes. Was it cut inside an emoji? text.encode('utf-8', 'ignore').decode() leaves such halves out."
            ) from None
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise PeftLabError(
            f"A {what} is missing ({value}). pandas reads texts such as 'NA' and 'None' as missing unless it is called "
            "with keep_default_na=False."
        )
    raise PeftLabError(f"A {what} is a text, found {value!r:.60} ({type(value).__name__}); str(...) makes one of it.")


def messages_of(value: Any, what: str) -> list[dict[str, Any]]:
    """A list of messages, each with a role and a content.

    Raises:
        PeftLabError: it is something else.
    """
    if not isinstance(value, Sequence):
        text_of(value, what)
    messages = list(value)
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or not _says_something(message):
            raise PeftLabError(
                f"A {what} as messages is a list of {{'role': ..., 'content': ...}}, found {message!r:.80} in it."
            )
    if not messages:
        raise PeftLabError(f"A {what} holds no message.")
    return messages


def _says_something(message: Mapping[str, Any]) -> bool:
    """Whether a message has a content; a call of a tool may stand without one."""
    return message.get("content") is not None or bool(message.get("tool_calls"))


def from_template(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> Any:
    """The conversation as the tokenizer's chat template writes it: a text, unless the options ask for tokens.

    Raises:
        PeftLabError: the template, which is a program of the tokenizer's makers, refuses it or fails.
    """
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(map(repr, tokenizer.chat_template))
        first = next(iter(tokenizer.chat_template), "name")
        raise PeftLabError(
            f"The tokenizer has the chat templates {names} and none called 'default'. Choose one: "
            f"tokenizer.chat_template = tokenizer.chat_template[{first!r}]."
        )
    try:
        return tokenizer.apply_chat_template(messages, **{"tokenize": False, **options})
    except Exception as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        advice = ""
        if any(message["role"] == "system" for message in messages):
            advice = " If it takes no system turn, put that text at the beginning of the user's."
        raise PeftLabError(
            f"The tokenizer's chat template refuses a conversation of the roles {roles}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}.{advice}"
        ) from error
