"""The book's Markdown reads the same on the site, in Jupyter, in Colab and on GitHub. This file fills it in.

A page's source is plain Markdown. What is computed or looked up stands in it as text, and an HTML comment behind the
text, which no reader sees, says where it comes from:

    LoRA trains 0.34%<!--=lora-percent--> of the weights     a value: the text up to the last space or bracket
    [Hu et al., 2021](https://...)<!--@cite hu2021lora-->    a paper of references.bib; cite-t gives "Hu et al. (2021)"
    [Section 2.8](#sec-lora-rank)<!--@see sec-lora-rank-->   a section, in this chapter or in another one; title adds
                                                             its title
    [(2.1)](#eq-lora)<!--@eq eq-lora-->                      an equation
    [the LoRA chapter](https://...)<!--@page 02_lora-->      a page; the words are the author's
    [The table](https://...)<!--@made claims-table-->        what only the site shows, made by the directive of
                                                             this name; further lines of the comment are its body
    LoRA trains two thin matrices.<!--@answer-->             the sentence that answers a chapter's question; the front
                                                             page and the page's description in searches show it, too

Targets are HTML anchors: `<a id="sec-lora-rank"></a>` on the line above a heading, above a displayed equation that ends
in `\\tag{2.1}`, and in front of a caption, `<a id="fig-lora-loss"></a>**Figure 2.1.** The loss ...`, in the cell that
follows the figure. Numbers of sections, equations and figures are filled in, too.

An author writes the comment alone; `make refresh` puts the text in front of it. Values are f-strings in the metadata of
the code cell that computes them, evaluated as soon as it has run. A chapter has its own values; facts/*.toml have those
of all chapters. Pages, README.md included, also have what facts/*.toml say of a chapter's run (`runs`):

    "peftlab": {"values": {"lora-percent": "{count.percent / 100:.2%}"}, "alt": "A line from {losses[0]:.1f} ...",
                "tolerance": {"absolute": 0.5, "relative": 0.1}}

`alt` describes the cell's figure for a reader who cannot see it. `tolerance` says how far printed numbers and values
may move between machines and releases: by the greater of the two.

This module imports nothing but the standard library, so that the site, the tests and the tools can share it.
"""

import ast
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

NO_BREAK = "\u00a0"  # between a number and its unit: a value in prose is one word, and stays on one line
SITE = "https://peftlab.github.io/peftlab/book"
FRONT = "index"  # the front page is the only page that lies above the folder of the book
VALUE = re.compile(r"(?P<text>[^ \n\t(\[*|<>\"]*)<!--=(?P<name>[\w-]+)-->")
LINK = re.compile(
    r"(?:\[(?P<text>[^\]]*)\]\((?P<url>[^)\s]*)\))?<!--@(?P<kind>cite|cite-t|see|title|eq|page) (?P<target>[\w-]+)-->"
)
MADE = re.compile(r"\[(?P<text>[^\]]*)\]\([^)\s]*\)<!--@made (?P<name>[\w-]+)(?P<body>(?:\n(?:(?!-->).)+)*)\n?-->")
ANSWER = "<!--@answer-->"
SENTENCE_END = re.compile(r"(?<=[.?!])(?:\*\*)?\s+")
HEADING = re.compile(r"^(?P<level>#{1,3}) (?:\d+(?:\.\d+)* )?(?P<title>\S.*)$", re.MULTILINE)
ANCHOR = re.compile(r'<a id="(?P<label>[\w-]+)"></a>')
TAG = re.compile(r"\\tag\{[\d.]*\}")
EQUATION = re.compile(r'<a id="(?P<label>eq-[\w-]+)"></a>\n+\$\$\n(?P<body>.*?)\s*\\tag\{[\d.]*\}\n\$\$', re.DOTALL)
CAPTION = re.compile(r'<a id="(?P<label>fig-[\w-]+)"></a>\*\*Figure [\d.]*\*\* (?P<text>.*)', re.DOTALL)
TITLE = re.compile(r"# @title (?P<title>.*)\n?")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?|(?<![\w.])[-+]?\.\d+")

RAW = (
    (re.compile(r"\{[a-z][\w:-]*\}`"), "a role of Sphinx"),
    (re.compile(r"^\s*(?:```|~~~|:::+)\s*\{", re.MULTILINE), "a directive of Sphinx"),
    (re.compile(r"^\([\w-]+\)=\s*$", re.MULTILINE), "a target of Sphinx"),
    (re.compile(r"^<!--", re.MULTILINE), "a line that begins with a comment, which makes the line raw HTML"),
    (re.compile(r"<!--(?![=@])"), "a comment that binds nothing"),
)


def chapter_number(page: str) -> int | None:
    """2 for "02_lora"; None for a page that is no chapter."""
    found = re.match(r"(\d\d)_", page)
    return int(found[1]) if found else None


