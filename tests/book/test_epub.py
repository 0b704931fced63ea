"""The book's EPUB holds what the pages hold, as files that any e-reader takes: figures, formulas, links, no markup.

`make test` makes a book of two pages. `make epub` runs the same tests on the book that it made.
"""

import functools
import io
import re
import zipfile
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import epub_book
import paper
import print_book
import pytest
from archive import EPUB
from epub_book import MEDIA, XHTML
from lxml import etree
from test_pages import IMAGES, RUN, violations
from test_print import CHAPTER, RAW, SHORT, on_paper

OPF, NCX = "{http://www.idpf.org/2007/opf}", "{http://www.daisy.org/z3986/2005/ncx/}"
MATHML = "{http://www.w3.org/1998/Math/MathML}"
WCAG = RUN % '{type: "tag", values: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}'
CUT_OFF = """
[...document.querySelectorAll("table, math, img")].filter(e => e.getBoundingClientRect().right > innerWidth)
  .map(e => e.outerHTML.slice(0, 200))
"""
FRONT = ["title.xhtml", "nav.xhtml"]


@functools.cache
class Source:
    """What the rendered page says that its chapter must hold."""

    def __init__(self, name: str):
        article = on_paper(name)
        self.formulas = len(article.select(".math"))
        self.numbers = [number.get_text() for number in article.select(".eqno")]
        self.figures = [image["alt"] for image in article.select("img")]
        self.headings = [" ".join(heading.get_text().split()) for heading in article.select("h1, h2")]
        # links of folded parts are not counted: some parts are left out
        self.links = len([link for link in article.select("a[href]") if not link.find_parent("details")])


class Epub:
    """An EPUB, read: its files, its pages as XML, and its package."""

    def __init__(self, data: bytes, names: list[str]):
        self.names, self.data = names, data
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            self.entries = file.infolist()
            self.files = {entry.filename: file.read(entry) for entry in self.entries}
        self.xml = {name: etree.fromstring(data) for name, data in self.files.items() if is_xml(name)}
        self.package = self.xml["book/package.opf"]
        self.items = {item.get("href"): item for item in self.package.iter(f"{OPF}item")}
        self.pages = {name: self.xml[f"book/{name}"] for name in self.items if name.endswith(".xhtml")}

    def chapter(self, name: str) -> etree._Element:
        return self.pages[f"{paper.plain_name(name)}.xhtml"]


def is_xml(name: str) -> bool:
    return name.endswith((".xhtml", ".opf", ".ncx", ".xml"))


def words(element: etree._Element) -> str:
    return " ".join("".join(element.itertext()).split())


@pytest.fixture(scope="module")
def small(browser, site) -> Epub:
    """An EPUB of two pages, made here. The first has links to the second."""
    names = [CHAPTER, "book/appendix_measurements"]
    return Epub(epub_book.make_epub(browser, site, names), names)


@pytest.fixture(scope="module", params=["two pages", pytest.param("whole book", marks=pytest.mark.printed)])
def epub(request) -> Epub:
    """The EPUB to look at: the small one, or the one that `make epub` left."""
    if request.param == "two pages":
        return request.getfixturevalue("small")
    return Epub((print_book.SITE / EPUB).read_bytes(), paper.page_names())


def test_its_parts_are_where_readers_look_for_them(epub):
    first = epub.entries[0]
    assert (first.filename, first.compress_type, first.extra) == ("mimetype", zipfile.ZIP_STORED, b"")
    assert epub.files["mimetype"] == b"application/epub+zip"
    assert b'full-path="book/package.opf"' in epub.files["META-INF/container.xml"]
    own = {"mimetype", "META-INF/container.xml", "book/package.opf"}
    assert {f"book/{name}" for name in epub.items} == set(epub.files) - own
    assert all(item.get("media-type") == MEDIA[Path(name).suffix] for name, item in epub.items.items())
    by_id = {item.get("id"): name for name, item in epub.items.items()}
    order = [by_id[reference.get("idref")] for reference in epub.package.iter(f"{OPF}itemref")]
    assert order == FRONT + [f"{paper.plain_name(name)}.xhtml" for name in epub.names]
    assert by_id[epub.package.find(f"{OPF}spine").get("toc")] == "toc.ncx"


def test_the_package_says_what_a_page_needs(epub):
    for name, item in epub.items.items():
        expected = {"nav"} if name == "nav.xhtml" else {"cover-image"} if name == "images/cover.png" else set()
        if name in epub.pages:
            expected |= {"mathml"} if epub.pages[name].find(f".//{MATHML}math") is not None else set()
            expected |= {"svg"} if epub.pages[name].find(".//{http://www.w3.org/2000/svg}svg") is not None else set()
        assert set((item.get("properties") or "").split()) == expected, name


def test_the_contents_have_every_chapter_and_section(epub):
    shown = [(link.get("href"), words(link)) for link in epub.pages["nav.xhtml"].iter(f"{XHTML}a")]
    points = list(epub.xml["book/toc.ncx"].iter(f"{NCX}navPoint"))
    assert [(p.find(f"{NCX}content").get("src"), words(p.find(f"{NCX}navLabel"))) for p in points] == shown
    assert [int(point.get("playOrder")) for point in points] == list(range(1, len(points) + 1))
    assert [text for _, text in shown] == [heading for name in epub.names for heading in Source(name).headings]
    chapters = epub.pages["nav.xhtml"].findall(f".//{XHTML}nav/{XHTML}ol/{XHTML}li")
    assert [chapter.find(f"{XHTML}a").get("href") for chapter in chapters] == [
        f"{paper.plain_name(name)}.xhtml" for name in epub.names
    ]


