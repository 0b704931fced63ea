"""A sloppy writer of JSON, for learning from a reward: short texts, of which about a third are valid.

A text is one object with one key, such as `{"a":17}`. Now and then its quotes are single ones, its last bracket is
missing, or a comma stands in front of it. Nothing here imports torch.
"""

from __future__ import annotations

import json
import random

from peftlab.checks import whole

CHARACTERS = "{}\":,'abcxyz0123456789"
END, START = 0, len(CHARACTERS) + 1  # the token behind a text, and the one before it
VOCABULARY = len(CHARACTERS) + 2
LONGEST = 12  # tokens of a text with its end
QUOTES, TAILS = ('"', '"', "'"), ("}", "}", ",}", "")  # what it draws from, each alike


def texts(count: int, seed: int = 0) -> list[str]:
    """Write texts.

    >>> from peftlab.assets import sloppy
    >>> sloppy.texts(3)
    ['{"x":97}', '{"c":65', '{"c":61}']
    """
    draw = random.Random(seed)
    return [_text(draw) for _ in range(whole("count", count, least=1))]


def _text(draw: random.Random) -> str:
    key, value = draw.choice("abcxyz"), draw.randint(0, 99)
    quote, tail = draw.choice(QUOTES), draw.choice(TAILS)
    return f"{{{quote}{key}{quote}:{value}{tail}"


def encode(text: str) -> list[int]:
    """Return the text's tokens, one for each character, without start and end."""
    return [CHARACTERS.index(character) + 1 for character in text]


def decode(tokens: list[int]) -> str:
    """Return the text of some tokens. Tokens that are no characters are left out."""
    return "".join(CHARACTERS[token - 1] for token in tokens if 0 < token <= len(CHARACTERS))


def is_valid(text: str) -> bool:
    """Say whether a text is valid JSON and an object."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
