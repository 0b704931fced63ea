"""Chats: a whole conversation as its template writes it, with labels on the assistant's turns alone.

Where these stand among the tokens is found by `peftlab.training.turns`, or said by the template's own marks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftlab.checks import Tokenizer, checked, one_of, whole
from peftlab.errors import PeftLabError, warn
from peftlab.training.conversations import messages_of
from peftlab.training.encoding import MOST_TOKENS
from peftlab.training.packing import IGNORE
from peftlab.training.turns import Chat, places_of

TRAIN_ON = ("assistant", "last")
TAKEN = (
    "tools", "tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs",
    "add_generation_prompt", "continue_final_message", "chat_template", "conversation", "padding", "truncation",
    "max_length",
)  # fmt: skip


@checked("messages", "tools")
def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    train_on: str = "assistant",
    max_length: int | None = None,
    *,
    tools: Sequence[Any] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> dict[str, list[int]]:
    """Encode a conversation, of which the assistant's turns are learned, as `{"input_ids", "labels"}`.

    `input_ids` are the tokens of the conversation as the tokenizer's chat template writes it, and `labels` those of the
    assistant's turns, each with the token that ends it; all else is -100. A template that marks its generations
    (`{% generation %}`) says itself what is learned. A message with `"weight": 0` is not learned.

    Args:
        messages: a list of `{"role": ..., "content": ...}`, with what else the template reads (`tool_calls`,
            `reasoning_content`).
        train_on: "assistant" for all of the assistant's turns, "last" for the last of them. Where a template takes the
            thinking out of earlier turns, "last" teaches no turn without it.
        max_length: the most tokens of an example. What is too much is cut from the beginning, whole answers with it if
            need be; an answer that is cut is not learned.
        tools, template_options: passed to the chat template, for example `{"enable_thinking": False}`.

    Raises:
        PeftLabError: there is no chat template, or it refuses the messages; no turn is the assistant's; the last
            answer is longer than `max_length`; or the answers cannot be found exactly among the tokens.

    >>> tokenizer.chat_template = (
    ...     "{% for m in messages %}{{ m.role + ' ' + m.content + eos_token }}{% endfor %}"
    ...     "{% if add_generation_prompt %}assistant {% endif %}"
    ... )
    >>> messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "runs"}]
    >>> pl.encode_chat(tokenizer, messages)["labels"]
    [-100, -100, -100, -100, -100, 12, 0]
    """
    one_of("train_on", train_on, TRAIN_ON)
    max_length = whole("max_length", max_length, least=1, ceiling=MOST_TOKENS, optional=True)
    if isinstance(messages, str):
        raise PeftLabError(f"messages is a text, {messages!r:.60}; a conversation is a list of messages.")
    options = dict(template_options or {})
    taken = next((name for name in options if name in TAKEN), None)
    if taken is not None:
        raise PeftLabError(f"template_options holds {taken!r}, which is set here; it is for what the template reads.")
    chat = Chat(tokenizer, messages_of(messages, "conversation"), tools, options)
    turns = chat.turns[-1:] if train_on == "last" else chat.turns
    turns = [turn for turn in turns if chat.messages[turn].get("weight", 1) != 0]
    if not turns:
        raise PeftLabError("The turns of the assistant that could be learned have the weight 0.")
    if chat.is_marked:
        learned = _marked(chat, turns)
    else:
        learned = [place for turn in turns for place in places_of(chat, turn)]
    labels = [IGNORE] * len(chat.ids)
    for place in learned:
        labels[place] = chat.ids[place]
    return _shortened({"input_ids": chat.ids, "labels": labels}, max_length)


def _marked(chat: Chat, turns: list[int]) -> list[int]:
    """The places that the template's own marks say, in these turns.

    Raises:
        PeftLabError: it marks nothing in them, or something that is not the assistant's.
    """
    marked = [place for place, mark in enumerate(chat.marks or ()) if mark]
    try:
        areas = {turn: _area(chat, turn) for turn in chat.turns}
    except PeftLabError:  # a message that cannot be found: the marks are all there is
        if turns != chat.turns:
            raise
        areas = dict.fromkeys(turns, (0, len(chat.text)))
    mine = {
        turn: [place for place in marked if first <= chat.places[place][0] and chat.places[place][1] <= behind]
        for turn, (first, behind) in areas.items()
    }
    strange = set(marked) - {place for area in mine.values() for place in area}
    if strange:
        first, behind = chat.places[min(strange)]
        raise PeftLabError(
            f"The chat template marks {chat.text[first:behind]!r} as generated, and that is not the assistant's. Mend "
            "its {% generation %} marks."
        )
    chosen = sorted({place for turn in turns for place in mine[turn]})
    if not chosen:
        raise PeftLabError(
            "The chat template has {% generation %} marks, and marks nothing in these answers. Put the marks around "
            "the content of the assistant's turns and the end token."
        )
    if not any(chat.is_special(place) for place in chosen[-2:]):
        warn(
            "The chat template's {% generation %} marks leave the end of an answer out, so that the model does not "
            "learn where to stop. Put the end token inside them."
        )
    return chosen


def _area(chat: Chat, turn: int) -> tuple[int, int]:
    """From the end of the content before a turn to the beginning of the content after it."""
    before, after = turn - 1, turn + 1
    begin = chat.content(chat.messages, before, chat.text)[1] if turn else 0
    behind = chat.content(chat.messages, after, chat.text)[0] if after < len(chat.messages) else len(chat.text)
    return begin, behind


def _shortened(example: dict[str, list[int]], most: int | None) -> dict[str, list[int]]:
    """The example with at most so many tokens: what follows the last label goes first, then the beginning.

    Raises:
        PeftLabError: the last answer and one token before it are longer.
    """
    ids, labels = example["input_ids"], example["labels"]
    if most is None or len(ids) <= most:
        return example
    last = max(place for place, label in enumerate(labels) if label != IGNORE)
    stop = max(last + 1, most)
    ids, labels = ids[:stop], labels[:stop]
    answer = next((last - place for place in range(last, -1, -1) if labels[place] == IGNORE), last + 1)
    if answer + 1 > most:
        raise PeftLabError(
            f"The last answer has {answer} tokens with its end token and needs at least one token of the conversation "
            f"before it, but max_length is {most}. Raise max_length to {answer + 1}."
        )
    ids, labels = ids[-most:], labels[-most:]
    for place in range(most):  # an answer that has lost its beginning, or all that stood before it
        if labels[place] == IGNORE:
            break
        labels[place] = IGNORE
    return {"input_ids": ids, "labels": labels}
