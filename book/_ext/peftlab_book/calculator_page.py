"""The directive of the calculator's page, and the archive beside it.

{calculator}   the form, the places for its answer, and the JSON that book/_static/calculator.js reads
"""

import html
from pathlib import Path

from docutils import nodes

from peftlab.memory import BUILT_IN
from peftlab.memory.counting.config import MOST
from peftlab.memory.estimate import ADAPTER_PRECISIONS, ATTENTIONS, LIBRARIES, OPTIMIZERS, PARALLEL, PRECISIONS
from peftlab_book import calculator
from peftlab_book.directives import FactsDirective

PYTHON = Path(__file__).resolve().parents[2] / "_static" / "vendor" / "pyodide"
# What the form shows at the start: a model of seven billion numbers with LoRA
FIRST = {"shape": "llama-2-7b", "method": "lora", "r": 16, "targets": "all-linear", "batch": 1, "sequence": 512}
COMMAND = "peftlab memory llama-2-7b --method lora --r 16 --targets all-linear"
YES_NO = {"no": "no", "yes": "yes"}
UNSET = {"": "as by default", "yes": "yes", "no": "no"}
TARGETS = {"": "as by default", "all-linear": "all linear layers", "named": "these modules"}
WORDS = {
    "bf16": "bf16", "fp32": "float32", "mixed": "mixed (float32 weights, bf16 autocast)",
    "ddp": "each holds everything (DDP)", "fsdp": "shards (FSDP)", "peft": "Hugging Face peft",
}  # fmt: skip
MODELS = {name: name for name in BUILT_IN} | {"pasted": "paste a config.json"}


class Calculator(FactsDirective):
    def run(self):
        self.env.note_reread()
        sizes = {path.name: path.stat().st_size for path in PYTHON.iterdir() if path.name != "LICENSE"}
        data = calculator.as_json(calculator.embedded({name: sizes[name] for name in calculator.COUNTED}))
        script = f'<script type="application/json" id="calc-data">{data}</script>'
        runs = '<script defer src="../_static/calculator.js"></script>'
        parts = ['<div id="calc" class="only-screen">', form(), answer(sum(sizes.values())), script, "</div>", runs]
        return [nodes.raw("", "\n".join(parts), format="html")]


def form():
    """The form. It is hidden until the script runs."""
    pasted = (
        '<textarea name="config" data-kind="word" rows="6" spellcheck="false" '
        'placeholder=\'{"model_type": "llama", ...}\'></textarea>'
    )
    file = ('<label class="calc-file">or open the file <input type="file" id="calc-file" '
            'accept=".json,application/json"></label>')  # fmt: skip
    names = '<input type="text" name="names" data-kind="word" spellcheck="false" placeholder="q_proj, v_proj">'
    model = [choice("shape", "Known models", MODELS), field("config", "Text of its config.json", pasted, after=file)]
    method = [
        choice("method", "What trains", {name: name for name in calculator.methods()}),
        number("r", "Rank", option=True),
        choice("targets", "Modules to adapt", TARGETS, option=True),
        field("names", "Names of modules, with commas", names),
        number("virtual_tokens", "Virtual tokens", option=True),
        number("reduction_factor", "Hidden width / bottleneck", option=True),
        number("oft_block_size", "Side of a rotation", option=True),
    ]
    step = [
        number("batch", "Examples at once"),
        number("sequence", "Tokens each"),
        choice("checkpointing", "Checkpointing", YES_NO),
        number("gpus", "GPUs"),
        choice("parallel", "Shared among the GPUs", words(PARALLEL)),
        choice("precision", "Precision", words(PRECISIONS)),
        choice("optimizer", "Optimiser", words(OPTIMIZERS)),
    ]
    more = [
        choice("bias", "Biases that train", words(("none", "all", "lora_only")), option=True),
        number("decompose_factor", "Side of the first factor", option=True, least=-1),
        choice("autocast", "Autocast to bf16", UNSET),
        choice("four_bit", "Base in four bits", UNSET),
        choice("adapter_precision", "Precision of the adapter", words(ADAPTER_PRECISIONS)),
        choice("masters", "Float32 masters of the adapter", YES_NO),
        choice("chunked_loss", "Loss in chunks", YES_NO),
        choice("attention", "Attention", words(ATTENTIONS)),
        choice("library", "Layers of", words(LIBRARIES)),
        number("labels", "Classes of the head"),
    ]
    groups = [group("Model", model), group("Method", method), group("Training step", step)]
    folded = f'<details><summary>More settings</summary><div class="calc-fields">{"".join(more)}</div></details>'
    short = '<p id="calc-short" aria-hidden="true" hidden></p>'
    return f'<form id="calc-form" aria-label="Settings" hidden novalidate>{"".join(groups)}{folded}{short}</form>'


