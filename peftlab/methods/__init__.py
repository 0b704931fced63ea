"""Load the methods, one file each. `peftlab.catalogue` has a row for each; DESIGN.md shows how each fits."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from peftlab import catalogue


def __getattr__(name: str) -> Any:
    """Load a config (`methods.LoRAConfig`), a file (`methods.lora`) or `METHODS` when it is first used.

    `METHODS` has the config class of each method by its name on the command line. QLoRA is LoRA on a base in four bits
    and has no config of its own.
    """
    rows = {name: row for name, row in catalogue.METHODS.items() if row.config}
    if name == "METHODS":
        return {name: row.config_class() for name, row in rows.items() if not row.four_bit}
    for row in rows.values():
        if name == row.config_name:
            return row.config_class()
    module = f"{__name__}.{name}"
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
