"""Read safetensors files, whole or only as far as the shapes, and make equal bytes of equal contents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from peftlab.errors import PeftLabError


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Read the shape of each tensor of a safetensors file, without the tensors."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PeftLabError(f"{file} is damaged or cut short ({error}); fetch or save it again.") from None


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors and the metadata of a safetensors file."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PeftLabError(f"{file} is damaged or cut short ({error}); fetch or save it again.") from None


def serialised(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file.

    Equal contents give equal bytes. The library alone would not do that: it shuffles the metadata.
    """
    raw = to_bytes(tensors, dict(metadata))
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format's alignment
    return len(text).to_bytes(8, "little") + text + raw[start:]
