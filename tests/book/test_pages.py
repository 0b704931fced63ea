"""The rendered book, as a reader's browser sees it. One test a page for each thing that must hold."""

import gzip
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
AXE = Path(__file__).parent / "vendor" / "axe-core" / "axe.min.js"

# A violation is listed with the element and what to do. Without resultTypes axe describes each element that passed as
# well, which takes a third of its time.
RUN = """
axe.run(document, {runOnly: %s, resultTypes: ["violations"]})
  .then(result => result.violations.map(v =>
    v.id + " (" + v.impact + "): " + v.nodes.map(n => n.html.slice(0, 160) + " -> " + n.failureSummary).join("; ")))
"""
# WCAG 2.1, levels A and AA, and axe's own good practice; and those of its rules that colours can break
RUN_AXE = RUN % '{type: "tag", values: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}'
RUN_AXE_ON_COLOURS = RUN % '{type: "rule", values: ["color-contrast", "link-in-text-block"]}'
# everything folded is opened, so that nothing escapes the scan
UNFOLD = """
document.querySelectorAll("details").forEach(d => d.open = true);
document.querySelectorAll(".toggle-hidden").forEach(d => d.querySelector("button, .toggle-button")?.click());
"""
# A page has thousands of elements and some hundred looks. A look is the colours, the size and the weight of an element
# and of all that it stands in. axe measures the contrast of the first element of each look, because measuring all takes
# twice as long. Its other rules judge every element.
ALIKE = """
((names, looks, ids, seen) => {
  const look = element => {
    if (element === null) return 0;
    if (!looks.has(element)) {
      const style = getComputedStyle(element);
      const text = [look(element.parentElement), ...names.map(name => style[name])].join();
      if (!ids.has(text)) ids.set(text, ids.size + 1);
      looks.set(element, ids.get(text));
    }
    return looks.get(element);
  };
  document.querySelectorAll("article *").forEach(e => {
    e.toggleAttribute("data-alike", seen.has(look(e)));
    seen.add(look(e));
  });
  axe.configure({rules: [{id: "color-contrast", selector: ":not([data-alike])"}]});
})(["color", "backgroundColor", "backgroundImage", "fontSize", "fontWeight", "opacity", "filter", "position",
    "textShadow", "visibility", "display", "mixBlendMode"], new Map(), new Map(), new Set());
"""
IMAGES = """
Promise.all([...document.images].map(i => { i.loading = "eager"; return i.decode().catch(() => null); })).then(() =>
  [...document.images].map(i => ({src: i.currentSrc || i.src, width: i.naturalWidth, alt: i.alt,
                                  shown: !!i.closest("article")})))
"""

# A corner of each figure that is seen says what it is drawn on.
GLARING = """
Promise.all([...document.querySelectorAll("article img")].filter(i => i.getClientRects().length).map(async image => {
  await image.decode();
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const [red, green, blue, alpha] = context.getImageData(1, 1, 1, 1).data;
  const turned = getComputedStyle(image).filter.includes("invert(1)");
  const fits = alpha < 128 ? image.matches(".only-dark, .dark-light") : (red + green + blue > 382) === turned;
  return fits ? null : image.src;
})).then(found => found.filter(Boolean))
"""
MOST_BYTES, MOST_UNPACKED = 1_350_000, 3_100_000


