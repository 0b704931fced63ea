"""Packages that only some chapters and functions need, and the error when one of them is missing."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache
from types import ModuleType
from typing import NamedTuple

from peftlab.errors import PeftLabError


class Optional(NamedTuple):
    """A package that is not always needed: its oldest release that works, its purpose, and the extra with it."""

    oldest: str
    purpose: str
    extra: str


PACKAGES = {
    "peft": Optional("0.18", "comparisons with Hugging Face peft", "notebooks"),
    "accelerate": Optional("1.1", "transformers' Trainer", "notebooks"),
    "matplotlib": Optional("3.8", "figures", "notebooks"),
    "ipywidgets": Optional("7.7", "widgets", "notebooks"),
    "sacrebleu": Optional("2.4", "BLEU and chrF", "evaluation"),
    "scipy": Optional("1.11", "intervals over repeated runs", "evaluation"),
    "bitsandbytes": Optional("0.45", "4-bit bases, 8-bit optimisers", "gpu"),
}


def require(name: str) -> ModuleType:
    """Import an optional package, or raise an error that says what to install.

    Raises:
        PeftLabError: the package is missing, or is installed and cannot be imported.

    >>> require("bitsandbytes").functional.get_4bit_type("nf4", device="cpu").numel()
    16
    """
    module, reason = load(name)
    if module is None:
        raise missing(name, reason)
    return module


def missing(name: str, reason: str = "is not installed") -> PeftLabError:
    """Return the error that says what to install."""
    package = PACKAGES[name]
    return PeftLabError(
        f"{name} {reason}. It is needed for {package.purpose}. Install it with: "
        f'pip install "{name}>={package.oldest}" (in a notebook: %pip install "{name}>={package.oldest}").'
    )


def available(name: str) -> ModuleType | None:
    """Import an optional package. Return None if it is missing or cannot be imported."""
    return load(name)[0]


@cache
def load(name: str) -> tuple[ModuleType | None, str]:
    """Import a package once. Return (the module, ""), or (None, the reason why not).

    On a CPU bitsandbytes logs at import that an optional kernel is missing. We do not use that kernel, and the line
    would appear in the output of every notebook.
    """
    if importlib.util.find_spec(name) is None:
        return None, "is not installed"
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before, logger.disabled = logger.disabled, True
    try:
        return importlib.import_module(name), ""
    except Exception as error:  # a library built for another system can raise many kinds of error
        reason = " ".join(str(error).split())[:200]
        return None, f"is installed, but importing it fails ({type(error).__name__}: {reason})"
    finally:
        logger.disabled = before
