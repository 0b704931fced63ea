"""The rules of `rules.toml`, and how they are applied: conditions, candidates, choices."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from peftlab.errors import PeftLabError, did_you_mean

Rule = Mapping[str, Any]
Facts = dict[str, Any]
FACTS = ("task", "serving", "kind", "size", "examples", "four_bit", "card", "gpus", "method", "r")
GIVES = ("method", "choose", "trap", "more")
KNOWN = {"name", "if", "because", "evidence", *GIVES}
SETTINGS = (
    "r", "alpha", "targets", "dropout", "learning_rate", "rates", "precision", "update", "ladder", "epochs", "ship",
)  # fmt: skip


class Word(NamedTuple):
    """A word that users say for a task or a need: its name, other names, and what it means."""

    name: str
    also: tuple[str, ...]
    text: str


@cache
def content() -> dict[str, Any]:
    """Return the whole of `rules.toml`. Treat it as read-only."""
    return tomllib.loads(resources.files(__package__).joinpath("rules.toml").read_text(encoding="utf-8"))


def rules() -> list[Rule]:
    """Return the rules, from the first to the last."""
    return list(content()["rule"])


def words(kind: str) -> list[Word]:
    """Return the tasks (`"task"`) or the needs (`"serving"`) that the rules know."""
    return [Word(one["name"], tuple(one["also"]), one["text"]) for one in content()[kind]]


def meaning(kind: str, name: str) -> str:
    """Return the name of a task or need with what it means."""
    return next(f"{word.name}: {word.text}" for word in words(kind) if word.name == name)


def meant(kind: str, given: str) -> str:
    """Return the name of the task or need that a user means.

    Raises:
        PeftLabError: nothing is called so (with near matches).
    """
    names = {name: word.name for word in words(kind) for name in (word.name, *word.also)}
    found = names.get(given.strip().lower())
    if found is None:
        listed = "; ".join(f"{word.name} ({word.text})" for word in words(kind))
        shown = f"{given[:60]!r}"
        raise PeftLabError(f"There is no {kind} {shown}.{did_you_mean(given[:60], names)} There are: {listed}.")
    return found


def fault(rule: Rule) -> str | None:
    """Return what is wrong with the form of a rule, or None. What its evidence says is another question."""
    if unknown := sorted(rule.keys() - KNOWN):
        return f"it has {', '.join(unknown)}, which no rule has"
    if not any(name in rule for name in GIVES):
        return "it gives nothing"
    if unknown := sorted(rule.get("if", {}).keys() - set(FACTS)):
        return f"its condition names {', '.join(unknown)}, which is no fact"
    if unknown := sorted(rule.get("choose", {}).keys() - set(SETTINGS)):
        return f"it chooses {', '.join(unknown)}, which is no setting"
    if bool({"method", "choose"} & rule.keys()) != ("because" in rule):
        return "a rule that gives a method or a setting says why (because), and no other does"
    if not rule.get("evidence"):
        return "it has no evidence: name the measured rows that carry it"
    return None


def applies(rule: Rule, facts: Facts) -> bool:
    """Say whether all conditions of a rule hold. A fact that is not known meets no condition."""
    return all(_meets(facts.get(name), wanted) for name, wanted in rule.get("if", {}).items())


def _meets(value: Any, wanted: Any) -> bool:
    if value is None:
        return False
    if isinstance(wanted, Mapping):
        return bool(wanted.get("least", -math.inf) <= value <= wanted.get("most", math.inf))
    return value in wanted if isinstance(wanted, list) else bool(value == wanted)


def candidates(facts: Facts) -> dict[str, Rule]:
    """Return the methods that the rules name, in order, each with its rule."""
    found: dict[str, Rule] = {}
    for rule in rules():
        if "method" in rule and applies(rule, facts):
            found.setdefault(rule["method"], rule)
    return found


def choices(facts: Facts) -> tuple[dict[str, Any], list[tuple[tuple[str, ...], Rule]], list[Rule]]:
    """Return (the settings for a method, which rule decided what, the rules that only give a trap or a way on).

    Args:
        facts: with the method.
    """
    chosen: dict[str, Any] = {}
    reasons, asides = [], []
    for rule in rules():
        if "method" in rule or not applies(rule, {**facts, **chosen}):
            continue
        new = {name: value for name, value in rule.get("choose", {}).items() if name not in chosen}
        chosen |= new
        if new:
            reasons.append((tuple(new), rule))
        elif "choose" not in rule:
            asides.append(rule)
    return chosen, reasons, asides


def every_evidence() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (the rule's name, an entry of its evidence) for all rules."""
    for rule in rules():
        for entry in rule["evidence"]:
            yield rule["name"], entry