def answer(size):
    """Everything beside the form: what starts Python, of `size` bytes, and the places of the answer."""
    return f"""
<noscript><p>The calculator needs JavaScript. In a shell this command answers: <code>{COMMAND}</code></p></noscript>
<div id="calc-answer">
<p id="calc-said" role="status" class="calc-unseen"></p>
<p id="calc-unknown" role="alert" class="calc-note" hidden></p>
<p id="calc-refused" class="calc-note" hidden></p>
<div id="calc-start" hidden>
<button type="button" id="calc-load">Start the calculator</button>
<p>This loads Python ({size / 1e6:.0f} MB) from this site, once. What you enter stays in your browser.</p>
<div id="calc-progress" hidden><progress id="calc-bar" max="1" value="0" aria-label="Loading Python"></progress>
<p id="calc-loaded"></p></div>
</div>
<section id="calc-result" aria-label="Answer" tabindex="-1" hidden>
<p id="calc-old" class="calc-note" hidden>These settings have no answer. What follows belongs to the last ones that had
one.</p>
<p class="calc-headline"><span class="calc-name">Peak memory <span id="calc-each"></span></span>
<strong id="calc-peak"></strong> <span id="calc-peak-binary"></span> <span id="calc-busy"></span></p>
<p><strong id="calc-needed"></strong> with the margin. <span id="calc-verdict"></span></p>
<p id="calc-part" hidden>The model has more than a text part. This is the answer for its text part alone. What it has
for images or sound is left out.</p>
<h2 id="calc-h-parts">What it consists of</h2>
<div id="calc-parts-bar" class="calc-parts-bar" aria-hidden="true"></div>
<table aria-labelledby="calc-h-parts"><thead class="calc-unseen"><tr><th scope="col">Part</th>
<th scope="col">Memory</th><th scope="col">Share</th></tr></thead><tbody id="calc-parts"></tbody></table>
<h2>When it is reached</h2>
<p id="calc-moment"></p>
<div id="calc-step" class="calc-picture"></div>
<h2>How sure this is</h2>
<p id="calc-beyond"></p><p id="calc-measured"></p><p id="calc-alike"></p><p id="calc-apart"></p><p id="calc-margin"></p>
<h2>Which card holds it</h2>
<ul id="calc-cards"></ul>
<h2>Longer examples</h2>
<p id="calc-curve-text"></p>
<div id="calc-curve" class="calc-picture"></div>
<p class="calc-legend"><span class="calc-key"></span> with the margin <span class="calc-key calc-key-thin"></span> the
estimate alone. Dashed: memory of cards.</p>
<details><summary>The same as a table</summary><table><thead><tr><th scope="col">Tokens</th><th scope="col">Peak</th>
<th scope="col">With the margin</th><th scope="col">Smallest card</th></tr></thead>
<tbody id="calc-curve-table"></tbody></table></details>
<p id="calc-facts"></p>
</section>
<section id="calc-elsewhere" aria-label="The same elsewhere" hidden>
<h2>The same question elsewhere</h2>
<p id="calc-save" hidden>Save the text that you pasted as <code>config.json</code> first.</p>
<p id="calc-no-link" hidden>The text that you pasted is too long for a link, so the address does not hold it.</p>
{copied("command", "In a shell")}{copied("call", "In Python")}{copied("link", "As a link to these settings")}
</section>
</div>"""


def copied(name, label):
    """A text with a button that copies it."""
    return (
        f'<div class="calc-copied"><div><span id="calc-{name}-name">{label}</span><button type="button" '
        f'data-copies="calc-{name}" aria-describedby="calc-{name}-name">Copy</button></div>'
        f'<pre id="calc-{name}" tabindex="0" aria-labelledby="calc-{name}-name"></pre></div>'
    )


def words(values):
    """The values of a list with what the form shows of them."""
    return {value: WORDS.get(value, value) for value in values}


def group(title, fields):
    """Fields that belong together."""
    return f'<fieldset><legend>{title}</legend><div class="calc-fields">{"".join(fields)}</div></fieldset>'


def number(name, label, option=False, least=1):
    """A field for a number. Its kind is what the script reads."""
    value = FIRST.get(name, calculator.default(name))
    shown = "" if value is None else f' value="{value}"'
    required = "" if calculator.default(name) is None else " required"
    control = (f'<input type="number" name="{name}" data-kind="number" min="{least}" max="{MOST}" step="1"{shown}'
               f"{required}>")  # fmt: skip
    return field(name, label, control, option)


def choice(name, label, options, option=False):
    """A list to choose from."""
    chosen = FIRST.get(name, calculator.default(name))
    chosen = chosen if isinstance(chosen, str) else {True: "yes", False: "no", None: ""}[chosen]
    listed = "".join(
        f'<option value="{html.escape(value)}"{" selected" * (value == chosen)}>{html.escape(text)}</option>'
        for value, text in options.items()
    )
    kind = "switch" if options in (YES_NO, UNSET) else "word"
    return field(name, label, f'<select name="{name}" data-kind="{kind}">{listed}</select>', option)


def field(name, label, control, option=False, after=""):
    """A control with its label, and the place for an error about it."""
    named = control.replace("name=", f'id="calc-in-{name}" aria-describedby="calc-error-{name}" name=', 1)
    only = f' data-option="{name}"' * option
    return (
        f'<div class="calc-field" data-field="{name}"{only}><label for="calc-in-{name}">{label}</label>{named}{after}'
        f'<p class="calc-error" id="calc-error-{name}" hidden></p></div>'
    )


def add_looks(app, pagename, templatename, context, doctree):
    """Give the calculator's page its style sheet, and no other page."""
    if doctree is not None and any('id="calc"' in raw.astext() for raw in doctree.findall(nodes.raw)):
        app.add_css_file("calculator.css")


def write_archive(app, exception):
    """Put what the page's Python imports beside its script."""
    if exception is None and app.builder.format == "html":
        calculator.write_archive(Path(app.outdir, *calculator.ARCHIVE.split("/")))
