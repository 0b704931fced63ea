"""Evidence: a statement about measured rows that can be computed, so that it can also turn out to be false.

An entry of `rules.toml` names a results file, the rows that it is about, a check, and the claim that must come out:

    shares   the shares of right answers of rows `a` and `b`: "same", "more" (a has more), "fewer" or "not more". With
             `each`, the name of a column, the claim must come out for each of its values in `a`
    losses   the mean of a loss (`column`): "same", "lower" (a is lower), "higher" or "not lower". `each` as above
    apart    a column's values: every one of `a` is "below" every one of `b`
    ratio    the mean of a column over rows `a`, divided by that over rows `b`, lies between `least` and `most`
    times    the same for seconds, by the processes that measured both in one run: "faster" or "slower" in all of them
    rate     the learning rate with the lowest mean loss on validation data (or the `highest` score) lies between
             `least` and `most`, and lower and higher rates were tried; with `edge` it is the lowest or highest of them.
             With `b`, the best rate of `a` divided by that of `b` lies between them. `each` as above

`differences.py` says what the error of a difference is. Two numbers are the "same" if zero lies inside the interval of
their difference, and "not more" and "not lower" claim as little. That says nothing if a large difference would have
been missed, so these claims state with `sees` how large a difference their rows must be able to see. What the rows can
see is computed. If it is more than `sees`, the claim does not come out. The answer shows it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from peftlab.errors import PeftLabError, did_you_mean
from peftlab.guide.differences import Difference, Read, difference, read_loss, read_share
from peftlab.guide.rules import content
from peftlab.kit.measurements import Results, results
from peftlab.memory.units import format_bytes

SITE = "https://peftlab.github.io/peftlab/book"
POINTS = 100  # a share in percent
CLAIMS = {
    "shares": ("same", "more", "fewer", "not more"), "losses": ("same", "lower", "higher", "not lower"),
    "apart": ("below",), "times": ("faster", "slower"),
}  # fmt: skip
ABSENT = ("same", "not more", "not lower")  # claims that no difference is seen
FIELDS = {
    "shares": {"right", "of", "items", "each", "sees"}, "losses": {"column", "each", "sees"}, "apart": {"column"},
    "ratio": {"column", "least", "most"}, "times": {"column", "least", "most", "per"},
    "rate": {"column", "each", "highest", "edge", "least", "most"},
}  # fmt: skip
COMMON = {"results", "rows", "a", "b", "check", "claim", "shown", "says"}


class Finding(NamedTuple):
    """What the measurements say to one entry of evidence.

    Attributes:
        holds: whether the claim came out.
        text: the computed numbers, in a sentence.
        source: the results file, its section, and the condition on all rows.
        groups: the further conditions on the rows that are compared: {"a": {...}, "b": {...}}.
        page: the section of the book that shows it, `"02_lora#sec-lora-sweep"`.
        at: the model that was measured, such as `"smollm2-135m"`.
        scores: whether scores, losses or best rates are compared, and not memory or time.
    """

    holds: bool
    text: str
    source: str
    groups: dict[str, dict[str, Any]]
    page: str
    at: str
    scores: bool

    def to_dict(self) -> dict[str, Any]:
        """Return what a reason shows of it."""
        told = {"text": self.text, "source": self.source, "groups": self.groups}
        return {**told, "page": self.page, "url": self.url, "at": self.at, "scores": self.scores}

    @property
    def url(self) -> str:
        """The section's address."""
        return address(self.page)


def address(page: str) -> str:
    """Return the address of a place in the book.

    >>> from peftlab.guide.evidence import address
    >>> address("02_lora#sec-lora-sweep")
    'https://peftlab.github.io/peftlab/book/02_lora.html#sec-lora-sweep'
    """
    name, _, anchor = page.partition("#")
    return f"{SITE}/{name}.html#{anchor}" if anchor else f"{SITE}/{name}.html"


@cache
def _read(topic: str) -> Results:
    return results(topic)


def look_up(entry: Mapping[str, Any]) -> Finding:
    """Compute one entry of evidence from its results file.

    Args:
        entry: as in `rules.toml`.

    Raises:
        PeftLabError: the entry is not one, or no row meets its conditions.
    """
    check = str(entry.get("check"))
    fault = _fault(entry, check)
    if fault:
        raise PeftLabError(f"evidence {dict(entry)!r}: {fault}")
    measured = _read(entry["results"]).where(**_conditions(entry.get("rows", {})))
    groups = {name: _group(measured, entry[name]) for name in ("a", "b") if name in entry}
    at = measured_at(entry, groups)
    holds, numbers = CHECKS[check](entry, measured, groups)
    words = entry.get("says", "")
    rows = entry.get("rows", {})
    told = [f"{name} {_said(value)}" for name, value in rows.items() if name not in ("section", "shape")]
    source = f"{entry['results']}, {_said(rows.get('section', 'all sections'))}, {at}"
    source += f": {', '.join(told)}" if told else ""
    text = f"{words}: {numbers}" if words else numbers
    told_groups = {name: _conditions(entry[name]) for name in groups}
    return Finding(holds, text, source, told_groups, entry["shown"], at, check not in ("ratio", "times"))


