"""Mutation testing: change one thing in a line that computes, and see whether the closest tests fail: `make mutants`.

    python tools/mutants.py --jobs 2 --limit 200     200 mutants, the same ones at each call; --seed 1 draws others
    python tools/mutants.py --only losses.py         all mutants of the files whose path ends so

A mutant that survives shows what no test holds. Write the test that kills it. If it computes the same, give the reason
in `tools/mutants-explained.toml`. Results go into a file as they come, so a run that was cut goes on. A survivor is
tried again when its tests have changed. Mutants stand in a copy of the checkout, never in the checkout itself.

It is a script because mutmut and cosmic-ray run the same tests for every mutant. Here each file has its closest tests
(`tools/mutants.toml`), so a mutant takes seconds and not minutes.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import copy
import hashlib
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE: dict[str, dict[str, str]] = tomllib.loads((ROOT / "tools" / "mutants.toml").read_text(encoding="utf-8"))
EXPLAINED = ROOT / "tools" / "mutants-explained.toml"
COPIED = ("peftlab", "tests", "tools", "pyproject.toml", "constraints.txt")  # what tests need of the checkout
QUICK = "not slow and not gpu and not kills"
# One thread, no GPU, no network, no plugins; and hypothesis draws the same examples each time, as it does under CI
ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "CI": "true",
         "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # fmt: skip
ENDS = ("killed", "timeout", "survived", "explained")

PAIRS = [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq),
         (ast.Is, ast.IsNot), (ast.In, ast.NotIn), (ast.And, ast.Or), (ast.LShift, ast.RShift),
         (ast.BitAnd, ast.BitOr)]  # fmt: skip
SWAPS = dict(PAIRS) | {b: a for a, b in PAIRS} | {ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult, ast.Mod: ast.FloorDiv}
NAMES = {"min": "max", "amin": "amax", "argmin": "argmax", "floor": "ceil", "any": "all"}
NAMES |= {b: a for a, b in NAMES.items()}
GUARDS = (None, "strict", "stacklevel", "repr")  # keywords that change no result, and ** of several
NEEDED = ("__setattr__", "zip", "range")  # functions whose third argument cannot be left out


@dataclass(frozen=True)
class Mutant:
    """One change of one file: its name, the lines before and after it, and the new text of the file."""

    area: str
    file: str
    line: int
    operator: str
    before: str
    after: str
    digest: str  # of the file before
    text: str

    @property
    def key(self) -> str:
        return json.dumps([self.file, self.digest, self.line, self.after])

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.operator}\n    {self.before}\n    {self.after}"


def variants(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name of the operator, what takes the node's place: another node, or text) for each mutant of one node."""

    def changed(**fields: Any) -> ast.AST:
        other = copy.copy(node)
        vars(other).update(fields)
        return other

    match node:
        case ast.UnaryOp(ast.USub(), ast.BinOp(ast.UnaryOp(ast.USub(), top), ast.FloorDiv() as op, bottom)):
            yield "rounded down", ast.BinOp(top, op, bottom)  # -(-a // b) rounds up
        case ast.UnaryOp(ast.Not() | ast.USub() as op, operand):
            yield f"{type(op).__name__} removed", operand
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in SWAPS:
            yield f"{type(op).__name__} to {SWAPS[type(op)].__name__}", changed(op=SWAPS[type(op)]())
        case ast.Compare(ops=ops):
            for at, new in enumerate(SWAPS[type(op)] for op in ops):
                yield f"{type(ops[at]).__name__} to {new.__name__}", changed(ops=[*ops[:at], new(), *ops[at + 1 :]])
        case ast.Constant(bool() as value):
            yield f"{value} swapped", ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield f"{value} plus 1", ast.Constant(value + 1)
        case ast.IfExp(_, first, second):
            yield "always the first", first
            yield "always the second", second
        case ast.Return(ast.expr() as value) if not isinstance(value, ast.Constant):
            yield "return value dropped", "return"
        case ast.Expr(ast.Call()):
            yield "call removed", "pass"
        case ast.Call(func, args, keywords):
            where = "attr" if isinstance(func, ast.Attribute) else "id"
            name = getattr(func, where, "")
            for keyword in keywords:
                if keyword.arg not in GUARDS:
                    yield f"{keyword.arg} dropped", changed(keywords=[one for one in keywords if one is not keyword])
            for at in range(2, len(args) if name not in NEEDED else 0):
                yield f"argument {at + 1} dropped", changed(args=[*args[:at], *args[at + 1 :]])
            if name in NAMES:
                renamed = copy.copy(func)
                setattr(renamed, where, NAMES[name])
                yield f"{name} to {NAMES[name]}", changed(func=renamed)


