"""Evidence: a statement about measured rows that can be computed, so that it can also turn out to be false.

An entry of `rules.toml` names a results file, the rows that it is about, a check, and the claim that must come out:

    shares   the shares of right answers of rows `a` and `b`: "same", "more" (a has more), "fewer" or "not more". With
             `each`, the name of a column, the claim must come out for each of its values in `a`
    apart    a column's values: every one of `a` is "below" every one of `b`
    ratio    the mean of a column over rows `a`, divided by that over rows `b`, lies between `least` and `most`
    times    the same for seconds, by the processes that measured both in one run: "faster" or "slower" in all of them
    rate     the learning rate with the lowest mean loss on validation data (or the `highest` score) lies between
             `least` and `most`

Two shares are the "same" if zero lies within two errors of their difference. The error of a share p of n questions over
k seeds has two parts, what other questions would change and what other seeds did:

    error^2 = p (1 - p) / n + variance over the seeds / k

"Same" means that no difference is seen. It does not mean that there is none, so the interval is always shown.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from peftlab.errors import PeftLabError, did_you_mean
from peftlab.kit.measurements import Results, results
from peftlab.memory.units import format_bytes

SITE = "https://peftlab.github.io/peftlab/book"
ERRORS = 2  # half the width of an interval, in errors
POINTS = 100  # a share in percent
CLAIMS = {"shares": ("same", "more", "fewer", "not more"), "apart": ("below",), "times": ("faster", "slower")}
FIELDS = {
    "shares": {"right", "of", "items", "each"}, "apart": {"column"}, "ratio": {"column", "least", "most"},
    "times": {"column", "least", "most", "per"}, "rate": {"column", "highest", "least", "most"},
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
    """

    holds: bool
    text: str
    source: str
    groups: dict[str, dict[str, Any]]
    page: str

    def to_dict(self) -> dict[str, Any]:
        """Return what a reason shows of it."""
        told = {"text": self.text, "source": self.source, "groups": self.groups}
        return {**told, "page": self.page, "url": self.url}

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
    holds, numbers = CHECKS[check](entry, measured, groups)
    words = entry.get("says", "")
    told = [f"{name} {_said(value)}" for name, value in entry.get("rows", {}).items() if name != "section"]
    source = f"{entry['results']}, {entry.get('rows', {}).get('section', 'all sections')}"
    source += f": {', '.join(told)}" if told else ""
    text = f"{words}: {numbers}" if words else numbers
    return Finding(holds, text, source, {name: _conditions(entry[name]) for name in groups}, entry["shown"])


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
    a_name, b_name = _names(entry)
    if column := entry.get("each"):
        values = dict.fromkeys(groups["a"].column(column))
        every = {str(value): groups["a"].where(**{column: value}) for value in values}
    else:
        every = {a_name: groups["a"]}
    found = {name: _difference(rows, groups["b"], entry) for name, rows in every.items()}
    holds = all(CLAIMED[entry["claim"]](low, high) for _, _, low, high in found.values())
    best = max(found, key=lambda name: found[name][0])
    a, b, low, high = found[best]
    named = f"the best of {len(found)}, {best}," if column else best
    told = f"{named} {a:.1%}, {b_name} {b:.1%} right; {POINTS * (a - b):+.1f} points"
    return holds, f"{told} ({POINTS * low:+.1f} to {POINTS * high:+.1f})"


CLAIMED = {
    "same": lambda low, high: low <= 0 <= high, "more": lambda low, high: low > 0,
    "fewer": lambda low, high: high < 0, "not more": lambda low, high: low <= 0,
}  # fmt: skip


def _difference(one: Results, other: Results, entry: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Return two shares, and the interval of their difference."""
    (a, a_error), (b, b_error) = (_share(rows, entry) for rows in (one, other))
    error = ERRORS * math.hypot(a_error, b_error)
    return a, b, a - b - error, a - b + error


def _share(rows: Results, entry: Mapping[str, Any]) -> tuple[float, float]:
    """Return the mean share of right answers of these rows, and its error."""
    right, of, items = entry.get("right", "right"), entry.get("of"), entry.get("items", 0)
    shares = [row[right] / row[of] if of else row[right] for row in rows]
    n = min(row[of or items] for row in rows) if of or isinstance(items, str) else items
    p, k = statistics.fmean(shares), len(shares)
    seeds = statistics.variance(shares) / k if k > 1 else 0.0
    return p, math.sqrt(max(p * (1 - p), 0.0) / n + seeds)


def _names(entry: Mapping[str, Any]) -> tuple[str, str]:
    return entry["a"].get("is", "a"), entry.get("b", {}).get("is", "b")


def _apart(entry: Mapping[str, Any], measured: Results, groups: Mapping[str, Results]) -> tuple[bool, str]:
    column = entry["column"]
    a, b = ([row[column] for row in groups[name]] for name in ("a", "b"))
    told = [f"{name} {_range(values)}" for name, values in zip(_names(entry), (a, b), strict=True)]
    return max(a) < min(b), f"{WORDS.get(column, column.replace('_', ' '))}: {', '.join(told)}"


WORDS = {"adapter_bytes": "file", "peak_bytes": "peak memory", "trainable": "numbers that train"}


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
    column = entry.get("column", "validation_loss")
    losses: dict[float, list[float]] = {}
    for row in groups["a"]:
        losses.setdefault(row["learning_rate"], []).append(row[column])
    sign = -1 if entry.get("highest") else 1
    best = min(losses, key=lambda rate: sign * statistics.fmean(losses[rate]))
    tried = ", ".join(f"{rate:g}" for rate in sorted(losses))
    name = entry["a"].get("is", "")
    return _within(best, entry), f"{name}{': ' if name else ''}best rate {best:g} of {tried}"


def _within(value: float, entry: Mapping[str, Any]) -> bool:
    return entry.get("least", -math.inf) <= value <= entry.get("most", math.inf)


def _range(values: list[float]) -> str:
    least, most = min(values), max(values)
    return f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"


def _amount(value: float, column: str) -> str:
    return format_bytes(value) if "bytes" in column else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


CHECKS = {"shares": _shares, "apart": _apart, "ratio": _ratio, "times": _times, "rate": _rate}
