"""The forms that data for fine-tuning comes in, told by their columns, and each made into one of four.

| columns | form | what becomes of it |
| --- | --- | --- |
| `messages` | chat | each of the assistant's turns is learned |
| `conversations` | ShareGPT's chat (`from`, `value`) | the same, with `human` as the user and `gpt` as the assistant |
| `prompt`, `completion` or `ticket` | prompt and completion | the completion is learned |
| `instruction`, `input`, `output` | Alpaca's | instruction and input are the prompt, the output is learned |
| `text`, `label` | classification | the label is learned |
| `text` | text | every token is learned |

Beside a chat may stand `tools` and `system`; beside Alpaca's columns `system` and `history`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftlab.commands.reading import Row
from peftlab.errors import PeftLabError, did_you_mean, near_matches

COMPLETIONS = ("completion", "ticket")
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# What others call the roles
ALSO = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "chatbot": "assistant",
    "model": "assistant", "ai": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip
# What others call the columns
RENAMED = {
    "response": "completion", "answer": "completion", "target": "completion", "question": "prompt", "query": "prompt",
    "sentence": "text", "content": "text", "labels": "label", "class": "label", "category": "label",
    "chat": "messages", "dialogue": "messages", "dialog": "messages", "turns": "messages",
}  # fmt: skip
KNOWN = ("messages", "conversations", "prompt", *COMPLETIONS, "instruction", "input", "output", "text", "label")
WANTED = (
    "it needs prompt and completion, text and label, or text alone; for chats messages (role, content) or "
    "conversations (from, value); or instruction, input and output"
)


@dataclass(frozen=True)
class Form:
    """A form that data comes in.

    Attributes:
        name: what it is called when it was found.
        kind: what becomes of it: chat, completion, classification or text.
        columns: those that are read, the one to learn last.
        beside: those that are read where there are any.
        told: what is done with it.
        change: makes of a row one of its kind.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    told: str
    beside: tuple[str, ...] = ()
    change: Callable[[Row, Form], dict[str, Any]] | None = None

    @property
    def answer(self) -> str:
        """The column to learn, once a row is changed."""
        return "messages" if self.kind == "chat" else "completion" if self.change else self.columns[-1]


def form_of(columns: Sequence[str], name: str) -> Form:
    """The form of data with these columns.

    Raises:
        PeftLabError: they are of no known form; the message names near matches.
    """
    for form in FORMS:
        if set(form.columns) <= set(columns):
            return form
    raise PeftLabError(f"{name} has the columns {', '.join(columns)}; {WANTED}.{_renaming(columns)}")


def changed(row: Row, form: Form, name: str) -> Row:
    """A row in the form of its kind.

    Raises:
        PeftLabError: a column is not there, or holds nothing, or something else than it should.
    """
    row = Row(dict(row), row.place)  # the validation may be the test, too
    for column in form.columns:
        if form.kind != "chat" and column != "label":
            row[column] = cell(row, column, name)
        elif row.get(column) is None or row[column] != row[column]:
            raise hole(row, column, name)
    return row if form.change is None else Row(form.change(row, form), row.place)


def cell(row: Row, column: str, name: str) -> Any:
    """A row's text: a whole number is one too, and a list is a conversation.

    Raises:
        PeftLabError: nothing is there, or something that is no text.
    """
    value = row.get(column)
    if value is None or value != value:  # not a number
        raise hole(row, column, name)
    if isinstance(value, (str, list)):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise PeftLabError(
        f"{name}: {column} is a text, found {value!r:.60} in {str(row)[:80]} ({row.where}). Put it in quotes."
    )


def hole(row: Row, column: str, name: str) -> PeftLabError:
    near = did_you_mean(column, [other for other in row if other not in KNOWN]) if column not in row else ""
    return PeftLabError(
        f"{name} has a row without {column} ({row.where}): {str(dict(row))[:80]}. Fill it in, or take the row out."
        f"{near}"
    )


def unused(columns: Sequence[str], form: Form) -> list[str]:
    """The columns that are not read."""
    return [column for column in columns if column not in (*form.columns, *form.beside)]


def _chat(row: Row, form: Form) -> dict[str, Any]:
    """{"messages", "tools"} of a chat, whatever its keys and roles are called."""
    (column,) = form.columns
    value = _parsed(row, column)
    if not isinstance(value, list) or not value:
        raise PeftLabError(
            f"{row.where}: {column} is a list of messages, each {{'role': ..., 'content': ...}} or {{'from': ..., "
            f"'value': ...}}; found {value!r:.80}."
        )
    messages = [_message(one, number, row) for number, one in enumerate(value, 1)]
    system = row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise PeftLabError(
            f"{row.where}: no message is the assistant's, so there is nothing to learn; found {roles}. Take the row "
            "out, or add the answer."
        )
    tools = _parsed(row, "tools") or None
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools)):
        raise PeftLabError(f"{row.where}: tools is a list of objects that describe functions, found {tools!r:.80}.")
    return {"messages": messages, "tools": tools}


