"""A reference shows what it refers to, for the mouse and the keyboard, and stays a plain link elsewhere."""

from pathlib import Path

import pytest
from browser import Page
from test_pages import AXE, RUN_AXE, violations

CHAPTER = "book/01_full_finetuning_memory.html"
QUESTIONS = "book/appendix_questions.html"
GLOSSARY = "book/appendix_glossary.html"
SHOWN = "[...document.querySelectorAll('.reference-preview')].find(e => e.checkVisibility({visibilityProperty: true}))"
# the middle of the first line of a link, which is scrolled to the middle of the window
POINT = """(link => {
  link.scrollIntoView({block: "center"});
  const line = link.getClientRects()[0];
  return [line.left + line.width / 2, line.top + line.height / 2];
})(document.querySelector(%r))"""
SECTION = "article a.reference.internal[href='#sec-memory-logits']"
# (page, the link, words of the preview, whether it has a formula)
KINDS = {
    "section": (CHAPTER, SECTION, "The logits", True),
    "section elsewhere": (CHAPTER, "article a.reference[href*='02_lora.html#sec-lora']", "2.12. What", True),
    "equation": (CHAPTER, "article a.reference[href='#equation-eq-memory-states']", "(1.1)", True),
    "figure": ("book/05_adapters.html", "article a.reference[href='#fig-adapters-block']", "Fig. 5.1", False),
    "term in the index": ("genindex.html", "article a[href$='#term-LoRA']", "low-rank adaptation", True),
    "section on the front page": ("index.html", "article a[href$='#sec-lora-start']", "A model that cannot", False),
    "rows of an answer": ("book/appendix_guide.html", "#guide-result a[href*='#measurements']", "GPU", False),
    "term elsewhere": ("book/05_adapters.html", "article a.term[href$='#term-LoRA']", "low-rank adaptation", True),
    "term": (GLOSSARY, "article a.reference[href='#term-scaling']", "added to the weight", True),
    "paper": (CHAPTER, "article a[href='https://arxiv.org/abs/2106.09685']", "Yelong Shen", False),
    "paper by its DOI": (CHAPTER, "article a[href*='doi.org/10.1016/S0079']", "McCloskey", False),
    "paper in an answer": (QUESTIONS, "article details[open] a[href*='appendix_bibliography']", "20", False),
}


def point(page: Page, selector: str) -> None:
    """Move the mouse to an element."""
    x, y = page.evaluate(POINT % selector)
    page.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


def seen(page: Page) -> str | None:
    return page.evaluate(f"({SHOWN})?.innerText")


@pytest.fixture(scope="module")
def tabs(browser):
    """The pages that `opened` has opened, by name. Opening a page of many formulas takes seconds."""
    pages: dict[str, Page] = {}
    yield pages
    for page in pages.values():
        page.close()


@pytest.fixture
def opened(browser, address, tabs):
    """Shows a page of the site in light or dark colours, with no preview on it: the mouse is elsewhere."""

    def show(name: str, dark: bool = False) -> Page:
        if name not in tabs:
            tabs[name] = browser.page()
            tabs[name].open(address + name)
            tabs[name].evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        page = tabs[name]
        page.browser.command("Target.activateTarget", targetId=page.target)
        page.colours(dark)
        assert page.until(f"document.documentElement.dataset.theme === '{'dark' if dark else 'light'}'")
        page.evaluate("document.activeElement.blur()")
        point(page, "article h1")
        assert page.until(f"!({SHOWN})")
        return page

    return show


@pytest.mark.parametrize("name, link, words, formula", KINDS.values(), ids=KINDS)
def test_the_mouse_shows_what_a_reference_refers_to(opened, address, name, link, words, formula):
    page = opened(name)
    point(page, link)
    assert page.until(SHOWN)
    assert words in seen(page) and len(seen(page)) > len(words)
    assert r"\(" not in seen(page) and r"\[" not in seen(page)
    assert page.evaluate(f"({SHOWN}).querySelectorAll('mjx-container').length > 0") is formula
    assert page.evaluate(f"document.querySelector({link!r}).getAttribute('aria-describedby') === ({SHOWN}).id")
    assert page.evaluate(f"({SHOWN}).role === 'tooltip' && !({SHOWN}).querySelector('a, button, [id], [tabindex]')")
    images = f"Promise.all([...({SHOWN}).querySelectorAll('img')].map(i => i.decode().then(() => i.naturalWidth)))"
    assert all(width > 0 for width in page.evaluate(images))
    assert page.evaluate(f"({SHOWN}).scrollHeight <= ({SHOWN}).clientHeight"), "it is cut off"
    box = page.evaluate(f"({SHOWN}).getBoundingClientRect().toJSON()")
    assert box["left"] >= 0 and box["right"] <= 1280 and box["top"] >= 0 and box["bottom"] <= 900
    assert [url for url in page.requests if not url.startswith(address)] == [] and page.problems == []


