"""Turns: where the assistant's answers stand among the tokens of a conversation as its chat template writes it.

The template is a program of the tokenizer's makers. It may strip spaces, drop the thinking of earlier turns, or put the
system's words elsewhere, so that a turn's tokens cannot be found by writing it alone. What is certain is this:

- the whole conversation T, which is what the model reads. Its tokens are the example;
- what the model is given before it writes turn k: the turns before it, and the opening of an assistant's turn, P_k;
- what stands there once turn k is written: E_k.

Where T begins with P_k and with E_k, turn k is what stands between. Where it does not, the parts that differ lie in the
other turns: the content of a turn is found by writing the conversation with another word in its place, and what the
template itself writes between two contents is compared from there. The end of the turn is learned, and what the
template writes behind it is not. Whatever cannot be found so is an error and never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any

from peftlab.errors import PeftLabError, warn
from peftlab.training.conversations import from_template, special_ids

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class Chat:
    """A conversation, its text T and its tokens, each with its first character and the one behind its last.

    Raises:
        PeftLabError: the template refuses the conversation, or the tokenizer does not tell where its tokens are.
    """

    tokenizer: Any
    messages: list[dict[str, Any]]
    tools: Any
    options: dict[str, Any]

    def __post_init__(self) -> None:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise PeftLabError(
                "The tokenizer has no chat template, which says how a conversation is written. Take the tokenizer of a "
                "chat model, set tokenizer.chat_template, or encode prompt and answer with pl.encode_completion."
            )
        self.turns = [place for place, message in enumerate(self.messages) if message["role"] == "assistant"]
        if not self.turns:
            roles = ", ".join(dict.fromkeys(str(message["role"]) for message in self.messages))
            raise PeftLabError(f"No message has the role 'assistant', so there is nothing to learn; found {roles}.")
        if not getattr(self.tokenizer, "is_fast", False):
            raise PeftLabError(
                f"{type(self.tokenizer).__name__} does not tell where in a text its tokens are. Load the fast one: "
                "AutoTokenizer.from_pretrained(..., use_fast=True)."
            )
        self.text = self.write(self.messages)
        template = self.tokenizer.get_chat_template(tools=self.tools)
        self.is_marked = bool(MARKS.search(template))
        more: dict[str, Any] = {"return_assistant_tokens_mask": True} if self.is_marked else {}
        # The template's own tokens: not what we would make of its text
        encoded = from_template(
            self.tokenizer, self.messages, tokenize=True, return_dict=True, tools=self.tools, **self.options, **more,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )  # fmt: skip
        self.ids, self.places = list(encoded["input_ids"]), [tuple(place) for place in encoded["offset_mapping"]]
        self.marks = encoded.get("assistant_masks")

    def write(self, messages: list[dict[str, Any]], opened: bool = False) -> str:
        """The template's text of some messages; `opened` for an answer to come."""
        more = {"add_generation_prompt": True} if opened else {}
        return from_template(self.tokenizer, messages, tools=self.tools, **self.options, **more)

    @cached_property
    def opens_answers(self) -> bool:
        """Whether the template writes something, where it is asked to, that an answer is to follow."""
        before = self.messages[: next(turn for turn in self.turns if turn)]
        return self.write(before, opened=True) != self.write(before)

    @cached_property
    def special(self) -> set[int]:
        return special_ids(self.tokenizer)

    def is_special(self, place: int) -> bool:
        return self.ids[place] in self.special

    def is_blank(self, place: int) -> bool:
        first, behind = self.places[place]
        return not self.text[first:behind].strip()

    def content(self, messages: list[dict[str, Any]], turn: int, text: str, opened: bool = False) -> tuple[int, int]:
        """Where the content of a turn stands in `text`, which the template wrote of these messages: (first, behind).

        Raises:
            PeftLabError: another word in its place does not stand in the same surroundings, once.
        """
        word = "peftlabword"
        while word in text:
            word += "x"
        message = messages[turn]
        given = message.get("content")
        other: Any = [{"type": "text", "text": word}] if isinstance(given, (list, tuple)) else word
        written = self.write([*messages[:turn], {**message, "content": other}, *messages[turn + 1 :]], opened)
        before, found, after = written.partition(word)
        if not found or word in after or not text.endswith(after):
            raise self.lost(turn, "another text in its place changes what the template writes elsewhere")
        first = len(commonprefix([text, before]))
        behind = len(text) - len(after)
        return (first, max(first, behind)) if given else (min(first, behind), behind)

    def lost(self, turn: int, why: str, advice: str = "") -> PeftLabError:
        usual = (
            "Mark it in the template with {% generation %} ... {% endgeneration %}, or encode the conversation turn by "
            "turn with pl.encode_completion(tokenizer, messages before, answer)."
        )
        return PeftLabError(
            f"The answer in message {turn + 1} of {len(self.messages)} cannot be found exactly in what the chat "
            f"template writes: {why}. {advice or usual}"
        )