def measured_at(entry: Mapping[str, Any], groups: Mapping[str, Results]) -> str:
    """Return the model on which the rows of an entry were measured: their `shape`, or what `measured` says of the file.

    Raises:
        PeftLabError: neither is there, or the rows are of several shapes.
    """
    shapes = {row.get("shape") for rows in groups.values() for row in rows}
    if len(shapes) == 1 and (shape := shapes.pop()):
        return str(shape)
    found = []
    for section in dict.fromkeys(row.get("section") for rows in groups.values() for row in rows):
        listed = [one for one in content()["measured"] if one["results"] == entry["results"]]
        models = [one["at"] for one in listed if section in one.get("sections", [section])]
        if not models:
            known = "Add it to `measured` in rules.toml"
            raise PeftLabError(f"evidence {dict(entry)!r}: on which model was it measured? {known}")
        found.append(str(models[0]))
    return ", ".join(dict.fromkeys(found))


def _fault(entry: Mapping[str, Any], check: str) -> str | None:
    if check not in FIELDS:
        return f"there is no check {check!r}.{did_you_mean(check, FIELDS)}"
    if missing := [name for name in ("results", "a", "shown") if not entry.get(name)]:
        return f"it lacks {', '.join(missing)}"
    if check != "rate" and "b" not in entry:
        return "it has nothing to compare with: b is missing"
    if unknown := sorted(entry.keys() - COMMON - FIELDS[check]):
        return f"the check {check} takes no {', '.join(unknown)}"
    if check in CLAIMS and entry.get("claim") not in CLAIMS[check]:
        return f"its claim is {entry.get('claim')!r}, and may be {', '.join(CLAIMS[check])}"
    if (entry.get("claim") in ABSENT) != ("sees" in entry):
        return f"a claim that no difference is seen ({', '.join(ABSENT)}) states what it sees, and no other does"
    if check in ("ratio", "rate") and not {"least", "most"} & entry.keys():
        return "it claims nothing: give least, most or both"
    return None


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _conditions(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the rows must have: all but the group's name, and the column that it has instead of the usual one."""
    return {name: value for name, value in given.items() if name not in ("is", "column")}


def _group(measured: Results, given: Mapping[str, Any]) -> Results:
    found = measured.where(**_conditions(given))
    if not len(found):
        raise PeftLabError(f"results {measured.topic!r}: no row has {_conditions(given)}.")
    return found


def _shares(entry: Mapping[str, Any], measured: Results, groups: Mapping[str, Results]) -> tuple[bool, str]:
    found = _differences(entry, groups, read_share(entry))
    best = max(found, key=lambda name: found[name].a - found[name].b)
    one = found[best]
    told = f"{best} {one.a:.1%}, {_names(entry)[1]} {one.b:.1%} right; {POINTS * (one.a - one.b):+.1f} points"
    told += f" ({POINTS * one.low:+.1f} to {POINTS * one.high:+.1f})"
    return _claimed(entry, found, POINTS), told + _limit(entry, f"{POINTS * _seen(found):.1f} points")


def _losses(entry: Mapping[str, Any], measured: Results, groups: Mapping[str, Results]) -> tuple[bool, str]:
    column = entry["column"]
    found = _differences(entry, groups, read_loss(column))
    best = min(found, key=lambda name: found[name].a - found[name].b)
    one = found[best]
    told = f"{WORDS.get(column, column.replace('_', ' '))}: {best} {one.a:.3f}, {_names(entry)[1]} {one.b:.3f}"
    told += f"; {one.a - one.b:+.3f} ({one.low:+.3f} to {one.high:+.3f})"
    return _claimed(entry, found, 1), told + _limit(entry, f"{_seen(found):.3f}")


def _differences(entry: Mapping[str, Any], groups: Mapping[str, Results], read: Read) -> dict[str, Difference]:
    """Return the difference of `a` and `b` by the name of `a`, or that of each of its values by what is said of it."""
    a_name, _ = _names(entry)
    if column := entry.get("each"):
        values = list(dict.fromkeys(groups["a"].column(column)))
        what = "rank " if column == "r" else ""
        each = {f"the best of {len(values)}, {what}{value},": groups["a"].where(**{column: value}) for value in values}
    else:
        each = {a_name: groups["a"]}
    return {name: difference(rows, groups["b"], read) for name, rows in each.items()}


def _claimed(entry: Mapping[str, Any], found: Mapping[str, Difference], scale: float) -> bool:
    """Say whether a claim comes out for all differences, and whether one that was to be seen could have been seen."""
    blind = entry["claim"] in ABSENT and scale * _seen(found) > entry["sees"]
    return not blind and all(CLAIMED[entry["claim"]](one.low, one.high) for one in found.values())


def _seen(found: Mapping[str, Difference]) -> float:
    return max(one.seen for one in found.values())


def _limit(entry: Mapping[str, Any], seen: str) -> str:
    return f"; a difference of {seen} would have shown" if entry["claim"] in ABSENT else ""


CLAIMED = {
    "same": lambda low, high: low <= 0 <= high, "more": lambda low, high: low > 0,
    "fewer": lambda low, high: high < 0, "not more": lambda low, high: low <= 0,
    "lower": lambda low, high: high < 0, "higher": lambda low, high: low > 0, "not lower": lambda low, high: high >= 0,
}  # fmt: skip


def _names(entry: Mapping[str, Any]) -> tuple[str, str]:
    return entry["a"].get("is", "a"), entry.get("b", {}).get("is", "b")


def _apart(entry: Mapping[str, Any], measured: Results, groups: Mapping[str, Results]) -> tuple[bool, str]:
    column = entry["column"]
    a, b = ([row[column] for row in groups[name]] for name in ("a", "b"))
    told = [f"{name} {_range(values)}" for name, values in zip(_names(entry), (a, b), strict=True)]
    return max(a) < min(b), f"{WORDS.get(column, column.replace('_', ' '))}: {', '.join(told)}"


WORDS = {
    "adapter_bytes": "file", "file_bytes": "file", "peak_bytes": "peak memory", "trainable": "numbers that train",
    "right": "right answers", "busy_seconds": "seconds in which the GPU worked",
}  # fmt: skip


def _ratio(entry: Mapping[str, Any], measured: Results, groups: Mapping[str, Results]) -> tuple[bool, str]:
    columns = [entry[name].get("column", entry.get("column")) for name in ("a", "b")]
    a, b = (statistics.fmean(row[column] for row in groups[name]) for name, column in zip("ab", columns, strict=True))
    both = zip(_names(entry), (a, b), columns, strict=True)
    told = ", ".join(f"{name} {_amount(value, column)}" for name, value, column in both)
    what = WORDS.get(columns[0], columns[0].replace("_", " "))
    return _within(a / b, entry), f"{what}: {told}" if columns[0] == columns[1] else told


def _times(entry: Mapping[str, Any], measured: Results, groups: Mapping[str, Results]) -> tuple[bool, str]:
    """Compare times. `per` names columns whose product the times are divided by, such as batch and sequence."""
    one, other = (groups[name].one() for name in ("a", "b"))
    scale = math.prod(other[name] for name in entry.get("per", ())) / math.prod(one[n] for n in entry.get("per", ()))
    found = measured.ratio(one, other, entry.get("column", "seconds"))
    least, most = scale * found.least, scale * found.most
    holds = least > 1 if entry["claim"] == "slower" else most < 1
    a_name, b_name = _names(entry)
    unit = " per token" if entry.get("per") else ""
    span = f" ({least:.2f} to {most:.2f})" if least < most else ""
    return holds, f"time of {a_name}{unit}: {scale * found.middle:.2f}{span} times that of {b_name}"


def _rate(entry: Mapping[str, Any], measured: Results, groups: Mapping[str, Results]) -> tuple[bool, str]:
    """Find best rates. With `b` it is those of `a` divided by those of `b`, with `each` in each value of a column."""
    names = [entry[name].get("is", "") for name in groups]
    column = entry.get("each")
    values = list(dict.fromkeys(groups["a"].column(column))) if column else [None]
    holds, told = True, []
    for value in values:
        rows = [group.where(**{column: value}) if column else group for group in groups.values()]
        found = [_best_rate(entry, group) for group in rows]
        rates = [rate for rate, _, _ in found]
        holds &= all(edge == entry.get("edge", False) for _, edge, _ in found)
        holds &= _within(rates[0] / rates[1] if len(rates) > 1 else rates[0], entry)
        where = "" if value is None else f"{value} steps: " if column == "steps" else f"{value}: "
        before = [f"{name} " if len(names) > 1 else "" for name in names]
        told.append(where + ", ".join(f"{name}{text}" for (_, _, text), name in zip(found, before, strict=True)))
    name = f"{names[0]}: " if names[0] and len(names) == 1 else ""
    return holds, f"{name}best rate {'; '.join(told)}"


def _best_rate(entry: Mapping[str, Any], rows: Results) -> tuple[float, bool, str]:
    """Return the rate with the lowest mean loss, whether it is at the edge of what was tried, and both in words."""
    losses: dict[float, list[float]] = {}
    for row in rows:
        losses.setdefault(row["learning_rate"], []).append(row[entry.get("column", "validation_loss")])
    sign = -1 if entry.get("highest") else 1
    best = min(losses, key=lambda rate: sign * statistics.fmean(losses[rate]))
    edge = best in (min(losses), max(losses))  # a better rate may lie beyond
    return best, edge, f"{best:g} of {min(losses):g} to {max(losses):g}{', at the edge' if edge else ''}"


def _within(value: float, entry: Mapping[str, Any]) -> bool:
    return entry.get("least", -math.inf) <= value <= entry.get("most", math.inf)


def _range(values: list[float]) -> str:
    least, most = min(values), max(values)
    return f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"


def _amount(value: float, column: str) -> str:
    return format_bytes(value) if "bytes" in column else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


CHECKS = {"shares": _shares, "losses": _losses, "apart": _apart, "ratio": _ratio, "times": _times, "rate": _rate}