def computing(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that compute: not those of errors, warnings, texts, annotations and decorators."""
    yield node
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            match child:
                case ast.Raise() | ast.JoinedStr() | ast.Assert() | ast.keyword("strict" | "stacklevel" | "repr"):
                    continue
                case ast.Expr(ast.Call(ast.Attribute(ast.Name("warnings")))):
                    continue
                case ast.AST() if name not in ("annotation", "returns", "decorator_list"):
                    yield from computing(child)


def mutants_of(file: Path, area: str) -> Iterator[Mutant]:
    """Yield every mutant of one file. Only the mutated lines change, so the mutant is the file with one difference."""
    code = file.read_bytes()
    digest = hashlib.sha256(code).hexdigest()[:12]
    starts = [0]  # where each line begins, in bytes, as ast counts columns
    for line in code.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    seen = set()
    for node in computing(ast.parse(code)):
        for operator, new in variants(node):
            text = new if isinstance(new, str) else ast.unparse(new)
            bare = isinstance(new, (str, ast.Constant, ast.Name, ast.Attribute, ast.Call, ast.stmt))
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            first, last = starts[node.lineno - 1], starts[node.end_lineno]
            after = code[first:begin] + (text if bare else f"({text})").encode() + code[end:last]
            told = (" ".join(part.decode().split()) for part in (code[first:last], after))
            mutated = (code[:first] + after + code[last:]).decode()
            if mutated in seen:
                continue
            seen.add(mutated)
            yield Mutant(area, str(file.relative_to(ROOT)), node.lineno, operator, *told, digest, mutated)


def closest() -> dict[str, tuple[str, list[str]]]:
    """Return {file: (area, its closest tests)}."""
    return {
        str(path.relative_to(ROOT)): (area, [f"tests/{name}.py" for name in tests.split()])
        for area, files in TABLE.items()
        for pattern, tests in files.items()
        for path in sorted((ROOT / "peftlab").glob(pattern))
    }


def chosen(only: str = "", limit: int | None = None, seed: int = 0) -> list[Mutant]:
    """Return the mutants to try, as the seed draws them: one of each area in turn."""
    areas: dict[str, list[Mutant]] = {}
    for file, (area, _) in closest().items():
        if file.endswith(only):
            areas.setdefault(area, []).extend(mutants_of(ROOT / file, area))
    for area, found in areas.items():
        random.Random(f"{seed}/{area}").shuffle(found)
    turns = range(max(map(len, areas.values()), default=0))
    return [found[turn] for turn in turns for found in areas.values() if turn < len(found)][:limit]


class Copies:
    """Copies of the checkout, one for each job. Mutants are written there, and tests run there."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self.free: queue.Queue[Path] = queue.Queue()
        for place in (folder / str(number) for number in range(jobs)):
            place.mkdir()
            for source in (ROOT / name for name in COPIED):
                (shutil.copytree if source.is_dir() else shutil.copy2)(source, place / source.name)
            self.free.put(place)

    def run(self, options: list[str], limit: float, mutant: Mutant | None = None) -> tuple[int | None, float, str]:
        """Run pytest on a mutant, or on the code as it is: (exit status, None for too long; seconds; what it said)."""
        place, began = self.free.get(), time.monotonic()
        if mutant:
            (place / mutant.file).write_text(mutant.text, encoding="utf-8")
        search = os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", QUICK, *options],
            cwd=place, env=os.environ | ALONE | {"PYTHONPATH": search}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        try:
            said, status = process.communicate(timeout=limit)[0], process.returncode
        except subprocess.TimeoutExpired:
            said, status = "", None
        finally:
            with contextlib.suppress(ProcessLookupError):  # also what a test has started and not ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if mutant:
                shutil.copy2(ROOT / mutant.file, place / mutant.file)
            self.free.put(place)
        return status, time.monotonic() - began, said


class Results:
    """What is known, in a file with one JSON object in each line. The last one of a key counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows = {row["key"]: row for row in map(json.loads, (line for line in lines if line.endswith("}")))}

    def add(self, key: str, **fields: Any) -> None:
        """Write down a result."""
        self.rows[key] = {"key": key, **fields}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[key]) + "\n")


def digest_of(paths: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def try_without(copies: Copies, results: Results, test: str) -> None:
    """Run a file of tests on the code as it is: how long it takes, and which of its tests fail on this machine."""
    key = f"{test} {digest_of(sorted([*ROOT.glob('peftlab/**/*.py'), *ROOT.glob('tests/**/*.py')]))}"
    if key not in results.rows:
        status, seconds, said = copies.run([test], 900)
        failed = re.findall(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", said, re.MULTILINE)
        nothing = status not in (0, 1) or (status == 1 and not failed)
        results.add(key, test=test, seconds=round(seconds, 1), failed=[test] if nothing else failed)
    results.rows[test] = results.rows[key]
    for name in results.rows[test]["failed"]:
        print(f"left out, because it fails here without a mutant: {name}", flush=True)


def try_one(copies: Copies, results: Results, mutant: Mutant, tests: list[str]) -> None:
    """Run the closest tests on a mutant, unless it is known how that ends."""
    known, now = results.rows.get(mutant.key), digest_of([ROOT / test for test in tests])
    if known and (known["result"] == "killed" or known["tests"] == now):
        return
    rows = sorted((results.rows[test] for test in tests), key=lambda row: row["seconds"])
    able = [row for row in rows if row["test"] not in row["failed"]]
    if not able:
        raise SystemExit(f"None of {', '.join(tests)} runs on this machine, so {mutant.file} cannot be tried.")
    began, result = time.monotonic(), "survived"
    for row in able:  # the quickest first, and the others only while the mutant lives
        without = [f"--deselect={name}" for name in row["failed"]]
        status = copies.run(["-x", *without, row["test"]], 60 + 5 * row["seconds"], mutant)[0]
        if status != 0:
            result = "timeout" if status is None else "killed"
            break
    seconds = time.monotonic() - began
    told = {name: value for name, value in asdict(mutant).items() if name != "text"}
    results.add(mutant.key, result=result, seconds=round(seconds, 1), tests=now, **told)
    if result == "survived":
        print(f"survived: {mutant}", flush=True)


def spread(call: Callable[[Any], None], what: Sequence[Any], jobs: int) -> None:
    """Call a function for each of these, `jobs` at a time."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(call, one) for one in what]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def explained() -> dict[tuple[str, str, str], str]:
    """Return {(file, line, operator): why such a mutant computes the same}."""
    rows = tomllib.loads(EXPLAINED.read_text(encoding="utf-8")).get("mutant", [])
    return {(row["file"], row["line"], row["operator"]): row["reason"] for row in rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Change lines that compute, and see whether the closest tests fail.")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutants at once (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="FILE", help="only files whose path ends so, such as losses.py")
    parser.add_argument("--limit", type=int, metavar="N", help="how many mutants (default: all there are)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which mutants, and in which order")
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "mutants.jsonl", metavar="FILE",
                        help="where results are kept (default: %(default)s)")  # fmt: skip
    asked = parser.parse_args(argv)
    results, tests, reasons = Results(asked.out), closest(), explained()
    mutants = chosen(asked.only, asked.limit, asked.seed)
    to_try = [one for one in mutants if (one.file, one.before, one.operator) not in reasons]
    files = sorted({test for one in to_try for test in tests[one.file][1]})
    print(f"{len(mutants)} mutants, {len(to_try)} of them not explained; first {len(files)} test files without any")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = Copies(Path(folder), asked.jobs)
        spread(lambda test: try_without(copies, results, test), files, asked.jobs)
        spread(lambda one: try_one(copies, results, one, tests[one.file][1]), to_try, asked.jobs)
    tried = {one.key: results.rows[one.key]["result"] for one in to_try}
    ends = [(one, tried.get(one.key, "explained")) for one in mutants]
    for mutant, end in sorted(ends, key=lambda pair: (pair[0].file, pair[0].line)):
        if end in ("survived", "timeout"):
            print(f"\n{end}: {mutant}")
    for area in dict.fromkeys(one.area for one in mutants):
        there = [end for one, end in ends if one.area == area]
        print(f"{area:14}{len(there):5} mutants: {', '.join(f'{there.count(end)} {end}' for end in ENDS)}")
    return int("survived" in tried.values())


if __name__ == "__main__":
    sys.exit(main())
