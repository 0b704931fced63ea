"""What can be downloaded is there: whole notebooks, PDFs and EPUB where made, an archive that needs no server."""

import io
import json
import os
import re
import zipfile
from pathlib import Path

import archive
import nbformat
import pytest
from paper import page_names
from test_pages import IMAGES

ROOT = Path(__file__).resolve().parents[2]
CHAPTER = "book/05_adapters.html"
MENU = """
[...document.querySelectorAll(".dropdown-download-buttons .dropdown-item")].map(e => [e.innerText.trim(), e.href || ""])
"""


@pytest.fixture(scope="module")
def packed(site) -> bytes:
    return archive.pack(site)


@pytest.fixture(scope="module")
def unpacked(packed, tmp_path_factory) -> Path:
    """The folder that a reader unpacks, on a path with a blank and a letter outside ASCII; without PDFs and EPUB."""
    folder = tmp_path_factory.mktemp("my stück")
    with zipfile.ZipFile(io.BytesIO(packed)) as file:
        left_out = re.compile(rf"/site/(pdf/|{re.escape(archive.EPUB)}$)")
        file.extractall(folder, [name for name in file.namelist() if not left_out.search(name)])
    archive.announce(folder / archive.FOLDER / "site")
    return folder / archive.FOLDER


@pytest.fixture
def opened(browser, unpacked):
    """Open a page of the archive as a file; afterwards its console must be empty."""
    pages = []

    def open_page(name, **looks):
        page = browser.page(**looks)
        pages.append(page)
        path, mark, query = name.partition("?")
        page.open((unpacked / path).as_uri() + mark + query)
        return page

    yield open_page
    for page in pages:
        assert page.problems == []
        assert [url for url in page.requests if not url.startswith("file://")] == []
        page.close()


def test_the_archive_holds_the_site_and_opens_from_one_file(site, packed, opened, unpacked):
    with zipfile.ZipFile(io.BytesIO(packed)) as file:
        names = set(file.namelist())
    beside = {name for name in names if "/site/" not in name}
    assert beside == {f"{archive.FOLDER}/{archive.OPEN}", f"{archive.FOLDER}/README.txt"}
    own = {f"{archive.FOLDER}/site/{path.relative_to(site).as_posix()}" for path in site.rglob("*") if path.is_file()}
    left_out = {name.rpartition("/site/")[2] for name in own - names}
    assert names - beside <= own and left_out <= {".buildinfo", archive.ARCHIVE}
    page = opened(archive.OPEN)
    assert page.until("document.querySelector('article h1')")
    assert page.evaluate("location.pathname").startswith(unpacked.as_uri().removeprefix("file://") + "/site/")


def test_the_same_site_gives_the_same_archive(tmp_path):
    names = ["index.html", archive.MADE, "pdf/one.pdf", archive.EPUB, "two.pdf.partial", archive.ARCHIVE]
    for second, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{name}\n", encoding="utf-8")
        os.utime(path, (second, second))
    first = archive.pack(tmp_path)
    os.utime(tmp_path / "index.html", (99, 99))
    assert archive.pack(tmp_path) == first
    with zipfile.ZipFile(io.BytesIO(first)) as file:
        inside = {name.rpartition("/site/")[2] for name in file.namelist() if "/site/" in name}
        made = file.read(f"{archive.FOLDER}/site/{archive.MADE}").decode()
    assert inside == {"index.html", archive.MADE, "pdf/one.pdf", archive.EPUB}
    assert '{"pdf/one.pdf": 12, "peft-lab.epub": 14}' in made  # and not the archive itself


@pytest.mark.parametrize("name", ["index.html", CHAPTER, "book/appendix_glossary.html", "genindex.html"])
def test_a_page_of_the_archive_is_whole(opened, pages, name):
    page = opened(f"site/{name}")
    for dark in (True, False):
        page.colours(dark)
        assert page.until(f"document.documentElement.dataset.theme === '{'dark' if dark else 'light'}'")
    assert page.evaluate("document.querySelectorAll('.math mjx-container').length") >= pages[name].formulas
    assert page.evaluate("document.querySelectorAll('mjx-merror').length") == 0
    fonts = "[...document.fonts].filter(f => f.family.startsWith('MJX') && f.status === 'loaded').length"
    assert page.evaluate(fonts) or not pages[name].formulas
    assert [image["src"] for image in page.evaluate(IMAGES) if not image["width"]] == []


def test_the_guide_answers_in_the_archive(opened):
    page = opened("site/book/appendix_guide.html")
    assert page.until("document.querySelector('#guide-result table')")


def test_search_in_the_archive_lists_pages(opened):
    page = opened("site/search.html?q=houlsby")
    assert page.until("document.querySelector('#search-results li a[href*=\"05_adapters\"]')")
    page.browser.pump(0.5)


def test_the_menu_offers_what_there_is(unpacked, opened):
    folder = unpacked / "site"
    plain = opened(f"site/{CHAPTER}").evaluate(MENU)
    assert [text for text, _ in plain] == ["Notebook, with outputs", "Print this page"]
    for path in ("pdf/05_adapters.pdf", "pdf/peft-lab.pdf", archive.EPUB, archive.ARCHIVE):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(b"0" * 260_000)
    archive.announce(folder)
    offered = opened(f"site/{CHAPTER}").evaluate(MENU)
    elsewhere = opened("site/book/appendix_guide.html").evaluate(MENU)
    assert offered[2:] == [
        ["PDF of this page (0.3 MB)", (folder / "pdf/05_adapters.pdf").as_uri()],
        ["PDF of the book (0.3 MB)", (folder / "pdf/peft-lab.pdf").as_uri()],
        ["EPUB of the book (0.3 MB)", (folder / archive.EPUB).as_uri()],
        ["The site, to read offline (0.3 MB)", (folder / archive.ARCHIVE).as_uri()],
    ]
    assert elsewhere[2:] == offered[3:]


def test_the_notebook_that_a_page_offers_is_the_stored_one(site, pages):
    """Its numbers and references are filled in: no mark stands without its text."""
    for name in page_names():
        source = ROOT / f"{name}.ipynb"
        if not source.is_file():
            continue
        assert any(link.endswith(f"_sources/{name}.ipynb") for link in pages[f"{name}.html"].links)
        offered = (site / "_sources" / f"{name}.ipynb").read_text(encoding="utf-8")
        assert json.loads(offered) == json.loads(source.read_text(encoding="utf-8"))
        notebook = nbformat.reads(offered, as_version=4)
        for cell in notebook.cells:
            assert cell.cell_type != "markdown" or not re.search(r"(?:^|[\s(])<!--[=@]", cell.source), cell.source[:200]
            assert cell.cell_type != "code" or cell.execution_count


def test_without_a_site_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(archive, "SITE", tmp_path)
    assert archive.main() == 1
    assert "make book" in capsys.readouterr().err and not any(tmp_path.iterdir())