def test_formulas_figures_and_links_are_those_of_the_page(epub):
    for name in epub.names:
        source, chapter = Source(name), epub.chapter(name)
        formulas = list(chapter.iter(f"{MATHML}math"))
        assert len(formulas) == source.formulas, name
        assert [formula for formula in formulas if not words(formula)] == [], name
        assert [words(number) for number in chapter.iterfind(".//*[@class='eqno']")] == source.numbers, name
        assert [image.get("alt") for image in chapter.iter(f"{XHTML}img")] == source.figures, name
        assert all(source.figures), name
        assert len(list(chapter.iter(f"{XHTML}a"))) >= source.links, name


def test_no_markup_is_left(epub):
    for name, page in epub.pages.items():
        tags = Counter(etree.QName(tag).localname for tag in page.iter(etree.Element))
        left = [tag for tag in tags if tag.startswith("mjx") or tag in ("merror", "script", "style", "form", "button")]
        assert left == [], name
        for code in page.iterfind(f".//{XHTML}pre"):
            code.getparent().remove(code)
        text = words(page)
        found = RAW.search(text) or re.search(r"\$[^0-9]|\\[a-z]+", text)
        assert not found, f"{name}: {text[found.start() - 40 : found.end() + 40]}"


def test_links_and_images_resolve(epub):
    ids = {name: page.xpath("//@id") for name, page in epub.pages.items()}
    assert [name for name, found in ids.items() if len(set(found)) < len(found)] == []
    for name, page in epub.pages.items():
        for link in page.iter(f"{XHTML}a"):
            parts = urlsplit(link.get("href"))
            if parts.scheme:
                assert parts.scheme in ("http", "https") and parts.netloc, link.get("href")
                continue
            assert parts.path in ids, f"{name}: {link.get('href')}"
            assert not parts.fragment or unquote(parts.fragment) in ids[parts.path], f"{name}: {link.get('href')}"
        for image in page.iter(f"{XHTML}img"):
            assert f"book/{image.get('src')}" in epub.files, f"{name}: {image.get('src')}"
            assert image.get("alt"), f"{name}: {image.get('src')}"


def test_links_between_chapters_stay_in_the_book(epub):
    """A link leads to a page of the site only where the EPUB lacks that page, or for a form that is left out."""
    site = paper.project()["urls"]["Documentation"].rstrip("/") + "/"
    inside = {urljoin(site, f"{name}.html") for name in epub.names}
    links = [link for name in epub.names for link in epub.chapter(name).iter(f"{XHTML}a")]
    out = [link for link in links if link.get("href").partition("#")[0] in inside]
    assert [link.get("href") for link in out if "left-out" not in link.getparent().get("class", "")] == []
    assert [link for link in links if link.get("href").partition("#")[0] in epub.pages]


@pytest.fixture
def opened(browser, tmp_path):
    """Opens the pages of an EPUB, one after the other, as a small tablet shows them."""

    def show(epub: Epub):
        with zipfile.ZipFile(io.BytesIO(epub.data)) as file:
            file.extractall(tmp_path)
        for name in epub.pages:
            page = browser.page(width=600, height=800)
            page.open((tmp_path / "book" / name).as_uri())
            assert page.evaluate("document.contentType") == "application/xhtml+xml"
            assert page.problems == []
            assert [url for url in page.requests if not url.startswith(tmp_path.as_uri())] == []
            yield name, page
            page.close()

    return show


def test_a_page_is_whole_and_asks_no_other_host(epub, opened):
    assert "url(" not in epub.files["book/style.css"].decode()
    for name, page in opened(epub):
        assert [image["src"] for image in page.evaluate(IMAGES) if not image["width"]] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 600, name
        assert page.evaluate(CUT_OFF) == [], name


def test_everyone_can_read_it(small, opened):
    """No rule of WCAG 2.1, A or AA, is broken."""
    for name, page in opened(small):
        assert violations(page, WCAG) == [], name


def test_the_same_book_gives_the_same_bytes(browser, site):
    first, second = (epub_book.make_epub(browser, site, [SHORT]) for _ in range(2))
    assert first == second


def test_its_date_is_that_of_the_sources(monkeypatch, tmp_path):
    """Without git it is that of the files."""
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "a.md").write_text("a", encoding="utf-8")
    monkeypatch.setattr(epub_book, "ROOT", tmp_path)
    newest = int((tmp_path / "book" / "a.md").stat().st_mtime)
    assert epub_book.modified().timestamp() == newest
    monkeypatch.setenv("PATH", str(tmp_path))
    assert epub_book.modified().timestamp() == newest


def test_a_formula_that_is_not_typeset_is_refused(browser, site, monkeypatch):
    document, wrong = paper.Paper.document, r'<span class="math">\(\frac{1}\)</span>'
    monkeypatch.setattr(
        paper.Paper, "document", lambda self, names: document(self, names).replace("</article>", f"{wrong}</article>")
    )
    with pytest.raises(print_book.BrowserError, match=f"{SHORT}: a formula is not typeset"):
        epub_book.make_epub(browser, site, [SHORT])


def test_what_is_missing_is_told_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(print_book, "SITE", tmp_path)
    for binary, told in (("chromium", "make book"), (None, "apt install chromium")):
        monkeypatch.setattr(print_book, "find_chromium", lambda binary=binary: binary)
        assert epub_book.main() == 1
        error = capsys.readouterr().err
        assert error.startswith("epub: ") and error.count("\n") == 1 and told in error
    assert not any(tmp_path.iterdir())
