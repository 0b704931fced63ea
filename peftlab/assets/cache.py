"""The cache folder: where it is, how a finished folder is put there in one step, and how it is checked.

It keeps three promises. A folder with an asset's final name is complete, because it is prepared under a temporary name
and then renamed. The next process that holds the asset's lock removes the temporary folders of killed processes. A
damaged file is noticed before it is used.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import platformdirs

from peftlab.assets.catalogue import AssetError, edition

STAMP = ".verified.json"


def cache_folder() -> Path:
    """Return `$PEFTLAB_CACHE`, or `peftlab` in the platform's user cache folder. It need not exist yet."""
    if chosen := os.environ.get("PEFTLAB_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(platformdirs.user_cache_dir("peftlab", appauthor=False)).absolute()


def asset_folder(name: str, entry: dict) -> Path:
    """Return the folder where the finished files of an asset are, or will be."""
    return cache_folder() / f"{name}-{edition(entry)}"


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fault(folder: Path, entry: dict, thorough: bool = False) -> str | None:
    """Say in words what is wrong with a finished folder; return None if nothing is.

    Hashing 500 MB at each load would take longer than the load. So the sizes are always compared, but a file is hashed
    again only if its time of change is not the one noted when it was last hashed, or with `thorough`. This finds
    truncated and overwritten files and a copied cache. Only `thorough` finds a change with a forged time.
    """
    if not folder.is_dir():
        return "not fetched"
    try:
        noted = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        noted = {}
    hashed = False
    for file, expected in entry["files"].items():
        try:
            status = os.stat(folder / file)
        except OSError:
            return f"{file} is missing"
        if status.st_size != expected["bytes"]:
            return f"{file} has {status.st_size:,} bytes, not {expected['bytes']:,}"
        if thorough or noted.get(file) != status.st_mtime_ns:
            if hash_file(folder / file) != expected["sha256"]:
                return f"{file} has been changed (its SHA-256 is not the expected one)"
            hashed = True
    if hashed:
        with contextlib.suppress(OSError):  # a read-only cache is hashed each time, and still works
            stamp(folder, entry)
    return None


def stamp(folder: Path, entry: dict) -> None:
    """Note that the files of `folder` have just been hashed and are right."""
    times = {file: os.stat(folder / file).st_mtime_ns for file in entry["files"]}
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".stamp-")
    with os.fdopen(descriptor, "w") as file:
        json.dump(times, file)
    os.chmod(temporary, 0o644)
    os.replace(temporary, folder / STAMP)


@contextlib.contextmanager
def locked(name: str, waiting: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold the lock of one asset. The system releases it even if this process is killed.

    Args:
        waiting: called about once a second while another process holds the lock.

    Raises:
        AssetError: the cache folder cannot be written.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / f".{name}.lock")
        while True:
            try:
                lock.acquire(timeout=1.0)
                break
            except filelock.Timeout:
                if waiting:
                    waiting()
    except OSError as error:
        raise AssetError(
            f"{name}: cannot write to the cache folder {folder} ({error.strerror or error}). "
            "Make it writable, or set PEFTLAB_CACHE to a folder you can write to."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def staging(name: str) -> Iterator[Path]:
    """Make a temporary folder beside the final one, and remove it at the end. The caller holds the asset's lock.

    Temporary folders that killed processes left for this asset are removed first.
    """
    for leftover in cache_folder().glob(f".partial-{name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=cache_folder(), prefix=f".partial-{name}."))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(prepared: Path, final: Path) -> None:
    """Move a prepared folder to its final name, in one step, with its contents on the disk first.

    A damaged folder of that name is mended file by file, the stamp last: what else somebody put there stays.
    """
    for path in prepared.iterdir():
        _sync(path)
    _sync(prepared)
    os.chmod(prepared, 0o755)  # temporary folders are made private; a class may share one cache
    if final.exists():
        (final / STAMP).unlink(missing_ok=True)
        for path in sorted(prepared.rglob("*"), key=lambda path: path.name == STAMP):
            if path.is_file():
                (final / path.relative_to(prepared)).parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, final / path.relative_to(prepared))
    else:
        os.replace(prepared, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    if path.is_dir() and sys.platform == "win32":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir():  # some network file systems refuse to sync a folder
            raise error
    finally:
        os.close(descriptor)
