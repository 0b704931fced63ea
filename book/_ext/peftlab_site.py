"""What the rendered site needs beyond Jupyter Book: Sphinx's numbers and links in the notebooks' plain Markdown
(portable.py), chapter numbers, and repairs of the theme's pages.

Written for Sphinx 7.4 and sphinx-book-theme 1.3, the versions of constraints.txt; tests/book opens every page and finds
out when a later version needs none of it, or something else. Repairs that need a running page are in _static/book.js.
"""

import json
import re

import portable
from docutils import nodes
from sphinx.environment.collectors.toctree import TocTreeCollector
from sphinx.transforms.post_transforms import SphinxPostTransform

# (what a page holds, what it should hold, why)
REPAIRS = [
    # ARIA 1.3 deprecates this role, and its list then has no item that counts as one
    ('role="doc-biblioentry"', 'role="listitem"'),
    # pandas leaves the corner of a table empty: a header that names nothing
    ("<th></th>", "<td></td>"),
    ('<th class="head"><p></p></th>', "<td></td>"),
    # a folded cell's name must contain the words that are seen, such as "Show the solution"
    ('<summary aria-label="Toggle hidden content">', "<summary>"),
]


def chapter_number(docname: str) -> int | None:
    """The number in a chapter's file name, book/02_lora -> 2; None for a page that is no chapter."""
    return portable.chapter_number(docname.removeprefix("book/"))


def read_page(app, docname, source) -> None:
    """Give Sphinx the numbers, links, labels and directives that a page's plain text stands in for."""
    page = docname.removeprefix("book/")
    if app.env.doc2path(docname).endswith(".ipynb"):
        source[0] = json.dumps(portable.for_site(page, json.loads(source[0])))
    else:
        source[0] = portable.markdown_for_site(page, source[0])


def renumber(env) -> None:
    """Put the chapter's own number first in every section number: in contents, at titles, for references."""
    for docname, numbers in env.toc_secnumbers.items():
        chapter = chapter_number(docname)
        if chapter is None:
            continue
        for anchor, number in numbers.items():
            if number:
                numbers[anchor] = (chapter, *number[1:])
        # what the table of contents and the title show are copies, kept in the nodes
        shown = env.tocs[docname].findall(lambda node: isinstance(node, nodes.Element))
        for node in [env.titles[docname], *shown]:
            if node.get("secnumber"):
                node["secnumber"] = [chapter, *node["secnumber"][1:]]


def number_chapters() -> None:
    """Number sections by the chapter's file name, not by its place in the table of contents.

    Chapters are written in no particular order, and chapter 2 must be chapter 2 before there is a chapter 1. Figures
    and equations take their numbers from the sections', so the change comes just before those are given.
    """
    assign = TocTreeCollector.assign_figure_numbers

    def assign_after_renumbering(self, env):
        renumber(env)
        return assign(self, env)

    TocTreeCollector.assign_figure_numbers = assign_after_renumbering


class KeepTogether(SphinxPostTransform):
    """Let no line end between a formula and the punctuation at it, nor inside a name such as Llama-2-7B or 16-bit.

    A browser may break a line on either side of a formula, and after every hyphen. So what belongs together stands in a
    span that book.css does not break.
    """

    default_priority = 900
    formats = ("html",)
    BEFORE, AFTER = re.compile(r"[(\[“‘]+$"), re.compile(r"[,.;:?!)\]’”%]+")
    NAME = re.compile(r"(?<![\w-])(?=[\w.-]*\d)[\w.]+(?:-[\w.]*\w)+(?![\w-])")
    LONGEST = 22  # characters: a longer name may be wider than a cell of a table

    def run(self, **_):
        for math in list(self.document.findall(nodes.math)):
            parent, place = math.parent, math.parent.index(math)
            before, after = (parent[i] if 0 <= i < len(parent) else None for i in (place - 1, place + 1))
            left = self.BEFORE.search(before) if isinstance(before, nodes.Text) else None
            right = self.AFTER.match(after) if isinstance(after, nodes.Text) else None
            if right:
                parent[place + 1] = nodes.Text(after[right.end() :])
            if left:
                parent[place - 1] = nodes.Text(before[: left.start()])
            if left or right:
                marks = [nodes.Text(found[0]) if found else nodes.Text("") for found in (left, right)]
                parent[place] = nodes.inline("", "", marks[0], math, marks[1], classes=["together"])
        for text in list(self.document.findall(nodes.Text)):
            plain = isinstance(text.parent, nodes.paragraph | nodes.emphasis | nodes.strong | nodes.caption)
            if plain and self.NAME.search(text):
                text.parent.replace(text, list(self._pieces(text)))

    def _pieces(self, text):
        end = 0
        for found in self.NAME.finditer(text):
            if len(found[0]) <= self.LONGEST:
                yield nodes.Text(text[end : found.start()])
                yield nodes.inline("", found[0], classes=["together"])
                end = found.end()
        yield nodes.Text(text[end:])


def repair_page(app, pagename, templatename, context, doctree) -> None:
    """Mend the HTML of one page before it is written."""
    for fault, repair in REPAIRS:
        if "body" in context:
            context["body"] = context["body"].replace(fault, repair)
    # Running cells in the page (thebe) is not offered; its set-up arrives twice and then fails in every page.
    if "script_files" in context:
        context["script_files"] = [s for s in context["script_files"] if "thebe" not in str(s.filename or s.attributes)]


def setup(app):
    number_chapters()
    app.add_post_transform(KeepTogether)
    app.connect("source-read", read_page)
    app.connect("html-page-context", repair_page, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
