"""The error that this package raises for a user's mistake, the near matches in its messages, and its warnings."""

from __future__ import annotations

import difflib
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

NO_MEMORY = re.compile(
    r"(?i)out of memory|can(?:no|')t allocate memory|not enough memory|unable to allocate|ALLOC_FAILED|"
    r"Storage size calculation overflowed|array is too big"
)


class PeftLabError(ValueError):
    """A user's mistake. The message says what was wrong, what was found and what to do.

    It is a `ValueError`, so code that does not know this package can catch it as one. The command line prints the
    message as one line and exits with status 2.

    >>> try:
    ...     pl.load_model("smollm-135m")
    ... except pl.PeftLabError as error:
    ...     print(error)
    There is no model 'smollm-135m'. Did you mean 'smollm2-135m'? ...
    """


def near_matches(word: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Return at most `limit` names in `known` that `word` may stand for, the most likely first."""
    names = {str(name).lower(): str(name) for name in known}
    word = str(word).lower()
    close = difflib.get_close_matches(word, names, n=limit, cutoff=0.6)
    if not close:  # "llama" is not spelt like "llama-2-7b", but a person who types it means such a name
        close = [name for name in names if len(word) >= 3 and (word in name or name in word)][:limit]
    return [names[name] for name in close]


def did_you_mean(word: str, known: Iterable[str], limit: int = 3) -> str:
    """Return `" Did you mean 'a' or 'b'?"` for the near matches of `word` in `known`, or an empty string."""
    close = near_matches(word, known, limit)
    if not close:
        return ""
    quoted = [repr(name) for name in close]
    listed = quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " or " + quoted[-1]
    return f" Did you mean {listed}?"


def some(paths: Sequence[str]) -> str:
    """Return the first of several paths, and how many more there are."""
    rest = f" and {len(paths) - 2} more" if len(paths) > 2 else ""
    return ", ".join(paths[:2]) + rest


def out_of_memory(error: BaseException) -> str | None:
    """Return what is known of how much memory was wanted, or `None` for an error that is not about memory.

    Python, torch on each device, numpy and safetensors each say it in their own way.
    """
    text = " ".join(str(error).split())
    if not (isinstance(error, MemoryError) or NO_MEMORY.search(text)):
        return None
    wanted = re.search(r"(?i)(?:allocate|with sizes=)\s*(\[[\d, ]+\]|[\d.]+ ?\w+)", text)
    return f" ({wanted[1]} were wanted)" if wanted else ""


_held = threading.local()  # .messages: where this thread's warnings go, if they are held back


def warn(message: str) -> None:
    """Warn, and name the user's own line: the last one outside this package that led here."""
    if getattr(_held, "messages", None) is not None:
        _held.messages.append(message)
        return
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("peftlab."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


@contextmanager
def held_back(messages: list[str]) -> Iterator[None]:
    """Add this package's warnings inside the block to `messages`, for this thread alone.

    No line of the user's leads to what another thread does. So the first thread warns of it later.
    """
    _held.messages = messages
    try:
        yield
    finally:
        _held.messages = None
