"""Helpers of the commands: print results, read targets."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Print two columns of text."""
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}}  {value}")


def print_json(value: Any) -> int:
    print(json.dumps(_finite(value), indent=2))
    return 0


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by None, because JSON does not have them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_targets(text: str | None) -> str | list[str] | None:
    """Return `--targets` as the library takes it: None, `"all-linear"`, a regular expression or a list of names."""
    if text is None or text == "all-linear":
        return text
    if re.search(r"[\\^$*+?()\[\]{}|]", text):  # characters that occur in no module's name
        return text
    return [name.strip() for name in text.split(",") if name.strip()]
