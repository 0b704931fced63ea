"""Test the package and the book with other versions than the pinned ones: `make test-newest`, `make test-colab`.

    python tools/other_versions.py newest      the newest releases, with no pins at all
    python tools/other_versions.py colab       what Colab has (tools/colab-versions.txt)

As a reader would, it builds the wheel, makes a new environment (.venv-newest or .venv-colab), and installs the wheel
with the extras that the chapters' set-up cells name, the fewest extras first. After each set of extras it runs the
chapters that name just these, in an empty folder, and compares every output. Then it installs the tests' own tools, and
runs the unit and parity tests against the wheel. If all passes, the versions are noted in peftlab/tested.json, which
`peftlab doctor` reads.

TORCH=2.11.0 chooses a release of torch. Without it, newest takes the newest, and colab takes the pinned one.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("tests/notebooks", "book/_ext")]

import normalise  # noqa: E402
import rules  # noqa: E402
from wheel import build  # noqa: E402

TESTED = ROOT / "peftlab" / "tested.json"
JOBS = os.environ.get("JOBS", "2")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", choices=["newest", "colab"])
    versions = parser.parse_args().versions
    began = time.monotonic()
    environment = ROOT / f".venv-{versions}"
    python = environment / "bin" / "python"
    print(f"{versions}: making {environment.name}", flush=True)
    run(sys.executable, "-m", "venv", "--clear", str(environment))
    wheel = build(ROOT, environment / "wheel")
    pins = environment / "pins.txt"
    pins.write_text("\n".join(pinned(versions)) + "\n", encoding="utf-8")

    def install(*what: str) -> None:
        print(f"{versions}: installing {', '.join(what)}", flush=True)
        names = [f"{wheel}{text.removeprefix('peftlab')}" if text.startswith("peftlab") else text for text in what]
        run(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(pins), *names)

    failed = []
    for extras, notebooks in by_extras().items():
        install(f"peftlab[{','.join(extras)}]")
        tests = [f"tests/notebooks/test_execution.py::test_prints_what_is_stored[{path.stem}]" for path in notebooks]
        told = f"{len(notebooks)} chapters with peftlab[{','.join(extras)}]"
        failed += [] if test(told, Path(sys.executable), tests, {"PEFTLAB_READER_PYTHON": str(python)}) else [told]
    install("peftlab[test]")
    told = "unit and parity tests"
    # pytest itself and not `python -m pytest`, which would put the checkout in front of the wheel
    failed += [] if test(told, python, ["tests/unit", "tests/parity", "-m", "not gpu and not kills"], {}) else [told]
    minutes = (time.monotonic() - began) / 60
    if failed:
        print(f"{versions}: failed after {minutes:.0f} minutes: {'; '.join(failed)}", file=sys.stderr)
        return 1
    note(versions, python)
    print(f"{versions}: all passed in {minutes:.0f} minutes")
    return 0


def pinned(versions: str) -> list[str]:
    """The pins of a set: none for the newest, but for a torch that was asked for."""
    torch = os.environ.get("TORCH")
    if versions == "newest":
        return [f"torch=={torch}"] if torch else []
    chosen = lines(ROOT / "tools" / "colab-versions.txt")
    here = next(line for line in lines(ROOT / "constraints.txt") if line.startswith("torch=="))
    return [*chosen, f"torch=={torch}" if torch else here]


def lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def by_extras() -> dict[tuple[str, ...], list[Path]]:
    """The notebooks by the extras that their set-up cells name, the fewest extras first."""
    found: dict[tuple[str, ...], list[Path]] = {}
    for path in sorted((ROOT / "book").glob("*.ipynb")):
        found.setdefault(rules.extras(normalise.read(path)), []).append(path)
    return dict(sorted(found.items(), key=lambda item: len(item[0])))


def test(what: str, python: Path, chosen: list[str], variables: dict[str, str]) -> bool:
    """Run some tests with the pytest of an environment, and say how they ended."""
    print(f"\n== {what}", flush=True)
    began = time.monotonic()
    command = [str(python.parent / "pytest"), "-q", "-n", JOBS, "-p", "no:cacheprovider", *chosen]
    status = subprocess.run(command, cwd=ROOT, env=os.environ | variables).returncode
    print(f"== {what}: {'failed' if status else 'passed'} in {time.monotonic() - began:.0f} s", flush=True)
    return status == 0


def note(versions: str, python: Path) -> None:
    """Write down with which versions everything passed."""
    tested = json.loads(TESTED.read_text(encoding="utf-8"))
    code = "import json, platform; from importlib import metadata; import sys; " + (
        "print(json.dumps({name: platform.python_version() if name == 'python' else metadata.version(name)"
        " for name in sys.argv[1:]}))"
    )
    done = subprocess.run([str(python), "-c", code, *tested["pinned"]], capture_output=True, text=True, check=True)
    found = {name: version.split("+")[0] for name, version in json.loads(done.stdout).items()}
    tested[versions] = found | {"date": date.today().isoformat()}
    TESTED.write_text(json.dumps(tested, indent=1) + "\n", encoding="utf-8")


def run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")


if __name__ == "__main__":
    sys.exit(main())
