"""Two tasks with as much to learn as one likes: random strings, and news in an alphabet that the model hardly knows.

Strings. A string is a key of one token, which is its own, and eight tokens drawn out of 4,096: 12 bits each. They can
only be learned by heart. The model is smollm2-135m cut to these 4,096 tokens, so that its head cannot waste a bit on
others. What is left of the loss, in bits, is what is not stored.

Alphabet. Each Latin letter of the news becomes a Greek one, by `GREEK`. Everything else stays. The text has the same
content, but the model knows none of its words. All articles are cut to the same number of tokens. The loss is given in
bits per character, because Latin text takes fewer tokens.
"""

from __future__ import annotations

import copy
import math
import string
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

import peftlab as pl
from peftlab.bench import family, lora

Row = dict[str, Any]

SECTIONS = ("capacity", "alphabet")
UNLEARNED = -100
GREEK = dict(zip(string.ascii_letters, "αβψδεφγηιξκλμνοπθρστυωώχύζΑΒΨΔΕΦΓΗΙΞΚΛΜΝΟΠΘΡΣΤΥΩΏΧΎΖ", strict=True))
LATIN = {greek: latin for latin, greek in GREEK.items()}


def measure(point: Row) -> Row:
    """Train as a point says, and return its row."""
    if point["section"] == "capacity":
        rows = strings(point["strings"], point["length"], point["choices"], point["seed"])
        placed = {**point, "layers_to_transform": [int(layer) for layer in point["layers"].split(",")]}
        model, losses = family.trained(placed, rows, cut(point["choices"]), precision=point["precision"])
        return {**point, **losses, **stored(point, model, rows)}
    examples = [one.greek for one in articles("train", point["tokens"], point["articles"])]
    model, losses = family.trained(point, examples, precision=point["precision"])
    row = {**point, **losses, **read(model, "validation", point["tokens"])}
    if point["scored"]:
        row |= {**read(model, "test", point["tokens"]), **family.on_news(model)}
    return row


# -------------------------------------------------------------------------------------------------------- strings


def strings(number: int, length: int, choices: int, seed: int) -> list[Row]:
    """Return examples of a key and so many random tokens; the key is given, the others are learned."""
    drawn = torch.Generator().manual_seed(seed)
    keys = torch.randperm(choices, generator=drawn)[:number].tolist()
    tokens = torch.randint(choices, (number, length), generator=drawn).tolist()
    pairs = zip(keys, tokens, strict=True)
    return [{"input_ids": [key, *those], "labels": [UNLEARNED, *those]} for key, those in pairs]


@cache
def cut(choices: int) -> nn.Module:
    """Return smollm2-135m with so many of its tokens: the rows of its embedding, which is its head, too."""
    model: Any = copy.deepcopy(lora.base()[0])
    rows = own_rows(model.get_input_embeddings().weight.detach(), choices)
    model.set_input_embeddings(nn.Embedding.from_pretrained(rows, freeze=False))
    model.lm_head = nn.Linear(rows.shape[1], choices, bias=False, device=rows.device)
    model.config.vocab_size = choices
    model.lm_head.weight = model.get_input_embeddings().weight
    return model


def own_rows(weight: torch.Tensor, choices: int) -> torch.Tensor:
    """Return so many rows of a matrix, drawn once and for all."""
    kept = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[:choices]
    return weight[kept.to(weight.device)].clone()


def stored(point: Row, model: nn.Module, rows: list[Row]) -> Row:
    """Return the loss on the strings, in nats per token, and the stored bits: all bits, less what the loss leaves."""
    loss = pl.mean_loss(model, rows, pl.Collator(lora.base()[1]), batch_size=512)
    tokens = point["strings"] * point["length"]
    bits = tokens * math.log2(point["choices"])
    found = bits - tokens * loss / math.log(2) if math.isfinite(loss) else None
    per_parameter = None if found is None else found / pl.count_parameters(model).trainable
    return {"validation_loss": lora.finite(loss), "bits": bits, "stored": found, "per_parameter": per_parameter,
            "shown": point["steps"] * point["batch_size"] / point["strings"]}  # fmt: skip


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