def settings(cell: Mapping) -> dict:
    """What a cell's metadata say to this module: values, alt, tolerance."""
    return dict(cell["metadata"].get("peftlab", {}))


def address_of(page: str) -> str:
    """Where the site shows a page."""
    return SITE.removesuffix("book") if page == FRONT else f"{SITE}/{page}.html"


def text_of(source: str | list) -> str:
    return source if isinstance(source, str) else "".join(source)


def prose(notebook: Mapping) -> list[str]:
    """The sources of the prose cells of a notebook."""
    return [text_of(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]


def targets(page: str, sources: list[str]) -> dict[str, str]:
    """The numbers of a chapter's sections, equations and figures: {"sec-lora-rank": "2.8", "eq-lora": "2.1"}."""
    chapter = chapter_number(page)
    found, sections, equations, figures = {}, [0, 0], 0, 0
    if chapter is None:
        return {}
    for source in sources:
        waiting = []  # anchors that wait for their heading or equation
        for line in FENCE.sub("", source).splitlines():
            if anchor := ANCHOR.match(line):
                if anchor["label"].startswith("fig-"):
                    figures += 1
                    found[anchor["label"]] = f"{chapter}.{figures}"
                else:
                    waiting.append(anchor["label"])
            elif heading := HEADING.match(line):
                level = len(heading["level"])
                if level == 2:
                    sections = [sections[0] + 1, 0]
                elif level == 3:
                    sections[1] += 1
                number = ".".join(str(n) for n in (chapter, *sections[: level - 1]))
                found |= {label: number for label in waiting if label.startswith("sec-")}
            elif TAG.search(line):
                equations += 1
                found |= {label: f"{chapter}.{equations}" for label in waiting if label.startswith("eq-")}
                waiting = []
    return found


def titles(sources: list[str]) -> dict[str, str]:
    """The titles of a chapter's sections, without their numbers: {"sec-lora-rank": "Why a low rank is enough"}."""
    marked = re.compile(rf"{ANCHOR.pattern}\n+{HEADING.pattern.removeprefix('^')}", re.MULTILINE)
    return {found["label"]: found["title"].strip() for source in sources for found in marked.finditer(source)}


def answers(sources: list[str]) -> list[str]:
    """The sentences of a chapter's prose that are marked as the answer to its question, with their numbers."""
    before = [part for source in sources for part in source.split(ANSWER)[:-1]]
    return [SENTENCE_END.split(VALUE.sub(lambda m: m["text"], part).rsplit("\n", 1)[-1].strip())[-1] for part in before]


def papers(bibliography: str) -> dict[str, tuple[str, str, str]]:
    """{key: (authors, year, address)} of a BibTeX file whose entries have one field per line."""
    found = {}
    for entry in re.split(r"^@\w+\{", bibliography, flags=re.MULTILINE)[1:]:
        lines = re.findall(r"^\s*(\w+)\s*=\s*[{\"](.*)[}\"],?\s*$", entry, re.MULTILINE)
        fields = {key.lower(): value for key, value in lines}
        names = re.split(r"\s+and\s+", re.sub(r"[{}]", "", fields.get("author", "")))
        last = [name.split(",")[0] if "," in name else name.split()[-1] for name in names if name]
        who = f"{last[0]} et al." if len(last) > 2 or last[-1] == "others" else " and ".join(last)
        if "doi" in fields:
            address = f"https://doi.org/{fields['doi']}"
        elif "eprint" in fields:
            address = f"https://arxiv.org/abs/{fields['eprint']}"
        else:
            address = fields.get("url", "")
        address = address.replace("(", "%28").replace(")", "%29")  # a parenthesis would end the Markdown link
        found[entry.split(",")[0].strip()] = (who, fields.get("year", ""), address)
    for who, year in {(who, year) for who, year, _ in found.values()}:
        alike = [key for key, (name, when, _) in found.items() if (name, when) == (who, year)]
        for letter, key in zip("abcdefgh", alike if len(alike) > 1 else [], strict=False):
            found[key] = (who, year + letter, found[key][2])
    return found


class Book:
    """All pages together: what a link can point to."""

    def __init__(self, notebooks: Mapping[str, Mapping], folder: Path):
        self.pages = {*notebooks, *(path.stem for path in folder.glob("*.md"))}
        self.papers = papers((folder / "references.bib").read_text(encoding="utf-8"))
        self.titles = {label: title for nb in notebooks.values() for label, title in titles(prose(nb)).items()}
        self.places = {
            label: (page, number)
            for page, notebook in notebooks.items()
            for label, number in targets(page, prose(notebook)).items()
        }

    @classmethod
    def read(cls, folder: Path) -> "Book":
        """The book in a folder, as its notebooks are stored."""
        return cls({path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.ipynb")}, folder)

    def link(self, page: str, kind: str, target: str, text: str) -> str:
        """A Markdown link from a page; a ValueError says what there is no target for."""
        if kind in ("cite", "cite-t"):
            if target not in self.papers:
                raise ValueError(f"{target} is not in references.bib")
            who, year, address = self.papers[target]
            return f"[{who}, {year}]({address})" if kind == "cite" else f"[{who} ({year})]({address})"
        if kind == "page":
            if target not in self.pages:
                raise ValueError(f"there is no page {target}")
            return f"[{text or 'Chapter ' + str(chapter_number(target))}]({address_of(target)})"
        if target not in self.places:
            raise ValueError(f"nothing is marked with {target}")
        there, number = self.places[target]
        address = f"#{target}" if there == page else f"{address_of(there)}#{target}"
        if kind == "eq":
            return f"[({number})]({address})"
        what = "Figure" if target.startswith("fig-") else "Section"
        return f"[{what} {number}{': ' + self.titles[target] if kind == 'title' else ''}]({address})"

    def fill(self, page: str, source: str, values: Mapping[str, str]) -> str:
        """A prose cell with all that is bound in it filled in; a ValueError names what is missing."""

        def value(found):
            if found["name"] not in values:
                raise ValueError(f"no cell of {page} computes the value {found['name']}")
            return f"{values[found['name']].replace(' ', NO_BREAK)}<!--={found['name']}-->"

        def link(found):
            filled = self.link(page, found["kind"], found["target"], found["text"] or "")
            return f"{filled}<!--@{found['kind']} {found['target']}-->"

        def made(found):
            return f"[{found['text']}]({address_of(page)})<!--@made {found['name']}{found['body']}-->"

        return MADE.sub(made, LINK.sub(link, VALUE.sub(value, source)))


def number_headings(page: str, sources: list[str]) -> list[str]:
    """The prose cells of a chapter with the numbers of its headings, equations and figures put in."""
    chapter = chapter_number(page)
    if chapter is None:
        return sources
    counts = {"section": 0, "part": 0, "equation": 0, "figure": 0}

    def heading(found):
        level = len(found["level"])
        if level == 1:
            return f"# {chapter} {found['title']}"
        if level == 2:
            counts["section"], counts["part"] = counts["section"] + 1, 0
            return f"## {chapter}.{counts['section']} {found['title']}"
        counts["part"] += 1
        return f"### {chapter}.{counts['section']}.{counts['part']} {found['title']}"

    def counted(kind: str, form: str) -> Callable:
        def replace(found):
            counts[kind] += 1
            return form.format(f"{chapter}.{counts[kind]}")

        return replace

    made = []
    for source in sources:
        if not FENCE.search(source):
            source = HEADING.sub(heading, source)
        source = TAG.sub(counted("equation", "\\tag{{{}}}"), source)
        made.append(re.sub(r"(?<=</a>)\*\*Figure [\d.]*\*\*", counted("figure", "**Figure {}.**"), source))
    return made


def stored_values(notebook: Mapping) -> dict[str, str]:
    """The values of a page as they were when its outputs were stored."""
    return dict(notebook["metadata"].get("peftlab", {}).get("values", {}))


def values_of_all(notebooks) -> dict[str, str]:
    """The values of all chapters, which pages without code may name."""
    return {name: text for notebook in notebooks for name, text in stored_values(notebook).items()}


def runs(folder: Path) -> dict[str, str]:
    """What the facts say of each chapter's run, as values: run-02-cpu, -gpu, -memory and -t4; and run-gpu.

    No chapter was timed on a T4. It is slower than the GPU that was, and what a chapter runs on a GPU takes longer on
    two cores. So the two measured times are the bounds of an estimate.
    """
    found = {}
    for path in sorted(folder.glob("facts/*.toml")):
        facts = tomllib.loads(path.read_text(encoding="utf-8"))
        if (number := chapter_number(path.stem)) is not None and (run := facts.get("run")):
            name = f"run-{number:02}"
            cpu = f"{run['seconds_cpu']:.0f} s"
            found |= {f"{name}-cpu": cpu, f"{name}-t4": f"at most {cpu}"}
            found[f"{name}-memory"] = f"{run['memory_gb']:.1f} GB"
            if "gpu" in run:
                gpu = f"{run['seconds_gpu']:.0f} s"
                found |= {f"{name}-gpu": gpu, f"{name}-t4": f"{gpu} to {cpu}", "run-gpu": run["gpu"]}
    return found


def expressions(cell: Mapping) -> dict[str, str]:
    """What to evaluate after a cell has run: {name: an f-string as Python source}. The alt text has the name "alt"."""
    found = settings(cell)
    wanted = {**found.get("values", {}), **({"alt": found["alt"]} if "alt" in found else {})}
    return {name: 'f"""' + template + '"""' for name, template in wanted.items()}


def evaluated(reply: Mapping) -> dict[str, str]:
    """The texts of `expressions` in a kernel's reply; a ValueError says which one failed, and how."""
    texts = {}
    for name, found in reply["content"].get("user_expressions", {}).items():
        if found["status"] != "ok":
            raise ValueError(f"the value {name}: {found.get('ename')}: {found.get('evalue')}")
        texts[name] = str(ast.literal_eval(found["data"]["text/plain"]))
    return texts


def near(stored: str, fresh: str, tolerance: Mapping[str, float]) -> str | None:
    """Compare two texts number by number: None, or what differs. All but the numbers must be the same.

    Spaces may differ, because a number with another number of digits moves the columns of a table.
    """

    def words(text):
        return re.sub(r"\s+", " ", NUMBER.sub("#", text)).replace("- #", "-#").strip()

    if words(stored) != words(fresh):
        return f"the words differ: {fresh.strip()[:300]!r} instead of {stored.strip()[:300]!r}"
    pairs = zip(NUMBER.findall(stored), NUMBER.findall(fresh), strict=True)
    for old, new in pairs:
        a, b = (float(text.replace(",", "").replace("−", "-")) for text in (old, new))
        allowed = max(tolerance.get("absolute", 0.0), tolerance.get("relative", 0.0) * abs(a))
        if not abs(a - b) <= allowed * (1 + 1e-9):
            return f"{new} instead of {old}, which may move by {allowed:.3g}"
    return None


def raw_markup(source: str):
    """Yield what a reader outside the site would see raw."""
    prose = re.sub(r"(?<!\})`[^`\n]+`", "", source)  # code is shown as it is
    for pattern, what in RAW:
        if found := pattern.search(prose):
            yield f"{what}: {prose[max(0, found.start() - 20) : found.end() + 30]!r}"


def for_site(page: str, notebook: dict) -> dict:
    """The notebook as MyST-NB reads it, with Sphinx's own numbers, links and labels in place of the filled-in text."""
    cells = []
    for cell in notebook["cells"]:
        source = text_of(cell["source"])
        if cell["cell_type"] == "markdown":
            if (caption := CAPTION.fullmatch(source.strip())) and cells and cells[-1]["cell_type"] == "code":
                figure = {"caption": markdown_for_site(page, caption["text"]), "name": caption["label"]}
                metadata = cells[-1]["metadata"]
                metadata["mystnb"] = {**metadata.get("mystnb", {}), "figure": figure}
                continue
            cell = {**cell, "source": markdown_for_site(page, source)}
        else:
            cell = {**cell, "metadata": folded_for_site(source, cell["metadata"])}
        cells.append(cell)
    return {**notebook, "cells": cells}


def folded_for_site(source: str, metadata: dict) -> dict:
    """The metadata of a code cell, so that the bar of a folded cell says what the cell shows.

    A cell that does nothing but name the provenance of a figure has no bar: its output is a badge.
    """
    tags, code = metadata.get("tags", []), TITLE.sub("", source).strip().splitlines()
    if code and all(line.startswith("pl.provenance(") for line in code):
        return {**metadata, "tags": [tag for tag in tags if not tag.startswith("hide-")] + ["remove-input"]}
    titled, prompts = TITLE.match(source), metadata.get("mystnb", {})
    if not titled or "code_prompt_show" in prompts or not {"hide-input", "hide-cell"} & set(tags):
        return metadata
    what = "code" if "hide-input" in tags else "report"
    bars = {f"code_prompt_{verb}": f"{titled['title']} ({verb} the {what})" for verb in ("show", "hide")}
    return {**metadata, "mystnb": {**prompts, **bars}}


def markdown_for_site(page: str, source: str) -> str:
    chapter = chapter_number(page)

    def link(found):
        if found["kind"] in ("see", "title"):
            return f"[{found['text']}](#{found['target']})"
        if found["kind"] == "eq":
            return f"{{eq}}`{found['target']}`"
        if found["kind"] == "page":
            return f"{{doc}}`{found['text']} <{found['target']}>`"
        return f"[{found['text']}]({found['url']})"

    source = EQUATION.sub(lambda m: f"```{{math}}\n:label: {m['label']}\n{m['body']}\n```", source)
    source = LINK.sub(link, VALUE.sub(lambda m: m["text"], source)).replace(ANSWER, "")
    source = MADE.sub(lambda m: f"```{{{m['name']}}}{m['body']}\n```", source)
    if chapter is not None and not FENCE.search(re.sub(r"```\{math\}.*?```", "", source, flags=re.DOTALL)):
        source = HEADING.sub(lambda m: f"{m['level']} {m['title']}", source)
    return re.sub(r'^<a id="([\w-]+)"></a>$', r"(\1)=", source, flags=re.MULTILINE)
