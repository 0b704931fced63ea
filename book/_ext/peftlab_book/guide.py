"""The decision guide of the book: what `book/_static/guide.js` needs to answer as `pl.recommend` does.

The rules go into the page as they are, each with its evidence computed. The script applies them to a reader's answers.
Memory needs the estimator, so `guide_peaks.json` holds the peaks of every step that an answer may need, for the
built-in shapes. `python tools/guide_peaks.py` makes it; a test says when it has to be made again.
"""

import itertools
import json
import math
from pathlib import Path

from peftlab.assets.catalogue import catalogue
from peftlab.errors import PeftLabError
from peftlab.guide import plan, recommendation, rules, times
from peftlab.guide.evidence import look_up
from peftlab.guide.recommend import impossible, too_long
from peftlab.memory import BUILT_IN, cards, load_shape

PEAKS = Path(__file__).with_name("guide_peaks.json")
SEQUENCES = (512, 1024, 2048, 4096)
EXAMPLES = (None, 1, 100, 500, 1000)  # numbers between which no rule draws a border, and more


def steps_of(shape):
    """Yield (method, settings, rung) of every step that an answer for a shape on one card may need."""
    seen = set()
    tasks, needs = ([word.name for word in rules.words(kind)] for kind in ("task", "serving"))
    named = [card for rule in rules.rules() for card in rule.get("if", {}).get("card", ())]
    for task, serving, examples, card in itertools.product(tasks, needs, EXAMPLES, ("", *named)):
        facts = {
            "task": task,
            "serving": serving,
            "kind": shape.kind,
            "size": shape.parameters,
            "four_bit": True,
            "examples": math.inf if examples is None else examples,
            "card": card,
            "gpus": 1,
        }
        for method in rules.candidates(facts):
            chosen, _, _ = rules.choices({**facts, "method": method})
            for rung in plan.rungs(chosen["ladder"], 1):
                if (key := (variant(method, chosen), rung)) not in seen:
                    seen.add(key)
                    yield method, chosen, rung


def variant(method, chosen):
    """The name of a method with those of its settings that memory depends on: lora/16/all-linear."""
    return "/".join(str(one) for one in (method, chosen.get("r"), chosen.get("targets")) if one is not None)


def rung_name(rung):
    """The name of a step: 4c is four examples at once, whose activations are computed again."""
    return f"{rung[0]}{'c' * rung[1]}"


def peaks_of(shape, steps, sequence, known):
    """{variant: {step: peak in bytes}} of a shape, with what the estimator says in the place of the steps it refuses.

    Args:
        steps: those of `steps_of`.
        known: what was found before. It is not estimated again.
    """
    found = {}
    for method, chosen, rung in steps:
        name, step = variant(method, chosen), rung_name(rung)
        before = known.get(name, {}) if isinstance(known, dict) else {}
        try:
            peak = before.get(step) if isinstance(before, dict) else None
            peak = peak or plan.peaks(shape, method, chosen, sequence, 1)(rung)
        except PeftLabError as error:
            found[name] = str(error)
        else:
            found.setdefault(name, {})[step] = peak
    return found


def stored():
    """The peaks as they are stored: {shape: {sequence: peaks_of(...)}}."""
    return json.loads(PEAKS.read_text(encoding="utf-8"))


def embedded(place=lambda page: (page, page)):
    """Everything that the script needs, as JSON can hold it.

    Args:
        place: gives (words, address) of the link to a section of the book, from "page#section".
    """
    shapes = {name: load_shape(name) for name in BUILT_IN}
    tasks = rules.words("task")
    return {
        "tasks": [word._asdict() for word in tasks],
        "serving": [word._asdict() for word in rules.words("serving")],
        "shapes": {name: {"kind": shape.kind, "size": shape.parameters, "refused": refused(shape, tasks),
                          "too_long": {n: longer for n in SEQUENCES if (longer := too_long(shape, n))}}
                   for name, shape in shapes.items()},
        "fetched": [name for name in catalogue() if name in shapes],
        "cards": {name: {"gb": size, "room": cards.card_bytes(name)} for name, size in cards.CARDS.items()},
        "context": cards.CONTEXT, "too_low": cards.TOO_LOW, "gb": cards.GB,
        "sequences": SEQUENCES,
        "no_command": recommendation.NO_COMMAND,
        "unscored": recommendation.UNSCORED,
        "timed": [one._asdict() for one in times.timed()],
        "rules": [with_findings(rule, place) for rule in rules.rules()],
        "peaks": stored(),
    }  # fmt: skip


def refused(shape, tasks):
    """{task: why this shape cannot do it}"""
    facts = {"kind": shape.kind, "size": shape.parameters, "serving": "one", "examples": math.inf}
    return {
        word.name: impossible(shape, word.name)
        for word in tasks
        if not rules.candidates({**facts, "task": word.name, "four_bit": False})
    }


def with_findings(rule, place):
    """A rule with its evidence computed."""
    found = []
    for finding in map(look_up, rule["evidence"]):
        words, address = place(finding.page)
        found.append({**finding.to_dict(), "words": words, "address": address})
    return {**rule, "evidence": found}
