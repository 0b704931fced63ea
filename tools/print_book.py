"""Print the rendered book as PDF: what `make pdf` calls, after `make book`.

    python tools/print_book.py                  the whole book and each page of it, into _build/html/pdf
    python tools/print_book.py 05_adapters      that page alone

Chromium prints the pages of _build/html. It has the formulas, numbers, references and figures as readers of the site
see them, so no second renderer has to know the book's directives. tools/paper.py makes the document that is printed,
and tools/print.css its looks.
"""

import argparse
import base64
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pikepdf
from archive import announce, write
from paper import ROOT, Paper, author, page_names, plain_name

from peftlab.progress import track

SITE = ROOT / "_build" / "html"
WHOLE = "peft-lab"
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("book", "unit")]

from browser import Browser, BrowserError, find_chromium  # noqa: E402

NO_BROWSER = (
    "%s: no Chromium or Chrome found, which typesets the book. Install one (Debian and Ubuntu: apt install chromium "
    "fonts-dejavu-core), or name one: CHROMIUM=/path/to/chrome make %s"
)
WIDTH = round((210 - 2 * 18) / 25.4 * 96)  # A4 less the margins of print.css, in CSS pixels

# A table or a formula that is wider than the paper is made smaller.
FIT = """
(() => {
  document.querySelectorAll("table, mjx-container[display='true']").forEach(wide => {
    const around = wide.parentElement.getBoundingClientRect().width;
    const inside = wide.matches("table") ? wide.getBoundingClientRect().width : wide.scrollWidth;
    if (inside > around + 0.5) wide.style.zoom = Math.floor(1000 * around / inside) / 1000;
  });
})()
"""

UNTYPESET = """
[...document.querySelectorAll(".math")].filter(e => !e.querySelector("mjx-container") || e.querySelector("mjx-merror"))
  .map(e => "a formula is not typeset: " + e.textContent)
"""
# If one thing is still too wide, Chromium prints the whole document smaller.
WIDE = """
document.documentElement.scrollWidth <= innerWidth ? [] : [...document.querySelectorAll("body *")]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 || (e.clientWidth && e.scrollWidth > e.clientWidth + 1))
  .map(e => "wider than the paper: " + e.outerHTML.slice(0, 200)).slice(-1)
"""
NUMBER = """
(numbers => document.querySelectorAll("[data-place]").forEach(e => e.textContent = numbers[e.dataset.place]))(%s)
"""


def page_numbers(data: bytes) -> dict[str, int]:
    """The page, counted from 1, on which each id lies that a link of the PDF leads to."""
    with pikepdf.open(io.BytesIO(data)) as pdf:
        pages = {page.objgen: number for number, page in enumerate(pdf.pages, start=1)}
        return {str(name).removeprefix("/"): pages[place[0].objgen] for name, place in pdf.Root.Dests.items()}


def entries(node: pikepdf.Object) -> Iterator[pikepdf.Object]:
    """The entries of an outline below `node`, in order."""
    entry = node.get("/First")
    while entry is not None:
        yield entry
        yield from entries(entry)
        entry = entry.get("/Next")


def finished(data: bytes, paper: Paper) -> bytes:
    """The same PDF, smaller, with its titles and without dates: the same book gives the same bytes."""
    out = io.BytesIO()
    with pikepdf.open(io.BytesIO(data)) as pdf:
        # in a heading of two lines Chromium loses the blank between them
        for entry, title in zip(entries(pdf.Root.Outlines), paper.headings(), strict=True):
            entry.Title = title
        for name in ("/CreationDate", "/ModDate"):
            del pdf.docinfo[name]
        pdf.docinfo["/Title"], pdf.docinfo["/Author"] = paper.title, author()
        pdf.Root.PageMode = pikepdf.Name.UseOutlines
        pdf.save(out, object_stream_mode=pikepdf.ObjectStreamMode.generate, deterministic_id=True)
    return out.getvalue()


def printed(page, tagged: bool = True) -> bytes:
    """What Chromium prints of an open page; `tagged` gives the outline, and the structure that screen readers use."""
    asked = {"preferCSSPageSize": True, "printBackground": True, "transferMode": "ReturnAsStream"}
    answer = page.command("Page.printToPDF", **asked, generateDocumentOutline=tagged, generateTaggedPDF=tagged)
    data, ended = b"", False
    while not ended:
        piece = page.command("IO.read", handle=answer["stream"], size=1 << 24)
        data, ended = data + base64.b64decode(piece["data"]), piece["eof"]
    page.command("IO.close", handle=answer["stream"])
    return data


def make_pdf(browser: Browser, site: Path, names: list[str]) -> bytes:
    """One PDF of the pages `names`. More than one are a book, with a title page and contents."""
    paper = Paper(site, names)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "book.html"
        source.write_text(paper.html(), encoding="utf-8")
        page = browser.page(width=WIDTH, height=1000)
        page.command("Emulation.setEmulatedMedia", media="print")
        page.open(source.as_uri())
        page.evaluate(
            "Promise.all([...document.images].map(i => i.decode())).then(() => document.fonts.ready).then(() => 0)"
        )
        page.evaluate(FIT)
        told = page.problems + page.evaluate(UNTYPESET) + page.evaluate(WIDE)
        if told:
            raise BrowserError(f"{names[0]}: {told[0]}")
        if len(names) > 1:
            # the contents know their page numbers after a first printing
            page.evaluate(NUMBER % json.dumps(page_numbers(printed(page, tagged=False))))
        data = printed(page)
        page.close()
    return finished(data, paper)


def browser_for(command: str) -> str | None:
    """The path of Chromium. If it or the rendered book is not there, say so in one line and return None."""
    binary = find_chromium()
    missing = [name for name in page_names() if not (SITE / f"{name}.html").is_file()]
    if binary is None:
        print(NO_BROWSER % (command, command), file=sys.stderr)
    elif missing:
        print(f"{command}: {missing[0]}.html is not in _build/html; render the book first: make book", file=sys.stderr)
    return None if missing else binary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", help="names of pages, such as 05_adapters; without any, the whole book")
    arguments = parser.parse_args()
    names = page_names()
    known = {plain_name(name): name for name in names}
    unknown = [name for name in arguments.pages if name not in known]
    if unknown:
        print(f"pdf: there is no page {unknown[0]!r}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    binary = browser_for("pdf")
    if binary is None:
        return 1
    todo = {page: [known[page]] for page in arguments.pages or known}
    if not arguments.pages:
        todo[WHOLE] = names
    started = time.monotonic()
    print(f"pdf: printing {len(todo)} files", flush=True)
    try:
        with Browser(binary) as browser:
            for page, of in track(list(todo.items()), "pdf", unit="file"):
                write(SITE / "pdf" / f"{page}.pdf", make_pdf(browser, SITE, of))
    except BrowserError as error:
        print(f"pdf: {error}", file=sys.stderr)
        return 1
    announce(SITE)
    print(f"pdf: printed in {time.monotonic() - started:.0f} s; open {(SITE / 'pdf' / page).relative_to(ROOT)}.pdf")
    return 0


if __name__ == "__main__":
    sys.exit(main())
