"""What helps a reader through the site: a bar and marks, keys, copied code, links to the glossary, and the search."""

import json
import re
import time
import tomllib
from pathlib import Path

import portable
import pytest
from browser import Page
from patience import HUNG_SECONDS
from test_pages import AXE, RUN_AXE, violations

BOOK = Path(__file__).resolve().parents[2] / "book"
NAME = "06_ia3_and_bitfit"
CHAPTER = f"book/{NAME}.html"
SECTIONS = "[...document.querySelectorAll('article > section > section')]"
MARK = f"document.querySelector(\".bd-docs-nav li a[href$='{NAME}.html'], .bd-docs-nav a.current\").textContent"
KEPT = "JSON.parse(localStorage.getItem('peftlab-reading'))"
KEYS = "document.querySelector('.reading-keys').open"
REFUSED = """Object.defineProperty(window, "localStorage", {configurable: true, get() {
  throw new DOMException("refused", "SecurityError"); }})"""


CODES = {"Escape": ("Escape", 27), " ": ("Space", 32)}


def press(page: Page, key: str, modifiers: int = 0) -> None:
    told = {"key": key, "modifiers": modifiers}
    if key in CODES:
        told |= dict(zip(("code", "windowsVirtualKeyCode"), CODES[key], strict=True))
    text = {"text": key} if len(key) == 1 and not modifiers else {}
    page.command("Input.dispatchKeyEvent", type="keyDown", **told, **text)
    page.command("Input.dispatchKeyEvent", type="keyUp", **told)


@pytest.fixture(scope="module")
def tab(browser, address):
    """A chapter, opened once for all tests of this file that read a chapter."""
    page = browser.page()
    page.open(address + CHAPTER)
    yield page
    page.close()


@pytest.fixture
def page(tab):
    tab.browser.command("Target.activateTarget", targetId=tab.target)
    tab.evaluate("document.querySelector('dialog[open]')?.close(); document.activeElement.blur(); scrollTo(0, 0)")
    tab.colours(dark=False)
    yield tab
    assert tab.problems == []


def test_the_bar_shows_how_far_one_is(page):
    width = "document.querySelector('.reading-bar').getBoundingClientRect().width / document.body.clientWidth"
    assert page.until(f"{width} === 0")
    page.evaluate("scrollTo(0, (document.documentElement.scrollHeight - innerHeight) / 2); true")
    assert page.until(f"Math.abs({width} - 0.5) < 0.01")
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight); true")
    assert page.until(f"{width} > 0.99")


def test_a_chapter_is_read_when_the_end_of_each_section_was_seen(page):
    page.evaluate("document.querySelector('.reading-tools button').click(); scrollTo(0, 1e9); true")
    assert page.until(f"{KEPT}.pages['book/{NAME}']"), "the last section was seen"
    count = page.evaluate(f"{SECTIONS}.length")
    assert len(page.evaluate(f"{KEPT}.pages['book/{NAME}'].seen")) < 3 < count
    assert re.search(rf"\b[12]/{count}$", page.evaluate(MARK))
    for place in range(count):
        page.evaluate(f"scrollBy(0, {SECTIONS}[{place}].getBoundingClientRect().bottom - innerHeight / 2); true")
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done))).then(() => true)")
    assert page.until(f"{MARK}.endsWith('✓ read')")
    assert "Read through: 1 of 9 chapters." in page.evaluate("document.querySelector('.reading-tools').innerText")


def test_another_page_knows_it_and_can_forget_it(browser, address, page):
    other = browser.page()
    other.open(address + "search.html")
    assert other.until(f"{MARK}.endsWith('✓ read')")
    other.evaluate("document.querySelector('.reading-tools button').click(); true")
    assert other.evaluate(f"{KEPT}.pages") == {} and "✓" not in other.evaluate(MARK)
    assert other.evaluate("document.activeElement.innerText").startswith("Keys")
    assert other.evaluate("document.querySelector('.reading-tools button').hidden") and other.problems == []
    other.close()


def test_keys_open_the_list_and_the_search(page):
    press(page, "?")
    assert page.until(KEYS)
    press(page, "n")  # not while a dialog is open
    press(page, "Escape")
    assert page.until(f"!{KEYS}")
    press(page, "s")
    assert page.until("document.activeElement.matches('dialog[open] input[type=search]')")
    press(page, "?")
    assert page.evaluate(f"document.activeElement.value === '?' && !{KEYS}"), "in a field one types"


