"""What came with a folder from somewhere: JSON, read with limits, and configs that would have code run.

No file may exhaust memory, mean two things, or bring its own Python.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peftlab.errors import PeftLabError, did_you_mean, warn

MOST_BYTES = 8_000_000  # the largest real configs name some thousand modules, in less than one megabyte
MOST_DEPTH = 64
INTEGERS = range(-(2**63), 2**64)  # a seed may need all 64 bits
# Fields by which transformers picks what computes a layer; "owner/name" there is code that it would fetch and run
KERNELS = ("attn_implementation", "experts_implementation", "use_kernels", "kernel_config")


def read_fields(file: Path, infinite: bool = False) -> dict[str, Any]:
    """Read a config: a JSON object.

    Args:
        infinite: whether numbers may be infinite or beyond 64 bits, as in the configs of some models.

    Raises:
        PeftLabError: the file cannot be read, is too large, is not UTF-8, is no JSON object, names a field twice, is
            nested too deeply, or holds a number that is infinite, NaN or beyond 64 bits.
    """
    try:
        with open(file, "rb") as opened:
            content = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise PeftLabError(f"{file} cannot be read: {error}.") from None
    if len(content) > MOST_BYTES:
        raise PeftLabError(f"{file} is larger than {MOST_BYTES // 1_000_000} MB, so it is no config. Save it again.")
    fields = parse(content, str(file), infinite)
    if not isinstance(fields, dict):
        raise PeftLabError(f"{file} holds a {type(fields).__name__}, not the fields of a config.")
    return fields


def warn_of_unknown(where: object, strange: Sequence[str], known: Iterable[str], advice: str) -> None:
    """Warn of fields that are not known, all in one warning, with near matches."""
    if strange:
        known = list(known)
        told = ", ".join(repr(name[:60]) + did_you_mean(name[:60], known, 1) for name in strange[:20])
        more = f" and {len(strange) - 20} more" if len(strange) > 20 else ""
        warn(f"{where} has fields that are not known, and they are ignored: {told}{more}. {advice}")


def parse(content: bytes | str, name: str, infinite: bool = False) -> Any:
    """Parse JSON with the limits of `read_fields`; `name` is what to call it in an error."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_infinity if infinite else _constant,
            parse_float=float if infinite else _float,
            parse_int=int if infinite else _integer,
        )
    except (ValueError, RecursionError) as error:
        told = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise PeftLabError(f"{name} cannot be read: {told}.") from None
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _inside(outer)]:
        depth += 1
        if depth > MOST_DEPTH:
            raise PeftLabError(f"{name} cannot be read: it is nested too deeply (more than {MOST_DEPTH} levels).")
    return value


def check_code(where: object, fields: dict[str, Any]) -> None:
    """Refuse a model's config that would have transformers run code which is not its own.

    `auto_map`, which names Python files beside the config, is not refused here: where transformers knows the model
    itself, it can be passed over.

    Raises:
        PeftLabError: a field, at any depth, names a kernel on the hub.
    """
    for name, value in fields.items():
        plain = name.strip("_").removesuffix("_internal")
        if plain in ("use_kernels", "kernel_config") and value:
            raise PeftLabError(f"{where} asks for kernels from the hub ({name}), and peftlab never runs such code.")
        for text in value.values() if isinstance(value, dict) else (value,):
            if plain in KERNELS and isinstance(text, str) and ("/" in text or ":" in text):
                raise PeftLabError(
                    f"{where} asks for the kernel {text!r} ({name}), whose code transformers would fetch and run, and "
                    f"peftlab never does. Take {name} out of it if you trust the rest."
                )
        if isinstance(value, dict):
            check_code(where, value)


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"it has {name!r} twice")
            seen.add(name)
    return fields


def _constant(text: str) -> float:
    raise ValueError(f"it holds {text}, which is no JSON number")


def _infinity(text: str) -> float:
    return _constant(text) if text == "NaN" else float(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds the number {text[:40]}, which is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or int(text) not in INTEGERS:
        raise ValueError(f"it holds the number {text[:40]}, which is too large")
    return int(text)
