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


def skip_lost_biases(settings: dict) -> None:
    """peft 0.20 leaves trained biases out of its state and its files, without a word."""
    if settings.get("bias") == "lora_only":
        skip_before("peft", "0.21", "biases of bias='lora_only' are lost")
