"""Choose a learning rate for each setting, and score other seeds at it: what the benches that compare methods share.

A point describes one run. Its columns up to "scored" say what is run; `learning_rate`, `seed` and `scored` vary within
a setting, and what comes behind "scored" in a row says what came of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from peftlab.bench import lora
from peftlab.bench.family_variants import SEEDS, TUNING

Row = dict[str, Any]


class Search(NamedTuple):
    """The rates to try first, the ladder of the next ones, and the seeds for trying and for scoring."""

    rates: tuple[float, ...]
    ladder: tuple[float, ...] = lora.LADDER
    tuning: tuple[int, ...] = (TUNING,)
    seeds: tuple[int, ...] = SEEDS


def follow_up(rows: Iterable[Row], search_of: Callable[[Row], Search]) -> Iterator[Row]:
    """Yield the next rate of a setting while its best one is at an edge, then the runs to score at the best one.

    Args:
        rows: the rows of the settings that are searched, so far.
        search_of: the search of the setting that a row belongs to.
    """
    tried: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        if not row["scored"]:
            tried.setdefault(setting_of(row), {}).setdefault(row["learning_rate"], []).append(row)
    for found in tried.values():
        first = next(iter(found.values()))[0]
        search = search_of(first)
        if not set(search.rates) <= set(found) or any(len(runs) < len(search.tuning) for runs in found.values()):
            continue  # some of its runs are still to come
        losses = {rate: mean_loss(runs) for rate, runs in found.items()}
        best = min(losses, key=lambda rate: losses[rate])
        told = {name: first[name] for name in described(first)}
        further = lora.beyond(best, losses, search.ladder)
        yield from ({**told, "learning_rate": rate, "seed": seed} for rate in further for seed in search.tuning)
        if not further:
            yield from ({**told, "learning_rate": best, "seed": seed, "scored": True} for seed in search.seeds)


def mean_loss(runs: list[Row]) -> float:
    """Return the mean loss on the validation examples, and infinity if a run has none."""
    losses = [row["validation_loss"] for row in runs]
    return math.inf if None in losses else statistics.fmean(losses)


def described(row: Row) -> list[str]:
    """Return the columns of a row that say what was run; the others say what came of it."""
    return list(row)[: list(row).index("scored") + 1]


def setting_of(row: Row) -> str:
    """Return a text that is the same for all runs of one setting."""
    return repr([(name, row[name]) for name in described(row) if name not in ("learning_rate", "seed", "scored")])
