"""What the calculator of the book asks Python, in the reader's browser: `answer`, from JSON to JSON.

It runs under Pyodide (book/_static/calculator_worker.mjs), with the files of the package that `peftlab.memory` is made
of. It computes nothing itself. So it imports nothing but the standard library and `peftlab.memory`.
"""

import inspect
import json
import re
from itertools import accumulate
from pathlib import Path

from peftlab.errors import PeftLabError
from peftlab.memory import CARDS, CUBLAS_WORKSPACE, estimate, load_shape, measured_like
from peftlab.memory.cards import GB, that_hold, with_margin
from peftlab.memory.counting.methods import method_name
from peftlab.memory.estimate import longest

PASTED = Path("config.json")  # where a pasted configuration lies, under the name that the shell command has for it
DEEPEST = 100  # brackets in brackets of a pasted configuration; those of models have fewer than ten
LONGEST = 2**15  # tokens at the end of the curve, if the model takes so many
LENGTHS = 8  # how often the curve halves it
POINTS = 240  # of a step's history
FIELDS = inspect.signature(estimate).parameters


def answer(text: str) -> str:
    """Return the answer to one question, or the package's error with the field that it is about.

    Args:
        text: {"shape": a name, or {"config": the text of a config.json}, and other arguments of `estimate`}.
    """
    given = json.loads(text)
    try:
        return json.dumps(answered(given))
    except PeftLabError as error:
        return json.dumps({"error": str(error), "field": field_of(str(error), given)})
    except Exception as error:  # a fault of ours: the reader is told so, in words
        told = (
            f"The package stopped at these settings with an error of its own ({type(error).__name__}). Your settings "
            "may be right. Change one. Please report the error, with the link to this page, which names the settings."
        )
        return json.dumps({"error": told, "field": "method" if isinstance(given["shape"], str) else "shape"})


def point(text: str) -> str:
    """Return a point of the curve: the peak, with the margin, and the smallest card; None if there is no answer."""
    given = json.loads(text)
    try:
        peak = estimate(**given | {"shape": shape_of(given)}).peak_bytes
    except PeftLabError:
        return json.dumps(None)
    holding = that_hold(peak)
    return json.dumps({"peak": peak, "with_margin": with_margin(peak), "card": holding[0] if holding else None})


def answered(given: dict) -> dict:
    """Return everything that the page shows of a step."""
    run = {name: value for name, value in given.items() if name != "shape"}
    found = estimate(shape_of(given), **run)
    shape = load_shape(shape_of(given), given.get("labels"))
    holding = that_hold(found.peak_bytes)
    cards = [
        {"name": name, "bytes": size * GB, "fits": name in holding}
        for name, size in sorted(CARDS.items(), key=lambda card: card[1])
    ]
    return {
        **found.as_dict(), "parts": found.parts, "with_margin": with_margin(found.peak_bytes), "cards": cards,
        "history": thinned([(moment, size + CUBLAS_WORKSPACE) for moment, size in found.history]),
        "measured": measured_like(shape, peak_bytes=found.peak_bytes, **run)._asdict(),
        "lengths": lengths(longest(shape, given["method"], given.get("virtual_tokens", 20))),
    }  # fmt: skip


def shape_of(given: dict) -> str:
    """Return the name of the shape, or the path of the pasted configuration.

    Raises:
        PeftLabError: the configuration has brackets in brackets, too deep for a browser.
    """
    shape = given["shape"]
    if isinstance(shape, str):
        return shape
    marks = re.findall(r"[][{}]", shape["config"])
    depth = max(accumulate(1 if mark in "[{" else -1 for mark in marks), default=0)
    if depth > DEEPEST:  # in a browser Python may crash on it
        raise PeftLabError(f"shape: this text has brackets in brackets, {depth:,} deep; paste a model's config.json.")
    PASTED.write_text(shape["config"], encoding="utf-8")
    return str(PASTED)


def lengths(most: int) -> list[int]:
    """Return the lengths of a curve that doubles up to the model's limit."""
    top = min(most, LONGEST)
    return [length for n in range(LENGTHS, -1, -1) if (length := top >> n) >= 1]


def thinned(history: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return at most `POINTS` points, the highest of each stretch."""
    width = -(-len(history) // POINTS)
    return [max(history[i : i + width], key=lambda one: one[1]) for i in range(0, len(history), width)]


def field_of(error: str, given: dict) -> str:
    """Return the name of the form's field that an error is about. Most errors begin with an argument's name."""
    try:  # whatever is asked of the model, it has no answer
        estimate(shape_of(given), "full", sequence=1)
    except PeftLabError:
        return "shape"
    try:
        method_name(given["method"])
    except PeftLabError:
        return "method"
    if re.search(r"has positions for", error):
        return "sequence"
    if re.match(r"Target |No targets|target", error):
        return "targets"
    begin = re.match(r"(\w+)(?:=| must| is)", error)
    return begin[1] if begin and begin[1] in FIELDS else "method"