def test_keys_of_the_browser_stay_its_own(page):
    for modifiers in (1, 2, 4):  # Alt, Ctrl, Meta
        press(page, "?", modifiers=modifiers)
    assert not page.evaluate(KEYS)
    page.evaluate("window.prevented = []; addEventListener('keydown', e => prevented.push(e.defaultPrevented)); true")
    for key in ("/", "'", " ", "ArrowRight", "Home", "h"):
        press(page, key)
    assert page.evaluate("prevented") == [False] * 6


def test_keys_can_be_switched_off(page):
    page.evaluate("document.querySelector('.reading-tools button:last-child').click(); true")
    assert page.evaluate(KEYS)
    assert page.evaluate("document.activeElement.matches('.reading-keys input')")
    for on in (False, True):
        press(page, " ")  # at the box
        assert page.evaluate(f"{KEPT}.keys") is on
        press(page, "Escape")
        assert page.until(f"!{KEYS}")
        page.evaluate("document.activeElement.blur()")
        press(page, "?")
        assert page.evaluate(KEYS) is on
        page.evaluate("document.querySelector('.reading-keys').close()")
        page.evaluate("document.querySelector('.reading-keys').showModal()")


def test_a_button_copies_code_that_runs(page):
    """What a cell's button copies is the cell's source, to the letter. Outputs have no button."""
    cells = json.loads((BOOK / f"{NAME}.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = [portable.text_of(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    page.evaluate(
        "window.copied = []; document.execCommand = command => copied.push(document.activeElement.value);"
        "document.querySelectorAll('.cell_input .copybtn').forEach(button => button.click()); true"
    )
    copied = page.evaluate("copied")
    assert len(copied) > 40 and set(copied) <= {source.strip("\n") for source in sources}
    assert page.evaluate("document.querySelectorAll('.cell_output .highlight-myst-ansi .copybtn').length") == 0
    session = r">>> a = 1\n>>> a\n1\n$ ls\n"
    page.evaluate(
        f"(button => {{ button.previousElementSibling.textContent = '{session}'; button.click(); }})"
        "(document.querySelector('.cell_input .copybtn')); true"
    )
    assert page.evaluate("copied.at(-1)") == "a = 1\na\nls"
    page.evaluate("document.querySelector('.cell_input .copybtn').focus({focusVisible: true})")
    seen = "getComputedStyle(document.activeElement).opacity"
    assert page.until(f"{seen} === '1'") and page.evaluate("document.activeElement.matches('.copybtn')")


def test_keys_turn_to_the_next_chapter_and_back(browser, address):
    page = browser.page()
    page.open(address + "book/appendix_claims.html")
    for key, name in (("n", "appendix_questions"), ("p", "appendix_claims")):
        turn(page, key)
        assert page.evaluate("location.pathname") == f"/book/{name}.html"
    page.close()


def turn(page: Page, key: str) -> None:
    """Press a key and wait until another page has loaded. Meanwhile nothing can be asked: the old page may be gone."""
    deadline = time.monotonic() + HUNG_SECONDS
    fired = [e for e in page.events if e["method"] == "Page.loadEventFired"]
    press(page, key)
    while [e for e in page.events if e["method"] == "Page.loadEventFired"] == fired:
        assert time.monotonic() < deadline, f"{key} loads no page"
        page.browser.pump(0.05)


def test_where_the_browser_keeps_nothing_the_page_works(browser, address):
    page = browser.page()
    page.command("Page.addScriptToEvaluateOnNewDocument", source=REFUSED)
    page.open(address + "book/appendix_claims.html")
    press(page, "?")
    assert page.until(KEYS)
    page.evaluate("document.querySelector('.reading-keys input').click(); true")
    page.evaluate("document.querySelector('.reading-keys').close(); scrollTo(0, 1e9); true")
    press(page, "?")
    assert not page.evaluate(KEYS), "a switch holds for as long as the page is open"
    assert page.until("document.querySelector('.reading-bar').getBoundingClientRect().width > 1000")
    page.evaluate("document.querySelector('.theme-switch-button').click(); true")
    assert page.evaluate("document.documentElement.dataset.mode") != "auto" and page.problems == []
    page.close()


def test_a_damaged_record_is_put_aside(browser, address):
    good = '"book/02_lora": {"seen": ["sec-lora-start"], "of": 20}'
    damaged = f'{{"pages": {{{good}, "{CHAPTER.removesuffix(".html")}": {{"seen": {{}}, "of": 3}}, "book/x": null}}}}'
    page = browser.page()
    put = "if (!localStorage.getItem('peftlab-reading')) localStorage.setItem('peftlab-reading', "
    page.command("Page.addScriptToEvaluateOnNewDocument", source=f"{put}{damaged!r})")
    page.open(address + CHAPTER)
    page.evaluate("scrollTo(0, 1e9); true")
    name = CHAPTER.removesuffix(".html")
    assert page.until(f"Array.isArray({KEPT}.pages['{name}']?.seen)") and page.problems == []
    assert page.evaluate(f"Object.keys({KEPT}.pages).includes('book/x')") is False
    page.evaluate("localStorage.removeItem('peftlab-reading'); true")
    page.close()


def test_terms_are_linked_where_another_chapter_explains_them(site):
    own = tomllib.loads((BOOK / "facts" / f"{NAME}.toml").read_text(encoding="utf-8"))["term"]
    own = {name for term in own for name in [term["term"], *term.get("also", [])]}
    links = re.findall(r'<a class="[^"]*\bterm\b[^"]*" href="([^"]+)">([^<]+)</a>', (site / CHAPTER).read_text("utf-8"))
    assert len(links) > 10 and ("appendix_glossary.html#term-LoRA", "LoRA") in links
    assert len({address for address, _ in links}) == len(links), "a term is linked twice"
    assert not {text for _, text in links} & own


SEARCHES = {
    "rslora": "#term-rsLoRA",
    "frobenius norm": "#term-Frobenius-norm",
    "Low-rank adaptation": "#term-low-rank-adaptation",
    "eq-lora": "#equation-eq-lora",
    "lora update": "#equation-eq-lora",
    "equation 2.1": "#equation-eq-lora",
    "dpo loss": "#equation-eq-recipes-dpo",
    "Why a low rank is enough": "#why-a-low-rank-is-enough",
}


@pytest.fixture(scope="module")
def search(browser, address):
    page = browser.page(width=390, height=844)
    page.open(address + "search.html")
    yield page
    page.close()


@pytest.mark.parametrize("asked, place", SEARCHES.items(), ids=SEARCHES)
def test_the_search_finds_what_is_called_so(search, asked, place):
    search.evaluate("document.querySelector('#search-results').replaceChildren(); true")
    search.evaluate(f"history.replaceState(null, '', '?q=' + encodeURIComponent({asked!r})); true")
    search.evaluate(f"Search.performSearch({asked!r}); true")
    assert search.until("document.querySelector('#search-results li a')")
    assert search.evaluate("document.querySelector('#search-results li a').href").endswith(place)
    assert search.until("document.querySelector('#search-results li:first-child .context')")
    excerpts = search.evaluate("[...document.querySelectorAll('#search-results .context')].map(p => p.textContent)")
    assert not [text for text in excerpts if re.match(r"\s*Contents\s", text)]  # the theme's, above the article
    if "#term-" in place:
        assert len(excerpts[0]) > len(asked) + 20  # with the term's explanation
    assert search.evaluate("document.documentElement.scrollWidth") <= 390
    assert search.problems == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_what_was_found_is_accessible(search, dark):
    search.colours(dark)
    search.evaluate("document.querySelector('#search-results').replaceChildren(); Search.performSearch('lora update')")
    assert search.until("document.querySelectorAll('#search-results .highlighted').length > 10")
    assert violations(search) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_list_of_keys_is_accessible(search, dark):
    search.colours(dark)
    search.evaluate("document.activeElement.blur()")
    press(search, "?")
    assert search.until(KEYS)
    search.evaluate(AXE.read_text(encoding="utf-8") + "; true")
    assert search.evaluate(RUN_AXE.replace("document", "{include: [['.reading-keys'], ['.reading-tools']]}")) == []
    assert search.evaluate("document.documentElement.scrollWidth") <= 390
    search.evaluate("document.querySelector('.reading-keys').close()")