def places_of(chat: Chat, turn: int) -> Iterator[int]:
    """The places of the tokens of a turn that are learned: from what the model is given on, to the end of the turn."""
    begin, content_end, end, loose = _region(chat, turn)
    places = chat.places
    straddling = next((place for place in places if place[0] < begin < place[1]), None)
    if straddling is not None:
        both = chat.text[slice(*straddling)]
        if not loose or chat.text[straddling[0] : begin].strip():
            raise chat.lost(
                turn,
                f"its first token, {both!r}, begins before it, in what the model is given",
                "Take the blanks off the answer's beginning, or off the end of what the template opens an answer with.",
            )
        begin = straddling[0]
    split = next((place for place in places if place[0] < content_end < place[1] and place[1] > end), None)
    if split is not None and chat.text[content_end : split[1]].strip():
        raise chat.lost(turn, f"its last token, {chat.text[slice(*split)]!r}, goes on behind it")
    inside = [
        at
        for at, (first, behind) in enumerate(places)
        if begin <= first < end and (behind <= end or first < content_end)
    ]
    closing = len(inside)  # from here on the template ends the turn: with special tokens, and blanks
    while closing and places[inside[closing - 1]][0] >= content_end:
        at = inside[closing - 1]
        if not (chat.is_special(at) or chat.is_blank(at)):
            break
        closing -= 1
    if not chat.messages[turn].get("tool_calls"):  # nothing but the end stands behind the content
        closing = next((place for place, at in enumerate(inside) if places[at][0] >= content_end), closing)
    ends = next((at for at in inside[closing:] if chat.is_special(at)), None)
    if ends is not None:
        yield from (at for at in inside if at <= ends)
        return
    warn(
        "The chat template writes no special token at the end of an answer, so that the model does not learn where to "
        "stop. Let the template end an answer with the tokenizer's eos_token."
    )
    yield from inside[:closing]


def _region(chat: Chat, turn: int) -> tuple[int, int, int, bool]:
    """Where a turn stands in the text: (first, behind its content, behind all the template writes of it, loose).

    `loose` says that blanks before the answer may belong to its first token, as the template opens no answers.
    """
    text, messages = chat.text, chat.messages
    given = chat.write(messages[:turn], opened=True) if turn else ""
    done = chat.write(messages[: turn + 1]) if turn + 1 < len(messages) else text
    opens = turn > 0 and chat.opens_answers
    content = messages[turn].get("content")
    if opens and content and isinstance(content, str) and text.startswith(done) and text.startswith(given + content):
        return len(given), len(given) + len(content), len(done), False  # as most templates write
    first, behind = chat.content(messages, turn, text)
    if text.startswith(done):
        end = len(done)
    else:
        tail = done[chat.content(messages[: turn + 1], turn, done)[1] :]
        end = behind + len(commonprefix([text[behind:], tail]))
    if end <= first and content:
        raise chat.lost(turn, "the template leaves it out")
    if opens:  # what the model is given, but not what it opens an answer with and the template does not keep
        begin = len(given) if text.startswith(given) else _aligned(chat, turn, given)
        return min(begin, first), behind, end, False
    if turn and text.startswith(given) and not text[len(given) : first].strip():
        return len(given), behind, end, True
    return first, behind, end, True


def _aligned(chat: Chat, turn: int, given: str) -> int:
    """Where an answer begins if T does not begin with what the model is given before it.

    Both hold the content of the message before. Behind it stands what the template writes between the two: the end of
    that turn and the opening of this one, as far as they are the same.
    """
    before = turn - 1
    here = chat.content(chat.messages, before, chat.text)[1]
    there = chat.content(chat.messages[:turn], before, given, opened=True)[1]
    common = len(commonprefix([chat.text[here:], given[there:]]))
    bare = chat.write(chat.messages[:turn])
    if not given.startswith(bare) or common <= len(bare) - there:
        raise chat.lost(turn, "what stands before it is not what the template opens an answer with")
    return here + common
