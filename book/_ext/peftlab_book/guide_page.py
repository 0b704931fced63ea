"""The directives of the guide's page: the form with its data, the table for readers without scripts, and the rules.

{guide}        the form, and the JSON that book/_static/guide.js reads
{guide-table}  the answers by task, kind of model and need
{guide-rules}  every rule with its evidence
"""

import html
import itertools
import json
import math
from pathlib import Path

import portable
from docutils import nodes

from peftlab.guide import recommendation, rules
from peftlab.guide.recommendation import plain
from peftlab.memory import cards
from peftlab_book import guide
from peftlab_book.directives import BOOK, RESULTS, FactsDirective

# A model of each kind and size that the rules tell apart, in the words of the table
MODELS = {
    "decoder, small": {"kind": "decoder", "size": 1e8}, "decoder, larger": {"kind": "decoder", "size": 1e10},
    "encoder": {"kind": "encoder", "size": 1e8}, "encoder-decoder": {"kind": "encoder-decoder", "size": 1e8},
}  # fmt: skip
FIRST = {"task": "instruction", "model": "llama-3.1-8b", "card": "RTX 4090"}  # what the form shows at the start


class GuideDirective(FactsDirective):
    """What these directives share: links to sections, and what makes the page be read again."""

    def follow(self):
        """Have the page made anew when a rule, a measurement or a chapter changes."""
        self.env.note_reread()
        folder = Path(self.env.srcdir)
        for path in (*(folder / RESULTS).glob("*.json"), *(folder / BOOK).glob("*.ipynb"), guide.PEAKS):
            self.env.note_dependency(str(path))

    def place(self):
        """A function from "page#section" to (words, address) of a link."""
        book = portable.Book.read(Path(self.env.srcdir, BOOK))

        def of(page):
            name, _, label = page.partition("#")
            if label in book.places:
                return f"Section {book.places[label][1]}: {book.titles[label]}".replace("`", ""), f"{name}.html#{label}"
            if name not in book.pages:
                self.warn(f"the guide names {page}, which is not in the book")
            return "the measured rows", f"{name}.html#{label}"

        return of


class Guide(GuideDirective):
    def run(self):
        self.follow()
        data = guide.embedded(self.place()) | {
            "spoken": recommendation.SPOKEN, "precisions": recommendation.PRECISIONS, "targets": recommendation.TARGETS,
        }  # fmt: skip
        text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
        script = f'<script type="application/json" id="guide-data">{text}</script>'
        return [nodes.raw("", form() + script + '<script defer src="../_static/guide.js"></script>', format="html")]


def form():
    """The form. It is hidden until the script runs, which can answer it."""
    sizes = {name: f" ({size:g} GB)" * (not name.endswith("GB")) for name, size in cards.CARDS.items()}
    shown = {name: name + size for name, size in sizes.items()} | {"other": "another card"}
    fields = [
        select("task", "What is to be learned?", {w.name: f"{w.name}: {w.text}" for w in rules.words("task")}),
        select("model", "Model", {name: name for name in guide.BUILT_IN}),
        select("card", "Graphics card", shown),
        '<label hidden>Its memory in GB<input type="number" name="gigabytes" min="1" max="10000" value="24"></label>',
        '<label>Training examples, if you know<input type="number" name="examples" min="1" step="1"></label>',
        select("sequence", "Tokens of the longest example", {str(n): f"{n:,}" for n in guide.SEQUENCES}),
        select("serving", "What matters when it is used?", {w.name: w.text for w in rules.words("serving")}),
        '<label class="guide-check"><input type="checkbox" name="four_bit" checked>'
        "The base may be held in four bits</label>",
    ]
    result = '<div id="guide-result" role="region" aria-label="Recommendation" aria-live="polite" hidden></div>'
    without = "<noscript><p>The form needs JavaScript. The table below has the answers, too.</p></noscript>"
    return f'<form id="guide-form" aria-label="Questions" hidden>{"".join(fields)}</form>{result}{without}'


def select(name, label, options):
    """A list to choose from, with its label."""
    chosen = FIRST.get(name)
    listed = "".join(
        f'<option value="{html.escape(value)}"{" selected" * (value == chosen)}>{html.escape(text)}</option>'
        for value, text in options.items()
    )
    return f'<label>{html.escape(label)}<select name="{name}">{listed}</select></label>'


class GuideTable(GuideDirective):
    def run(self):
        self.follow()
        return [
            self.table(
                ["Task", "Model", "What matters", "Method, and what comes next", "Settings"],
                [14, 14, 22, 20, 30],
                list(answers()),
            )
        ]


def answers():
    """Yield the table's rows: needs with the same answer share a row."""
    for word, (model, facts) in itertools.product(rules.words("task"), MODELS.items()):
        found = {}
        for need in rules.words("serving"):
            asked = {
                **facts,
                "task": word.name,
                "serving": need.name,
                "examples": math.inf,
                "four_bit": True,
                "card": "",
                "gpus": 1,
            }
            methods = list(rules.candidates(asked))
            if methods:
                chosen, _, _ = rules.choices({**asked, "method": methods[0]})
                found.setdefault((", then ".join(methods), settings(chosen)), []).append(need.text)
        for (methods, told), needs in found.items():
            yield [word.name, model, "; ".join(needs), methods, told]


def settings(chosen):
    """The settings in words."""
    size = f"rank {chosen['r']}, alpha {plain(chosen['alpha'])}, " if "r" in chosen else ""
    where = f"{recommendation.words_of_targets(chosen)}, " if "targets" in chosen else ""
    low, high = map(plain, chosen["rates"])
    return f"{size}{where}rate {plain(chosen['learning_rate'])} ({low} to {high})"


class GuideRules(GuideDirective):
    def run(self):
        self.follow()
        place = self.place()
        made = [folded(guide.with_findings(rule, place)) for rule in rules.rules()]
        return [nodes.raw("", "\n".join(made), format="html")]


def folded(rule):
    """A rule: its name, what it says, when it applies, and its evidence with links."""
    says = " ".join(str(rule[name]) for name in ("because", "more", "trap") if name in rule)
    gives = [f"method = {rule['method']}"] if "method" in rule else []
    gives += [f"{name} = {value}" for name, value in rule.get("choose", {}).items()]
    when = ", ".join(f"{name}: {condition(wanted)}" for name, wanted in rule.get("if", {}).items()) or "always"
    lines = "".join(
        f"<li>{html.escape(one['text'])} ({html.escape(one['source'])}). "
        f'<a href="{one["address"]}">{html.escape(one["words"])}</a></li>'
        for one in rule["evidence"]
    )
    gives = f" Gives {html.escape(', '.join(gives))}." if gives else ""
    return (
        f"<details><summary>{html.escape(rule['name'])}</summary><p>{html.escape(says)}</p>"
        f"<p>When {html.escape(when)}.{gives}</p><ul>{lines}</ul></details>"
    )


def condition(wanted):
    """A condition in words."""
    if isinstance(wanted, dict):
        return " and ".join(f"at {limit} {value:,.0f}" for limit, value in wanted.items())
    if isinstance(wanted, bool):
        return "yes" if wanted else "no"
    return " or ".join(map(str, wanted)) if isinstance(wanted, list) else str(wanted)
