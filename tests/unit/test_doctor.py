"""What `peftlab doctor` says of machines that lack something; each lack is made up, one at a time."""

import hashlib
import json
import os
import re
import shutil
import socket
import tomllib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from peftlab.assets.cache import asset_folder
from peftlab.assets.catalogue import catalogue
from peftlab.commands import cli, doctor, machine, preflight
from peftlab.optional import PACKAGES


@pytest.fixture(autouse=True)
def room(monkeypatch):
    """A disk and a memory with room for every chapter, whatever the machine has on which the tests run."""
    monkeypatch.setattr(machine, "disk_free", lambda folder: 100_000_000_000)
    monkeypatch.setattr(machine, "memory", lambda: (64_000_000_000, 48_000_000_000))


def status_of(capsys, *arguments):
    status = cli.main(["doctor", *arguments])
    return status, capsys.readouterr().out


def test_this_machine_runs_and_both_forms_say_the_same(capsys):
    status, out = status_of(capsys, "--json")
    report = json.loads(out)
    assert status == 0 and report["problems"] == []
    assert report["devices"][0]["name"] == "cpu" and report["system"]["memory"] > 1e9
    assert set(report["assets"]) == set(catalogue())
    assert [chapter["title"] for chapter in report["chapters"]] == [chapter.title for chapter in doctor.CHAPTERS]
    status, page = status_of(capsys)
    assert status == 0 and "Nothing essential is missing." in page
    for word in (*doctor.ESSENTIAL, *catalogue(), "Start here", "2 LoRA", "GB (", "4-bit"):
        assert word in page


def test_the_lower_bounds_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    essential = dict(line.split(">=") for line in project["dependencies"])
    assert {name: essential[name] for name in doctor.ESSENTIAL} == doctor.ESSENTIAL
    for name, (least, _, extra) in PACKAGES.items():
        assert f"{name}>={least}" in project["optional-dependencies"][extra]
    assert project["requires-python"] == ">={}.{}".format(*doctor.PYTHON)


def test_chapters_ask_for_things_that_exist():
    for chapter in doctor.CHAPTERS:
        assert set(chapter.assets) <= set(catalogue()) and set(chapter.packages) <= set(PACKAGES)


def versions(monkeypatch, **changed):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: changed[name] if name in changed else real(name))


@pytest.mark.parametrize(
    ("version", "told"),
    [(None, "torch is not installed: pip install 'torch>=2.6'."), ("2.5.1", "torch 2.5.1 is too old")],
)
def test_without_torch_or_with_an_old_one_nothing_works(version, told, capsys, monkeypatch):
    versions(monkeypatch, torch=version)
    status, page = status_of(capsys)
    assert status == 1 and told in page and "Nothing essential is missing" not in page
    assert re.search(r"2 LoRA +is missing what is named under problems", page)


def test_a_nightly_build_of_the_least_version_is_new_enough():
    assert not doctor.older("2.6.0.dev20250101+cu124", "2.6")
    assert doctor.older("2.5.9", "2.6") and not doctor.older("unheard-of", "2.6")


def test_an_old_python_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "PYTHON", (9, 0))
    assert "peftlab needs 9.0 or newer" in doctor.examine()["problems"][0]


def test_a_torch_that_does_not_import_is_a_problem_and_no_traceback(monkeypatch):
    def broken():
        raise OSError("libcudart.so.12: cannot open\nin line two")

    monkeypatch.setattr(machine, "devices", broken)
    report = doctor.examine()
    assert report["devices"] == []
    told = "torch is installed but cannot be imported (OSError: libcudart.so.12: cannot open in line two)."
    assert report["problems"] == [told]
    assert doctor.render(report)


def test_what_is_optional_is_a_note_with_the_command_that_helps(monkeypatch):
    versions(monkeypatch, bitsandbytes=None, peft="0.1")
    report = doctor.examine()
    assert report["problems"] == [] and report["four_bit"] == {"bitsandbytes": None, "devices": []}
    notes = " ".join(report["notes"])
    assert "pip install 'bitsandbytes>=0.45'" in notes and "peft 0.1 is older than 0.18" in notes
    assert "no: bitsandbytes is missing or too old" in doctor.render(report)


