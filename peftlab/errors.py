"""The one kind of error this package raises for a person's mistake, and the near matches its messages carry."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftLabError(ValueError):
    """Something asked for cannot be done; the message says what was wrong, what was found and what to do.

    It is a `ValueError`, so code that knows nothing of this package catches it as such. The command line
    prints the message as one line and exits with status 2.
    """


def near_matches(word: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The names in `known` that `word` may have been meant to be, the likeliest first (at most `limit`)."""
    names = {str(name).lower(): str(name) for name in known}
    word = str(word).lower()
    close = difflib.get_close_matches(word, names, n=limit, cutoff=0.6)
    if not close:  # "llama" is no near spelling of "llama-2-7b", but a person who types it means one of those
        close = [name for name in names if len(word) >= 3 and (word in name or name in word)][:limit]
    return [names[name] for name in close]


def did_you_mean(word: str, known: Iterable[str], limit: int = 3) -> str:
    """`" Did you mean 'a' or 'b'?"` for the near matches of `word` in `known`; an empty string without any."""
    close = near_matches(word, known, limit)
    if not close:
        return ""
    quoted = [repr(name) for name in close]
    listed = quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " or " + quoted[-1]
    return f" Did you mean {listed}?"
