"""What a reader of the site gets beyond the text: links to the glossary, a search that knows names, light pages.

A term that another chapter explains is a link to the glossary where a page uses it first; _static/preview.js shows the
entry under the mouse and on keyboard focus. The search finds terms and equations by their names. When the pages are
written, each loses the scripts that it does not need, and the fonts of icons lose the icons that no page has. The text
of each page is stored a second time as a script, from which previews are made: a page that was opened as a file may not
fetch others, but it may load scripts.
"""

import json
import re
from pathlib import Path

import portable
from docutils import nodes
from fontTools import subset
from peftlab_book import facts as facts_files
from sphinx.search import IndexBuilder
from sphinx.transforms.post_transforms import SphinxPostTransform

SCORER = Path(__file__).with_name("scorer.js")
GLOSSARY = "book/appendix_glossary"
WITHOUT_LINKS = {GLOSSARY, "book/start_here", "book/appendix_bibliography", "book/appendix_measurements"}
# words of the glossary that also have a plain meaning, which most pages use
PLAIN = {
    "baseline", "bias", "clipping", "energy", "feature", "fused", "gate", "head", "host", "key", "label", "launch",
    "magnitude", "margin", "packing", "prefix", "query", "r", "scale", "scaling", "targets", "value",
}  # fmt: skip
HEAVY = re.compile(r'\s*<script[^>]*\ssrc="[^"]*/scripts/fontawesome\.js[^>]*></script>')
SEARCH = re.compile(r'\s*<script src="[^"]*(?:searchtools|language_data|searchindex)\.js[^>]*></script>')
ARTICLE = re.compile(r"<article\b.*?</article>", re.DOTALL)
UNSEEN = re.compile(r"<(pre|table|script|svg)\b.*?</\1>", re.DOTALL)  # previews show none of these
ICON = re.compile(r'(?<=[\s"])fa-([a-z-]+)')
THEME = '<script data-cfasync="false">'
# The theme's first script fails where a browser refuses to keep anything; there it gets a store that forgets.
FORGETFUL = """<script>
    try { localStorage.length; } catch { Object.defineProperty(window, "localStorage", { value: {
      kept: new Map(), getItem(key) { return this.kept.get(key) ?? null; },
      setItem(key, value) { this.kept.set(key, value); },
      removeItem(key) { this.kept.delete(key); },
    } }); }
  </script>
  """


def facts_of(app) -> list:
    """The facts of all chapters. The directives report their faults."""
    return facts_files.load(Path(app.srcdir, "book", "facts"))[0]


class LinkTerms(SphinxPostTransform):
    """Link each term of the glossary where a page uses it first, unless the page's own chapter explains it."""

    default_priority = 890  # before names are kept together
    formats = ("html",)

    def run(self, **_):
        page = self.env.docname
        if page in WITHOUT_LINKS or not page.startswith("book/"):
            return
        others = [facts for facts in facts_of(self.app) if page != f"book/{facts.page}"]
        names = [name for facts in others for term in facts.terms for name in [term["term"], *term.get("also", [])]]
        names = sorted(set(names) - PLAIN, key=len, reverse=True)  # the longest first: "deep prompt" before "prompt"
        if not names:
            return
        # a name in small letters may begin a sentence; any may stand in the plural
        forms = [re.escape(name) for name in names]
        forms = [f"[{form[0].upper()}{form[0]}]{form[1:]}" if form.islower() else form for form in forms]
        pattern = re.compile(rf"(?<![\w-])(?:{'|'.join(f'({form})' for form in forms)})s?(?![\w+-])")
        glossary = self.app.builder.get_relative_uri(page, GLOSSARY)
        linked = set()
        paragraphs = self.document.findall(nodes.paragraph)
        for text in [node for paragraph in paragraphs for node in paragraph if isinstance(node, nodes.Text)]:
            pieces, end = [], 0
            for found in pattern.finditer(text):
                name = names[found.lastindex - 1]
                if name not in linked:
                    linked.add(name)
                    anchor = self.env.get_domain("std").objects["term", name][1]
                    address = {"internal": True, "refuri": f"{glossary}#{anchor}", "classes": ["term"]}
                    pieces += [nodes.Text(text[end : found.start()]), nodes.reference("", found[0], **address)]
                    end = found.end()
            if pieces:
                text.parent.replace(text, [*pieces, nodes.Text(text[end:])])