def test_an_empty_cache_is_no_problem_and_a_full_disk_or_little_memory_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "not" / "yet"))
    report = doctor.examine()
    place = [chapter.title for chapter in doctor.CHAPTERS].index("LoRA")
    lora = report["chapters"][place]
    assert report["problems"] == [] and report["assets"]["news"]["state"] == "not fetched"
    assert lora["runs"] and lora["fetches"] == list(doctor.CHAPTERS[place].assets) and lora["download"] > 9e7
    assert "it first brings smollm2-135m" in doctor.render(report)
    monkeypatch.setattr(machine, "disk_free", lambda folder: 1000)
    assert "of disk space" in doctor.examine()["chapters"][place]["missing"][0]
    monkeypatch.setattr(machine, "memory", lambda: (2_000_000_000, 1))
    assert "4.00 GB of memory (here: 2.00 GB)" in doctor.examine()["chapters"][place]["missing"][1]


def test_a_damaged_file_and_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "fault", lambda *_, **__: "model.safetensors is missing")
    report = doctor.examine()
    assert report["assets"]["minilm"]["state"] == "damaged"
    assert "minilm in the cache is damaged (model.safetensors is missing): peftlab fetch minilm." in report["faults"]
    assert cli.main(["doctor"]) == 1
    (tmp_path / "file").touch()
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "file" / "cache"))
    report = doctor.examine()
    assert not report["cache"]["writable"] and "set PEFTLAB_CACHE" in report["problems"][0]


def test_verify_hashes_again(monkeypatch):
    asked = []
    monkeypatch.setattr(doctor, "fault", lambda folder, entry, thorough: asked.append(thorough))
    doctor.examine(verify=True)
    assert asked == [True] * len(catalogue())


def test_a_gpu_that_only_emulates_bf16_is_said_to_be_slow_at_it():
    asked = []

    def supported(including_emulation=True):
        asked.append(including_emulation)
        return including_emulation

    cuda = SimpleNamespace(
        get_device_properties=lambda index: SimpleNamespace(name="Tesla T4", total_memory=15_800_000_000),
        mem_get_info=lambda index: (15_000_000_000, 15_800_000_000),
        device=lambda index: nullcontext(),
        is_bf16_supported=supported,
    )
    found = machine._cuda(SimpleNamespace(cuda=cuda), 1)
    assert found["name"] == "cuda:1" and found["free"] == 15_000_000_000 and asked == [False]
    assert found["dtypes"] == {"float32": "native", "bfloat16": "slow", "float16": "native"}


def test_a_gpu_that_torch_does_not_see_is_noted(monkeypatch):
    monkeypatch.setattr(machine, "unused_gpu", lambda: True)
    cpu = {"name": "cpu", "model": "x", "memory": None, "free": None, "dtypes": {"float32": "native", "float16": "no"}}
    monkeypatch.setattr(machine, "devices", lambda: [cpu])
    versions(monkeypatch, torch="2.13.0+cpu")
    report = doctor.examine()
    assert "torch 2.13.0+cpu is built for the CPU only" in report["notes"][-1]
    assert "unknown: float32\n" in doctor.render(report)


def test_sizes_that_a_gpu_can_train(monkeypatch):
    """By the estimator: a card of 24 GB takes LoRA at 8B, one of 141 GB also 70B in four bits."""
    cuda = {"name": "cuda:0", "model": "a card", "memory": 24_000_000_000, "free": 1, "dtypes": {"float32": "native"}}
    monkeypatch.setattr(machine, "devices", lambda: [{**cuda, "name": "cpu"}, cuda, {**cuda, "name": "cuda:1"}])
    report = doctor.examine()
    assert list(report["sizes"]) == ["cuda:0", "cuda:1"]
    sizes = report["sizes"]["cuda:0"]
    assert sizes["llama-3.2-1b"] == ["full", "lora", "qlora"]
    assert sizes["llama-3.1-8b"] == ["lora", "qlora"] and sizes["llama-2-70b"] == []
    assert "llama-2-70b   none" in doctor.render(report)
    monkeypatch.setattr(machine, "devices", lambda: [{**cuda, "memory": 141_000_000_000}])
    assert doctor.examine()["sizes"]["cuda:0"]["llama-2-70b"] == ["qlora"]


