"""Which examples share a batch when a list is worked through without training."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peftlab.core.records import record_of, unwrap
from peftlab.errors import PeftLabError


def batches(model: nn.Module, lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """The examples' positions, batch by batch: like lengths together, longest first, to pad little.

    What fits in one batch keeps its order, and so do examples whose adapters `activate` named row by row.

    Args:
        lengths: the length of each example, in tokens.

    Raises:
        PeftLabError: adapters were named row by row, but not one for each example, or for several batches: the names
            are those of one batch.
    """
    record = record_of(unwrap(model))
    rows = record.activity.rows if record and record.activity.enabled and not record.activity.merged else None
    count = len(lengths)
    if rows is not None and count and (len(rows) != count or count > batch_size):
        raise PeftLabError(
            f"activate was given {len(rows)} names, one for each row of one batch, but here are {count} examples in "
            f"batches of {batch_size}. Name an adapter for each example and pass batch_size={count} or more, or "
            "activate one adapter at a time."
        )
    order = list(range(count))
    if count > batch_size:
        order.sort(key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, count, batch_size)]
