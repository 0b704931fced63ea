"""Which method for this task, this model and this card? `pl.recommend` applies the rules of `rules.toml`."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from peftlab.checks import checked, one_of, whole
from peftlab.errors import PeftLabError
from peftlab.guide.plan import Rung, first_that_fits, peaks, read_card, rungs
from peftlab.guide.recommendation import Reason, Recommendation
from peftlab.guide.rules import Facts, Rule, candidates, choices, meant
from peftlab.guide.times import time_of
from peftlab.memory.counting.builtin import BUILT_IN
from peftlab.memory.counting.shapes import Shape, load_shape

MOST = 2**40  # examples and tokens
MOST_GPUS = 1024
USUAL = 512  # tokens of an example


@checked("card", "gpus", "examples", "tokens", "sequence", "four_bit")
def recommend(
    task: str,
    model: str | os.PathLike[str] | dict | Shape,
    card: str | float | None = None,
    *,
    gpus: int = 1,
    examples: int | None = None,
    tokens: int | None = None,
    sequence: int | None = None,
    serving: str = "one",
    four_bit: bool = True,
) -> Recommendation:
    """Recommend a method and its settings, by measurements only.

    Each choice follows a rule of `peftlab/guide/rules.toml`. A rule names the measured rows that carry it, and a test
    computes them again. The memory is `peftlab.memory`'s estimate with its margin. The time is given only where this
    step was measured on this card.

    Args:
        task: `"classification"`, `"instruction"`, `"style"`, `"knowledge"`, `"preference"` or `"reward"`; or another
            word for one of these, such as `"dpo"`.
        model: a built-in shape, the path of a `config.json` or of its folder, its dict, or a `Shape`.
        card: a card by its name, as `peftlab.memory.fits` takes it, or its memory in GB. None: memory is no matter.
        gpus: how many of this card.
        examples: training examples, or instead `tokens`, the tokens of all of them.
        sequence: tokens of the longest example. None: 512, or as many as the model takes if these are fewer.
        serving: what matters when it is used: `"one"` model, `"many"` adapters on one base, the lowest `"latency"`, or
            the smallest `"file"`.
        four_bit: whether the base may be held in four bits.

    Raises:
        PeftLabError: an unknown task, model, card or need (with near matches); a number that is not positive; a task
            that this kind of model cannot do, or that no measurement is about; a sequence longer than the model takes.

    >>> found = pl.recommend("instruction", "llama-3.1-8b", "RTX 4090", examples=5000)
    >>> found.method, found.chosen["r"], found.batch, found.checkpointing
    ('lora', 16, 4, True)
    >>> print(found)
    task           instruction: write an answer to an input
    serving        one: one model for one job
    model          llama-3.1-8b, 8,030,261,248 parameters
    card           RTX 4090 (24 GB)
    method         lora
    ...
    """
    task, serving = meant("task", task), meant("serving", serving)
    one_of("four_bit", four_bit, (True, False))
    gpus = whole("gpus", gpus, least=1, ceiling=MOST_GPUS)
    sequence = whole("sequence", sequence, least=1, ceiling=MOST, optional=True)
    examples = whole("examples", examples, least=1, ceiling=MOST, optional=True)
    tokens = whole("tokens", tokens, least=1, ceiling=MOST, optional=True)
    if examples is not None and tokens is not None:
        raise PeftLabError("Give examples or tokens, not both.")
    held = None if card is None else read_card(card)
    shape = load_shape(model)
    if sequence is None:
        sequence = min(USUAL, positions_of(shape))
    if tokens is not None:
        examples = math.ceil(tokens / sequence)
    if longer := too_long(shape, sequence):
        raise PeftLabError(longer)
    facts: Facts = {
        "task": task, "serving": serving, "kind": shape.kind, "size": shape.parameters,
        "examples": math.inf if examples is None else examples, "four_bit": bool(four_bit),
        "card": held.name if held else "", "gpus": gpus,
    }  # fmt: skip
    known = candidates(facts)
    if not known:
        raise PeftLabError(impossible(shape, task))
    tried: list[Attempt] = []
    refused: dict[str, PeftLabError] = {}
    for method, rule in known.items():
        try:
            tried.append(attempt({**facts, "method": method}, rule, shape, sequence, held.room if held else None))
        except PeftLabError as error:  # GPT-2 cannot have LoKr, for example
            refused[method] = error
            continue
        if tried[-1].fits is not False:
            break
    if not tried:
        raise next(iter(refused.values()))
    best = tried[-1] if tried[-1].fits is not False else min(tried, key=lambda one: one.peak)
    method, (batch, again, way) = best.method, best.rung
    accumulation = max(1, best.chosen["update"] // (batch * gpus))
    measured = None
    if held is not None and gpus == 1:
        measured = time_of(held.name, shape.name, method, best.chosen, batch, sequence, again)
    decided = [(("method",), best.rule), *best.reasons]
    applied = [rule for _, rule in decided] + best.asides
    return Recommendation(
        task=task, serving=serving, model=shape.name, source=_path_of(model), kind=shape.kind,
        parameters=shape.parameters, card=held, gpus=gpus, sequence=sequence, examples=examples,
        four_bit=bool(four_bit), method=method,
        chosen={name: value for name, value in best.chosen.items() if name != "ladder"},
        batch=batch, checkpointing=again, accumulation=accumulation, parallel=way, peak_bytes=best.peak,
        fits=best.fits, too_large={one.method: one.peak for one in tried if one is not best},
        refused={name: str(error) for name, error in refused.items()}, time=measured,
        more=tuple(rule["more"] for rule in applied if "more" in rule),
        traps=tuple(rule["trap"] for rule in applied if "trap" in rule),
        reasons=tuple(Reason(names, rule["because"], tuple(rule["evidence"])) for names, rule in decided),
    )  # fmt: skip


class Attempt(NamedTuple):
    """A candidate with its settings, and the first of its steps that fits, or the smallest."""

    method: str
    rule: Rule
    chosen: dict[str, Any]
    reasons: list[tuple[tuple[str, ...], Rule]]
    asides: list[Rule]
    rung: Rung
    peak: int
    fits: bool | None


def attempt(facts: Facts, rule: Rule, shape: Shape, sequence: int, room: int | None) -> Attempt:
    """Choose the settings for a candidate, and find a step that fits.

    Args:
        facts: with the method.
        rule: the one that named the method.
        room: the largest estimate that fits; None if that is no matter.
    """
    method, gpus = facts["method"], facts["gpus"]
    chosen, reasons, asides = choices(facts)
    found = first_that_fits(rungs(chosen["ladder"], gpus), peaks(shape, method, chosen, sequence, gpus), room)
    return Attempt(method, rule, chosen, reasons, asides, *found)


def _path_of(model: Any) -> str | None:
    """Return the folder of a model that was given as a path, or None."""
    if not isinstance(model, (str, os.PathLike)) or str(model) in BUILT_IN:
        return None
    path = Path(model)
    return str(path.parent if path.suffix == ".json" else path)


def positions_of(shape: Shape) -> int:
    """Return for how many tokens a model has positions; MOST where its config sets no limit."""
    positions = shape.config.get("max_position_embeddings")
    return positions if isinstance(positions, int) and positions > 0 else MOST


def too_long(shape: Shape, sequence: int) -> str | None:
    """Return why a model cannot read an example of so many tokens, or None."""
    most = positions_of(shape)
    if sequence <= most:
        return None
    return (
        f"{shape.name} has positions for {most:,} tokens, too few for {sequence:,}. Shorten the examples, or "
        "take a model for longer ones."
    )


def impossible(shape: Shape, task: str) -> str:
    """Return why no rule names a method for this kind of model."""
    if shape.kind == "encoder":
        return (
            f"{shape.name} is an encoder and writes no text, so it cannot be trained for {task!r}. "
            "Take task='classification', or a decoder such as 'llama-3.2-1b'."
        )
    return (
        f"No measurement is about {task!r} with a model of the kind {shape.kind!r}, as {shape.name} is. "
        "Take a decoder such as 'llama-3.2-1b'."
    )