def page_names() -> list[str]:
    """The pages to open: those of the table of contents, and those that Sphinx adds."""
    import yaml

    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    files = [toc["root"]] + [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    return [f"{name}.html" for name in files] + ["genindex.html", "search.html"]


@pytest.fixture(scope="module", params=page_names())
def loaded(request, browser, address, pages):
    """A page opened on a wide screen in light colours, and what its source holds."""
    page = browser.page()
    page.open(address + request.param)
    yield request.param, page, pages[request.param]
    page.close()


@pytest.fixture
def on_a_phone(loaded):
    """The same page on a narrow screen: its window is made smaller, because opening many formulas takes seconds.

    test_a_chapter_opens_on_a_phone opens one there.
    """
    _, page, _ = loaded
    page.colours(dark=False)
    page.resize(390, 844)
    assert page.until("window.innerWidth < 1280 && document.documentElement.dataset.theme === 'light'")
    return page


def violations(page, run: str = RUN_AXE) -> list[str]:
    page.evaluate(UNFOLD + "true")
    page.evaluate(AXE.read_text(encoding="utf-8") + "; true")
    page.evaluate(ALIKE + "true")
    return page.evaluate(run)


def test_loads_without_a_complaint(loaded):
    _, page, _ = loaded
    assert page.problems == []
    assert page.evaluate("document.title")


def test_asks_no_other_host(loaded, address):
    _, page, _ = loaded
    assert [url for url in page.requests if not url.startswith(address)] == []


def test_mathematics_is_typeset(loaded):
    _, page, source = loaded
    typeset = page.evaluate("document.querySelectorAll('.math mjx-container').length")
    assert typeset >= source.formulas, f"{source.formulas} formulas, {typeset} typeset"
    assert page.evaluate("[...document.querySelectorAll('mjx-merror, [data-mjx-error]')].map(e => e.textContent)") == []
    read_aloud = page.evaluate("document.querySelectorAll('.math mjx-container mjx-assistive-mml > math').length")
    assert read_aloud == typeset, f"{typeset - read_aloud} formulas have no MathML for screen readers"
    left = page.evaluate(r"(document.querySelector('article')?.innerText || '').match(/\\\(|\\\[|\\frac|\\mathbb/g)")
    assert not left, f"mathematics left as source: {left}"


def test_images_are_there_and_described(loaded):
    _, page, _ = loaded
    for image in page.evaluate(IMAGES):
        assert image["width"] > 0, f"{image['src']} is not there"
        # the logo stands beside its name, which says the same
        assert len(image["alt"]) >= 20 or not image["shown"], f"{image['src']} has no description"


def test_accessible_in_light_colours(loaded):
    _, page, _ = loaded
    assert violations(page) == []


def test_accessible_in_dark_colours(loaded):
    """The same page, after the reader's system has gone dark: opening a page of many formulas takes seconds.

    Its elements were judged in light colours. Now only the colours differ.
    """
    _, page, _ = loaded
    page.colours(dark=True)
    assert page.until("document.documentElement.dataset.theme === 'dark'")
    assert violations(page, RUN_AXE_ON_COLOURS) == []
    assert page.problems == []


def test_figures_are_dark_in_dark_colours(loaded):
    """A figure on white is turned round, and one that is dark is not. One without a ground says which it is."""
    _, page, _ = loaded
    page.colours(dark=True)
    assert page.until("document.documentElement.dataset.theme === 'dark'")
    assert page.evaluate(GLARING) == []
    page.colours(dark=False)
    assert page.until("document.documentElement.dataset.theme === 'light'")
    turned = "[...document.querySelectorAll('article img')].filter(i => getComputedStyle(i).filter !== 'none').length"
    assert page.evaluate(turned) == 0


def test_is_light_to_load(loaded, address, site):
    """All that a page makes a browser load, compressed as servers do it, for a reader who comes for the first time."""
    name, page, _ = loaded
    weights, unpacked = {}, 0
    for url in set(page.requests):
        path = site / url.removeprefix(address).split("?")[0].split("#")[0]
        packed = path.suffix in (".png", ".woff", ".woff2")
        unpacked += path.stat().st_size
        weights[path.name] = len(path.read_bytes() if packed else gzip.compress(path.read_bytes()))
    heaviest = sorted(weights.items(), key=lambda item: -item[1])[:5]
    assert sum(weights.values()) < MOST_BYTES, f"{sum(weights.values())} bytes, of which {heaviest}"
    assert unpacked < MOST_UNPACKED
    assert (site / name).stat().st_size < MOST_BYTES


def test_accessible_on_a_phone(on_a_phone):
    assert violations(on_a_phone) == []
    assert on_a_phone.problems == []


def test_nothing_scrolls_sideways_on_a_phone(on_a_phone):
    nothing_is_wider(on_a_phone)


def test_a_chapter_opens_on_a_phone(browser, address):
    page = browser.page(width=390, height=844)
    page.open(address + "book/02_lora.html")
    nothing_is_wider(page)
    assert page.problems == []
    page.close()


def nothing_is_wider(page):
    page.evaluate(UNFOLD + "true")
    wide = page.evaluate(
        "[...document.querySelectorAll('article *')].filter(e => e.getBoundingClientRect().right > 391 && "
        "!e.closest('pre, mjx-container, .table-scroll, .output, mjx-assistive-mml'))"
        ".slice(0, 5).map(e => e.outerHTML.slice(0, 120))"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, f"these reach past the edge: {wide}"
    assert page.evaluate("window.innerWidth") <= 390, f"the page was zoomed out to fit: {wide}"


def test_search_finds_a_word(browser, address):
    page = browser.page()
    page.open(address + "search.html?q=LoRA")
    page.browser.pump(1.0)
    found = page.evaluate("document.querySelectorAll('#search-results li a').length")
    assert found > 0 and page.problems == []
    page.close()
