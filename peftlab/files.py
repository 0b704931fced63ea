"""Files that are there whole or not at all: one by itself, or several of a folder together.

A rename puts one file in another's place in a single step. Several files with fixed names have no such step, so
`write_together` goes this way:

    1. each new file is written under a temporary name in the same folder, and forced to the disk;
    2. a note (`NOTE`) says which temporary file belongs in which place, with the sums of the files before and after.
       From this moment on the new files count;
    3. the files are renamed into their places, and the note is removed.

A process that is killed before the second step leaves the old files. One that is killed after it leaves the new ones,
some of them still under their temporary names; `settled` finds them, and the next `write_together` finishes the work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from peftlab.errors import PeftLabError

try:
    import fcntl
except ImportError:  # Windows, which removes no file that another process holds open
    fcntl = None  # type: ignore[assignment]  # the name of a module stands for None there

NOTE = ".peftlab-save.json"
PATIENCE = 60.0  # seconds that a save waits for another one in the same folder
Result = TypeVar("Result")


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Write a file so that a reader finds the old one or the new one whole, also after a kill or a power cut.

    The file gets the usual mode of a new file. After an error nothing is left behind. Raises OSError as `open` does.
    """
    path = Path(path)
    temporary = path.with_name(temporary_name(path.name))
    try:
        fill(temporary, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_together(folder: Path, contents: Mapping[str, bytes | None]) -> None:
    """Write files of a folder so that `settled` finds all of the old ones or all of the new ones, also after a kill.

    What an interrupted save left in the folder is finished or removed first. A file that would not change is left
    alone, so one changed file is replaced in a single step, for other programs too.

    Args:
        contents: the files by their names; None takes a file away. The last is the one that other programs look for
            first: it is removed before the others change and comes last, so they see no mixture either.

    Raises:
        OSError: a file cannot be written. The old files are then as they were.
        PeftLabError: another process is saving into the folder and does not finish.
    """
    for name in contents:
        if (folder / name).is_dir():
            raise PeftLabError(f"{folder / name} is a folder, and a file of that name is to be saved. Move it away.")
    with held(folder):
        finish(folder)
        sweep(folder, contents)
        after = {name: None if new is None else hashlib.sha256(new).hexdigest() for name, new in contents.items()}
        before = {name: file_sum(folder / name) for name in contents}
        changed = [name for name in contents if before[name] != after[name]]
        if len(changed) <= 1:
            for name in changed:
                content = contents[name]
                if content is None:
                    (folder / name).unlink()
                else:
                    write_atomically(folder / name, content)
            sync(folder)
            return
        written = {name: content for name in changed if (content := contents[name]) is not None}
        drafts = {name: temporary_name(name) for name in written}
        try:
            for name, draft in drafts.items():
                fill(folder / draft, written[name])
            files = {n: {"draft": drafts.get(n), "before": before[n], "after": after[n]} for n in changed}
            write_atomically(folder / NOTE, json.dumps({"format": 1, "files": files}, indent=1).encode())
        except BaseException:
            if not (folder / NOTE).exists():  # else the new files count already
                for draft in drafts.values():
                    (folder / draft).unlink(missing_ok=True)
            raise
        sync(folder)
        finish(folder)


def settled(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Say where each of these files lies: under its own name, or after a kill still under its temporary one.

    Left out are files that are not there, and those that an interrupted save was to take away.
    """
    paths: dict[str, Path | None] = {name: folder / name for name in names}
    for name, (file, draft) in (pending(folder) or {}).items():
        if name in paths:
            paths[name] = draft or file
    return {name: path for name, path in paths.items() if path is not None and path.is_file()}


def read_settled(folder: Path, names: Iterable[str], read: Callable[[dict[str, Path]], Result]) -> Result:
    """Read files of a folder by `read`, and again as long as another process saves into the folder meanwhile.

    Raises:
        whatever `read` raises of files that stayed as they are.
    """
    names, deadline = (*names, NOTE), time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        before = [_stamp(folder / name) for name in names]
        try:
            result = read(settled(folder, names[:-1]))
        except (PeftLabError, OSError):
            if [_stamp(folder / name) for name in names] == before:
                raise
        else:
            if [_stamp(folder / name) for name in names] == before:
                return result
        time.sleep(0.005)
    raise PeftLabError(f"Another process keeps saving into {folder}, so it cannot be read; try again later.")


def pending(folder: Path) -> dict[str, tuple[Path | None, Path | None]] | None:
    """Return what an interrupted save left to do.

    It is {name: (its file or None to take away, the draft to put there or None)}.

    None where there is nothing to do, or where somebody else has written a file since: then the note says nothing.
    """
    try:
        files = json.loads((folder / NOTE).read_text(encoding="utf-8"))["files"]
        work: dict[str, tuple[Path | None, Path | None]] = {}
        for name, fields in files.items():
            own, draft = file_sum(folder / name), fields["draft"]
            if own == fields["after"]:
                work[name] = (folder / name if own else None, None)
            elif own not in (fields["before"], None):
                return None
            elif fields["after"] is None:
                work[name] = (None, None)
            elif re.fullmatch(_drafts_of(name), draft) and file_sum(folder / draft) == fields["after"]:
                work[name] = (folder / name, folder / draft)
            else:
                return None
        return work
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def finish(folder: Path) -> None:
    """Do what an interrupted save left to do, and removes its note; hold the folder."""
    if not (folder / NOTE).is_file():
        return
    work = pending(folder) or {}
    last = next(reversed(work), None)
    if last is not None and work[last][1] is not None:  # until it is back, other programs see no whole folder
        (folder / last).unlink(missing_ok=True)
    for name, (file, draft) in work.items():
        if draft is not None:
            os.replace(draft, folder / name)
        elif file is None:
            (folder / name).unlink(missing_ok=True)
    sync(folder)
    (folder / NOTE).unlink(missing_ok=True)


def sweep(folder: Path, names: Iterable[str]) -> None:
    """Remove the temporary files that killed processes left for these names; hold the folder."""
    patterns = [_drafts_of(name) for name in (*names, NOTE)]
    for path in list(folder.glob(".*.tmp")):
        if any(re.fullmatch(pattern, path.name) for pattern in patterns) and path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Let one process at a time save into a folder; the system lets go of it when the process dies.

    Where there are no such locks (Windows, some network folders) it holds nothing.
    """
    if fcntl is None:
        yield
        return
    handle, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + PATIENCE
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise PeftLabError(
                        f"Another process has been saving into {folder} for {PATIENCE:.0f} seconds. Wait for it, end "
                        "it, or save into another folder."
                    ) from None
                time.sleep(0.02)
            except OSError:
                break
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a forked process may still hold the handle
        os.close(handle)


def temporary_name(name: str) -> str:
    """Return the name of a draft of a file, in the same folder: only within a file system is a rename one step."""
    return f".{name}.{os.getpid()}-{threading.get_ident()}.tmp"


def _drafts_of(name: str) -> str:
    return rf"\.{re.escape(name)}\.\d+-\d+\.tmp"


def fill(path: Path, content: bytes) -> None:
    """Write a new file and forces it to the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def file_sum(path: Path) -> str | None:
    """Return the SHA-256 sum of a file in hexadecimal, or None if there is no file."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(folder: Path) -> None:
    """Force a folder's entries to the disk; Windows has no such call and needs none."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:  # some network file systems refuse to
            pass
        finally:
            os.close(handle)


def _stamp(path: Path) -> Any:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
