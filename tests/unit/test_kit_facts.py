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
question = "What is a thing?"
answer = "Stuff."
shown = ["sec-demo"]
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


def test_labels_in_facts_are_in_the_chapters():
    for facts in facts_module.load(BOOK / "facts")[0]:
        path = BOOK / f"{facts.page}.ipynb"
        if path.is_file():
            prose = portable.prose(json.loads(path.read_text(encoding="utf-8")))
            labels = {found["label"] for text in prose for found in portable.ANCHOR.finditer(text)}
            for entry in facts.claims + facts.questions:
                assert set(entry.get("shown", [])) <= labels, entry


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("[chapter]", "[chaptre]"), "unknown table [chaptre]; there are: chapter, run"),
        (("number = 7", 'number = "7"'), "'number' is to be a whole number, found '7'"),
        (("number = 7", "number = true"), "'number' is to be a whole number"),
        (('title = "Demo"', 'titel = "Demo"'), "unknown key 'titel'"),
        (('verdict = "wrong"', 'verdict = "false"'), "verdict 'false' is none of: right, half right, wrong"),
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
    "index": "# Start\n\n```{toctree}\nbook/07_demo\nbook/appendix\n```\n\n```{chapter-table}\n```\n\n"
             "```{block-drawing} lora\nA and B stand\nbeside \"q\".\n```",
    "book/07_demo": "# Demo\n\n(sec-demo)=\n## One is one\n\nA {term}`thing`, or {term}`stuff`.",
    "book/appendix": "# Appendix\n\n## Claims\n\n```{claims-table}\n```\n\n## Questions\n\n```{questions}\n```\n\n"
                     "## Measurements\n\n```{measurements}\n```\n\n## Glossary\n\n```{facts-glossary}\n```",
}
RESULT = {"topic": "demo", "rows": [{"r": 8, "note": "a<b"}],
          "provenance": {"gpu": "H100", "cpu": None, "versions": {"torch": "2.11.0"}, "date": "2026-11-22",
                         "command": "peftlab bench demo --out demo.json"}}


def build(folder, facts=GOOD, result=RESULT):
    """Build a small book; returns Sphinx's (exit status, warnings)."""
    pages = PAGES | {"book/facts/07_demo.toml": facts, "peftlab/results/demo.json": json.dumps(result)}
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
    assert '<a class="reference internal" href="book/07_demo.html">' in built["index"]
    assert "Time on two cores" in built["index"] and "12 s<" in built["index"], "a machine that all share stands once"
    assert 'alt="A and B stand beside &quot;q&quot;."' in built["index"] and "data:image/png;base64," in built["index"]
    assert "1.2 GB" in built["index"] and "not measured" in built["index"]
    page = built["book/appendix"]
    assert 'href="07_demo.html#sec-demo"><span class="std std-ref">One is one</span>' in page
    assert "<strong>Wrong.</strong> It is 1." in page and '<span class="math' in page
    assert "What is a thing?" in page and "<details" in page
    assert "peftlab bench demo --out demo.json" in re.sub(r"<[^>]+>", "", page)
    assert "H100" in page and "<td" in page and "a&lt;b" in page
    assert 'href="../_downloads/' in page


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
