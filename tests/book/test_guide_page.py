"""The decision guide's page answers as `pl.recommend` does, by keyboard and without scripts too."""

import json
import random

import pytest
from peftlab_book import guide

import peftlab as pl
from peftlab.guide import recommend as recommending
from peftlab.guide import rules
from peftlab.memory import BUILT_IN, CARDS

PAGE = "book/appendix_guide.html"
COMBINATIONS = 50
ASK = "document.querySelector('#guide-form').elements"


@pytest.fixture(scope="module")
def page(browser, address):
    opened = browser.page()
    opened.open(address + PAGE)
    yield opened
    opened.close()


def questions() -> list[dict]:
    """Combinations of all that the form asks, drawn once for all: each model, task, need and card is among them.

    The last two are there for the methods that few questions lead to.
    """
    draw = random.Random(0)
    lists = {
        "model": list(BUILT_IN), "task": [w.name for w in rules.words("task")],
        "serving": [w.name for w in rules.words("serving")], "card": [*CARDS, 6, 20.5, 96],
        "examples": [None, 16, 700, 5000], "sequence": [512, 1024, 2048, 4096], "four_bit": [True, False],
    }  # fmt: skip
    columns = {}
    for name, values in lists.items():
        column = (values * COMBINATIONS)[:COMBINATIONS]
        draw.shuffle(column)
        columns[name] = column
    drawn = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    every = {**drawn[0], "card": "H100", "sequence": 512, "model": "smollm2-135m", "task": "style", "examples": None}
    return [*drawn, {**every, "serving": "one"}, {**every, "serving": "file"}]


def by_the_package(question: dict) -> dict:
    try:
        return json.loads(json.dumps(pl.recommend(**question).to_dict()))
    except pl.PeftLabError as error:
        return {"error": str(error)}


@pytest.fixture
def stored_peaks(monkeypatch):
    """The package reads the memory that the page holds; tests/unit/test_guide.py compares that with the estimator."""
    stored = guide.stored()

    def peaks(shape, method, chosen, sequence, gpus):
        found = stored[shape.name][str(sequence)][guide.variant(method, chosen)]
        if isinstance(found, str):
            raise pl.PeftLabError(found)
        return lambda rung: found[guide.rung_name(rung)]

    monkeypatch.setattr(recommending, "peaks", peaks)


def test_answers_are_those_of_the_package(page, stored_peaks):
    asked = questions()
    answers = page.evaluate(f"{json.dumps(asked)}.map(window.peftlabGuide.recommend)")
    kept = ("text", "source", "groups", "page", "url", "at", "scores")
    for answer in answers:
        for reason in answer.get("reasons", []):
            reason["evidence"] = [{name: one[name] for name in kept} for one in reason["evidence"]]
    for question, answer in zip(asked, answers, strict=True):
        assert answer == by_the_package(question), question
    methods = {answer.get("method") for answer in answers}
    assert {"full", "lora", "qlora", None} <= methods  # None: a question that has no answer
    assert {answer.get("fits") for answer in answers} == {True, False, None}


def test_an_answer_follows_the_form(page):
    """A change by the keyboard is answered, and read out: the region is live."""
    result = "document.querySelector('#guide-result')"
    assert page.evaluate(f"{result}.getAttribute('aria-live')") == "polite"
    assert page.evaluate(f"{result}.querySelector('td').innerText") == "lora"
    page.evaluate(f"{ASK}.model.focus(); true")
    for kind in ("keyDown", "keyUp"):
        page.command("Input.dispatchKeyEvent", type=kind, key="ArrowDown", code="ArrowDown", windowsVirtualKeyCode=40)
    assert page.until(f"{ASK}.model.value === 'llama-3.1-70b'")
    assert page.evaluate(f"{result}.querySelector('td').innerText") == "qlora" and page.problems == []
    assert "it does not fit this card" in page.evaluate(f"{result}.innerText")


def test_another_card_asks_for_its_memory(page):
    hidden = f"{ASK}.gigabytes.closest('label').hidden"
    change = "dispatchEvent(new Event('input', {bubbles: true})); true"
    assert page.evaluate(hidden) is True
    page.evaluate(f"{ASK}.card.value = 'other'; {ASK}.card.{change}")
    assert page.evaluate(hidden) is False
    page.evaluate(f"{ASK}.gigabytes.value = ''; {ASK}.gigabytes.{change}")
    assert "at least one" in page.evaluate("document.querySelector('#guide-result').innerText")


def test_every_question_has_a_label(page):
    labelled = "[...document.querySelectorAll('#guide-form :is(select, input)')].map(e => e.labels.length)"
    assert page.evaluate(labelled) == [1] * 8


def test_without_scripts_there_is_a_table(browser, address):
    page = browser.page(width=390, height=844)
    page.command("Emulation.setScriptExecutionDisabled", value=True)
    page.command("Page.navigate", url=address + PAGE)
    assert page.until("document.readyState === 'complete' && document.querySelector('#guide-form')")
    assert page.evaluate("getComputedStyle(document.querySelector('#guide-form')).display") == "none"
    rows = page.evaluate("[...document.querySelectorAll('#without-the-form table tbody tr')].map(r => r.innerText)")
    assert len(rows) > 20 and any("rank 1, alpha 16" in row for row in rows)
    assert page.evaluate("document.querySelectorAll('#the-rules details').length") == len(rules.rules())
    page.close()


def test_the_page_holds_all_and_is_small(site):
    text = (site / PAGE).read_text(encoding="utf-8")
    assert len(text.encode()) < 600_000
    assert "fetch(" not in (site / "_static" / "guide.js").read_text(encoding="utf-8")
