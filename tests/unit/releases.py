"""Which releases are installed: older ones differ in known ways, and what is held to them is skipped there."""

from importlib import metadata

import pytest
from packaging.version import Version


def older(library: str, release: str) -> bool:
    """Say whether the installed release of a library is older than this one."""
    return Version(Version(metadata.version(library)).base_version) < Version(release)


def skip_before(library: str, release: str, why: str) -> None:
    """Skip the rest of a test if a library is older than this release."""
    if older(library, release):
        pytest.skip(f"{library} before {release}: {why}")


def skip_lost_biases(settings: dict, kept: tuple[str, ...] = ("all",)) -> None:
    """peft 0.20 leaves trained biases out of its state and its files, without a word.

    Args:
        kept: the kinds of `bias` that it does save: those of bias="all" for LoRA and AdaLoRA, none for other methods.
    """
    bias = settings.get("bias", "none")
    if bias not in ("none", *kept):
        skip_before("peft", "0.21", f"biases of bias={bias!r} are lost")
