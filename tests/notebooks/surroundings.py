"""Which packages a chapter's set-up cell brings, and which others lie around in the environment of the tests."""

from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def hidden(extras: tuple[str, ...]) -> set[str]:
    """The modules of this environment that `peftlab[extras]` does not bring: those of the tests and other extras."""
    brought, waiting = set(), [("peftlab", frozenset(extras))]
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in brought:
            continue
        brought.add((name, wanted))
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, requires):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*wanted, "")):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    kept = {name for name, _ in brought} | {"pip", "setuptools"}
    return {
        module
        for module, packages in metadata.packages_distributions().items()
        if not any(canonicalize_name(package) in kept for package in packages)
    }
