"""The error that this package raises for a user's mistake, and the near matches in its messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


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
