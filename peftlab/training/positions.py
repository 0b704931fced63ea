"""Spare transformers a look at positions that lie on a GPU.

Rows without a padding mask may be packed. So transformers looks for borders in their positions, and to read the answer
the CPU waits until the GPU has done all its work: no step can be launched while the GPU computes the step before. But
where a batch holds token ids alone, the model counts the positions itself, and there are no borders. Inside `counted`
transformers is told this without a look.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import masking_utils

LOOK = "find_packed_sequence_indices"  # positions (b, t) -> the number of each token's example, or None for one a row
ALONE = frozenset(("input_ids", "labels", "logits_to_keep"))


class _Known(threading.local):
    """What a thread knows about the batch that its model reads."""

    counted = False


_known = _Known()
_lock = threading.Lock()
_open = 0  # blocks of `spared`, in all threads


def _unless_counted(look: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(look)
    def spares(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not _known.counted:
            return look(*args, **kwargs)
        return None

    return spares


_CODE = _unless_counted(id).__code__  # by which our function is known


@contextmanager
def spared() -> Iterator[None]:
    """Let `counted` spare transformers the look, inside the block. Afterwards transformers is as it was.

    Several threads may train at once. If others have put something around our function meanwhile, it stays, and looks.
    """
    global _open
    library: Any = masking_utils
    with _lock:
        if not _open and hasattr(library, LOOK):
            setattr(library, LOOK, _unless_counted(getattr(library, LOOK)))
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            look: Any = getattr(library, LOOK, None)
            if not _open and getattr(look, "__code__", None) is _CODE:
                setattr(library, LOOK, look.__wrapped__)


@contextmanager
def counted(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Say inside the block, for this thread, that the model counts its positions itself if it reads token ids alone."""
    before = _known.counted
    _known.counted = set(inputs) <= ALONE
    try:
        yield
    finally:
        _known.counted = before