def test_a_preview_stays_under_the_mouse_and_goes_with_it(opened):
    page = opened(CHAPTER)
    point(page, SECTION)
    assert page.until(SHOWN)
    point(page, ".reference-preview:not([hidden])")
    page.browser.pump(0.5)
    assert seen(page)
    for kind in ("keyDown", "keyUp"):  # Escape closes it under the mouse, too
        page.command("Input.dispatchKeyEvent", type=kind, key="Escape", code="Escape", windowsVirtualKeyCode=27)
    assert page.until(f"!({SHOWN})")
    point(page, "article h1")
    point(page, SECTION)
    assert page.until(SHOWN)
    point(page, "article h1")
    assert page.until(f"!({SHOWN})")
    assert page.evaluate(f"document.querySelector({SECTION!r}).getAttribute('aria-describedby')") is None


def test_the_keyboard_shows_it_and_escape_closes_it(opened):
    page = opened(CHAPTER)
    page.evaluate(f"document.querySelector({SECTION!r}).focus({{focusVisible: true}})")
    assert page.until(SHOWN)
    assert "The logits" in seen(page)
    for kind in ("keyDown", "keyUp"):
        page.command("Input.dispatchKeyEvent", type=kind, key="Escape", code="Escape", windowsVirtualKeyCode=27)
    assert page.until(f"!({SHOWN})")
    assert page.evaluate(f"document.activeElement.matches({SECTION!r})")
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") is None
    page.evaluate("document.activeElement.blur()")
    page.evaluate(f"document.querySelector({SECTION!r}).focus({{focusVisible: true}})")
    assert page.until(SHOWN)
    page.evaluate("document.activeElement.blur()")
    assert page.until(f"!({SHOWN})")


def test_touch_shows_nothing_and_follows_the_link(browser, address):
    page = browser.page(width=390, height=844)
    page.open(address + CHAPTER)
    page.command("Emulation.setTouchEmulationEnabled", enabled=True)
    x, y = page.evaluate(POINT % SECTION)
    page.command("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    page.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert page.until("location.hash === '#sec-memory-logits'")
    page.browser.pump(0.5)
    assert seen(page) is None
    page.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("kind", ["section", "figure", "paper"])
def test_a_preview_is_accessible(opened, kind, dark):
    name, link, _, _ = KINDS[kind]
    page = opened(name, dark=dark)
    point(page, link)
    assert page.until(SHOWN)
    page.evaluate(AXE.read_text(encoding="utf-8") + "; true")
    parts = f"{{include: [['.reference-preview:not([hidden])'], [{link!r}]]}}"
    assert page.evaluate(RUN_AXE.replace("document", parts)) == []
    assert seen(page)


def test_an_open_preview_leaves_the_page_accessible(opened):
    page = opened(CHAPTER)
    point(page, SECTION)
    assert page.until(SHOWN)
    assert violations(page) == []
    assert seen(page)


def test_a_figure_is_dark_on_a_dark_page(opened):
    looks = f"(({{filter, mixBlendMode}}) => [filter, mixBlendMode])(getComputedStyle(({SHOWN}).querySelector('img')))"
    for dark, expected in ((True, ["invert(1) hue-rotate(180deg)", "screen"]), (False, ["none", "normal"])):
        page = opened("book/05_adapters.html", dark=dark)
        point(page, KINDS["figure"][1])
        assert page.until(SHOWN)
        assert page.evaluate(looks) == expected


def test_a_page_that_is_opened_as_a_file_shows_it_too(browser, site):
    page = browser.page()
    page.open(Path(site / QUESTIONS).as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    for link, words in ((KINDS["paper in an answer"][1], "20"), ("article a[href*='02_lora.html#sec-']", "2.")):
        page.evaluate(f"document.querySelector({link!r}).focus({{focusVisible: true}})")
        assert page.until(SHOWN) and words in seen(page)
        page.evaluate("document.activeElement.blur()")
        assert page.until(f"!({SHOWN})")
    assert page.problems == []
    page.close()


def test_what_cannot_be_loaded_stays_a_link(opened):
    page = opened(GLOSSARY)
    page.evaluate(
        "document.querySelector('article').insertAdjacentHTML('beforeend', "
        '\'<a class="reference internal" id="lost" href="nowhere.html#a">a</a>\')'
    )
    page.evaluate("document.querySelector('#lost').focus({focusVisible: true})")
    page.browser.pump(0.5)
    assert seen(page) is None and [p for p in page.problems if "404" not in p and "not loaded" not in p] == []
