"""The options that describe a method, as the rows of the catalogue list them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peftlab.catalogue import METHODS, Method, Option


def trainable() -> dict[str, Method]:
    """Return the methods that `peftlab train` knows."""
    return {name: row for name, row in METHODS.items() if row.trains}


def counted() -> dict[str, Method]:
    """Return the methods that `peftlab count` and `peftlab memory` know, with their options for these commands."""
    rows = {name: row for name, row in METHODS.items() if row.tensors}
    return {name: replace(row, options=tuple(o for o in row.options if o.counted)) for name, row in rows.items()}


def options_of(rows: Mapping[str, Method]) -> dict[str, Option]:
    """Return the options of all rows by name, each once."""
    return {option.name: option for row in rows.values() for option in row.options}


def defaults_of(name: str, rows: Mapping[str, Method]) -> dict[tuple[Any, str], list[str]]:
    """Return the defaults of an option, each with what the config chooses for it, and the methods that have it."""
    found: dict[tuple[Any, str], list[str]] = {}
    for method, row in rows.items():
        if row.takes(name):
            found.setdefault((row.default(name), row.chosen(name)), []).append(method)
    return found


def add_method_options(command: argparse.ArgumentParser, rows: Mapping[str, Method]) -> None:
    """Give a command `--method` and the options of these rows. An option that is not given is None until `settle`."""
    command.add_argument("--method", default="lora", metavar="M", help=f"{', '.join(rows)} (default: lora)")
    for name, option in options_of(rows).items():
        defaults = defaults_of(name, rows)
        told = {told: methods for (value, chosen), methods in defaults.items() if (told := _shown(value, chosen))}
        more: dict[str, Any] = {"type": option.kind, "metavar": option.metavar, "choices": option.choices}
        if option.kind is bool:
            more = {"action": argparse.BooleanOptionalAction}
        command.add_argument(
            flag(name),
            default=None,
            help=option.help + _told(told),
            **more,
        )


def settle(arguments: argparse.Namespace, rows: Mapping[str, Method]) -> None:
    """Fill in the options that were not given, and name those that the method does not take.

    An option gets the default of the method's row. If the method does not take it, it gets the default that all other
    rows agree on, or None. One that was given is passed over, and standard error says so: a loop over methods may give
    the same options to all. An unknown method is left to the command.
    """
    method = str(arguments.method).lower()
    row = rows.get(method)
    if row is None:
        return
    idle = [name for name in options_of(rows) if getattr(arguments, name) is not None and not row.takes(name)]
    if idle:
        own = ", ".join(flag(option.name) for option in row.options) or "none"
        told = f"{', '.join(map(flag, idle))}: no option of the method {method}, so it changes nothing. Its own: {own}."
        print(f"peftlab: {told}", file=sys.stderr)
    for name in options_of(rows):
        if name in idle or getattr(arguments, name) is None:
            values = {value for value, _ in defaults_of(name, rows)}
            shared = values.pop() if len(values) == 1 else None
            setattr(arguments, name, row.default(name) if row.takes(name) else shared)


def flag(name: str) -> str:
    """Return an option as it is typed: `--virtual-tokens`."""
    return f"--{name.replace('_', '-')}"


def _told(defaults: Mapping[str, list[str]]) -> str:
    """Return what `--help` says of an option's defaults: {a default in words: the methods that have it}."""
    if not defaults:
        return ""
    each = list(defaults) if len(defaults) == 1 else [f"{words} for {'/'.join(m)}" for words, m in defaults.items()]
    return f" (default: {('; ' if any(', ' in words for words in defaults) else ', ').join(each)})"


def _shown(default: Any, chosen: str) -> str:
    """Return a default as `--help` shows it; empty where nobody says what the config chooses."""
    if default is None:
        return chosen
    if isinstance(default, bool):
        return "yes" if default else "no"
    return f"{default:g}" if isinstance(default, float) else str(default)
