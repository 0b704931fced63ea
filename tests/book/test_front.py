"""The front page, what other sites read of each page, and the page for what is not found."""

import functools
import html
import json
import re
import struct
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import peftlab_head as head
import portable
import pytest
import yaml
from conftest import QuietHandler
from peftlab_book import describe, drawings
from test_pages import RUN_AXE, RUN_AXE_ON_COLOURS, nothing_is_wider, violations

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
CHAPTERS = sorted(path.stem for path in BOOK.glob("*.ipynb"))
BASE = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["html"]["baseurl"]
IN_FRONT = ["appendix_calculator", "appendix_guide", "appendix_claims"]
MOST_BYTES = 1_500_000  # even where a server compresses nothing
META = re.compile(r'<meta (?:name|property)="([^"]+)" content="([^"]*)" />')
CARDS = """
[...document.querySelectorAll(".front-card")].map(card => ({
  links: [...card.querySelectorAll("a")].map(a => a.getAttribute("href")),
  title: card.querySelector("a").textContent,
  drawing: card.querySelector("svg[role=img]").getAttribute("aria-label"),
  texts: [...card.querySelectorAll("p")].slice(1).map(p => p.textContent)}))
"""
FOCUSED = """
(e => ({link: e.getAttribute("href"), card: !!e.closest(".front-card"),
        ring: getComputedStyle(e, e.closest(".front-card") ? "::after" : null).outlineStyle}))(document.activeElement)
"""


@pytest.fixture(scope="module")
def front(browser, address):
    page = browser.page(width=1440)
    page.open(address + "index.html")
    yield page
    page.close()


def tags(text: str) -> dict[str, str]:
    return {name: html.unescape(content) for name, content in META.findall(text)}


# ------------------------------------------------------------------------------------------------------ the front page


def test_a_card_for_each_chapter_and_for_what_answers_at_once(front, site):
    cards = front.evaluate(CARDS)
    assert [card["links"] for card in cards] == [[f"book/{page}.html"] for page in [*IN_FRONT, *CHAPTERS]]
    for card, page in zip(cards, [*IN_FRONT, *CHAPTERS], strict=True):
        assert (site / f"book/{page}.html").is_file() and len(card["drawing"]) >= 20
        assert card["title"] and all(card["texts"])


def test_no_button_leads_to_a_list_of_contents_that_is_not_there(front, lost):
    for page in (front, lost):
        assert page.evaluate("document.querySelectorAll('.secondary-toggle').length") == 0


