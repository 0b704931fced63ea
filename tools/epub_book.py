"""Make an EPUB of the rendered book: what `make epub` calls, after `make book`.

Chromium opens each page as tools/paper.py prepares it for paper, MathJax typesets it, and in the place of a formula is
left the MathML that MathJax has put there for screen readers. Chromium then writes the page as XHTML. The EPUB is
_build/html/peft-lab.epub. The same site gives the same bytes.
"""

import html
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from archive import EPUB, announce, write, zipped
from lxml import etree
from paper import ROOT, SUBTITLE, Paper, author, page_names, plain_name
from print_book import SITE, UNTYPESET, Browser, BrowserError, browser_for

from peftlab.progress import track

sys.path.insert(0, str(ROOT / "book" / "_ext"))

from peftlab_book import drawings  # noqa: E402
from peftlab_head import NAME, ON_IT, SAID  # noqa: E402

CSS = ROOT / "tools" / "epub.css"
SOURCES = ["index.md", "_config.yml", "_toc.yml", "book", "peftlab", "tools"]
XHTML = "{http://www.w3.org/1999/xhtml}"
MANY = 8  # columns, more than which are set smaller
COVER = "images/cover.png"
MEDIA = {
    ".xhtml": "application/xhtml+xml", ".ncx": "application/x-dtbncx+xml", ".css": "text/css", ".png": "image/png",
}  # fmt: skip

SERIALISED = """
(article => {
  article.querySelectorAll("mjx-container").forEach(e => e.replaceWith(e.querySelector("mjx-assistive-mml > math")));
  article.removeAttribute("style");
  return new XMLSerializer().serializeToString(article);
})(document.querySelector("article"))
"""
PAGE = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE html>
<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops" lang="en" xml:lang="en">
<head><title>{title}</title><link rel="stylesheet" type="text/css" href="style.css"/></head>
<body>{body}</body>
</html>
"""
CONTAINER = """<?xml version="1.0" encoding="UTF-8"?>
<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container">
<rootfiles><rootfile full-path="book/package.opf" media-type="application/oebps-package+xml"/></rootfiles>
</container>
"""
PACKAGE = """<?xml version="1.0" encoding="UTF-8"?>
<package xmlns="http://www.idpf.org/2007/opf" version="3.0" unique-identifier="id" xml:lang="en">
<metadata xmlns:dc="http://purl.org/dc/elements/1.1/">
<dc:identifier id="id">{identifier}</dc:identifier>
<dc:title>{title}</dc:title>
<dc:language>en</dc:language>
<dc:creator>{author}</dc:creator>
<dc:description>{subtitle}</dc:description>
<dc:rights>Text and figures: CC BY 4.0. Code: Apache License 2.0.</dc:rights>
<dc:source>{address}</dc:source>
<meta property="dcterms:modified">{modified:%Y-%m-%dT%H:%M:%SZ}</meta>
<meta property="schema:accessMode">textual</meta>
<meta property="schema:accessMode">visual</meta>
<meta property="schema:accessModeSufficient">textual</meta>
<meta property="schema:accessibilityFeature">alternativeText</meta>
<meta property="schema:accessibilityFeature">MathML</meta>
<meta property="schema:accessibilityFeature">readingOrder</meta>
<meta property="schema:accessibilityFeature">structuralNavigation</meta>
<meta property="schema:accessibilityFeature">tableOfContents</meta>
<meta property="schema:accessibilityHazard">none</meta>
<meta property="schema:accessibilitySummary">Every figure has a description, and formulas are MathML.</meta>
<meta name="cover" content="{cover}"/>
</metadata>
<manifest>
{manifest}
</manifest>
<spine toc="{ncx}">
{spine}
</spine>
</package>
"""
NCX = """<?xml version="1.0" encoding="UTF-8"?>
<ncx xmlns="http://www.daisy.org/z3986/2005/ncx/" version="2005-1" xml:lang="en">
<head><meta name="dtb:uid" content="{identifier}"/><meta name="dtb:depth" content="2"/></head>
<docTitle><text>{title}</text></docTitle>
<navMap>
{points}</navMap>
</ncx>
"""
LINE = '<li><a href="{link}">{text}</a>{below}</li>\n'
POINT = (
    '<navPoint id="p{number}" playOrder="{number}"><navLabel><text>{text}</text></navLabel>'
    '<content src="{link}"/>{below}</navPoint>\n'
)


def modified() -> datetime:
    """When the sources of the book last changed: as git knows it, or by their files where there is no git."""
    command = ["git", "log", "-1", "--format=%ct", "--", *SOURCES]
    try:
        seconds = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        seconds = max(int(path.stat().st_mtime) for path in (ROOT / "book").glob("*.*"))
    return datetime.fromtimestamp(seconds, UTC)


def page(title: str, body: str) -> bytes:
    return PAGE.format(title=html.escape(title), body=body).encode()


def link(place: str) -> str:
    """Where a place of the document, as Paper.place names it, lies in the EPUB."""
    name, mark, _ = place.partition("--")
    return f"{name}.xhtml#{place}" if mark else f"{name}.xhtml"


def article(text: str, images: dict[str, Path]) -> str:
    """A page as Chromium wrote it, made fit for an EPUB. The files of its images are added to `images`."""
    root = etree.fromstring(text)
    for anchor in root.iterfind(f".//{XHTML}a[@href]"):
        if anchor.get("href").startswith("#"):
            anchor.set("href", link(unquote(anchor.get("href")[1:])))
    for image in root.iterfind(f".//{XHTML}img"):
        path = Path(unquote(urlsplit(image.get("src")).path))
        images[f"images/{path.name}"] = path
        image.set("src", f"images/{path.name}")
    for table in root.iterfind(f".//{XHTML}table"):
        if len(table.find(f".//{XHTML}tr")) > MANY:
            table.set("class", f"{table.get('class', '')} wide".strip())
    return etree.tostring(root, encoding="unicode")


def contents(paper: Paper, entry: str, around: str = "{}") -> str:
    """The contents: every heading as `entry` shows it. Its {below} are a chapter's sections, inside of `around`."""
    made = below = ""
    # from the last to the first, so that the sections are ready when their chapter comes
    for number, (level, text, place) in reversed([*enumerate(paper.contents(), start=1)]):
        inside = around.format(below) if level == 1 and below else ""
        shown = entry.format(number=number, text=html.escape(text), link=link(place), below=inside)
        made, below = (shown + made, "") if level == 1 else (made, shown + below)
    return made


