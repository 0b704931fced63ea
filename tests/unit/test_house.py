"""Agreements between the files of the house: one address, one version, one set of pins, arrows that go one way."""

import ast
import functools
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "peftlab"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
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


def test_contributing_names_files_that_exist():
    """Only of the package, the tests and the tools; a name with NAME or NN stands for a file of your own."""
    named = re.findall(r"(?:peftlab|tests|tools|book)/[\w/.-]+", read("CONTRIBUTING.md"))
    named += [f"peftlab/{path}" for path in re.findall(r"`((?:methods|core)/\w+\.py)`", read("CONTRIBUTING.md"))]
    for path in (path.rstrip(".") for path in named if not re.search("NAME|NN|/peftlab$", path)):
        assert (ROOT / path).exists(), f"CONTRIBUTING.md names {path}, which does not exist"


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


def test_types_are_shipped_and_checked():
    """`py.typed` tells a user's type checker to believe our annotations, so lint must hold them."""
    assert (PACKAGE / "py.typed").is_file()
    assert "py.typed" in SETTINGS["tool"]["setuptools"]["package-data"]["*"]
    mypy = SETTINGS["tool"]["mypy"]
    assert mypy["packages"] == ["peftlab"]
    for setting in ("check_untyped_defs", "disallow_untyped_defs", "no_implicit_optional", "warn_unused_ignores"):
        assert mypy[setting] is True, setting
    for override in mypy["overrides"]:
        ours = [name for name in override["module"] if name.startswith(("peftlab", "*"))]
        assert ours in ([], ["peftlab.kit.exercises.*"]), f"{ours}: the package itself is checked in full"
        assert not ours or not {"ignore_errors", "ignore_missing_imports"} & override.keys()
    for target, checks in {"check": "/mypy\n", "test": '-m pytest tests -m "not gpu and not kills'}.items():
        recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", read("Makefile"), re.MULTILINE)[1]
        assert "/ruff check ." in recipe and checks in recipe, f"make {target} does not check the types"
    assert '"-m", "mypy"' in read("tests/unit/test_types.py")  # which `make test` runs beside the other tests


def test_what_the_type_checker_ignores_has_a_reason():
    lines = [line for path in PACKAGE.rglob("*.py") for line in path.read_text(encoding="utf-8").splitlines()]
    ignored = [line for line in lines if "type: ignore" in line]
    assert len(ignored) <= 12
    for line in ignored:
        assert re.search(r"# type: ignore\[[a-z-]+\]  # \w+", line), line


def test_no_large_file_is_tracked():
    large = [n for n in tracked() if (ROOT / n).is_file() and (ROOT / n).stat().st_size > 4_000_000]
    assert large == []


# ------------------------------------------------------------------------------------------- the wings of the package

# What each wing may import, beside itself and the files at the top of peftlab/. A wing names only wings above it in
# this table, so arrows between wings cannot close a circle. "peftlab" is the face, which loads every public name.
WINGS = {
    "peftlab": (),
    "assets": (),
    "memory": (),
    "evaluation": (),
    "core": (),
    "quantization": ("core",),
    "methods": ("core", "quantization"),
    "adapters": ("core", "quantization", "methods"),
    "fast": ("core", "quantization", "methods"),
    "training": ("memory", "core", "quantization", "fast"),
    "kit": ("memory", "evaluation", "quantization"),
    "guide": ("assets", "memory", "kit"),
    "bench": (
        "peftlab", "assets", "memory", "evaluation", "core", "quantization", "methods", "adapters", "fast", "training",
        "kit",
    ),
    "commands": (
        "peftlab", "assets", "memory", "evaluation", "core", "quantization", "methods", "adapters", "fast", "training",
        "kit", "guide", "bench",
    ),
}  # fmt: skip
TOP = 10  # files in the top folder, beside __init__ and __main__
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
HEAVY = ("torch", "transformers", "datasets", "peft", "numpy", "bitsandbytes", "matplotlib")


class Import(NamedTuple):
    """One import: what it loads, whether it stands inside a function, and whether it names that or a file inside."""

    name: str
    late: bool
    named: bool


def modules(package: Path) -> dict[str, Path]:
    """The files of the package by the names that one imports."""
    named = {".".join(p.relative_to(package.parent).with_suffix("").parts): p for p in package.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in sorted(named.items())}


