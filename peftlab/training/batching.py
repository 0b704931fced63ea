"""Which examples share a batch in evaluation and generation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peftlab.checks import whole
from peftlab.core.records import record_of, unwrap
from peftlab.errors import PeftLabError


def batches(model: nn.Module, lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the examples' positions, batch by batch. Examples of similar length share a batch, which saves padding.

    The longest come first. Examples that fit into one batch keep their order; `activate` may have named an adapter for
    each of these rows.

    Args:
        lengths: the length of each example, in tokens.

    Raises:
        PeftLabError: `activate` named one adapter per row, but not one per example, or there is more than one batch.
    """
    batch_size = whole("batch_size", batch_size, least=1)
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
