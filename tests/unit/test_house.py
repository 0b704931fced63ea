"""Agreements between the files of the house: one address, one version, one set of pins, and nothing private in them."""

import importlib.metadata
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
# The newest versions that a person may be held to; the pins may be later.
OLDEST_PYTHON = "3.11.2"  # of Debian 12
CEILINGS = {"torch": "2.11", "transformers": "5.17", "peft": "0.21.0"}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


def pins() -> dict[str, str]:
    lines = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


def requirements() -> list[Requirement]:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group if not text.startswith("peftlab[")]


def test_constraints_are_plain_pins():
    for line in read("constraints.txt").splitlines():
        # no path, no host, no local build such as +cpu, no marker
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line
    lines = [line.lower() for line in read("constraints.txt").splitlines() if not line.startswith("#")]
    assert lines == sorted(set(lines)), "constraints.txt is not sorted, or names a package twice"


def test_every_requirement_is_a_lower_bound_and_is_pinned():
    for requirement in requirements():
        # version 2 of Jupyter Book is another program
        allowed = {">=", "<"} if requirement.name == "jupyter-book" else {">="}
        assert {s.operator for s in requirement.specifier} == allowed, f"{requirement}: lower bounds only"
        pin = pins().get(canonicalize_name(requirement.name))
        assert pin, f"{requirement.name} is not in constraints.txt"
        assert pin in requirement.specifier, f"{requirement} does not admit its pin {pin}"
        ceiling = CEILINGS.get(requirement.name)
        assert not ceiling or ceiling in requirement.specifier, f"{requirement} is above {ceiling}"


def test_what_installs_the_package_is_pinned():
    assert {"pip", "setuptools", "wheel"} <= pins().keys()


def test_pins_install_on_the_oldest_python():
    """One pin that refuses Debian 12's Python makes pip search for hours among old versions of everything else."""
    for name, pin in pins().items():
        try:
            metadata = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:  # the lab extra is not in every environment
            continue
        if metadata["Version"].split("+")[0] == pin and metadata["Requires-Python"]:
            assert OLDEST_PYTHON in SpecifierSet(metadata["Requires-Python"]), f"{name} {pin}"


def test_conda_environment_says_the_same():
    environment = yaml.safe_load(read("environment.yml"))
    assert environment["channels"] == ["conda-forge"]
    plain = [d for d in environment["dependencies"] if isinstance(d, str)]
    (through_pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert sorted(re.match(r"[a-z]+", d)[0] for d in plain) == ["make", "pip", "python"]
    assert [d for d in plain if d.startswith("python")] == [f"python{PROJECT['requires-python']}"]
    # pip takes the very files that `make` takes, so there is no second list to drift
    assert through_pip == ["-c constraints.txt", "-e .[test,lab]"]
    assert set(PROJECT["optional-dependencies"]) >= {"test", "lab", "book", "notebooks", "gpu"}


def test_python_versions_agree():
    minimum = re.search(r"(\d+\.\d+)", PROJECT["requires-python"])[1]
    assert f"Python {minimum}" in read("README.md")
    assert minimum in read("tools/setup.sh")
    assert f"({minimum.replace('.', ', ')})" in read("tools/setup.sh")


def test_repository_has_one_address():
    config = yaml.safe_load(read("_config.yml"))
    assert config["repository"] == {"url": REPOSITORY, "branch": "main"}
    assert not config["repository"].get("path_to_book")
    assert config["launch_buttons"]["colab_url"] == "https://colab.research.google.com"
    owner_and_name = REPOSITORY.removeprefix("https://github.com/")
    mention = re.compile(r"github\.com/([\w.-]+/peftlab)\b|colab\.research\.google\.com/github/([\w.-]+/[\w.-]+?)/")
    for name in tracked():
        written = Path(name).suffix in (".md", ".yml", ".toml", ".cff", ".ipynb", ".py", ".txt", ".sh")
        if not written or "vendor/" in name or not (ROOT / name).exists():
            continue
        for found in mention.finditer(read(name)):
            assert (found[1] or found[2]).removesuffix(".git") == owner_and_name, f"{name}: {found[0]}"


def test_colab_links_lead_to_notebooks():
    for name in ("README.md", "CONTRIBUTING.md"):
        for path in re.findall(r"colab\.research\.google\.com/github/\S+?/blob/main/([^)\s\"]+)", read(name)):
            assert (ROOT / path).is_file(), f"{name}: {path} does not exist"


def test_links_between_documents_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", read(name)):
            assert "://" in target or (ROOT / target).exists(), f"{name}: {target} does not exist"


def test_one_version():
    import peftlab

    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT  # setuptools reads it from the package
    assert yaml.safe_load(read("CITATION.cff"))["version"] == peftlab.__version__
    newest = re.search(r"^## \[(?!Unreleased)([^\]]+)\]", read("CHANGELOG.md"), re.MULTILINE)[1]
    assert newest == peftlab.__version__


def test_citation_and_licences_agree():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["repository-code"] == REPOSITORY
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in read("LICENSE") and "Attribution 4.0 International" in read("LICENSE-BOOK")


def test_vendored_scripts_are_those_of_their_manifest():
    import vendor

    assert [problem for folder in (vendor.SITE, vendor.TESTS) for problem in vendor.check(folder)] == []


def test_vendored_scripts_that_changed_are_found(tmp_path):
    import vendor

    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.js").write_text("1")
    digest = vendor.listed(tmp_path)["lib/a.js"]
    (tmp_path / "manifest.json").write_text(json.dumps({"lib": {"files": {"a.js": digest, "b.js": "0"}}}))
    assert vendor.check(tmp_path) == ["lib/b.js is missing"]
    (tmp_path / "lib" / "a.js").write_text("2")
    (tmp_path / "lib" / "c.js").write_text("3")
    told = vendor.check(tmp_path)
    assert "lib/a.js differs from the manifest" in told and "lib/c.js is in " in told[0]


def test_make_help_lists_every_target_of_the_readme():
    help_text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("book", "test", "check", "lab", "refresh", "clean", "help", "fetch", "test-gpu"):
        assert f"make {target} " in help_text, target


def test_bibliography_entries_say_who_what_and_when():
    from pybtex.database import parse_file

    entries = parse_file(str(ROOT / "book" / "references.bib")).entries
    assert len(entries) >= 20
    for key, entry in entries.items():
        assert entry.persons.get("author") and entry.fields["title"] and entry.fields["year"].isdigit(), key
        if "arXiv:" in (journal := entry.fields.get("journal", "")):
            assert entry.fields["url"] == "https://arxiv.org/abs/" + journal.split("arXiv:")[1], key
            assert key == key.lower() and re.fullmatch(r"[a-z]+\d{4}[a-z0-9]+", key), key


def test_no_large_file_is_tracked():
    large = [n for n in tracked() if (ROOT / n).is_file() and (ROOT / n).stat().st_size > 4_000_000]
    assert large == []
