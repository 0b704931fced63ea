"""Pages of the rendered book as one document for paper, which tools/print_book.py prints. An EPUB has the same pages.

Folded parts are opened, what only works on a screen is left out or becomes a sentence, and links between pages lead to
places in the document. Links to what is not in it lead to the published site.
"""

import html
import json
import re
import tomllib
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import yaml
from bs4 import BeautifulSoup, Tag

from peftlab import __version__

ROOT = Path(__file__).resolve().parent.parent
CSS = ROOT / "tools" / "print.css"
# what has no place on paper, and what becomes a sentence there
SCREEN = "script, style, link, button, noscript, [hidden], .headerlink"
INTERACTIVE = "form, .only-screen"
SUBTITLE = "An executable book on parameter-efficient fine-tuning"


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def author() -> str:
    return project()["authors"][0]["name"]


def page_names() -> list[str]:
    """The pages of the book in their order, such as "book/02_lora"."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    return [toc["root"]] + [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]


def plain_name(name: str) -> str:
    return name.rpartition("/")[2]


def text_of(tag: Tag) -> str:
    return re.sub(r"\s+", " ", tag.get_text()).strip()


def title_of(code: Tag) -> str:
    """Take the comment that names a folded cell, its first line, out of the code."""
    comment = code.find(class_="c1")
    if comment.next_sibling:
        comment.next_sibling.replace_with(comment.next_sibling.removeprefix("\n"))
    return comment.extract().get_text().removeprefix("# @title ").strip()


def said(text: str, address: str = "", kind: str = "left-out") -> Tag:
    """A paragraph that stands in for something, ended by a link if there is an `address`."""
    made = BeautifulSoup("<p></p>", "html.parser").p
    made["class"] = kind
    made.append(text)
    if address:
        link = BeautifulSoup("<a></a>", "html.parser").a
        link["href"] = link.string = address
        made.append(link)
    return made


class Paper:
    """The pages `names` of a site as one document. Links to other pages lead to the published site."""

    def __init__(self, site: Path, names: list[str]):
        self.site, self.names = site, names
        self.address = project()["urls"]["Documentation"].rstrip("/") + "/"
        self.articles: dict[str, Tag] = {name: self._article(name) for name in names}
        for name, article in self.articles.items():
            self._for_paper(name, article)
        self.ids = {name: {tag["id"] for tag in article.select("[id]")} for name, article in self.articles.items()}
        for name, article in self.articles.items():
            self._links(name, article)

    def _article(self, name: str) -> Tag:
        soup = BeautifulSoup((self.site / f"{name}.html").read_text(encoding="utf-8"), "lxml")
        return soup.select_one("article.bd-article")

    def _for_paper(self, name: str, article: Tag) -> None:
        """Leave out what only a screen can do, and open what is folded."""
        for part in [part for part in article.select(INTERACTIVE) if not part.find_parent(class_="only-screen")]:
            told = "On the site a form stands here, which answers at once: "
            part.replace_with(said(told, f"{self.address}{name}.html"))
        for tag in article.select(SCREEN):
            tag.decompose()
        for fold in article.select("details"):
            summary = fold.find("summary")
            title = text_of(summary)
            code = fold.find("pre") if "hide" in fold.get("class", []) else None
            if code:
                title = title_of(code)
            if code and not title.startswith("Solution"):
                fold.replace_with(said(f"{title}: the code is in the notebook."))
            elif re.fullmatch(r".* \(\d+ rows?\)", title):
                fold.replace_with(said(f"{title}: on the site, and in the file."))
            else:
                fold.name = summary.name = "div"
                summary["class"] = "fold-title"
                if code:
                    summary.string = title
                for arrow in summary.select("svg"):
                    arrow.decompose()
        for image in article.select("img"):
            image["src"] = (self.site / f"{name}.html").parent.joinpath(image["src"]).resolve().as_uri()
            image["loading"] = "eager"

    def place(self, name: str, fragment: str) -> str:
        """The id that stands in the document for `fragment` of a page; without a fragment, for the page."""
        return f"{plain_name(name)}--{fragment}" if fragment else plain_name(name)

    def _links(self, name: str, article: Tag) -> None:
        for link in article.select("a[href]"):
            parts = urlsplit(urljoin(f"http://book/{name}.html", link["href"]))
            if parts.netloc != "book":
                continue
            target, fragment = unquote(parts.path).strip("/").removesuffix(".html"), unquote(parts.fragment)
            if target in self.articles:
                link["href"] = "#" + self.place(target, fragment if fragment in self.ids[target] else "")
            else:
                link["href"] = urljoin(self.address, parts.path.lstrip("/")) + (f"#{fragment}" if fragment else "")
        for tag in article.select("[id]"):
            tag["id"] = self.place(name, tag["id"])
        # A link leads to the heading itself: its section may begin at the foot of the page before.
        for section in article.select("section[id]"):
            if heading := section.find(["h1", "h2", "h3", "h4"], recursive=False):
                for mark in [tag for tag in heading.find_previous_siblings("span", id=True) if not tag.contents]:
                    heading.insert(0, mark)
                heading["id"] = section["id"]
                del section["id"]

    @property
    def title(self) -> str:
        page, book = self.heading(self.names[0]), "PEFT Lab"
        return book if len(self.names) > 1 or page == book else f"{page} - {book}"

    def heading(self, name: str) -> str:
        return text_of(self.articles[name].find("h1"))

    def headings(self) -> list[str]:
        """The text of every heading of the document, in order: the titles of the outline."""
        front = ["Contents"] if len(self.names) > 1 else []
        return front + [
            text_of(h) for article in self.articles.values() for h in article.select("h1, h2, h3, h4, h5, h6")
        ]

    def contents(self) -> list[tuple[int, str, str]]:
        """(level, text, id) of every heading that the contents list."""
        return [
            (level, text_of(heading), plain_name(name) if level == 1 else heading["id"])
            for name, article in self.articles.items()
            for level, heading in ((int(h.name[1]), h) for h in article.select("h1, h2"))
        ]

    def html(self) -> str:
        """The whole document."""
        return self.document(self.names, self._front() if len(self.names) > 1 else "")

    def document(self, names: list[str], front: str = "") -> str:
        """A part of the document, which a browser opens by itself."""
        css = [(self.site / "_static" / "pygments.css").read_text(encoding="utf-8"), CSS.read_text(encoding="utf-8")]
        articles = []
        for number, name in enumerate(names):
            running = json.dumps(self.heading(name), ensure_ascii=False)
            css.append(f"@page chapter-{number} {{ @top-right {{ content: {running} }} }}")
            contents = self.articles[name].decode_contents()
            articles.append(f'<article id="{plain_name(name)}" style="page: chapter-{number}">{contents}</article>')
        mathjax = (self.site / "_static" / "vendor" / "mathjax" / "tex-chtml.js").as_uri()
        config = '{"options": {"enableMenu": false, "processHtmlClass": "math"}}'
        return (
            '<!DOCTYPE html><html lang="en" data-theme="light"><head><meta charset="utf-8">'
            f"<title>{html.escape(self.title)}</title><style>{' '.join(css)}</style>"
            f'<script>window.MathJax = {config}</script><script src="{mathjax}" defer></script></head>'
            f"<body>{front}{''.join(articles)}</body></html>"
        )

    @property
    def imprint(self) -> str:
        return (
            f"Version {__version__}. Text and figures are under the licence CC BY 4.0, code is under the "
            "Apache License 2.0. This book is made to be run. Its pages, notebooks and measurements are at "
            f'<a href="{self.address}">{self.address}</a>. Left out here are the code that only draws a table or a '
            "figure, and the single rows of the results files."
        )

    def _front(self) -> str:
        """The title page and the contents, whose page numbers are filled in later."""
        lines = "".join(
            f'<li class="level-{level}"><a href="#{place}"><span>{html.escape(text)}</span>'
            f'<span class="dots"></span><span class="number" data-place="{place}">000</span></a></li>'
            for level, text, place in self.contents()
        )
        return (
            '<div class="front"><p class="book-title">PEFT Lab</p>'
            f'<p class="book-subtitle">{SUBTITLE}</p>'
            f'<p class="book-authors">{html.escape(author())}</p><p class="book-imprint">{self.imprint}</p></div>'
            f'<nav class="contents"><h1>Contents</h1><ul>{lines}</ul></nav>'
        )
