"""Fetching: every byte checked, nothing half done left behind, whatever happens on the way."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from fake_assets import CONTENT, WHEEL, Index, make_entry, make_wheel, sha256

from peftlab.assets import cache, convert, fetch
from peftlab.assets.catalogue import AssetError, catalogue, edition, entry, tree_hash

NAME = "fake"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache, and a pip that knows only a folder of wheels."""
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "cache"))
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_RESUME_RETRIES", "0")
    serve_folder(monkeypatch, tmp_path / "wheels")
    return tmp_path


def serve_folder(monkeypatch, folder):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def downloaded(home):
    """The entry of the fake asset, its wheel lying in the cache as if a download had just ended."""
    wheel = make_wheel(home / "wheels")
    (home / "cache").mkdir()
    shutil.copyfile(wheel, home / "cache" / f".wheel-{NAME}.whl")
    return make_entry(wheel)


def serve_url(monkeypatch, url):
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", url)


def leftovers(home):
    """What is in the cache besides locks and finished folders."""
    found = list((home / "cache").iterdir()) if (home / "cache").exists() else []
    return [path.name for path in found if path.name.startswith((".partial", ".wheel"))]


def refuse_pip(monkeypatch):
    """Any attempt to start pip is now a failure of the test."""

    def refuse(*_, **__):
        raise AssertionError("pip was started")

    monkeypatch.setattr(fetch.subprocess, "Popen", refuse)


def start(found, script="fetch.fetch_one(NAME, FOUND, progress=False)", **variables):
    """Fetch in another process; `script` may do things around it."""
    program = (
        "import json, os, sys, time\nfrom peftlab.assets import cache, convert, fetch\n"
        f"NAME, FOUND = {NAME!r}, json.loads({json.dumps(found)!r})\n{script}\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | variables, stderr=subprocess.PIPE, text=True
    )


def test_fetch_takes_the_member_checks_it_and_then_needs_no_network(home, monkeypatch):
    found = make_entry(make_wheel(home / "wheels"))
    folder = fetch.fetch_one(NAME, found, progress=False)
    assert (folder / "data.bin").read_bytes() == CONTENT
    assert folder.parent == home / "cache"
    assert leftovers(home) == []
    refuse_pip(monkeypatch)
    assert fetch.fetch_one(NAME, found, progress=False, thorough=True) == folder


def test_a_wheel_with_another_hash_is_refused(home):
    found = make_entry(make_wheel(home / "wheels"))
    make_wheel(home / "wheels", CONTENT[:-1] + b"!")
    with pytest.raises(AssetError, match=r"^fake: .*does not have the expected SHA-256"):
        fetch.fetch_one(NAME, found, progress=False)
    assert leftovers(home) == []
    assert not cache.asset_folder(NAME, found).exists()


def test_our_own_check_of_the_wheel_does_not_rely_on_pip(home, monkeypatch):
    found = make_entry(make_wheel(home / "wheels"))
    make_wheel(home / "wheels", CONTENT[:-1] + b"!")
    real = subprocess.Popen

    def careless(command, **options):
        requirement = command[command.index("--requirement") + 1]
        requirement.write_text(f"{found['package']}=={found['version']}\n")
        return real([part for part in command if part != "--require-hashes"], **options)

    monkeypatch.setattr(fetch.subprocess, "Popen", careless)
    with pytest.raises(AssetError, match="expected SHA-256"):
        fetch.fetch_one(NAME, found, progress=False)
    assert leftovers(home) == []


@pytest.mark.parametrize("member_hash", ["0" * 64, {"data.bin": "0" * 64}, "tree:" + "0" * 64])
def test_a_member_with_another_hash_is_refused(home, member_hash):
    found = downloaded(home) | {"member_sha256": member_hash}
    if not isinstance(member_hash, str) or member_hash.startswith("tree:"):
        found["member"] = "fake_asset/"
    with pytest.raises(AssetError, match=r"^fake: .* has SHA-256 .*, expected (0000|tree:0)"):
        fetch.fetch_one(NAME, found, progress=False)
    assert not cache.asset_folder(NAME, found).exists()