def words(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", text)).split())


@pytest.mark.parametrize("page", CHAPTERS)
def test_a_card_says_what_its_chapter_says(front, site, page):
    card = front.evaluate(CARDS)[[*IN_FRONT, *CHAPTERS].index(page)]
    facts, answer = describe.chapter(page, BOOK)
    assert card["title"] == f"{facts['number']} {facts['title']}" and card["texts"][0] == facts["question"]
    assert words(card["texts"][1]) in words((site / f"book/{page}.html").read_text(encoding="utf-8"))
    assert re.findall(r"[\d.%]+", card["texts"][1]) == re.findall(r"[\d.%]+", describe.plain(answer))


def test_the_claims_card_counts_the_claims(front, pages):
    told = front.evaluate(CARDS)[IN_FRONT.index("appendix_claims")]["texts"][-1]
    claims = (ROOT / "_build/html/book/appendix_claims.html").read_text(encoding="utf-8")
    counts = [claims.count(f"<strong>{verdict}.</strong>") for verdict in ("Right", "Half right", "Wrong")]
    assert [int(n) for n in re.findall(r"\d+", told)] == [sum(counts), *counts]


def test_the_picture_has_the_measured_numbers_of_chapter_1(front):
    values = portable.stored_values(json.loads((BOOK / f"{CHAPTERS[0]}.ipynb").read_text(encoding="utf-8")))
    shown = front.evaluate("[...document.querySelectorAll('.front-picture text')].map(t => t.textContent)")
    described = front.evaluate("document.querySelector('.front-picture svg').getAttribute('aria-label')")
    for name in ("memory-real", "memory-lora", "memory-qlora"):
        assert values[name] in shown and values[name] in described
    for row in drawings.costs().values():  # the mark stands at the bar's end, as the text below says
        assert row.estimated.peak_bytes == pytest.approx(row.measured, rel=0.03)
        assert sum(row.parts.values()) == row.estimated.peak_bytes


def test_the_keyboard_reaches_every_card_in_order_and_shows_where_it_is(browser, address):
    page = browser.page(width=1280)
    page.open(address + "index.html")
    links = page.evaluate("[...document.querySelectorAll('article a[href]')].map(a => a.getAttribute('href'))")
    page.evaluate("(h => { h.tabIndex = -1; h.focus(); })(document.querySelector('#peft-lab > h1'))")
    reached = []
    for _ in range(len(links) + 20):
        for kind in ("keyDown", "keyUp"):
            page.command("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        found = page.evaluate(FOCUSED)
        if found["card"]:
            assert found["ring"] == "solid", f"{found['link']}: the focus is not seen"
            reached.append(found["link"])
    page.close()
    assert reached == [f"book/{name}.html" for name in [*IN_FRONT, *CHAPTERS]]


def test_a_click_anywhere_on_a_card_follows_its_link(browser, address):
    page = browser.page(width=390, height=844)
    page.open(address + "index.html")
    hit = """
    (card => { card.scrollIntoView({block: "center"}); const r = card.getBoundingClientRect();
      return [[8, 8], [r.width - 8, r.height - 8], [r.width / 2, 40]].map(([x, y]) =>
        document.elementFromPoint(r.x + x, r.y + y).closest("a")?.getAttribute("href")); })
    """
    cards = page.evaluate(f"[...document.querySelectorAll('.front-card')].map({hit})")
    page.close()
    assert cards == [[f"book/{name}.html"] * 3 for name in [*IN_FRONT, *CHAPTERS]]


def test_the_front_page_is_light(front, site):
    """All that it asks for. It has no formulas, so it comes without MathJax."""
    files = {site / urlsplit(url).path.lstrip("/") for url in front.requests}
    sizes = {file.name: file.stat().st_size for file in files}
    assert sizes["index.html"] < 100_000 and sum(sizes.values()) < MOST_BYTES, sizes


# ------------------------------------------------------------------------------------------------- what others read


def test_each_page_describes_itself(site, pages):
    told = {name: tags((site / name).read_text(encoding="utf-8")) for name in [*pages, "404.html"]}
    for name, found in told.items():
        length = len(found["description"])
        assert describe.SHORTEST <= length <= describe.LONGEST, f"{name}: {length}: {found['description']}"
        assert found["og:description"] == found["description"] == found["twitter:description"]
        assert found["og:title"] and found["og:title"] == found["twitter:title"]
    assert len({found["description"] for found in told.values()}) == len(told)
    assert len({found["og:title"] for found in told.values()}) == len(told)


def test_the_picture_for_links_is_there(site, pages):
    picture = (site / head.PREVIEW).read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", picture[16:24]) == (1200, 630)
    assert len(picture) < 200_000
    for name in pages:
        found = tags((site / name).read_text(encoding="utf-8"))
        assert found["og:image"] == found["twitter:image"] == BASE + head.PREVIEW
        assert (found["og:image:width"], found["og:image:height"]) == ("1200", "630")


def test_canonical_links_and_the_sitemap_name_the_pages(site, pages):
    for name in pages:
        expected = BASE + ("" if name == "index.html" else name)
        text = (site / name).read_text(encoding="utf-8")
        assert re.findall(r'<link rel="canonical" href="([^"]*)"', text) == [expected]
        assert tags(text)["og:url"] == expected
    listed = re.findall(r"<loc>(.*)</loc>", (site / "sitemap.xml").read_text(encoding="utf-8"))
    assert set(listed) == {BASE + ("" if n == "index.html" else n) for n in pages} - {
        BASE + "search.html", BASE + "genindex.html"}  # fmt: skip
    assert len(listed) == len(set(listed))


def test_the_sites_address_stands_in_one_setting():
    assert portable.SITE == BASE + "book"
    assert f"[Read the book]({BASE.rstrip('/')})" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_without_an_address_nothing_is_invented():
    made = head.tags("book/02_lora", "LoRA & more", 'A "quoted" description', "")
    assert "http" not in made and "og:image" not in made and "og:url" not in made
    assert tags(made)["og:title"] == "LoRA & more" and tags(made)["description"] == 'A "quoted" description'
    assert tags(made)["twitter:card"] == "summary"
    assert head.rooted('<a href="x.html"> <a href="#y"> <a href="https://z">', "") == (
        '<a href="/x.html"> <a href="#y"> <a href="https://z">')  # fmt: skip


def test_another_address_goes_everywhere():
    base = "https://example.org/deep/book"
    found = tags(head.tags("book/02_lora", "LoRA", "Told.", base))
    assert found["og:url"] == base + "/book/02_lora.html" and found["og:image"] == f"{base}/{head.PREVIEW}"
    assert "<loc>https://example.org/deep/book/</loc>" in head.sitemap(base, ["index"])
    assert head.rooted('<a href="./x.html"> <img src="y.png">', base) == (
        '<a href="/deep/book/x.html"> <img src="/deep/book/y.png">')  # fmt: skip


# ------------------------------------------------------------------------------------------------- what is not found


class Hosted(QuietHandler):
    """As GitHub serves the site: in a folder of its host, with 404.html for what is not there."""

    root = urlsplit(BASE).path

    def do_GET(self):
        path = urlsplit(self.path).path
        there = Path(self.directory, path.removeprefix(self.root) or "index.html")
        if path.startswith(self.root) and there.is_file():
            self.path = "/" + self.path.removeprefix(self.root)
            return super().do_GET()
        body = Path(self.directory, "404.html").read_bytes()
        self.send_response(404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def host(site):
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hosted, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def lost(browser, host):
    page = browser.page()
    page.open(host + Hosted.root + "book/old/deep/page.html")
    yield page
    page.close()


def complaints(page) -> list[str]:
    """What went wrong but for the page itself, which is not found, as it should be."""
    return [told for told in page.problems if "old/deep/page.html" not in told]


def test_what_is_not_found_is_shown_whole_at_any_depth(lost, host, site):
    assert lost.evaluate("document.querySelector('article h1').textContent") == "This page is not here"
    assert complaints(lost) == [] and all(url.startswith(host) for url in lost.requests)
    links = lost.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)")
    inside = [urlsplit(url).path for url in links if url.startswith(host) and "#" not in url]
    assert len(inside) > 20
    for path in inside:
        assert (site / path.removeprefix(Hosted.root)).is_file(), path


class Elsewhere(Hosted):
    """The same site in another folder of another host, such as a fork's."""

    root = "/another/folder/"


def test_what_is_not_found_is_mended_where_the_site_lies_elsewhere(browser, site):
    """Its links begin with the folder that the site has at its own address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Elsewhere, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page, host = browser.page(), f"http://127.0.0.1:{server.server_port}"
        page.open(host + Elsewhere.root + "book/old/page.html")
        told = "document.documentElement.dataset.content_root"
        assert page.until(f"{told} === '{Elsewhere.root}'")
        links = page.evaluate("[...document.querySelectorAll('article a[href], link[href]')].map(a => a.href)")
        assert len(links) > 10 and all(url.startswith((host + Elsewhere.root, "https://")) for url in links)
        assert page.evaluate("document.querySelector('.front-search').action") == f"{host}{Elsewhere.root}search.html"
        wide = "getComputedStyle(document.querySelector('article h1')).fontFamily"
        assert page.until(f"{wide}.includes('system-ui')") and page.until("document.documentElement.dataset.theme")
        page.close()
        server.shutdown()


def test_what_is_not_found_can_be_searched_for(browser, lost):
    """The form's own address and field lead to results."""
    form = "(f => [f.method, f.action, f.querySelector('input').name])(document.querySelector('.front-search'))"
    method, action, name = lost.evaluate(form)
    page = browser.page()
    page.open(f"{action}?{name}=adapter")
    assert method == "get" and page.until("document.querySelector('#search-results li a')", timeout=60)
    page.close()


def test_what_is_not_found_is_accessible_and_fits_a_phone(lost):
    assert violations(lost, RUN_AXE) == []
    lost.colours(dark=True)
    assert lost.until("document.documentElement.dataset.theme === 'dark'")
    assert violations(lost, RUN_AXE_ON_COLOURS) == []
    lost.resize(390, 844)
    nothing_is_wider(lost)
