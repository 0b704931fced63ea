"""What searches, and other sites that show a link, read of each page; the sitemap; the page for what is not found.

Everything that needs the site's own address takes it from `html: baseurl` of _config.yml. Without one there are no
canonical links, no pictures for links and no sitemap: a wrong address would be worse than none.
"""

import html
import re
from pathlib import Path
from urllib.parse import urlsplit

from peftlab_book import describe, drawings

NAME = "PEFT Lab"
PREVIEW = "_static/social.png"
ON_IT = ["Fine-tune a large language", "model by training a small", "part of it: derived,", "predicted and measured."]
SAID = "PEFT Lab. Bars compare the memory of full fine-tuning, LoRA and QLoRA: predicted, and measured on a GPU."
# the titles that the theme's templates would give, or would give twice
TITLES = {"index": "PEFT Lab: parameter-efficient fine-tuning, derived and measured", "genindex": "Index",
          "search": "Search"}  # fmt: skip
MISSING = "404"  # servers of static pages, such as GitHub's, show 404.html for what they do not have
# no column of contents at the right, and no button for it: cards are contents enough, the calculator needs the room
WITHOUT_CONTENTS = ("index", MISSING, "book/appendix_calculator")
UNLISTED = (MISSING, "search", "genindex")
LINK = re.compile(r'(?<=\s)(?P<name>href|src|action|data-content_root)="(?!#|/|[a-z][a-z+.-]*:)(?:\./)?(?P<to>[^"]*)"')

# What the page says. Its links are made absolute, because a browser may show it at any depth. They begin with the
# folder that the site has on its host. Where another host has it in another one, the script finds that and mends them.
LOST = """
<section id="not-found">
<h1>This page is not here</h1>
<p>The address may be old or mistyped. Search the book, or go on from one of these pages.</p>
<form class="front-search" role="search" action="search.html" method="get">
<label for="lost-search">Search the book</label>
<span><input type="search" id="lost-search" name="q" autocomplete="off"><button type="submit">Search</button></span>
</form>
<ul>
<li><a href="index.html">The front page</a></li>
<li><a href="book/start_here.html">Start here</a>: which chapter answers which question</li>
<li><a href="book/appendix_calculator.html">A memory calculator</a></li>
<li><a href="book/appendix_guide.html">Which method? A guide</a></li>
<li><a href="book/appendix_claims.html">Claims checked</a></li>
<li><a href="book/appendix_glossary.html">Glossary</a></li>
</ul>
</section>
<script>
(async () => {
  const told = document.documentElement.dataset.content_root;
  if (location.pathname.startsWith(told)) return;
  const folders = location.pathname.split("/").slice(1, -1);
  for (let depth = 0; depth <= folders.length; depth += 1) {
    const root = ["", ...folders.slice(0, depth), ""].join("/");
    const answer = await fetch(`${root}_static/made.js`);
    if (!answer.ok) continue;
    document.documentElement.dataset.content_root = root;
    for (const name of ["href", "action", "src"]) {
      for (const element of document.querySelectorAll(`[${name}^='${told}']`)) {
        const mended = element.tagName === "SCRIPT" ? document.createElement("script") : element;
        mended.setAttribute(name, root + element.getAttribute(name).slice(told.length));
        mended.async = false;
        if (mended !== element) element.replaceWith(mended);
      }
    }
    return;
  }
})();
</script>
"""


def address(base: str, pagename: str) -> str:
    """Where the site shows a page: its root for the front page."""
    return base.rstrip("/") + "/" + ("" if pagename == "index" else f"{pagename}.html")


def tags(pagename: str, title: str, description: str, base: str) -> str:
    """The tags of one page's head. `base` is the site's address, or empty."""
    kind = "website" if pagename == "index" else "article"
    properties = {"og:type": kind, "og:site_name": NAME, "og:title": title, "og:description": description}
    names = {"description": description, "twitter:card": "summary", "twitter:title": title,
             "twitter:description": description}  # fmt: skip
    if pagename in (MISSING, "search"):
        names["robots"] = "noindex"
    if base:
        picture, (width, height) = base.rstrip("/") + "/" + PREVIEW, drawings.PREVIEW
        properties |= {"og:image": picture, "og:image:width": str(width), "og:image:height": str(height),
                       "og:image:alt": SAID}  # fmt: skip
        if pagename != MISSING:
            properties["og:url"] = address(base, pagename)
        names |= {"twitter:card": "summary_large_image", "twitter:image": picture, "twitter:image:alt": SAID}
    made = [("property", *pair) for pair in properties.items()] + [("name", *pair) for pair in names.items()]
    return "".join(f'\n<meta {kind}="{name}" content="{html.escape(text)}" />' for kind, name, text in made)


def sitemap(base: str, pagenames: list[str]) -> str:
    """The sitemap of these pages."""
    listed = "".join(f"<url><loc>{html.escape(address(base, name))}</loc></url>\n" for name in pagenames)
    return (f'<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n'
            f"{listed}</urlset>\n")  # fmt: skip


def rooted(page: str, base: str) -> str:
    """A page of the site's root with its links made absolute, so that it works at any depth."""
    root = urlsplit(base).path.rstrip("/") + "/"
    return LINK.sub(lambda m: f'{m["name"]}="{root}{m["to"]}"', page)


def describe_page(app, pagename, templatename, context, doctree) -> None:
    """Give a page its description, its title and what other sites show of it."""
    base, folder = app.config.html_baseurl, Path(app.srcdir, "book")
    if pagename == "index":
        context["title"], context["docstitle"] = TITLES["index"], ""
    title = TITLES.get(pagename) or html.unescape(re.sub(r"<[^>]*>", "", context["title"]))
    description = describe.description(pagename.removeprefix("book/"), folder)
    context["metatags"] = (context.get("metatags") or "") + tags(pagename, title, description, base)
    if base:
        context["pageurl"] = None if pagename == MISSING else address(base, pagename)
    if pagename in WITHOUT_CONTENTS:
        context["meta"] = {**(context.get("meta") or {}), "html_theme.sidebar_secondary.remove": "true"}
        context["generate_toc_html"] = lambda *_, **__: ""
        # Sphinx counts the formulas of all pages as the front page's, since its table of contents lists them.
        context["script_files"] = without_mathematics(context["script_files"])


def without_mathematics(scripts: list) -> list:
    """The scripts of a page but for MathJax and its settings."""
    return [script for script in scripts if "mathjax" not in f"{script.filename} {script.attributes}".lower()]


def missing_page(app):
    """Have the page for what is not found made, in the theme's frame."""
    yield MISSING, {"title": "Page not found", "body": LOST, "meta": {}}, "page.html"


def finish(app, exception) -> None:
    """Write what is not a page of the book: the picture for links, the sitemap, and absolute links for 404.html."""
    if exception or app.builder.format != "html":
        return
    base, out = app.config.html_baseurl, Path(app.outdir)
    (out / PREVIEW).write_bytes(drawings.preview(NAME, ON_IT))
    missing = out / f"{MISSING}.html"
    missing.write_text(rooted(missing.read_text(encoding="utf-8"), base), encoding="utf-8")
    if base:
        pages = sorted(app.env.found_docs - set(UNLISTED), key=lambda name: (name != "index", name))
        (out / "sitemap.xml").write_text(sitemap(base, pages), encoding="utf-8")


def setup(app):
    app.connect("html-collect-pages", missing_page)
    app.connect("html-page-context", describe_page, priority=800)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