def typeset(browser: Browser, paper: Paper, name: str, images: dict[str, Path]) -> bytes:
    """One page of the site as a chapter of the EPUB."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "page.html"
        source.write_text(paper.document([name]), encoding="utf-8")
        tab = browser.page()
        tab.open(source.as_uri())
        if told := tab.problems + tab.evaluate(UNTYPESET):
            raise BrowserError(f"{name}: {told[0]}")
        text = tab.evaluate(SERIALISED)
        tab.close()
    return page(paper.heading(name), article(text, images))


def item(number: str, name: str, data: bytes) -> str:
    """What the package says of one of its files."""
    has = {"nav": name == "nav.xhtml", "cover-image": name == COVER}
    has |= {word: name.endswith(".xhtml") and tag in data for word, tag in (("mathml", b"<math"), ("svg", b"<svg"))}
    words = " ".join(word for word, true in has.items() if true)
    properties = f' properties="{words}"' if words else ""
    return f'<item id="{number}" href="{name}" media-type="{MEDIA[Path(name).suffix]}"{properties}/>'


def make_epub(browser: Browser, site: Path, names: list[str]) -> bytes:
    """The EPUB of the pages `names` of a site."""
    paper = Paper(site, names)
    images: dict[str, Path] = {}
    about = {"title": NAME, "subtitle": SUBTITLE, "author": html.escape(author()), "address": paper.address}
    about |= {"identifier": uuid.uuid5(uuid.NAMESPACE_URL, paper.address).urn, "modified": modified()}
    items, about["points"] = contents(paper, LINE, "<ol>{}</ol>"), contents(paper, POINT)
    cover = f'<p><img class="cover" src="{COVER}" alt="{html.escape(SAID)}"/></p>'
    words = f"<h1>{NAME}</h1><p>{SUBTITLE}</p><p>{about['author']}</p><p>{paper.imprint}</p>"
    pages = {
        "title.xhtml": page(NAME, f'<section epub:type="titlepage">{cover}{words}</section>'),
        "nav.xhtml": page("Contents", f'<nav epub:type="toc"><h1>Contents</h1><ol>\n{items}</ol></nav>'),
    }
    for name in track(names, "epub", unit="page"):
        pages[f"{plain_name(name)}.xhtml"] = typeset(browser, paper, name, images)
    files = pages | {"toc.ncx": NCX.format(**about).encode(), "style.css": CSS.read_bytes()}
    files |= {COVER: drawings.cover(NAME, ON_IT)} | {name: path.read_bytes() for name, path in images.items()}
    ids = {name: f"i{number}" for number, name in enumerate(files)}
    about["manifest"] = "\n".join(item(ids[name], name, data) for name, data in files.items())
    about["spine"] = "\n".join(f'<itemref idref="{ids[name]}"/>' for name in pages)
    package = PACKAGE.format(ncx=ids["toc.ncx"], cover=ids[COVER], **about).encode()
    inside = {"mimetype": b"application/epub+zip", "META-INF/container.xml": CONTAINER.encode()}
    inside |= {"book/package.opf": package} | {f"book/{name}": data for name, data in files.items()}
    return zipped(inside, plain={"mimetype"})


def main() -> int:
    binary = browser_for("epub")
    if binary is None:
        return 1
    names, started = page_names(), time.monotonic()
    print(f"epub: typesetting {len(names)} pages", flush=True)
    try:
        with Browser(binary) as browser:
            data = make_epub(browser, SITE, names)
    except BrowserError as error:
        print(f"epub: {error}", file=sys.stderr)
        return 1
    write(SITE / EPUB, data)
    announce(SITE)
    print(f"epub: {(SITE / EPUB).relative_to(ROOT)}, {len(data) / 1e6:.1f} MB, in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
