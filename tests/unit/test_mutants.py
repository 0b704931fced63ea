"""The tool that mutates: what it changes, that it draws the same mutants again, and how a mutant's end is told."""

import ast
import dataclasses
import functools
import json

import mutants
import pytest

CODE = '''"""A text with 1 number."""
import warnings


def clip(x: float, most: int = 3, *, least=0) -> float:
    if not x or x < least:
        raise ValueError(f"{x + 1} is too small, {1}")
    warnings.warn("x < 1", stacklevel=2)
    record(x, most, "é", 5)
    pages = -(-x // most)
    return min(x * pages, most, key=abs) if pages == 1 else list(zip([x], [x], [x], strict=True))
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A checkout of one file, whose tests hold all but one constant and one argument."""
    for name, text in {
        "peftlab/sums.py": "def half(x):\n    return x // 2 if x > 1 else turn(x)\n\n\n"
        "def turn(x, by=1):\n    return x\n",
        "peftlab/__init__.py": "",
        "pyproject.toml": "[tool.pytest.ini_options]\nmarkers = ['slow: s', 'gpu: g', 'kills: k']\n",
        "constraints.txt": "",
        "tools/mutants.py": "",
        "tests/unit/test_sums.py": "from peftlab.sums import half\n\n\ndef test_half():\n    assert half(9) == 4\n"
        "    assert half(1) == 1\n\n\ndef test_that_fails_here():\n    assert False, 'FAILED or not'\n",
        "explained.toml": '[[mutant]]\nfile = "peftlab/sums.py"\nline = "def turn(x, by=1):"\noperator = "1 plus 1"\n'
        'reason = "nothing reads it"\n',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "EXPLAINED", tmp_path / "explained.toml")
    monkeypatch.setattr(mutants, "TABLE", {"sums": {"sums.py": "unit/test_sums"}})
    return tmp_path


def made(tmp_path, monkeypatch, code):
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    path = tmp_path / "code.py"
    path.write_text(code, encoding="utf-8")
    return list(mutants.mutants_of(path, "an area"))


def test_what_computes_is_changed_and_messages_are_not(tmp_path, monkeypatch):
    found = made(tmp_path, monkeypatch, CODE)
    assert {(one.line, one.operator) for one in found} == {
        (5, "3 plus 1"), (5, "0 plus 1"),
        (6, "Or to And"), (6, "Not removed"), (6, "Lt to LtE"),
        (9, "call removed"), (9, "argument 3 dropped"), (9, "argument 4 dropped"), (9, "5 plus 1"),
        (10, "rounded down"), (10, "USub removed"), (10, "FloorDiv to Mult"),
        (11, "return value dropped"), (11, "always the first"), (11, "always the second"), (11, "Eq to NotEq"),
        (11, "1 plus 1"), (11, "key dropped"), (11, "min to max"), (11, "Mult to Div"),
    }  # fmt: skip
    for one in found:
        lines, before = one.text.splitlines(), CODE.splitlines()
        assert [at for at in range(len(before)) if lines[at] != before[at]] == [one.line - 1], "one line, and no other"
        assert ast.dump(ast.parse(one.text)) != ast.dump(ast.parse(CODE))
    text = next(one.after for one in found if one.operator == "rounded down")
    assert text == "pages = (x // most)"


@pytest.mark.parametrize(
    ("before", "operator", "value"),
    [("4 * (5 - 2)", "Sub to Add", 28), ("2 * 3 + 1", "Add to Sub", 5), ("2 * (3 + 1)", "Mult to Div", 0.5),
     ("not 1 == 2", "Eq to NotEq", False), ("7 - (2 if 1 else 3)", "always the second", 4),
     ("2 ** 3 * 2", "Pow to Mult", 12), ("6 - -(-7 // 2)", "rounded down", 3), ("1 and 0 or 2", "And to Or", 1),
     ("max(1, 2)", "max to min", 1),
     ("all([1, 0])", "all to any", True), ("7 % 4", "Mod to FloorDiv", 1), ("5 & 3 | 8", "BitAnd to BitOr", 15)],
)  # fmt: skip
def test_a_mutant_computes_what_its_name_says(tmp_path, monkeypatch, before, operator, value):
    (found,) = (one for one in made(tmp_path, monkeypatch, f"result = {before}\n") if one.operator == operator)
    names = {}
    exec(found.text, names)
    assert names["result"] == value


def test_the_same_are_drawn_again_from_every_area(monkeypatch):
    of_file = functools.cache(lambda path, area, made=mutants.mutants_of: tuple(made(path, area)))  # takes a second
    monkeypatch.setattr(mutants, "mutants_of", of_file)
    first = mutants.chosen(limit=16)
    assert [one.area for one in first] == 2 * list(mutants.TABLE)
    assert [one.key for one in mutants.chosen(limit=24)][:16] == [one.key for one in first], "more begin as fewer do"
    assert [one.key for one in mutants.chosen(limit=16, seed=1)] != [one.key for one in first]
    assert {one.file for one in mutants.chosen("merging.py")} == {"peftlab/adapters/merging.py"}


def test_every_file_and_every_test_of_the_table_exists():
    for files in mutants.TABLE.values():
        for pattern, tests in files.items():
            assert list((mutants.ROOT / "peftlab").glob(pattern)), pattern
            for test in tests.split():
                assert (mutants.ROOT / "tests" / f"{test}.py").is_file(), test


def test_every_method_is_in_the_table():
    """A new method is easily left out, and then no mutant of it is ever tried."""
    folder = mutants.ROOT / "peftlab"
    named = {path for files in mutants.TABLE.values() for pattern in files for path in folder.glob(pattern)}
    missing = {path.name for path in set((folder / "methods").glob("[!_]*.py")) - named}
    assert not missing, f"Name the closest tests of these in tools/mutants.toml, under [methods]: {sorted(missing)}"


def test_every_reason_is_about_a_mutant_that_exists():
    for key, reason in mutants.explained().items():
        there = {(one.file, one.before, one.operator) for one in mutants.chosen(key[0])}
        assert key in there and len(reason.split()) > 4, key


def test_ends_are_told_kept_and_taken_up_again(project, capsys):
    out = project / "out.jsonl"
    assert mutants.main(["--out", str(out), "--jobs", "2"]) == 1
    said = capsys.readouterr().out
    assert "left out, because it fails here without a mutant: tests/unit/test_sums.py::test_that_fails_here" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    ends = {row["operator"]: row["result"] for row in rows if "operator" in row}
    assert ends.pop("1 plus 1") == "survived"
    assert ends == dict.fromkeys(["Gt to GtE", "always the first", "always the second", "2 plus 1", "FloorDiv to Mult",
                                  "return value dropped"], "killed")  # fmt: skip
    assert "survived: peftlab/sums.py:2: 1 plus 1\n    return x // 2 if x > 1 else turn(x)" in said
    assert said.endswith(f"{len(rows)} mutants: {len(rows) - 2} killed, 0 timeout, 1 survived, 1 explained\n")
    assert (project / "peftlab/sums.py").read_text().startswith("def half(x):\n    return x // 2 if x > 1")

    size = len(rows)
    with out.open("a") as file:
        file.write('{"key": "cut in the mid')
    assert mutants.main(["--out", str(out)]) == 1
    assert len(out.read_text().splitlines()) == size + 1, "nothing is tried a second time"


def test_a_mutant_that_does_not_end_is_stopped(project):
    (project / "copies").mkdir()
    copies = mutants.Copies(project / "copies", 1)
    (one,) = (one for one in mutants.chosen() if one.operator == "always the first")
    endless = dataclasses.replace(one, text="while True: pass\n")
    assert copies.run(["tests/unit/test_sums.py"], 3, endless)[0] is None
    assert copies.run(["tests/unit/test_sums.py", "-k", "half"], 60)[0] == 0, "and the copy is as it was"
