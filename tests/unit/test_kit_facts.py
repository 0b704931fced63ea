"""The facts of the chapters and the Sphinx extension that makes appendices of them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import portable
import pytest
from peftlab_book import facts as facts_module

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"

GOOD = """
[chapter]
number = 7
title = "Demo"
question = "Why?"

[[claim]]
id = "H1"
claim = "One is $1 + 1$."
verdict = "wrong"
truth = "It is 1."
shown = ["sec-demo"]

[[term]]
term = "thing"
also = ["stuff"]
text = "What a {term}`stuff` is."

[[question]]
theme = "methods"
level = "easy"
question = "What is a thing?"
answer = "Stuff."
shown = ["sec-demo"]
"""
PRACTICE = """
[topic]
title = "Practice"

[[claim]]
id = "H2"
claim = "Two is three."
verdict = "wrong"
truth = "It is 2."
seen = "a dream"
shown = ["sec-demo"]

[[question]]
theme = "shipping"
level = "hard"
question = "Where to?"
answer = "Home."
"""
RUN = '[run]\ncpu = "two cores"\nseconds_cpu = 12.4\nmemory_gb = 1.25\ndate = 2026-11-22\n'


def test_the_facts_of_the_book_are_in_order():
    found, faults = facts_module.load(BOOK / "facts")
    assert faults == []
    assert found


@pytest.mark.parametrize("path", sorted(BOOK.glob("[0-9][0-9]_*.ipynb")), ids=lambda path: path.stem)
def test_every_chapter_has_facts_and_measured_times(path):
    found = {facts.page: facts for facts in facts_module.load(BOOK / "facts")[0]}
    assert path.stem in found, f"write book/facts/{path.stem}.toml"
    assert found[path.stem].run, f"book/facts/{path.stem}.toml has no [run]: measure the chapter and write it down"


CHAPTERS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(BOOK.glob("[0-9][0-9]_*.ipynb"))}
FACTS = facts_module.load(BOOK / "facts")[0]
QUESTIONS = [entry for facts in FACTS for entry in facts.questions]


def test_labels_in_facts_are_in_the_chapters():
    labels = {page: {found["label"] for text in portable.prose(chapter) for found in portable.ANCHOR.finditer(text)}
              for page, chapter in CHAPTERS.items()}
    for facts in FACTS:
        here = labels[facts.page] if facts.chapter else set.union(*labels.values())
        for entry in facts.claims + facts.questions:
            assert set(entry.get("shown", [])) <= here, entry


# What stands for no number of its own: formulas and code
NO_NUMBER = re.compile(r"\$[^$]*\$|`[^`]*`")
NUMBER = re.compile(r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?![\w.]*[A-Za-z])")  # 16 and 0.01, and none of H100, 7B, GPT-2


def holds_a_number(answer):
    return bool(portable.VALUE.search(answer) or NUMBER.search(NO_NUMBER.sub("~", answer)))


@pytest.mark.parametrize("entry", QUESTIONS, ids=lambda entry: entry["question"][:40])
def test_an_answer_that_holds_a_number_names_a_section(entry):
    """That no such number is typed which a cell computes, tests/notebooks/rules.py holds for all facts."""
    assert entry.get("shown") or not holds_a_number(entry["answer"])


@pytest.mark.parametrize(
    ("answer", "holds"),
    [
        ("It takes 14.4 GB.", True),
        ("It takes <!--=memory-lora-->.", True),
        ("In $16 N$ bytes, `r=8` on a 7B model, GPT-2 and an H100.", False),
        ("In 4 bits.", True),
        ("By 0.5. And by 1,000 times.", True),
    ],
)
def test_a_number_is_found(answer, holds):
    assert holds_a_number(answer) == holds


def test_a_value_is_a_value_of_a_section_that_the_answer_names():
    """The cell that computes a value stands in a chapter whose section is named beside it."""
    of_label = {found["label"]: page for page, chapter in CHAPTERS.items()
                for text in portable.prose(chapter) for found in portable.ANCHOR.finditer(text)}
    of_value = {name: page for page, chapter in CHAPTERS.items() for name in portable.stored_values(chapter)}
    for entry in QUESTIONS:
        pages = {of_value[found["name"]] for found in portable.VALUE.finditer(entry["answer"])}
        assert pages <= {of_label[label] for label in entry.get("shown", [])}, entry["question"]


def test_every_numbered_equation_has_a_name():
    """By it the search finds the equation. A chapter names its own."""
    for page, chapter in CHAPTERS.items():
        labels = [found["label"] for text in portable.prose(chapter) for found in portable.EQUATION.finditer(text)]
        named = [entry["label"] for facts in FACTS if facts.page == page for entry in facts.equations]
        assert named == labels, page


def test_there_are_questions_enough():
    assert len(QUESTIONS) >= 70
    assert {entry["theme"] for entry in QUESTIONS} == set(facts_module.THEMES)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("[chapter]", "[chaptre]"), "unknown table [chaptre]; there are: chapter, topic, run"),
        (("number = 7", 'number = "7"'), "'number' is to be a whole number, found '7'"),
        (("number = 7", "number = true"), "'number' is to be a whole number"),
        (('title = "Demo"', 'titel = "Demo"'), "unknown key 'titel'"),
        (('verdict = "wrong"', 'verdict = "false"'), "verdict 'false' is none of: right, half right, wrong"),
        (('level = "easy"', 'level = "simple"'), "level 'simple' is none of: easy, medium, hard"),
        (('theme = "methods"\n', ""), "[[question]] 1: 'theme' is missing"),
        (('theme = "methods"', 'theme = "rank"'), "theme 'rank' is none of: methods, derivations"),
        (('id = "H1"', 'id = "one"'), "id 'one' is no letter and number"),
        (('truth = "It is 1."', ""), "[[claim]] 1: 'truth' is missing"),
        (('shown = ["sec-demo"]', "shown = []"), "'shown' names no section"),
        (('answer = "Stuff."', 'answer = " "'), "[[question]] 1: 'answer' is empty"),
        (('also = ["stuff"]', 'also = "stuff"'), "'also' is to be a list of texts"),
        (("[[term]]", "[term]"), "write [[term]] with two brackets"),
        (("[[claim]]", "[[claim]"), "no valid TOML"),
        (("[[claim]]", RUN.replace("12.4", "0") + "[[claim]]"), "'seconds_cpu' is to be above zero"),
        (('term = "thing"', 'term = "Stuff"'), "the term 'stuff' is also in"),
    ],
)
def test_a_fault_is_named_with_its_file(tmp_path, change, fault):
    assert change[0] in GOOD
    (tmp_path / "07_demo.toml").write_text(GOOD.replace(*change, 1))
    faults = facts_module.load(tmp_path)[1]
    assert any(told.startswith("07_demo.toml: ") and fault in told for told in faults), faults


def test_two_chapters_do_not_claim_the_same(tmp_path):
    (tmp_path / "07_demo.toml").write_text(GOOD)
    (tmp_path / "08_more.toml").write_text(GOOD.replace("number = 7", "number = 8"))
    faults = facts_module.load(tmp_path)[1]
    assert "08_more.toml: the claim id 'H1' is also in 07_demo.toml" in faults
    assert "08_more.toml: the term 'thing' is also in 07_demo.toml" in faults


CONF = """
import sys
sys.path[:0] = [{root!r}, {ext!r}]
extensions = ["myst_parser", "sphinx_design", "peftlab_book"]
myst_enable_extensions = ["dollarmath"]
html_theme = "basic"
exclude_patterns = ["_build"]
"""
PAGES = {
    "index": "# Start\n\n```{toctree}\nbook/07_demo\nbook/appendix\n```",
    "book/07_demo": "# Demo\n\n(sec-demo)=\n## One is one\n\nA {term}`thing`, or {term}`stuff`.",
    "book/appendix": "# Appendix\n\n## Claims\n\n```{claims-table}\n```\n\n## Questions\n\n```{questions}\n```\n\n"
                     "## Measurements\n\n```{measurements}\n```\n\n## Glossary\n\n```{facts-glossary}\n```\n\n"
                     "## Exercises\n\n```{exercise-table}\ndemo.one: sec-demo\n```",
}
NOTEBOOK = {"metadata": {}, "cells": [
    {"cell_type": "markdown", "source": "**1. First** (easy, 5 minutes). One?"},
    {"cell_type": "code", "source": ["answer = None\n", 'pl.check("demo.one", answer)']},
    {"cell_type": "markdown", "source": "**2. Second** (hard, 15 minutes). Two?"},
    {"cell_type": "code", "source": 'pl.check("demo.two", None)'},
    {"cell_type": "markdown", "source": "**3. Third** (open, 30 minutes). A?\n\n**4. Fourth** (open, 45 minutes). B?"},
]}
RESULT = {"topic": "demo", "rows": [{"r": 8, "note": "a<b"}],
          "provenance": {"gpu": "H100", "cpu": None, "versions": {"torch": "2.11.0"}, "date": "2026-11-22",
                         "command": "peftlab bench demo --out demo.json"}}


def build(folder, facts=GOOD, result=RESULT):
    """Build a small book; returns Sphinx's (exit status, warnings)."""
    pages = PAGES | {"book/facts/07_demo.toml": facts, "book/facts/practice.toml": PRACTICE,
                     "book/07_demo.ipynb": json.dumps(NOTEBOOK), "peftlab/results/demo.json": json.dumps(result)}
    for name, text in pages.items():
        path = folder / (name if "." in name else f"{name}.md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "conf.py").write_text(CONF.format(root=str(ROOT), ext=str(BOOK / "_ext")))
    shutil.rmtree(folder / "_build", ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-n", "--keep-going", "-b", "html", ".", "_build"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    status, told = build(folder, GOOD.replace("[[claim]]", RUN + "[[claim]]"))
    assert (status, told) == (0, "")
    return {name: (folder / "_build" / f"{name}.html").read_text() for name in PAGES}


def test_pages_say_what_the_facts_say(built):
    page = built["book/appendix"]
    assert 'href="07_demo.html#sec-demo"><span class="std std-ref">One is one</span>' in page
    assert "<strong>Wrong.</strong> It is 1." in page and '<span class="math' in page
    assert re.search(r'<details[^>]* id="question-1">.*?1. What is a thing\? \(easy\)', page, re.DOTALL)
    assert "<em>Seen in a dream.</em>" in page, "what belongs to no chapter has a file of its own"
    assert re.search(r'<details[^>]* id="question-2">.*?2. Where to\? \(hard\)', page, re.DOTALL)
    index = page[page.index('id="questions-by-theme"') : page.index('id="question-1"')]
    assert re.findall(r"<p>([A-Z][\w ,]+)</p>|href=\"#question-(\d)\"", index) == [
        ("Theme", ""), ("Questions", ""), ("How the methods work", ""), ("", "1"),
        ("Merging, storing and serving", ""), ("", "2")]
    assert "peftlab bench demo --out demo.json" in re.sub(r"<[^>]+>", "", page)
    assert "H100" in page and "<td" in page and "a&lt;b" in page
    assert 'href="../_downloads/' in page


def test_exercises_are_listed_as_the_notebooks_have_them(built):
    page = built["book/appendix"]
    listed = page[page.index('id="exercises"') :]
    assert "7 Demo: 2 with a check, 20 minutes in all; 2 open" in listed
    cells = [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td>(.*?)</td>", listed, re.DOTALL)]
    assert cells == ["1: First", "One is one", "easy, 5 minutes", "2: Second", "the chapter", "hard, 15 minutes",
                     "3: Third", "the chapter", "open, 30 minutes",
                     "4: Fourth", "the chapter", "open, 45 minutes"]
    assert 'href="07_demo.html#sec-demo"' in listed


def test_terms_of_the_glossary_are_linked(built):
    assert built["book/07_demo"].count('href="appendix.html#term-thing"') == 1
    assert built["book/07_demo"].count('href="appendix.html#term-stuff"') == 1
    assert '<dt id="term-thing">' in built["book/appendix"]


def test_faults_fail_the_build(tmp_path):
    broken = GOOD.replace('verdict = "wrong"', 'verdict = "false"').replace("sec-demo", "sec-nowhere")
    lacking = {**RESULT, "provenance": {**RESULT["provenance"], "date": None}}
    status, told = build(tmp_path, broken, lacking)
    assert status != 0
    assert "book/facts/07_demo.toml: [[claim]] 1: verdict 'false'" in told
    assert "undefined label: 'sec-nowhere'" in told
    assert "peftlab/results/demo.json: its provenance has no date" in told
