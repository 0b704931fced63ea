"""Two tasks in which what the model knows of words is of no use: news in another alphabet, and with swapped words.

Alphabet. Each Latin letter of the news becomes a Greek one, by `GREEK`. Everything else stays. The text has the same
content, but the model knows none of its words. All articles are cut to the same number of tokens. The loss is given in
bits per character, because Latin text takes fewer tokens.

Rewiring. The 1,024 tokens that are most frequent in the news take each other's places, by one fixed permutation in
which none keeps its own. So what the model knows of them is wrong in every block. The embeddings are frozen, with the
head that shares them; otherwise full fine-tuning could put their rows back. No example is shown twice.

How much must change? Each swapped token's embedding should become that of the token which it replaces. Of this change
(its squares) the best linear map makes 9% if it adds rank 1 to the identity, 13% with rank 4, 21% with 16, 40% with
64, 72% with 256, and 78% with the full rank of 576. A block does more than a linear map, and there are 30. But no small
rank does most of it. So we expect a lower loss with each higher rank, and the lowest in full fine-tuning.
"""

from __future__ import annotations

import copy
import math
import random
import string
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

from torch import nn

import peftlab as pl
from peftlab.bench import family, lora

Row = dict[str, Any]

SECTIONS = ("alphabet", "rewiring")
SWAPPED = 1024  # tokens
READ = 256  # examples of a split on which a loss is measured
GREEK = dict(zip(string.ascii_letters, "αβψδεφγηιξκλμνοπθρστυωώχύζΑΒΨΔΕΦΓΗΙΞΚΛΜΝΟΠΘΡΣΤΥΩΏΧΎΖ", strict=True))
LATIN = {greek: latin for latin, greek in GREEK.items()}


def measure(point: Row) -> Row:
    """Train as a point says, and return its row."""
    if point["section"] == "rewiring":
        return rewired(point)
    examples = [one.greek for one in articles("train", point["tokens"], point["articles"])]
    model, losses = family.trained(point, examples, precision=point["precision"])
    row = {**point, **losses, **read(model, "validation", point["tokens"])}
    if point["scored"]:
        row |= {**read(model, "test", point["tokens"]), **family.on_news(model)}
    return row


# ------------------------------------------------------------------------------------------------------- alphabet


class Article(NamedTuple):
    """The beginning of an article in both alphabets, and the number of characters behind its first token."""

    greek: Row
    latin: Row
    greek_characters: int
    latin_characters: int


@cache
def articles(split: str, tokens: int, number: int | None = None) -> list[Article]:
    """Return the articles of a split, cut to so many tokens of the Greek text."""
    rows = pl.load_data("news")[split]
    return [article(row["text"], tokens) for row in rows.select(range(len(rows) if number is None else number))]


def article(text: str, tokens: int) -> Article:
    """Encode one article in both alphabets."""
    tokenizer = lora.base()[1]
    beginning = text[: 4 * tokens]  # a Greek token is seldom longer than a character
    greek = pl.encode_text(tokenizer, written(beginning, GREEK), tokens, end=False)
    shown = tokenizer.decode(greek["input_ids"]).rstrip("\ufffd")  # the cut may go through a letter
    latin = pl.encode_text(tokenizer, written(shown, LATIN), end=False)
    first = len(tokenizer.decode(latin["input_ids"][:1]))
    return Article(greek, latin, len(shown) - 1, len(shown) - first)


def written(text: str, letters: dict[str, str]) -> str:
    """Return a text in other letters."""
    return "".join(letters.get(letter, letter) for letter in text)


def read(model: nn.Module, split: str, tokens: int) -> Row:
    """Return the loss on the articles of a split, in nats per token and in bits per character.

    On the test articles, the bits for their Latin originals, too.
    """
    ours = articles(split, tokens)
    greek, latin = [one.greek for one in ours], [one.latin for one in ours]
    loss, bits = bits_per_character(model, greek, sum(one.greek_characters for one in ours))
    if split == "validation":
        return {"validation_loss": loss, "validation_bits": bits}
    originals = bits_per_character(model, latin, sum(one.latin_characters for one in ours))[1]
    return {"test_loss": loss, "test_bits": bits, "latin_bits": originals}


def bits_per_character(model: nn.Module, examples: list[Row], characters: int) -> tuple[float | None, float | None]:
    """Return the mean loss per token and the bits per character. The first token of each text is not predicted."""
    loss = pl.mean_loss(model, examples, pl.Collator(lora.base()[1]), batch_size=family.AT_ONCE)
    if not math.isfinite(loss):
        return None, None
    return loss, loss * sum(len(one["input_ids"]) - 1 for one in examples) / math.log(2) / characters


# ------------------------------------------------------------------------------------------------------- rewiring


def rewired(point: Row) -> Row:
    """Train on news with swapped words, and return the row.

    It also has the untrained model's loss on the validation examples, and on the same ones before the swap.
    """
    examples = texts("train", point["tokens"])[: point["steps"] * point["batch_size"]]
    model, losses = family.trained(point, examples, frozen(), precision=point["precision"])
    given = {"validation_loss": (model, True), "base_loss": (frozen(), True), "original_loss": (frozen(), False)}
    read = {name: loss_on(net, "validation", point["tokens"], swapped) for name, (net, swapped) in given.items()}
    if point["scored"]:
        read |= {"test_loss": loss_on(model, "test", point["tokens"]), **family.on_news(model)}
    return {**point, **losses, **read}


@cache
def frozen() -> nn.Module:
    """Return the model with frozen embeddings, which are its head, too."""
    model: Any = copy.deepcopy(lora.base()[0])
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


@cache
def encoded(split: str) -> list[list[int]]:
    """Return the tokens of each article of a split."""
    tokenizer = lora.base()[1]
    return [tokenizer(row["text"], add_special_tokens=False)["input_ids"] for row in pl.load_data("news")[split]]


@cache
def swap() -> dict[int, int]:
    """Return {token: the one that takes its place}: one cycle through the most frequent tokens of the news."""
    counts = Counter(token for text in encoded("train") for token in text)
    frequent = sorted(counts, key=lambda token: (-counts[token], token))[:SWAPPED]
    random.Random(0).shuffle(frequent)
    return dict(zip(frequent, frequent[1:] + frequent[:1], strict=True))


@cache
def texts(split: str, tokens: int, swapped: bool = True) -> list[Row]:
    """Return the articles of a split in pieces of so many tokens, in a random order. Shorter ends are left out."""
    places, pieces = swap() if swapped else {}, []
    for text in encoded(split):
        starts = range(0, len(text) - tokens + 1, tokens)
        pieces += [[places.get(token, token) for token in text[start : start + tokens]] for start in starts]
    random.Random(0).shuffle(pieces)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def loss_on(model: nn.Module, split: str, tokens: int, swapped: bool = True) -> float | None:
    """Return the loss on the first pieces of a split, in nats per token."""
    examples = texts(split, tokens, swapped)[:READ]
    return lora.finite(pl.mean_loss(model, examples, pl.Collator(lora.base()[1]), batch_size=family.AT_ONCE))
