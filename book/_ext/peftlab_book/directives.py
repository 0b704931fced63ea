"""The directives. Each builds document nodes; texts from the facts files are parsed as MyST on the way."""

import html
import itertools
import json
import re
import textwrap
from pathlib import Path

import portable
from docutils import nodes
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.domains.std import make_glossary_term
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from peftlab.kit import measurements, tables
from peftlab_book.facts import THEMES, load

log = logging.getLogger(__name__)
BOOK = "book"  # below the source folder, as are the next two
FACTS = "book/facts"
RESULTS = "peftlab/results"


class FactsDirective(SphinxDirective):
    """What the directives share: reading the facts, parsing their texts, making tables and sections."""

    def facts(self):
        """All chapters' facts. The page is read again at each build, since a new file may have come."""
        folder = Path(self.env.srcdir, FACTS)
        self.env.note_reread()
        for path in folder.glob("*.toml"):
            self.env.note_dependency(str(path))
        found, faults = load(folder)
        for fault in faults:
            self.warn(f"{FACTS}/{fault}")
        return found

    def warn(self, text):
        log.warning(text, location=self.get_location(), type="peftlab_book")

    def parsed(self, text):
        """Nodes of a MyST text, in which `<!--=lora-percent-->` is a value that a chapter's cell computed."""
        text = portable.VALUE.sub(self._value, text)
        holder = nodes.container()
        self.state.nested_parse(StringList(text.splitlines(), source=self.get_source_info()[0]), 0, holder)
        return holder.children

    def _value(self, found):
        paths = list(Path(self.env.srcdir, BOOK).glob("*.ipynb"))
        for path in paths:
            self.env.note_dependency(str(path))
        values = portable.values_of_all(json.loads(path.read_text(encoding="utf-8")) for path in paths)
        if found["name"] not in values:
            self.warn(f"no chapter computes the value {found['name']}")
        return values.get(found["name"], "")

    def section(self, title, name):
        section = nodes.section(ids=[nodes.make_id(name)], names=[name])
        section += nodes.title(title, title)
        return section

    def table(self, headings, widths, rows):
        """A table of MyST texts. ``widths`` are shares of the line in percent."""
        group = nodes.tgroup(cols=len(headings))
        group += [nodes.colspec(colwidth=width) for width in widths]
        group += nodes.thead("", self._row(headings))
        group += nodes.tbody("", *[self._row(row) for row in rows])
        return nodes.table("", group, classes=["facts-table", "colwidths-given"])

    def _row(self, texts):
        return nodes.row("", *[nodes.entry("", *self.parsed(text)) for text in texts])


def _references(labels):
    return ", ".join(f"{{ref}}`{label}`" for label in labels)


class ClaimsTable(FactsDirective):
    def run(self):
        made = []
        for facts in self.facts():
            if facts.claims:
                section = self.section(facts.title, f"claims-{facts.page}")
                # two columns, so that the table can be read on a telephone
                rows = [[claim["claim"] + (f"\n\n*Seen in {claim['seen']}.*" if "seen" in claim else ""),
                         f"**{claim['verdict'].capitalize()}.** {claim['truth'].strip()}\n\n"
                         f"Shown in {_references(claim['shown'])}."] for claim in facts.claims]
                section += self.table(["Claim", "Verdict, and what is so"], [38, 62], rows)
                made.append(section)
        return made


class FactsGlossary(FactsDirective):
    def run(self):
        entries = []
        for facts in self.facts():
            for term in facts.terms:
                names = [self._term(name) for name in [term["term"], *term.get("also", [])]]
                body = nodes.definition("", *self.parsed(term["text"]))
                entries.append((term["term"].lower(), nodes.definition_list_item("", *names, body)))
        if not entries:
            return []
        entries.sort(key=lambda entry: entry[0])
        listed = nodes.definition_list("", *[item for _, item in entries], classes=["glossary"])
        return [addnodes.glossary("", listed, sorted=False)]

    def _term(self, name):
        source, line = self.get_source_info()
        return make_glossary_term(self.env, [nodes.Text(name)], None, source, line, node_id=None,
                                  document=self.state.document)


class Equations(FactsDirective):
    """The names of the numbered equations, in the order of the book."""

    def run(self):
        rows = [[f"{{eq}}`{entry['label']}`", entry["name"]] for facts in self.facts() for entry in facts.equations]
        return [self.table(["Equation", "Name"], [20, 80], rows)] if rows else []


class Questions(FactsDirective):
    """The questions by chapter, numbered through, under an index of the numbers by theme."""

    def run(self):
        made, index, numbers = [], {theme: [] for theme in THEMES}, itertools.count(1)
        for facts in self.facts():
            if facts.questions:
                section = self.section(facts.title, f"questions-{facts.page}")
                for entry, number in zip(facts.questions, numbers, strict=False):  # in this order, so that none is lost
                    index[entry["theme"]].append(number)
                    section += self.parsed(self._folded(number, entry))
                made.append(section)
        if not made:
            return []
        rows = [[THEMES[theme], ", ".join(f"[{number}](#question-{number})" for number in numbers)]
                for theme, numbers in index.items() if numbers]
        by_theme = self.section("By theme", "questions-by-theme")
        by_theme += self.table(["Theme", "Questions"], [38, 62], rows)
        return [by_theme, *made]

    @staticmethod
    def _folded(number, entry):
        shown = entry.get("shown")
        seen = f"\n\nShown in {_references(shown)}." if shown else ""
        return (f"`````{{dropdown}} {number}. {entry['question']} ({entry['level']})\n:name: question-{number}\n\n"
                f"{entry['answer'].strip()}{seen}\n`````")


