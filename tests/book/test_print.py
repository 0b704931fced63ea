"""The book's PDF holds what the pages hold: outline, figures, captions, equations, links, and no markup.

`make test` prints one chapter and a book of two pages. `make pdf` runs the same tests on all that it printed.
"""

import io
import re
from collections import Counter
from itertools import pairwise

import paper
import pikepdf
import print_book
import pypdfium2
import pytest
from browser import BrowserError
from bs4 import BeautifulSoup
from pypdfium2 import raw

CHAPTER = "book/05_adapters"
SHORT = "book/appendix_other_tools"
RAW = re.compile(
    r"```|:::|\{(?:ref|eq|doc|glue|cite|numref|code-cell)\b|<!--|&[a-z]+;"
    r"|\\\(|\\\[|\$\\|\\(?:frac|mathbb|begin|text)\b|@title|\?\?"
)
POINTS = 72 / 25.4  # per millimetre
MARGIN = 18 * POINTS  # as in print.css


def squeezed(text: str) -> str:
    """Text without any white space: a PDF breaks lines where it likes."""
    return re.sub(r"[\s\u00ad\ufffe\u200b]|\u0002", "", text)


def on_paper(name: str):
    """The article of a rendered page, without what has no place on paper."""
    text = (print_book.SITE / f"{name}.html").read_text(encoding="utf-8")
    article = BeautifulSoup(text, "lxml").select_one("article.bd-article")
    for part in article.select(f"{paper.SCREEN}, {paper.INTERACTIVE}"):
        part.decompose()
    return article


class Source:
    """What the rendered page says that its PDF must hold."""

    def __init__(self, name: str):
        article = on_paper(name)
        headings = article.select("h1, h2, h3, h4, h5, h6")
        self.headings = [(int(heading.name[1]), " ".join(heading.get_text().split())) for heading in headings]
        self.links = len(article.select("a[href^='#']"))
        self.images = len(article.select("img"))
        self.captions = [squeezed(caption.get_text()) for caption in article.select(".caption-number")]
        # with every reference to an equation, so that none of the numbers themselves can be missing
        self.equations = [number.get_text() for number in article.select(".eqno, a[href*='#equation-']")]


class Printed:
    """A PDF: its text and images page by page, and its outline as (level, title, page)."""

    def __init__(self, data: bytes, names: list[str]):
        self.names, self.data = names, data
        with pypdfium2.PdfDocument(data) as document:
            self.pages = [page.get_textpage().get_text_range() for page in document]
            self.images = [len(list(page.get_objects(filter=[raw.FPDF_PAGEOBJ_IMAGE]))) for page in document]
            self.ends = [self.end(page) for page in document]
            outline = [entry for entry in document.get_toc() if entry.get_title() != "Contents"]
            self.outline = [(entry.level + 1, entry.get_title(), entry.get_dest().get_index()) for entry in outline]
        starts = [page for level, _, page in self.outline if level == 1] + [len(self.pages)]
        self.chapters = {name: slice(*pages) for name, pages in zip(names, pairwise(starts), strict=True)}

    def end(self, page) -> float:
        """How far the page's text reaches to the right. (A brace is a letter stretched beyond the page, of which a part
        is shown.)"""
        text = page.get_textpage()
        boxes = [text.get_rect(number) for number in range(text.count_rects())]
        return max((right for left, _, right, _ in boxes if left > 0), default=0.0)

    def text(self, name: str) -> str:
        return squeezed("".join(self.pages[self.chapters[name]]))


MADE = [pytest.param(name, marks=pytest.mark.printed) for name in ("each page", "whole book")]


@pytest.fixture(scope="module", params=["chapter", "book", *MADE])
def printed(request) -> list[Printed]:
    """PDFs to look at: printed here, or those that `make pdf` left."""
    made = print_book.SITE / "pdf"
    names = paper.page_names()
    if request.param == "whole book":
        return [Printed((made / f"{print_book.WHOLE}.pdf").read_bytes(), names)]
    if request.param == "each page":
        return [Printed((made / f"{paper.plain_name(name)}.pdf").read_bytes(), [name]) for name in names]
    site, browser = request.getfixturevalue("site"), request.getfixturevalue("browser")
    names = {"chapter": [CHAPTER], "book": [SHORT, "book/appendix_guide"]}[request.param]
    return [Printed(print_book.make_pdf(browser, site, names), names)]


