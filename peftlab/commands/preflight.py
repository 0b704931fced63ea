"""The pre-flight for a room without a network: `peftlab doctor --offline`.

Nothing is guessed: every file of the cache is hashed, every package of every chapter is imported, and every model and
data set is loaded, all while this process can open no connection. Each fault is one sentence.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

from peftlab.assets.cache import cache_folder
from peftlab.assets.catalogue import catalogue
from peftlab.commands.doctor import CHAPTERS, ESSENTIAL, examine, older, one_line
from peftlab.optional import PACKAGES, load


def check() -> dict[str, Any]:
    """Return ``ready``, ``cache`` (its folder) and ``faults``: one sentence for each thing that a room would miss."""
    with no_network():
        report = examine(verify=True)
        faults = list(report["problems"])
        told = {name for name in ESSENTIAL if any(name in problem for problem in faults)}
        for name in dict.fromkeys((*ESSENTIAL, *(name for chapter in CHAPTERS for name in chapter.packages))):
            module, reason = (None, "") if name in told else load(name)
            version = report["packages"][name]
            if name in PACKAGES and module is not None and older(version or "0", PACKAGES[name].oldest):
                module, reason = None, f"{version or 'without a version'} is too old"
            if module is None and name not in told:
                command = f" pip install --upgrade '{name}>={PACKAGES[name].oldest}'." if name in PACKAGES else ""
                faults.append(f"{name} {reason}; {_chapters_with(name)}.{command}")
        for name, asset in report["assets"].items():
            if asset["state"] == "not fetched":
                faults.append(f"{name} is not in the cache {cache_folder()}: peftlab fetch {name}, with a network.")
            elif asset["state"] == "damaged":
                faults.append(f"{name} in the cache is damaged ({asset['fault']}): peftlab fetch {name}.")
            elif not faults and (fault := _unloadable(name)):
                faults.append(f"{name} is in the cache, but loading it without a network fails: {fault}")
        if not faults:
            faults = [f"Chapter {c['number']} is missing {what}." for c in report["chapters"] for what in c["missing"]]
    return {"ready": not faults, "cache": str(cache_folder()), "faults": faults}


def render(report: dict[str, Any]) -> str:
    """The faults, one a line, or one line that says what was checked."""
    if report["faults"]:
        return "\n".join(" ".join(fault.split()) for fault in report["faults"])
    return (
        f"Ready for a room without a network: {len(catalogue())} models and data sets verified and loaded, the "
        f"packages of {len(CHAPTERS)} chapters imported."
    )


def _chapters_with(name: str) -> str:
    chapters = [str(chapter.number) for chapter in CHAPTERS if name in chapter.packages]
    return f"chapters {', '.join(chapters)} need it" if chapters else "every chapter needs it"


def _unloadable(name: str) -> str | None:
    """Why a verified model or data set cannot be loaded; None when it can."""
    from peftlab.assets.data import load_data
    from peftlab.assets.models import load_model

    try:
        load_data(name) if catalogue()[name]["kind"] == "dataset" else load_model(name)
    except Exception as error:  # whatever goes wrong here would go wrong in the room
        return one_line(error)
    return None


@contextlib.contextmanager
def no_network() -> Iterator[None]:
    """Let no connection be opened by this process, as in a room without a network."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("there is no network during this check")

    names = ("connect", "connect_ex")
    before = {name: getattr(socket.socket, name) for name in names}
    look_up = socket.getaddrinfo
    for name in names:
        setattr(socket.socket, name, refuse)
    socket.getaddrinfo = refuse
    try:
        yield
    finally:
        socket.getaddrinfo = look_up
        for name in names:
            setattr(socket.socket, name, before[name])