def test_memory_and_cores_respect_a_container(monkeypatch):
    monkeypatch.undo()  # here the machine is asked itself, from files that are made up
    files = {
        "/proc/meminfo": "MemTotal:       16000000 kB\nMemAvailable:    9000000 kB\n",
        "/sys/fs/cgroup/memory.max": "2000000000\n",
        "/sys/fs/cgroup/memory.current": "500000000\n",
        "/sys/fs/cgroup/cpu.max": "100000 100000\n",
    }
    monkeypatch.setattr(machine, "_text", lambda path: files.get(path, ""))
    assert machine.memory() == (2_000_000_000, 1_500_000_000) and machine.cores() == 1
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert machine.memory() == (16_000_000 * 1024, 9_000_000 * 1024)


def test_every_chapter_of_the_book_has_its_line():
    """A chapter brings a file of facts; its needs belong into the table of the doctor."""
    known = {chapter.number: chapter for chapter in doctor.CHAPTERS}
    for file in (Path(__file__).parents[2] / "book" / "facts").glob("*.toml"):
        facts = tomllib.loads(file.read_text(encoding="utf-8"))
        if "chapter" not in facts:
            continue  # questions of practice, which belong to no chapter
        line = known.get(facts["chapter"]["number"])
        assert line is not None and line.title == facts["chapter"]["title"], file.name
        assert line.memory >= 1e9 * facts.get("run", {}).get("memory_gb", 0), file.name


def test_a_version_newer_than_all_tested_ones_is_noted(capsys, monkeypatch):
    newest = max(doctor.TESTED.values(), key=lambda row: doctor._order(row["transformers"]))["transformers"]
    versions(monkeypatch, transformers="99.1", torch=doctor.TESTED["pinned"]["torch"] + "+cpu")
    status, page = status_of(capsys)
    told = f"transformers 99.1 is newer than every version that peftlab was tested with (the newest is {newest})"
    assert status == 0 and told in page and "+cpu is newer" not in page
    versions(monkeypatch, transformers=newest)
    assert f"transformers {newest} is newer" not in status_of(capsys)[1]


def test_the_tested_versions_are_those_of_the_pins():
    root = Path(__file__).parents[2]
    pins = dict(line.split("==") for line in (root / "constraints.txt").read_text().split() if "==" in line)
    assert set(doctor.TESTED["pinned"]) == {"python", *doctor.ESSENTIAL, *PACKAGES}
    for name, version in doctor.TESTED["pinned"].items():
        assert name == "python" or pins[name] == version, f"{name}: peftlab/tested.json and constraints.txt differ"


def small_catalogue(monkeypatch, tmp_path, kind="dataset"):
    """A catalogue of two made-up data sets of one small file each, both in the cache and whole."""
    entries = {}
    for name in ("alpha", "beta"):
        content = f"the file of {name}".encode() * 50
        files = {"data.bin": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}}
        entries[name] = {"kind": kind, "files": files, "wheel_bytes": 1000}
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path / "cache"))
    for module in (doctor, preflight):
        monkeypatch.setattr(module, "catalogue", lambda: entries)
    monkeypatch.setattr(doctor, "CHAPTERS", (doctor.Chapter(7, "A chapter", ("alpha",), ("peft",)),))
    monkeypatch.setattr(preflight, "CHAPTERS", doctor.CHAPTERS)
    monkeypatch.setattr(preflight, "_unloadable", lambda name: None)
    for name, entry in entries.items():
        folder = asset_folder(name, entry)
        folder.mkdir(parents=True)
        (folder / "data.bin").write_bytes(f"the file of {name}".encode() * 50)
    return {name: asset_folder(name, entry) / "data.bin" for name, entry in entries.items()}


def flip(file):
    """Change one byte and keep the size and the time of change: only a hash can tell."""
    status, content = file.stat(), bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("harm", "arguments", "told"),
    [
        (lambda files: files["beta"].write_bytes(b"short"), [], "beta in the cache is damaged (data.bin has 5 bytes"),
        (lambda files: files["alpha"].unlink(), [], "alpha in the cache is damaged (data.bin is missing)"),
        (lambda files: flip(files["beta"]), ["--verify"], "beta in the cache is damaged (data.bin has been changed"),
        (lambda files: shutil.rmtree(files["beta"].parent), ["--verify"], "beta is not in the cache: peftlab fetch"),
        (lambda files: shutil.rmtree(files["beta"].parent), ["beta"], "beta is not in the cache: peftlab fetch beta"),
        (lambda files: shutil.rmtree(files["alpha"].parent), ["7"], "alpha is not in the cache: peftlab fetch alpha"),
    ],
)  # fmt: skip
def test_what_is_asked_for_and_missing_or_damaged_gives_status_1(harm, arguments, told, capsys, monkeypatch, tmp_path):
    files = small_catalogue(monkeypatch, tmp_path)
    assert status_of(capsys, *arguments)[0] == 0
    harm(files)
    status, page = status_of(capsys, *arguments)
    assert status == 1 and told in page and "Nothing essential is missing" not in page
    assert told in " ".join(json.loads(status_of(capsys, *arguments, "--json")[1])["faults"])