def test_the_outline_has_every_heading(printed):
    for pdf in printed:
        expected = [heading for name in pdf.names for heading in Source(name).headings]
        assert [entry[:2] for entry in pdf.outline] == expected


def test_figures_captions_and_equations_are_there(printed):
    for pdf in printed:
        for name in pdf.names:
            source, text = Source(name), pdf.text(name)
            assert sum(pdf.images[pdf.chapters[name]]) == source.images, f"{name}: figures"
            assert [caption for caption in source.captions if caption not in text] == [], name
            short = {number for number, times in Counter(source.equations).items() if text.count(number) < times}
            assert short == set(), f"{name}: equations"


def test_no_markup_is_left(printed):
    for pdf in printed:
        found = [(number, RAW.search(text)) for number, text in enumerate(pdf.pages, start=1)]
        assert [(number, mark.group()) for number, mark in found if mark] == [], pdf.names[0]


def test_no_page_is_empty_and_nothing_is_cut_off(printed):
    for pdf in printed:
        empty = [number for number, text in enumerate(pdf.pages) if len(squeezed(text)) < 20 and not pdf.images[number]]
        assert empty == [], pdf.names[0]
        wide = {number: end for number, end in enumerate(pdf.ends, start=1) if end > 210 * POINTS - MARGIN + 1}
        assert wide == {}, pdf.names[0]


def test_what_is_too_wide_is_refused(browser, site, monkeypatch):
    """Chromium would print the whole document smaller."""
    html, wide = paper.Paper.html, f"<p>{'x' * 200}</p>"
    monkeypatch.setattr(paper.Paper, "html", lambda self: html(self).replace("</article>", f"{wide}</article>"))
    with pytest.raises(BrowserError, match=f"{SHORT}: wider than the paper: <p>xxx"):
        print_book.make_pdf(browser, site, [SHORT])


def test_links_lead_somewhere(printed):
    """Every link leads to a place in the PDF, or to an address. The contents name the pages where chapters begin."""
    for pdf in printed:
        with pikepdf.open(io.BytesIO(pdf.data)) as document:
            places = {str(name) for name in document.Root.get("/Dests", {}).keys()}
            links = [link for page in document.pages for link in page.get("/Annots", []) if link.Subtype == "/Link"]
            inside = [str(link.Dest) for link in links if "/Dest" in link]
            outside = [str(link.A.URI) for link in links if "/Dest" not in link]
            assert set(inside) <= places and len(inside) >= sum(Source(name).links for name in pdf.names)
            assert [address for address in outside if not re.match(r"https?://", address)] == []
            assert document.docinfo["/Title"] and document.Root.Lang == "en"
            assert document.Root.MarkInfo.Marked
            assert not {"/CreationDate", "/ModDate"} & set(document.docinfo.keys())


def test_the_contents_name_the_pages(printed):
    for pdf in printed:
        if len(pdf.names) > 1:
            front = squeezed("".join(pdf.pages[: pdf.chapters[pdf.names[0]].start]))
            for level, title, page in pdf.outline:
                assert level > 2 or squeezed(f"{title}{page + 1}") in front, title


def test_the_same_book_gives_the_same_bytes(browser, site):
    first, second = (print_book.make_pdf(browser, site, [SHORT]) for _ in range(2))
    assert first == second


def test_without_a_browser_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(print_book, "find_chromium", lambda: None)
    monkeypatch.setattr("sys.argv", ["print_book.py"])
    assert print_book.main() == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "apt install chromium" in told


@pytest.mark.parametrize("arguments, told", [(["05_adaptors"], "there is no page '05_adaptors'")])
def test_wrong_pages_are_one_error(monkeypatch, capsys, arguments, told):
    monkeypatch.setattr("sys.argv", ["print_book.py", *arguments])
    assert print_book.main() == 2
    assert told in capsys.readouterr().err
