"""The support desk: customers' messages, and the JSON tickets a model is to write for them.

A message has a few sentences; one says what the customer wants of which product, one may say how soon; the others are
what people write besides. The ticket has three fields:

| field | value | when |
| --- | --- | --- |
| intent | `refund` | the customer wants the money back |
| | `repair` | the product is faulty, and no money is asked for |
| | `delivery` | it has not come, or went astray |
| | `billing` | an invoice or a charge is wrong or missing |
| | `advice` | a question about using it |
| product | one of `PRODUCTS` | the one that needs attention; others may be mentioned |
| urgency | `urgent` | needed now or today |
| | `can wait` | the writer says so |
| | `normal` | nothing is said of time; feelings do not count |

Messages are drawn by a seeded generator, the same on every machine and version of Python. The three splits share no
sentence, whether it carries a label or not (see `phrases`). Nothing here imports torch.
"""

import itertools
import json
import random
from collections.abc import Sequence
from typing import TypeVar

from peftlab.assets import phrases
from peftlab.checks import number, one_of
from peftlab.errors import PeftLabError

Item = TypeVar("Item")

FIELDS = ("intent", "product", "urgency")
INTENTS = tuple(phrases.INTENTS)
PRODUCTS = phrases.PRODUCTS
URGENCIES = tuple(phrases.URGENCY)
SIZES = {"train": 4000, "validation": 500, "test": 500}
PATIENCE = 5000  # draws in a row that bring nothing new before the phrases count as used up
INSTRUCTION = "Reply with the ticket as JSON."


def generate(split: str, size: int | None = None, *, difficulty: float = 0.15, seed: int = 0) -> list[dict[str, str]]:
    """Messages with their tickets, no two messages the same.

    Args:
        split: `"train"`, `"validation"` or `"test"`; each has phrases of its own.
        size: how many; by default 4,000 to train and 500 each for validation and test. A smaller size gives the first
            of a larger one's.
        difficulty: from 0 (the request and the urgency, nothing else) to 1. It raises how often another product,
            feelings and dates come along; above 0.25 urgency is more and more often put in other words than the
            label's; above 0.5 also words of other intents come along, products are described instead of named, and
            urgency is implied instead of stated.
        seed: another seed, other messages from the same phrases.

    Every 120 rows in a row hold each combination of intent, product and urgency once. Rows are dicts of `message`,
    `ticket` (canonical JSON), `intent`, `product` and `urgency`. Raises PeftLabError for an unknown split, a
    difficulty outside [0, 1], or more messages than the phrases can make.
    """
    split = one_of("split", split, SIZES)
    difficulty = number("difficulty", difficulty, least=0, most=1)
    size = SIZES[split] if size is None else size
    draw = Draw(f"{seed}/{split}/{difficulty:.6f}")
    combinations = list(itertools.product(INTENTS, PRODUCTS, URGENCIES))
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    while len(rows) < size:
        for labels in draw.shuffled(combinations):
            intent, product, urgency = labels
            text = message(split, intent, product, urgency, difficulty, draw)
            failures = 0
            while text in seen:
                failures += 1
                if failures > PATIENCE:
                    raise PeftLabError(
                        f"Difficulty {difficulty} makes no {size:,} distinct messages for {split!r}; it made "
                        f"{len(rows):,}. Ask for fewer, or raise the difficulty."
                    )
                text = message(split, intent, product, urgency, difficulty, draw)
            seen.add(text)
            rows.append({"message": text, "ticket": ticket(*labels)} | dict(zip(FIELDS, labels, strict=True)))
    return rows[:size]


def message(split: str, intent: str, product: str, urgency: str, difficulty: float, draw: "Draw") -> str:
    """One message for the given labels."""
    hard = max(0.0, 2 * difficulty - 1)
    other = draw.one([name for name in PRODUCTS if name != product])
    request = draw.one(phrases.INTENTS[intent][split])
    named = draw.one(phrases.DESCRIBED[product][split]) if draw.happens(0.5 * hard) else product
    worded = phrases.URGENCY if draw.happens(2 * difficulty - 0.5) else phrases.STATED
    worded = phrases.IMPLIED if draw.happens(0.5 * hard) else worded
    soon = draw.one(worded[urgency][split])
    body = [request.replace("{p}", named)]
    if soon:
        body.insert(draw.below(2), soon)  # before the request or after it
    asides: tuple[tuple[dict, float], ...] = (
        (phrases.OTHERS, difficulty),
        (phrases.PASSING, hard),
        (phrases.FEELINGS, difficulty),
        (phrases.TIMES, difficulty / 2),
    )
    for kind, share in asides:
        if draw.happens(share):
            aside = draw.one(kind[split]).replace("{o}", other).replace("{n}", str(2 + draw.below(8)))
            body.insert(draw.below(len(body) + 1), aside)
    greeting = draw.one(phrases.OPENINGS[split])
    closing = draw.one(phrases.CLOSINGS[split])
    return " ".join(part for part in (greeting, *body, closing) if part)


def ticket(intent: str, product: str, urgency: str) -> str:
    """The canonical JSON of a ticket."""
    return json.dumps({"intent": intent, "product": product, "urgency": urgency}, separators=(",", ":"))


def prompt(message: str) -> list[dict[str, str]]:
    """What the model is given: the instruction as the system's turn, the message as the user's."""
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": message}]


def parse(answer: str) -> dict | None:
    """The ticket in an answer, or None if the answer is not a JSON object and nothing else but white space."""
    try:
        found = json.loads(answer)
    except (ValueError, TypeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def score(answers: Sequence[str], tickets: Sequence[str]) -> dict[str, float]:
    """Shares, between 0 and 1, of answers that are right.

    `exact`: the three fields, right, and nothing else; spaces and the order of fields do not matter.
    `intent`, `product`, `urgency`: that field is right. `valid`: the answer is a JSON object at all.
    """
    if len(answers) != len(tickets) or not tickets:
        raise PeftLabError(f"score needs one answer for each ticket; got {len(answers)} and {len(tickets)}.")
    found = [parse(answer) for answer in answers]
    wanted = [json.loads(ticket) for ticket in tickets]
    pairs = list(zip(found, wanted, strict=True))
    shares = {"exact": sum(a == b for a, b in pairs)}
    for field in FIELDS:
        shares[field] = sum(a is not None and a.get(field) == b[field] for a, b in pairs)
    shares["valid"] = sum(a is not None for a in found)
    return {name: count / len(tickets) for name, count in shares.items()}


class Draw:
    """Chance that is the same everywhere: built on `random()` alone, the one method Python promises never to change."""

    def __init__(self, seed: str):
        self._random = random.Random(seed)

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1."""
        return int(self._random.random() * n)

    def one(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.below(len(items))]

    def happens(self, share: float) -> bool:
        """True in this share of calls."""
        return self._random.random() < share

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """The items in a random order."""
        return sorted(items, key=lambda _: self._random.random())