def test_a_folder_can_be_named_by_one_hash(home):
    found = downloaded(home) | {"member": "fake_asset/"}
    found["member_sha256"] = "tree:" + tree_hash({"data.bin": sha256(CONTENT)})
    assert (fetch.fetch_one(NAME, found, progress=False) / "data.bin").read_bytes() == CONTENT


def test_a_truncated_wheel_and_a_connection_that_breaks(home, monkeypatch):
    wheel = make_wheel(home / "wheels")
    found = make_entry(wheel)
    with Index(wheel, mode="broken") as index:
        serve_url(monkeypatch, index.url)
        with pytest.raises(AssetError, match=r"^fake: .*(broke off|expected SHA-256)"):
            fetch.fetch_one(NAME, found, progress=False)
    assert leftovers(home) == []
    wheel.write_bytes(wheel.read_bytes()[: wheel.stat().st_size // 2])
    serve_folder(monkeypatch, home / "wheels")
    with pytest.raises(AssetError, match="^fake: "):
        fetch.fetch_one(NAME, found, progress=False)
    assert leftovers(home) == []
    assert not cache.asset_folder(NAME, found).exists()


def test_no_network_and_no_such_package_are_told_apart(home, monkeypatch):
    found = make_entry(make_wheel(home / "wheels"))
    serve_url(monkeypatch, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")  # pip speaks of the network only when it tries again
    with pytest.raises(AssetError, match="^fake: the package index cannot be reached"):
        fetch.fetch_one(NAME, found, progress=False)
    serve_folder(monkeypatch, home)
    with pytest.raises(AssetError, match="^fake: your package index has no peftlab-fake-asset 1.0"):
        fetch.fetch_one(NAME, found, progress=False)


def test_a_python_without_pip_is_told_so(home, monkeypatch):
    found = make_entry(make_wheel(home / "wheels"))
    (home / "python").write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    (home / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(home / "python"))
    with pytest.raises(AssetError, match="^fake: pip is missing from this Python; run `.*python -m ensurepip`"):
        fetch.fetch_one(NAME, found, progress=False)


def test_a_full_disk_is_told_before_and_during(home, monkeypatch):
    found = make_entry(make_wheel(home / "wheels"))
    usage = shutil.disk_usage(home)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(AssetError, match="^fake: needs 0.01 GB while it is unpacked.* has 0.00 GB free"):
        fetch.fetch_one(NAME, found, progress=False)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage)
    shutil.copyfile(home / "wheels" / WHEEL, home / "cache" / f".wheel-{NAME}.whl")

    def fill(source, target):
        (target / "data.bin").write_bytes(CONTENT[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(convert.RECIPES, "copy", fill)
    with pytest.raises(AssetError, match="^fake: the disk of .* is full; nothing was kept"):
        fetch.fetch_one(NAME, found, progress=False)
    assert not cache.asset_folder(NAME, found).exists()
    assert not any(name.startswith(".partial") for name in leftovers(home))


def test_a_kill_while_downloading_leaves_nothing_broken(home, monkeypatch):
    wheel = make_wheel(home / "wheels")
    found = make_entry(wheel)
    with Index(wheel, mode="stall") as index:
        serve_url(monkeypatch, index.url)
        process = start(found)
        assert index.half_sent.wait(30)
        process.kill()
        process.wait()
        assert not cache.asset_folder(NAME, found).exists()
    serve_folder(monkeypatch, home / "wheels")
    folder = fetch.fetch_one(NAME, found, progress=False)
    assert (folder / "data.bin").read_bytes() == CONTENT
    assert leftovers(home) == []


def test_a_kill_while_unpacking_leaves_nothing_broken_and_keeps_the_download(home, monkeypatch):
    found = downloaded(home)
    script = (
        "def half(source, target):\n"
        "    (target / 'data.bin').write_bytes((source / 'data.bin').read_bytes()[:1000])\n"
        "    print('half', file=sys.stderr, flush=True)\n    time.sleep(60)\n"
        "convert.RECIPES['copy'] = half\nfetch.fetch_one(NAME, FOUND, progress=False)"
    )
    process = start(found, script)
    assert process.stderr.readline() == "half\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not cache.asset_folder(NAME, found).exists()
    assert len(leftovers(home)) == 2  # the temporary folder, and the wheel, which is whole
    refuse_pip(monkeypatch)
    folder = fetch.fetch_one(NAME, found, progress=False)
    assert (folder / "data.bin").read_bytes() == CONTENT
    assert leftovers(home) == []


def test_two_processes_download_once(home, monkeypatch):
    wheel = make_wheel(home / "wheels")
    found = make_entry(wheel)
    with Index(wheel, mode="stall") as index:
        serve_url(monkeypatch, index.url)
        first = start(found)
        assert index.half_sent.wait(30)
        second = start(found)
        time.sleep(0.5)
        assert first.poll() is None and second.poll() is None
        index.go.set()
        assert [process.wait(60) for process in (first, second)] == [0, 0], first.stderr.read() + second.stderr.read()
        assert index.served == 1
    assert (cache.asset_folder(NAME, found) / "data.bin").read_bytes() == CONTENT
    assert leftovers(home) == []


def test_damage_is_noticed_and_mended(home):
    found = downloaded(home)
    folder = fetch.fetch_one(NAME, found, progress=False)
    path = folder / "data.bin"
    assert cache.fault(folder, found) is None

    path.write_bytes(CONTENT[:-1])
    assert "bytes, not" in cache.fault(folder, found)
    path.write_bytes(CONTENT[:-1] + b"!")
    assert "changed" in cache.fault(folder, found)
    path.write_bytes(CONTENT)  # right again, at another time: hashed once more, and believed
    assert cache.fault(folder, found) is None
    (folder / cache.STAMP).write_text("no JSON")
    assert cache.fault(folder, found) is None
    before = os.stat(path)
    path.write_bytes(CONTENT[:-1] + b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # a forged time of change
    assert "changed" in cache.fault(folder, found, thorough=True)
    lines = []
    assert fetch.fetch_one(NAME, found, progress=False, say=lines.append, thorough=True) == folder
    assert path.read_bytes() == CONTENT
    assert len(lines) == 1 and "again" in lines[0]
    path.unlink()
    assert "missing" in cache.fault(folder, found)
    assert leftovers(home) == []


def test_the_cache_folder_can_be_chosen_and_must_be_writable(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTLAB_CACHE", "~/somewhere")
    assert cache.cache_folder() == cache.Path.home() / "somewhere"
    monkeypatch.delenv("PEFTLAB_CACHE")
    assert cache.cache_folder().name == "peftlab"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match="^fake: cannot write to the cache folder .*PEFTLAB_CACHE"):
        fetch.fetch_one(NAME, make_entry(make_wheel(tmp_path / "wheels")), progress=False)


def test_the_size_of_a_folder_that_vanishes(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(bytes(10))
    assert fetch._size(tmp_path) == 10
    real = os.scandir

    def vanish(path):  # pip clears its folder between our seeing it and our going into it
        if not str(path).startswith(str(tmp_path)) or str(path) == str(tmp_path):
            return real(path)
        with contextlib.suppress(OSError):
            os.remove(tmp_path / "a" / "file")
            os.rmdir(tmp_path / "a")
        return real(path)

    monkeypatch.setattr(os, "scandir", vanish)
    assert fetch._size(tmp_path) == 0


def test_unknown_names_have_near_matches_before_anything_is_fetched(home, monkeypatch):
    refuse_pip(monkeypatch)
    with pytest.raises(AssetError, match="no asset 'reviws'. Did you mean 'reviews'"):
        fetch.fetch(["smollm2-135m", "reviws"])
    assert not (home / "cache").exists()


def test_the_catalogue_is_complete_and_its_editions_follow_the_files():
    for name, found in catalogue().items():
        assert entry(name) is found
        assert found["recipe"] in convert.RECIPES
        assert len(found["wheel_sha256"]) == 64 and found["wheel_bytes"] > 0
        assert all(len(file["sha256"]) == 64 and file["bytes"] > 0 for file in found["files"].values())
        assert found["licence"] and found["hub"]
        assert edition(found | {"licence": "other"}) == edition(found)
        assert edition(found | {"files": {}}) != edition(found)


def test_fetching_loads_no_torch():
    program = "import sys, peftlab.assets.fetch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
