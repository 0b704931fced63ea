"""The support desk: customers' messages, and the JSON tickets that a model shall write for them.

A message has a few sentences. One of them says what the customer wants for which product, and one may say how soon. The
others do not matter. The ticket has three fields:

| field | value | when |
| --- | --- | --- |
| intent | `refund` | the customer wants the money back |
| | `repair` | the product is faulty, and no money is asked for |
| | `delivery` | it has not arrived, or was lost on the way |
| | `billing` | an invoice or a charge is wrong or missing |
| | `advice` | a question about using it |
| product | one of `PRODUCTS` | the one that needs attention; others may be mentioned |
| urgency | `urgent` | needed now or today |
| | `can wait` | the writer says so |
| | `normal` | the message says nothing about time; feelings do not count |

A seeded generator draws the messages. They are the same on every machine and version of Python. The three splits have
no sentence in common, with or without a label (see `phrases`). Nothing here imports torch.
"""

import itertools
import json
import random
from collections.abc import Sequence
from typing import TypeVar

from peftlab.assets import phrases
from peftlab.checks import checked, number, one_of, whole
from peftlab.errors import PeftLabError

Item = TypeVar("Item")

FIELDS = ("intent", "product", "urgency")
INTENTS = tuple(phrases.INTENTS)
PRODUCTS = phrases.PRODUCTS
URGENCIES = tuple(phrases.URGENCY)
SIZES = {"train": 4000, "validation": 500, "test": 500}
MOST_MESSAGES = 1_000_000
PATIENCE = 5000  # after this many draws in a row without a new message, the phrases are used up
INSTRUCTION = "Reply with the ticket as JSON."


@checked("size", "difficulty")
def generate(split: str, size: int | None = None, *, difficulty: float = 0.15, seed: int = 0) -> list[dict[str, str]]:
    """Generate messages with their tickets. No two messages are equal.

    Args:
        split: `"train"`, `"validation"` or `"test"`. Each has its own phrases.
        size: the number of messages. By default 4,000 for training and 500 each for validation and test. A smaller size
            gives the first messages of a larger one.
        difficulty: from 0 (only the request and the urgency) to 1. The higher it is, the more often a message mentions
            another product, feelings and dates. Above 0.25, urgency is more and more often expressed in words other
            than the label's. Above 0.5, words of other intents occur too, products are described instead of named, and
            urgency is implied instead of stated.
        seed: another seed gives other messages from the same phrases.

    Returns:
        A list of dicts with `message`, `ticket` (canonical JSON), `intent`, `product` and `urgency`. Each stretch of
        120 rows holds each combination of intent, product and urgency once.

    Raises:
        PeftLabError: an unknown split, a difficulty outside [0, 1], or more messages than the phrases allow.

    >>> pl.support_desk.generate("train", size=1)[0]["message"]
    'It is really urgent. I do not want a new printer, I want my money. Best wishes, Tom'
    """
    split = one_of("split", split, SIZES)
    difficulty = number("difficulty", difficulty, least=0, most=1)
    size = SIZES[split] if size is None else whole("size", size, least=0, ceiling=MOST_MESSAGES)
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


@checked("difficulty")
def message(split: str, intent: str, product: str, urgency: str, difficulty: float, draw: "Draw") -> str:
    """Draw one message with the given labels."""
    split, difficulty = one_of("split", split, SIZES), number("difficulty", difficulty, least=0, most=1)
    _check_labels(intent, product, urgency)
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


@checked()
def ticket(intent: str, product: str, urgency: str) -> str:
    """Return the canonical JSON of a ticket.

    >>> pl.support_desk.ticket("repair", "lamp", "normal")
    '{"intent":"repair","product":"lamp","urgency":"normal"}'
    """
    _check_labels(intent, product, urgency)
    return json.dumps({"intent": intent, "product": product, "urgency": urgency}, separators=(",", ":"))


def _check_labels(*labels: str) -> None:
    for name, label, known in zip(FIELDS, labels, (INTENTS, PRODUCTS, URGENCIES), strict=True):
        one_of(name, label, known)


@checked()
def prompt(message: str) -> list[dict[str, str]]:
    """Return what the model reads: the instruction as the system's turn and the message as the user's."""
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": message}]


@checked()
def parse(answer: str) -> dict | None:
    """Return the ticket in an answer, or None if the answer is anything but one JSON object and white space.

    >>> pl.support_desk.parse('{"intent":"repair"}'), pl.support_desk.parse("Here it is: {}")
    ({'intent': 'repair'}, None)
    """
    try:
        found = json.loads(answer)
    except (ValueError, TypeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@checked()
def score(answers: Sequence[str], tickets: Sequence[str]) -> dict[str, float]:
    """Return the shares of right answers, between 0 and 1.

    - `exact`: the three fields are right and there is nothing else. Spaces and the order of fields do not matter.
    - `intent`, `product`, `urgency`: this field is right.
    - `valid`: the answer is a JSON object.

    >>> pl.support_desk.score(['{"intent":"repair"}'], [pl.support_desk.ticket("repair", "lamp", "normal")])
    {'exact': 0.0, 'intent': 1.0, 'product': 0.0, 'urgency': 0.0, 'valid': 1.0}
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
    """Random choices that are the same everywhere. They use only `random()`, which Python promises not to change."""

    @checked()
    def __init__(self, seed: str):
        self._random = random.Random(seed)

    def below(self, n: int) -> int:
        """Draw a whole number from 0 to n - 1."""
        return int(self._random.random() * n)

    def one(self, items: Sequence[Item]) -> Item:
        """Draw one of the items."""
        return items[self.below(len(items))]

    def happens(self, share: float) -> bool:
        """Return True in this share of the calls."""
        return self._random.random() < share

    def shuffled(self, items: Sequence) -> list:
        """Return the items in a random order."""
        return sorted(items, key=lambda _: self._random.random())
