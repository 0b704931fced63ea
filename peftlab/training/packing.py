"""Several examples in one row, without padding and without contamination.

A batch of unequal texts is mostly padding. Here its examples are laid into as few rows as they fill. In a row, the
positions restart at 0 with each example, no example attends to another, and the first token of an example is not
predicted from the last one of the example before it. So the sum of the losses is that of the padded batch,

    L = sum over examples of sum over i of nll(x_{i+1} | x_1 .. x_i)

and packing changes time and memory, not what is learned.

The borders are told to the model by `position_ids` alone: without an attention mask and without a cache, transformers
makes from them a causal mask of blocks (within a sliding window, too), and for flash attention the lengths of the
examples, which must then stand in one row. Not every model reads them so: `peftlab.training.borders` tries it on the
model itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftlab.errors import PeftLabError

IGNORE = -100  # the label that torch's cross-entropy leaves out
WIDTHS = tuple(1 + eighths / 8 for eighths in range(9))  # of a row, in lengths of the longest example


def first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Lay examples into rows of `width` tokens: the longest first, each into the first row with room for it.

    Returns:
        The examples' numbers, row by row.

    >>> from peftlab.training.packing import first_fit
    >>> first_fit([5, 3, 2, 4], width=7)
    [[0, 2], [3, 1]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        row = next((number for number, free in enumerate(room) if free >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def best_rows(lengths: Sequence[int]) -> list[list[int]]:
    """The rows of the width, from the longest example's length to twice that, that leave the least padding."""
    longest = max(lengths)

    def cells(rows: list[list[int]]) -> int:
        return len(rows) * max(sum(lengths[index] for index in row) for row in rows)

    return min((first_fit(lengths, int(longest * share)) for share in WIDTHS), key=cells)


def pack(batch: Mapping[str, Any], *, one_row: bool = False, multiple_of: int = 1) -> dict[str, Any]:
    """Return a padded batch as packed rows.

    Args:
        batch: tensors (b, t), on one side padded; `attention_mask` says where. Without it there is no padding.
        one_row: put all examples into one row, as flash attention needs it.
        multiple_of: round the rows' length up to a multiple of this.

    Returns:
        The same tensors (rows, width) without `attention_mask`; `position_ids`, which restart at 0 for each example
        and are 0 on padding; and `use_cache`, which is False: with a cache, models do not look for borders.

    Raises:
        PeftLabError: a tensor is not one value for each token.
    """
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise PeftLabError(f"Only token ids can be packed: the batch holds {', '.join(map(repr, batch)) or 'nothing'}.")
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if not real.any():
        raise PeftLabError("There is nothing to pack: the attention mask hides every token.")
    columns = {key: value for key, value in batch.items() if key not in ("attention_mask", "use_cache")}
    for key, value in columns.items():
        if key == "position_ids":
            raise PeftLabError(
                "The examples have position_ids of their own. Packing counts positions itself: leave them out."
            )
        if not isinstance(value, Tensor) or value.shape != ids.shape:
            shape = f" {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            raise PeftLabError(
                f"{key}{shape} is not one value for each token of input_ids {tuple(ids.shape)}, so its examples cannot "
                f"share a row. Packing is for causal language models, and for columns with one value for each token."
            )
    lengths = real.sum(1).tolist()
    filled = [index for index, length in enumerate(lengths) if length]
    rows = [list(range(len(filled)))] if one_row else best_rows([lengths[index] for index in filled])
    width = max(sum(lengths[filled[place]] for place in row) for row in rows)
    width += -width % multiple_of
    packed = {}
    for key, value in (*columns.items(), ("position_ids", ids)):
        parts = [value[index][real[index]] for index in filled]
        if key == "position_ids":
            parts = [torch.arange(len(part)) for part in parts]
        elif key == "labels":  # what stands before an example must not learn to predict it
            parts = [torch.cat([part.new_full((1,), IGNORE), part[1:]]) for part in parts]
        packed[key] = value.new_full((len(rows), width), _fill(key, value, real))
        for target, row in zip(packed[key], rows, strict=True):
            joined = torch.cat([parts[place] for place in row])
            target[: len(joined)] = joined
    return {**packed, "use_cache": False}


def _fill(key: str, value: Tensor, real: Tensor) -> int:
    """What stands on padding: what the batch was padded with."""
    if key == "labels":
        return IGNORE
    if key != "input_ids":
        return 0
    return int(value[~real][0]) if (~real).any() else int(value[0, -1])