def _message(value: Any, number: int, row: Row) -> dict[str, Any]:
    where = f"{row.where}: message {number}"
    if not isinstance(value, Mapping):
        raise PeftLabError(f"{where} is {value!r:.60}, not an object such as {{'role': 'user', 'content': '...'}}.")
    keys = ("role", "content") if "role" in value else ("from", "value")
    missing = next((key for key in keys if key not in value), None)
    if missing == "content" and value.get("tool_calls"):
        missing = None
    if missing is not None:
        wanted = ("role", "content", "from", "value")
        near = next((found for key in value if key not in wanted if (found := did_you_mean(str(key), wanted))), "")
        raise PeftLabError(
            f"{where} has the keys {', '.join(map(repr, value))}; it needs 'role' and 'content', or 'from' and "
            f"'value'.{near}"
        )
    role, content = (value.get(key) for key in keys)
    if content is None and not value.get("tool_calls"):
        raise PeftLabError(f"{where} ({role}) has no {keys[1]}: {str(dict(value))[:80]}. Fill it in, or take it out.")
    if content is not None and not isinstance(content, (str, list)):
        raise PeftLabError(f"{where} ({role}): {keys[1]} is a text, found {content!r:.60}. Put it in quotes.")
    named = str(role).strip().lower()
    named = ALSO.get(named, named)
    if named not in ROLES:
        known = (*ROLES, *ALSO)
        raise PeftLabError(f"{where} has the role {role!r}; known are {', '.join(known)}.{did_you_mean(named, known)}")
    rest = {key: entry for key, entry in value.items() if key not in keys and entry is not None}
    return {"role": named, **({} if content is None else {"content": content}), **rest}


def _alpaca(row: Row, form: Form) -> dict[str, Any]:
    """{"prompt", "completion", "plain"}: the instruction, and the input after an empty line if there is one.

    `plain` is the prompt for a tokenizer without a chat template, with Alpaca's own headings.
    """
    given = row.get("input")
    if given is not None and given == given and not isinstance(given, (str, int)):
        raise PeftLabError(f"{row.where}: input is a text, found {given!r:.60}. Put it in quotes.")
    prompt = row["instruction"] if given in (None, "") or given != given else f"{row['instruction']}\n\n{given}"
    system, history = row.get("system"), row.get("history")
    before = [{"role": "system", "content": system}] if system else []
    plain = f"{system}\n\n" if system else ""
    for pair in history or ():
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise PeftLabError(f"{row.where}: history is a list of pairs [question, answer], found {pair!r:.80}.")
        before += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        plain += f"### Instruction:\n{pair[0]}\n\n### Response:\n{pair[1]}\n\n"
    heading = "" if prompt == row["instruction"] else f"### Input:\n{given}\n\n"
    plain += f"### Instruction:\n{row['instruction']}\n\n{heading}### Response:\n"
    asked = [*before, {"role": "user", "content": prompt}] if before else prompt
    return {"prompt": asked, "completion": row["output"], "plain": plain}


def _parsed(row: Row, column: str) -> Any:
    """A value that may be written as JSON, as in a table's cell."""
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise PeftLabError(f"{row.where}: {column} is no list and no JSON ({error}): {value!r:.80}.") from error
    return value


def _renaming(columns: Sequence[str]) -> str:
    """What columns may have been meant."""
    for column in columns:
        plain = column.strip().lower()
        known = RENAMED.get(plain) or next(iter(near_matches(plain, KNOWN, 1)), None)
        if known is not None and known not in columns and len(plain) > 2:
            return f" Rename {column!r} to {known!r}, if that is what it holds."
    return ""


CHAT = "the assistant's turns are learned, the rest is context"
FORMS = (
    Form("chat messages", "chat", ("messages",), CHAT, ("tools", "system"), _chat),
    Form("ShareGPT conversations", "chat", ("conversations",), CHAT, ("tools", "system"), _chat),
    Form("prompt and completion", "completion", ("prompt", "completion"), "the completion is learned"),
    Form("prompt and ticket", "completion", ("prompt", "ticket"), "the ticket is learned"),
    Form(
        "Alpaca's instruction, input and output", "completion", ("instruction", "output"),
        "instruction and input are the prompt, the output is learned", ("input", "system", "history"), _alpaca,
    ),
    Form("text and label", "classification", ("text", "label"), "the label is learned"),
    Form("text", "text", ("text",), "every token is learned"),
)  # fmt: skip