EXERCISE = re.compile(r"^\*\*(?P<number>\d+)\. (?P<title>[^*]+)\*\* \((?P<level>\w+), (?P<minutes>\d+) minutes\)",
                      re.MULTILINE)
CHECK = re.compile(r"pl\.check\(\"([\w.]+)\"")


class ExerciseTable(FactsDirective):
    """The exercises of all chapters, as the notebooks have them. The body says after which section one can be done.

    Each line of it names a check and the label of a section, `lora.count: sec-lora-savings`.
    """

    has_content = True

    def run(self):
        after = dict(line.split(": ", 1) for line in self.content if line.strip())
        made = []
        for facts in self.facts():
            path = Path(self.env.srcdir, BOOK, f"{facts.page}.ipynb")
            if not facts.chapter or not path.is_file():
                continue
            self.env.note_dependency(str(path))
            rows, times = [], []
            for found, check in exercises(json.loads(path.read_text(encoding="utf-8"))):
                times += [int(found["minutes"])] if check else []
                section = after.pop(check, None)
                rows.append([f"{found['number']}: {found['title']}",
                             _references([section]) if section else "the chapter",
                             f"{found['level']}, {found['minutes']} minutes"])
            told = (f"{facts.chapter['number']} {facts.title}: {len(times)} with a check, {sum(times)} minutes in all; "
                    f"{len(rows) - len(times)} open")
            made += self._folded(told, self.table(["Exercise", "After", "Level, time"], [36, 40, 24], rows))
        for check in after:
            self.warn(f"no chapter has an exercise with the check {check}")
        return made

    def _folded(self, title, table):
        folded = self.parsed(f"`````{{dropdown}} {title}\n.\n`````")
        (body,) = folded[0].findall(nodes.paragraph)  # the title is a rubric, the dot stands in for the table
        body.replace_self(table)
        return folded


def exercises(notebook):
    """Yield (match of EXERCISE, name of its check or None) for each exercise; an open one has no check."""
    waiting = []
    for cell in notebook["cells"]:
        source = portable.text_of(cell["source"])
        if cell["cell_type"] == "markdown":
            yield from ((found, None) for found in waiting)
            waiting = list(EXERCISE.finditer(source))
        elif waiting and (check := CHECK.search(source)):
            *before, last = waiting
            yield from ((found, None) for found in before)
            yield last, check[1]
            waiting = []
    yield from ((found, None) for found in waiting)


MOST_ROWS = 10  # of a section on the page, which stays below 1.5 MB
COLUMNS = 84  # of a command


def _wrapped(command):
    """A command on lines that the page shows whole, each but the last with a backslash at its end."""
    lines = textwrap.wrap(command, COLUMNS, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return " \\\n".join(lines)


class Measurements(FactsDirective):
    def run(self):
        folder = Path(self.env.srcdir, RESULTS)
        self.env.note_reread()
        made = []
        for path in sorted(folder.glob("*.json")):
            self.env.note_dependency(str(path))
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                measurements.validate(content, f"{RESULTS}/{path.name}")
            except ValueError as error:  # also what json raises
                self.warn(f"{RESULTS}/{path.name}: {error}" if path.name not in str(error) else str(error))
                continue
            made.append(self._topic(path, measurements.Results(content["topic"], content["provenance"],
                                                               content["rows"])))
        return made or self.parsed("There are no measurements yet.")

    def _topic(self, path, results):
        given = results.provenance
        section = self.section(path.stem, f"measurements-{path.stem}")
        versions = ", ".join(f"{name} {version}" for name, version in sorted(given["versions"].items()))
        facts = [("GPU", given.get("gpu")), ("CPU", given.get("cpu")), ("Versions", versions), ("Date", given["date"]),
                 ("Rows", f"{len(results)}, in {{download}}`{path.name} </{RESULTS}/{path.name}>`")]
        section += self.parsed("\n".join(f"- {name}: {value}" for name, value in facts if value)
                               + f"\n\nTo repeat it:\n\n```shell\n{_wrapped(given['command'])}\n```")
        for name, rows in self._parts(results):
            section += nodes.raw("", self._folded(path.stem, name, rows), format="html")
        return section

    @staticmethod
    def _parts(results):
        """(name, rows) of each section of a topic, in order; rows without one are a part of their own."""
        parts = {}
        for row in results:
            parts.setdefault(row.get("section", results.topic), []).append(row)
        return parts.items()

    @staticmethod
    def _folded(file, name, rows):
        """A part's rows under its name, in a table without columns that say the same in each row."""
        shown = rows[:MOST_ROWS]
        same = {key: value for key, value in rows[0].items() if all(row.get(key, ...) == value for row in rows)}
        varied = [{key: value for key, value in row.items() if key not in same} for row in shown]
        told = ", ".join(f"{key} {value}" for key, value in same.items() if key != "section")
        table = tables.as_html(*tables.lay_out(varied), caption=f"{file}: {name}") if any(varied) else ""
        more = f"<p>The first {len(shown)} of {len(rows)} rows; the others are in the file.</p>" * (rows != shown)
        summary = f"<summary>{html.escape(name)} ({len(rows)} row{'s' * (len(rows) != 1)})</summary>"
        return f"<details>{summary}\n<p>{html.escape(told)}</p>\n{table}\n{more}</details>"