def test_what_was_not_asked_for_may_be_missing(capsys, monkeypatch, tmp_path):
    files = small_catalogue(monkeypatch, tmp_path)
    shutil.rmtree(files["beta"].parent)
    for arguments in ([], ["alpha"], ["7"], ["torch", "peft"]):
        assert status_of(capsys, *arguments)[0] == 0, arguments


@pytest.mark.parametrize(("reason", "name"), [("is not installed", "peft"), ("is broken", "bitsandbytes")])
def test_a_package_that_is_asked_for_and_cannot_be_imported_gives_status_1(reason, name, capsys, monkeypatch, tmp_path):
    small_catalogue(monkeypatch, tmp_path)
    monkeypatch.setattr(doctor, "load", lambda asked: (None, reason if asked == name else ""))
    status, page = status_of(capsys, name)
    assert status == 1 and f"{name} {reason}." in page


def test_a_name_that_the_doctor_does_not_know_is_a_mistake(capsys):
    assert cli.main(["doctor", "minlm"]) == 2
    assert "Did you mean 'minilm'?" in capsys.readouterr().err
    assert cli.main(["doctor", "--offline", "minilm"]) == 2


@pytest.mark.parametrize(
    ("harm", "lines"),
    [
        (lambda files: None, ["Ready for a room without a network"]),
        (lambda files: flip(files["alpha"]), ["alpha in the cache is damaged"]),
        (lambda files: shutil.rmtree(files["beta"].parent), ["beta is not in the cache"]),
        (
            lambda files: (files["alpha"].write_bytes(b""), files["beta"].unlink()),
            ["alpha in the cache is damaged", "beta in the cache is damaged"],
        ),
    ],
)
def test_the_preflight_has_one_line_per_fault(harm, lines, capsys, monkeypatch, tmp_path):
    harm(small_catalogue(monkeypatch, tmp_path))
    status, page = status_of(capsys, "--offline")
    told = page.splitlines()
    assert status == (lines[0][:5] != "Ready") and len(told) == len(lines)
    assert all(line.startswith(start) for line, start in zip(told, lines, strict=True))


def test_the_preflight_imports_each_package_of_a_chapter_and_knows_its_oldest_release(monkeypatch, tmp_path, capsys):
    small_catalogue(monkeypatch, tmp_path)
    monkeypatch.setattr(preflight, "load", lambda name: (None, "is broken") if name == "peft" else (object(), ""))
    assert status_of(capsys, "--offline") == (
        1, "peft is broken; chapters 7 need it. pip install --upgrade 'peft>=0.18'.\n",
    )  # fmt: skip
    monkeypatch.setattr(preflight, "load", lambda name: (object(), ""))
    versions(monkeypatch, peft="0.3")
    assert status_of(capsys, "--offline")[1].startswith("peft 0.3 is too old; chapters 7 need it.")


def test_the_preflight_loads_what_is_there_without_a_network(monkeypatch, tmp_path, capsys):
    def reach_out(name):
        return socket.create_connection(("127.0.0.1", 9), timeout=1)

    small_catalogue(monkeypatch, tmp_path)
    monkeypatch.setattr(preflight, "_unloadable", lambda name: _told(reach_out, name) if name == "beta" else None)
    status, page = status_of(capsys, "--offline")
    assert status == 1 and page.count("\n") == 1
    assert page.startswith("beta is in the cache, but loading it without a network fails: there is no network")
    with pytest.raises(ConnectionRefusedError):  # the guard is gone again
        reach_out("beta")


def _told(call, name):
    try:
        call(name)
    except OSError as error:
        return str(error)