def name_places(app) -> None:
    """Let the search find terms by all their names, and equations by their names, labels and numbers.

    Sphinx finds a term too, but shows the page's title in place of the term.
    """
    feed = IndexBuilder.feed

    def feed_with_names(self, docname, filename, title, doctree):
        feed(self, docname, filename, title, doctree)
        if docname == GLOSSARY:
            objects = app.env.get_domain("std").objects.items()
            named = [(name, anchor) for (kind, name), (_, anchor) in objects if kind == "term"]
            self._all_titles[docname] = [*self._all_titles[docname], *named]
            self._index_entries[docname] = []
        entries = [entry for facts in facts_of(app) if docname == f"book/{facts.page}" for entry in facts.equations]
        places = portable.Book.read(Path(app.srcdir, "book")).places if entries else {}
        for label, name in ((entry["label"], entry["name"]) for entry in entries if entry["label"] in places):
            number = places[label][1]
            named = [(title, f"equation-{label}") for title in (f"{name} ({number})", f"Equation {number}", label)]
            self._all_titles[docname] = [*self._all_titles[docname], *named]

    IndexBuilder.feed = feed_with_names


def finish_pages(app, exception) -> None:
    """Make the written pages light, and store the text of each as a script for previews."""
    if exception or app.builder.name != "html":
        return
    site, icons = Path(app.outdir), set()
    for path in sorted(site.rglob("*.html")):
        if "_static" in path.relative_to(site).parts:
            continue
        text = HEAVY.sub("", path.read_text(encoding="utf-8")).replace(THEME, FORGETFUL + THEME, 1)
        if path.name != "search.html":
            text = SEARCH.sub("", text)
        path.write_text(text, encoding="utf-8")
        icons |= set(ICON.findall(text))
        if found := ARTICLE.search(text):
            name = path.relative_to(site).with_suffix("").as_posix()
            stored = f"peftlabPage({json.dumps(name)}, {json.dumps(UNSEEN.sub('', found[0]), ensure_ascii=False)});\n"
            script = site / "_static" / "pages" / f"{name}.js"
            script.parent.mkdir(parents=True, exist_ok=True)
            script.write_text(stored, encoding="utf-8")
    keep_icons(site / "_static", icons)


def keep_icons(static: Path, names: set[str]) -> None:
    """Write fonts that hold no other icons than these; reading.css puts them before the theme's, which are large.

    A browser that misses an icon in them takes the theme's font, as it did before.
    """
    style = "".join(path.read_text(encoding="utf-8") for path in sorted(static.glob("styles/*.css")))
    codes = {code for name in names for code in re.findall(rf'\.fa-{name}:before[^{{}}]*{{content:"\\(\w+)"', style)}
    codes |= set(re.findall(r'content:"\\(\w+)";font-family:Font Awesome', style))
    for font in ("fa-solid-900", "fa-brands-400"):
        source = static / "vendor" / "fontawesome" / "webfonts" / f"{font}.ttf"
        options = subset.Options(flavor="woff")
        read = subset.load_font(str(source), options)
        subsetter = subset.Subsetter(options)
        subsetter.populate(unicodes=[int(code, 16) for code in codes])
        subsetter.subset(read)
        subset.save_font(read, str(static / f"{font}.woff"), options)


def setup(app):
    app.add_post_transform(LinkTerms)
    app.connect("config-inited", lambda app, config: setattr(config, "html_search_scorer", str(SCORER)))
    app.connect("builder-inited", name_places)
    app.connect("build-finished", finish_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
