"""Helpers of the commands: print results, read targets."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from peftlab.errors import PeftLabError, out_of_memory


@contextlib.contextmanager
def memory_for(doing: str, advice: str) -> Iterator[None]:
    """Report memory that runs out inside the block, in any library's words, as one line."""
    try:
        yield
    except Exception as error:
        wanted = None if isinstance(error, PeftLabError) else out_of_memory(error)
        if wanted is None:
            raise
        raise PeftLabError(f"Out of memory while {doing}{wanted}. {advice}") from error


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


class SwitchOrFit(argparse.Action):
    """An option that is a switch, `--name` and `--no-name`, or `--name fit`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **more: Any) -> None:
        names = [*option_strings, *(f"--no-{name.removeprefix('--')}" for name in option_strings)]
        super().__init__(names, dest, nargs="?", metavar="fit", **more)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        no = str(option_string).startswith("--no-")
        if values is not None and (no or values != "fit"):
            takes = "no value" if no else "the word fit or nothing"
            raise PeftLabError(f"{option_string} takes {takes}, not {values!r}.")
        setattr(namespace, self.dest, not no if values is None else values)


def parse_targets(text: str | None) -> str | list[str] | None:
    """Return `--targets` as the library takes it: None, `"all-linear"`, a regular expression or a list of names."""
    if text is None or text == "all-linear":
        return text
    if re.search(r"[\\^$*+?()\[\]{}|]", text):  # characters that occur in no module's name
        return text
    return [name.strip() for name in text.split(",") if name.strip()]