@functools.cache  # the broken houses of the tests differ from ours in a file or two
def statements(text: str) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    """The import statements of a file's text, each with whether it stands inside a function."""
    tree = ast.parse(text)
    inner = {id(node) for outer in ast.walk(tree) if isinstance(outer, FUNCTIONS) for node in ast.walk(outer)}
    return [(node, id(node) in inner) for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def imports(package: Path) -> dict[str, list[Import]]:
    """What each file imports, also inside functions and for types alone.

    A file of another package also loads what that package's `__init__` loads, so each name brings the packages that
    it lies in, but for those that the importing file lies in itself.
    """
    files = modules(package)
    found: dict[str, list[Import]] = {}
    for name, path in files.items():
        found[name] = []
        for node, late in statements(path.read_text(encoding="utf-8")):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            else:
                assert not node.level, f"{path}, line {node.lineno}: a relative import"
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                wanted = [inside if inside in files else node.module for inside in whole]
            for target in wanted:
                parts = target.split(".")
                outer = (".".join(parts[:n]) for n in range(2, len(parts)))
                beside = [o for o in outer if o in files and not f"{name}.".startswith(f"{o}.")]
                found[name] += [Import(one, late, one == target) for one in [target, *beside]]
    return found


def wing_of(name: str) -> str | None:
    """The wing that a file lies in: "" for a file at the top, None for what is not ours."""
    parts = name.split(".")
    if parts[0] != "peftlab":
        return None
    return "peftlab" if parts[1:] in ([], ["__main__"]) else parts[1] if parts[1] in WINGS else ""


def circle(graph: dict[str, list[Import]]) -> list[str]:
    """The files of a circle, or an empty list."""
    done: set[str] = set()

    def follow(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done or name not in graph:
            return []
        for one in graph[name]:
            if found := follow(one.name, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in graph if (found := follow(name, []))), [])


def reached(graph: dict[str, list[Import]], start: str, late: bool = True) -> set[str]:
    """All that a file imports, and what that imports, and so on; without `late`, only what starting it loads."""
    seen, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [one.name for one in graph.get(name, ()) if late or not one.late]
    return seen


def heavy(graph: dict[str, list[Import]], start: str) -> set[str]:
    """The large libraries that starting a file loads."""
    return {name.split(".")[0] for name in reached(graph, start, late=False)} & set(HEAVY)


def faults(package: Path) -> list[str]:
    """What is wrong with the wings of a package: one line each."""
    graph = imports(package)
    top = sorted(path.name for path in package.glob("*.py") if path.stem not in ("__init__", "__main__"))
    told = [f"{len(top)} files at the top: {', '.join(top)}"] if len(top) > TOP else []
    told += [f"{path.name} is no wing" for path in package.iterdir() if [*path.rglob("*.py")] and path.is_dir()
             and path.name not in WINGS]  # fmt: skip
    if round_trip := circle(graph):
        told.append(f"a circle: {' -> '.join(round_trip)}")
    for name, found in graph.items():
        own = wing_of(name)
        for one in found:
            other = wing_of(one.name)
            if other and other != own and other not in WINGS.get(own, ()) and name != "peftlab.__main__":
                told.append(f"an arrow upwards: {name} -> {one.name}")
            if one.late and one.named and other is not None and (heavy(graph, name) or not heavy(graph, one.name)):
                told.append(f"hidden in a function, and nothing heavy is put off: {name} -> {one.name}")
        if own == "memory" and (bad := {"torch", "transformers"} & {n.split(".")[0] for n in reached(graph, name)}):
            told.append(f"{name} reaches {', '.join(sorted(bad))}")
    for name in ("peftlab", "peftlab.__main__", "peftlab.commands.cli"):
        if bad := heavy(graph, name):
            told.append(f"starting {name} loads {', '.join(sorted(bad))}")
    return told


def test_the_wings_stand_as_drawn():
    names = list(WINGS)
    assert all(names.index(below) < names.index(wing) for wing, allowed in WINGS.items() for below in allowed)
    assert faults(PACKAGE) == []


def wings_of_the_design(text: str) -> dict[str, set[str]]:
    """What the table of DESIGN.md says that each wing may import. "All of these" are the rows above, and `but` some."""
    found: dict[str, set[str]] = {}
    table = text.partition("| wing | may import |")[2].partition("\n\n")[0]
    for names, allowed in re.findall(r"^\| ([^|]*`.+?) \| (.+?) \|$", table, re.MULTILINE):
        named = set(re.findall(r"`(\w+)`", allowed))
        if allowed.startswith("all of these"):
            named = found.keys() - named
        if allowed.endswith("the public names"):
            named |= {"peftlab"}
        for wing in re.findall(r"`(\w+)`", names):
            assert wing not in found, f"DESIGN.md has two rows for {wing}"
            found[wing] = named
    return found


def test_the_design_says_what_each_wing_may_import():
    text = read("peftlab/DESIGN.md")
    assert wings_of_the_design(text) == {wing: set(allowed) for wing, allowed in WINGS.items() if wing != "peftlab"}
    top = re.search(r"^at the top of the folder +(.+?): any wing", text, re.MULTILINE)[1].split(", ")
    here = [path.stem for path in sorted(PACKAGE.glob("*.py")) if path.stem not in ("__init__", "__main__")]
    assert sorted(top) == here


def test_the_design_names_files_and_functions_that_exist():
    """A path may begin anywhere below the package. "`moved` (`training/labels.py`)" also says what the file defines."""
    text = read("peftlab/DESIGN.md").partition("\n## What we rely on\n")[0]
    files = {path for path in tracked() if not path.startswith("book/_static/vendor")}
    for path in re.findall(r"`([\w./]+\.(?:py|toml|js|mjs))`", text):
        assert any(f"/{file}".endswith(f"/{path}") for file in files), f"DESIGN.md names {path}, which does not exist"
    for name, path in re.findall(r"`([\w.]+)` (?:in |\()`([\w/]+\.py)`", text):
        defined = re.compile(rf"^\s*(?:def|class) {name.rpartition('.')[2]}\b", re.MULTILINE)
        there = [file for file in files if f"/{file}".endswith(f"/{path}")]
        assert any(defined.search(read(file)) for file in there), f"DESIGN.md: {path} defines no {name}"


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("core/hooks.py", "from peftlab.core.records import unwrap", "a circle: "),
        ("core/hooks.py", "def f():\n    from peftlab.core.records import unwrap", "a circle: "),
        ("core/hooks.py", "if TYPE_CHECKING:\n    from peftlab.core.records import Record", "a circle: "),
        ("methods/parts.py", "from peftlab.methods.lora import LoRAConfig", "a circle: "),
        ("core/modes.py", "from peftlab.methods import lora", "an arrow upwards: peftlab.core.modes -> peftlab."),
        ("errors.py", "from peftlab.memory import units", "an arrow upwards: peftlab.errors -> peftlab.memory"),
        ("training/losses.py", "import peftlab as pl", "an arrow upwards: peftlab.training.losses -> peftlab"),
        ("memory/units.py", "def f():\n    import torch", "peftlab.memory.units reaches torch"),
        ("progress.py", "import torch", "starting peftlab.commands.cli loads torch"),
        ("errors.py", "from torch import nn", "starting peftlab loads torch"),
        ("commands/terminal.py", "from peftlab.core import modes", "starting peftlab.commands.cli loads torch"),
        ("core/modes.py", "def f():\n    from peftlab.core.hooks import hosts", "hidden in a function, and "),
        ("stray/thing.py", "", "stray is no wing"),
        ("one.py two.py three.py four.py five.py six.py seven.py", "", " files at the top: "),
    ],
)  # fmt: skip
def test_a_broken_house_is_found(tmp_path, file, line, fault):
    broken = tmp_path / "peftlab"
    shutil.copytree(PACKAGE, broken, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in file.split():
        (broken / name).parent.mkdir(exist_ok=True)
        with open(broken / name, "a", encoding="utf-8") as opened:
            opened.write(f"\n{line}\n")
    assert any(fault in told for told in faults(broken)), faults(broken)


def test_a_relative_import_is_found(tmp_path):
    (tmp_path / "peftlab").mkdir()
    (tmp_path / "peftlab" / "a.py").write_text("from . import b\n")
    with pytest.raises(AssertionError, match="line 1: a relative import"):
        imports(tmp_path / "peftlab")


@pytest.mark.parametrize("name", ["peftlab", "peftlab.memory", "peftlab.commands.cli", "peftlab.assets.support_desk"])
def test_light_modules_load_nothing_heavy(name):
    code = f"import sys, {name}; print([one for one in {HEAVY} if one in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_short_names_of_modules_lead_to_their_places():
    """What the book writes as `pl.<module>`, wherever the file is."""
    import peftlab

    for name in ("exercises", "figures", "measurements", "memory", "methods", "notebook", "quantization", "tables",
                 "support_desk", "training", "widgets"):  # fmt: skip
        assert getattr(peftlab, name).__name__.rsplit(".", 1)[-1] == name
    assert peftlab.methods.lora.LoRAConfig is peftlab.LoRAConfig
