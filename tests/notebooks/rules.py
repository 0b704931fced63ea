"""The rules of a chapter that a program can hold. Each takes a notebook and yields what breaks the rule, in words.

tests/notebooks/test_style.py applies them to every notebook of the book; test_rules.py sees each of them find a fault.
CONTRIBUTING.md says why each is there.
"""

import ast
import re
import statistics

import nbformat
import portable
import typed_numbers

from peftlab.kit import measurements
from peftlab.optional import PACKAGES

SETUP = """from importlib.util import find_spec

# Set-up: brings what this chapter needs where it is missing, as on Colab.
{needed}
if not all(map(find_spec, needed)):
    %pip install -q \\
        "peftlab[{extras}] @ git+{repository}"
import peftlab as pl"""
EXTRAS = re.compile(r'"peftlab\[([a-z,]+)\] @ git\+')

MAX_CODE_LINES = 25
MEDIAN_CODE_LINES = 8
MEDIAN_PROSE_WORDS = 45
MIN_ALT_CHARACTERS = 20
MAX_RELATIVE_TOLERANCE = 0.5
MAX_COLUMNS = 88
LINES_PER_VERDICT = 20
MAX_PLUMBING = 0.1  # of the lines of code that a reader sees
PLUMBING = ("pl.table", "pl.figures.", "pl.widgets.", "pl.expect", "pl.glue", "figure.", "axes.", "axis.")
CHOICE = re.compile(r"\.(?:where|one)\([^()]*?section=(\[[^\]]*\]|\([^)]*\)|\"[^\"]*\")")
FOLDED_TAGS = ("hide-input", "hide-cell")

# folders at the root of some system: /home/..., /content/... (Colab), C:\..., but not </p> or 1/2 or https://x/tmp
ABSOLUTE_PATH = re.compile(
    r"(?<![\w:/.<])/(?:home|root|tmp|work|Users|usr|opt|content|mnt|private|var|etc)/|\b[A-Z]:\\\\?\w|file://"
)
ADDRESS = re.compile(r"\b0x[0-9a-f]{8,}\b")
REMOTE_IMAGE = re.compile(
    r"!\[[^\]]*\]\(\s*https?:|<img[^>]+src\s*=\s*[\"']?https?:|(?:```|:::)\{(?:image|figure)\}\s*https?:"
)
BANNED_WORDS = re.compile(r"\b(simply|obviously|trivially|revolutionary|game-chang\w+|blazing\w*)\b", re.IGNORECASE)
BANNED_TAGS = ("nbval-skip", "skip-execution", "nbval-raises-exception", "raises-exception")
BANNED_COMMENTS = re.compile(r"#\s*(?:NBVAL_|PYTEST_VALIDATE_)\w+")


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "markdown"]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def name(cell) -> str:
    """How a message calls a cell: its first line that is not an anchor."""
    lines = [line for line in cell.source.strip().splitlines() if not re.fullmatch(r'<a id="[\w-]+"></a>|', line)]
    return repr(lines[0][:60]) if lines else "an empty cell"


def output_texts(cell):
    """Every text a cell's outputs hold: streams, plain text, HTML, Markdown."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield output.text
        for kind, value in output.get("data", {}).items():
            if kind.startswith("text/") and isinstance(value, str):
                yield value


def plain_prose(source: str) -> str:
    """Prose without code, mathematics, links' targets, comments and directive options."""
    blocks = (r"(```|~~~)(?!\{).*?\1", r"\$\$.*?\$\$", r"```\{(?:math|code-block)\}.*?```", r"<!--.*?-->")
    for pattern in blocks:
        source = re.sub(pattern, " ", source, flags=re.DOTALL)
    for pattern in (r"`[^`]*`", r"\$[^$]*\$", r"!?\[([^\]]*)\]\([^)]*\)", r"^:\w[\w-]*:.*$", r"<[^>]+>"):
        source = re.sub(pattern, lambda m: m[1] if m.re.groups else " ", source, flags=re.MULTILINE)
    return source


def valid_format(notebook):
    """The file is a valid notebook of format 4.5, and GitHub and Colab agree (widget metadata without state is not)."""
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        yield f"not a valid notebook: {error.message}"
    if (notebook.nbformat, notebook.nbformat_minor) < (4, 5):
        yield f"format {notebook.nbformat}.{notebook.nbformat_minor} has no cell ids: 4.5 is needed"
    if "widgets" in notebook.metadata:
        yield "metadata.widgets is stored: outputs of widgets need a kernel, a static figure does not"


def executed_in_order(notebook):
    """Execution counts run 1..n and no cell is unexecuted or empty."""
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts are {counts}, not 1..{len(counts)}: make refresh"
    yield from (f"{name(cell)} (a {cell.cell_type} cell)" for cell in notebook.cells if not cell.source.strip())


def clean_outputs(notebook):
    """No error, no stderr, no absolute path, no memory address in any output."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"{name(cell)} ended in {output.ename}"
            if output.get("name") == "stderr":
                yield f"{name(cell)} wrote to stderr: {output.text[:80]!r}"
            if "application/vnd.jupyter.widget-view+json" in output.get("data", {}) and len(output.data) == 1:
                yield f"{name(cell)} shows a widget and nothing beside it"
        for text in output_texts(cell):
            for what, pattern in (("an absolute path", ABSOLUTE_PATH), ("a memory address", ADDRESS)):
                if found := pattern.search(text):
                    yield f"{name(cell)} printed {what}: {text[max(0, found.start() - 20) : found.end() + 20]!r}"


def short_cells(notebook):
    """No code cell is over 25 lines, and half of the code and prose cells are short."""
    lengths = {id(cell): len(cell.source.strip().splitlines()) for cell in code_cells(notebook)}
    for cell in code_cells(notebook):
        if lengths[id(cell)] > MAX_CODE_LINES:
            yield f"{name(cell)} has {lengths[id(cell)]} lines, at most {MAX_CODE_LINES}"
    if lengths and statistics.median(lengths.values()) > MEDIAN_CODE_LINES:
        yield f"the median code cell has {statistics.median(lengths.values()):g} lines, at most {MEDIAN_CODE_LINES}"
    words = [len(plain_prose(cell.source).split()) for cell in prose_cells(notebook)]
    if words and statistics.median(words) > MEDIAN_PROSE_WORDS:
        yield f"the median prose cell has {statistics.median(words):g} words, at most {MEDIAN_PROSE_WORDS}"


def described_figures(notebook):
    """Every figure is described for who cannot see it, and the cell after it is its caption; none is SVG (a date)."""
    labels = []
    for cell, following in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        if cell.cell_type != "code":
            continue
        kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
        if "image/svg+xml" in kinds:
            yield f"{name(cell)} stores SVG: use PNG"
        if not kinds & {"image/png", "image/jpeg"}:
            continue
        caption = portable.CAPTION.fullmatch(following.source) if following else None
        if caption is None:
            yield f'{name(cell)} draws a figure, and no cell <a id="fig-x"></a>**Figure .** with its caption follows'
        else:
            labels.append(caption["label"])
        if len(portable.settings(cell).get("alt", "")) < MIN_ALT_CHARACTERS:
            yield f"{name(cell)} draws a figure without a description (peftlab.alt) of what is seen"
        elif not cell.metadata.get("mystnb", {}).get("image", {}).get("alt"):
            yield f"{name(cell)} draws a figure whose description is not filled in: make refresh"
    yield from (f"two figures are named {n}" for n in sorted({n for n in labels if labels.count(n) > 1}))


def portable_prose(notebook):
    """Prose reads the same on the site, in Jupyter, in Colab and on GitHub: no markup that only Sphinx knows."""
    for cell in prose_cells(notebook):
        yield from (f"{name(cell)} holds {what}" for what in portable.raw_markup(cell.source))
    for cell in code_cells(notebook):
        if any("application/papermill.record/text/plain" in output.get("data", {}) for output in cell.outputs):
            yield f"{name(cell)} glues a number; give it to the prose in the cell's metadata (peftlab.values)"


def stated_tolerances(notebook):
    """A cell that lets its numbers move says by how much, and prints numbers."""
    for cell in code_cells(notebook):
        found = portable.settings(cell)
        if unknown := set(found) - {"values", "alt", "tolerance"}:
            yield f"{name(cell)} has metadata that nothing reads: peftlab.{', '.join(sorted(unknown))}"
        if "tolerance" not in found:
            continue
        tolerance = found["tolerance"]
        if not tolerance or set(tolerance) - {"absolute", "relative"} or not all(v > 0 for v in tolerance.values()):
            yield f"{name(cell)} states the tolerance {dict(tolerance)}: give absolute, relative or both, above zero"
        if tolerance.get("relative", 0) > MAX_RELATIVE_TOLERANCE:
            yield f"{name(cell)} lets its numbers move by {tolerance['relative']:.0%}: what would such a number say?"
        texts = [*output_texts(cell), *(portable.stored_values(notebook).get(n, "") for n in found.get("values", {}))]
        if not any(portable.NUMBER.search(text) for text in texts):
            yield f"{name(cell)} states a tolerance and prints no number"


def narrow_code(notebook):
    """No line of code or of shown source is over 88 columns: longer ones scroll on a laptop."""
    for cell in code_cells(notebook):
        shown = [line for output in cell.outputs for line in shown_source(output)]
        for line in [*cell.source.splitlines(), *shown]:
            if len(line) > MAX_COLUMNS:
                yield f"{name(cell)} has a line of {len(line)} columns, at most {MAX_COLUMNS}: {line.strip()[:60]!r}"


def shown_source(output) -> list[str]:
    """The lines of a function that a cell shows with pl.show_source."""
    text = output.get("data", {}).get("text/markdown", "")
    found = re.fullmatch(r"```python\n(.*?)\n```\s*", text, re.DOTALL)
    return found[1].splitlines() if found else []


def few_verdicts(notebook):
    """Cells print numbers, not verdicts: at most one printed line in twenty says True or False."""
    texts = [o.text for cell in code_cells(notebook) for o in cell.outputs if o.output_type == "stream"]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    verdicts = [line for line in lines if re.search(r"\b(True|False)\b", line)]
    if len(verdicts) * LINES_PER_VERDICT > max(len(lines), LINES_PER_VERDICT):
        yield f"{len(verdicts)} of {len(lines)} printed lines say True or False, such as {verdicts[0]!r}"


def is_folded(cell) -> bool:
    return bool(set(tags(cell)) & set(FOLDED_TAGS))


def folded_everywhere(notebook):
    """A cell that is folded on the page is folded in JupyterLab and in Colab, where its first line is its title."""
    for cell in code_cells(notebook):
        jupyter = bool(cell.metadata.get("jupyter", {}).get("source_hidden"))
        colab = cell.metadata.get("cellView") == "form" and cell.source.startswith("# @title ")
        if {is_folded(cell), jupyter, colab} not in ({True}, {False}):
            yield (
                f"{name(cell)} is folded in one place and not in another: give it a tag hide-input or hide-cell, "
                'jupyter.source_hidden, cellView "form", and "# @title ..." as its first line'
            )


def little_plumbing(notebook):
    """Of the lines of code that a reader sees, at most one in ten draws a table or a figure or checks the page."""
    lines, plumbing = 0, 0
    for cell in code_cells(notebook)[1:]:
        if is_folded(cell):
            continue
        source = typed_numbers.MAGIC.sub(r"\1pass", cell.source)
        lines += len([line for line in source.splitlines() if line.strip()])
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(PLUMBING):
                plumbing += node.end_lineno - node.lineno + 1
    if plumbing > MAX_PLUMBING * lines:
        yield f"{plumbing} of {lines} lines of code that a reader sees are plumbing: fold cells, or use less of it"


def nothing_remote(notebook):
    """No image from another host, in prose or in outputs."""
    for cell in notebook.cells:
        texts = [cell.source] if cell.cell_type == "markdown" else list(output_texts(cell))
        yield from (f"{name(cell)} shows a remote image" for text in texts if REMOTE_IMAGE.search(text))


def nothing_skipped(notebook):
    """nbval compares every cell; one that cannot be compared is followed by one that checks its claim and prints."""
    cells = code_cells(notebook)
    for cell, following in zip(cells, [*cells[1:], None], strict=False):
        for tag in set(tags(cell)) & set(BANNED_TAGS):
            yield f"{name(cell)} is tagged {tag}"
        if found := BANNED_COMMENTS.search(cell.source):
            yield f"{name(cell)} holds {found[0]}: use a tag"
        if "nbval-ignore-output" in tags(cell):
            if following is None or "nbval-ignore-output" in tags(following):
                yield f"{name(cell)} is not compared, and the next code cell does not check it"
            elif not "".join(output_texts(following)).strip():
                yield f"{name(cell)} is not compared, and the check after it prints nothing"


def comparable_code(notebook):
    """No trailing `;` (nbval compares the output all the same), no clear_output, no In or Out."""
    for cell in code_cells(notebook):
        lines = cell.source.strip().splitlines()
        if lines and lines[-1].rstrip().endswith(";"):
            yield f"{name(cell)} ends in `;`: assign to _ instead"
        if re.search(r"\bclear_output\b|\b(?:In|Out)\[", cell.source):
            yield f"{name(cell)} uses clear_output, In or Out"


def plain_voice(notebook):
    """No exclamation marks and no hype in prose."""
    for cell in prose_cells(notebook):
        prose = plain_prose(cell.source)
        if "!" in prose:
            at = prose.index("!")
            yield f"an exclamation mark: {prose[max(0, at - 40) : at + 1]!r}"
        yield from (f"the word {word!r} in {name(cell)}" for word in BANNED_WORDS.findall(prose))


def timed_sections() -> frozenset[str]:
    """The sections of measurements whose rows name their run and hold times of several processes."""
    stored = [measurements.results(topic) for topic in measurements.topics()]
    return frozenset(row["section"] for results in stored for row in results if "run" in row and "processes" in row)


def times_of_one_run(notebook, timed=None):
    """Times are compared within one run only: a cell that reads some chooses their rows with `within_run`."""
    timed = timed_sections() if timed is None else timed
    for cell in code_cells(notebook):
        if "seconds" not in cell.source or ".ratio(" in cell.source:
            continue
        for choice in CHOICE.finditer(cell.source):
            for section in sorted(timed.intersection(re.findall(r"[\w-]+", choice.group(1)))):
                yield (
                    f"{name(cell)} reads times of section {section!r}, which may be of several runs: "
                    "choose the rows with within_run, or divide the times with ratio"
                )


def no_typed_numbers(notebook):
    """Numbers in prose, captions and descriptions of figures are bound to a cell; typed is only what measures nothing.

    A number is bound by the mark behind it (`0.34%<!--=share-->`); in a figure's description by the f-string that
    computes it. Not read are code, formulas (one that is a bare number is read) and the text of a link that is filled
    in. May be typed:

    - what another source says: numbers in quotation marks, repeated beside them too, and in a sentence that cites a
      paper or links to a page outside the book;
    - inputs of the code of the same section: literals of its cells, or of the whole chapter if three significant digits
      rule chance out. A number with a unit (%, GB, ms, times, ...) needs the literal at the unit's scale (0.05 for 5%,
      8e9 for 8 GB), or the same words in a string;
    - an exercise's givens: numbers without a unit, and those with one that stand in its solution;
    - names and places: a word that begins with a letter (SmolLM2-135M, r2), a model by its size (a 7B model), a card
      and its memory (a card of 48 GB), numbers of chapters, sections, figures, steps, layers and list items, dates;
    - formats: "8 bits", and up to 16 whole bytes;
    - plans of time in minutes or hours (measured times are in seconds), and the constants 0 and 1.
    """
    for cells, code in typed_numbers.sections(notebook):
        for cell in cells:
            if cell.cell_type == "markdown":
                yield from (f"{name(cell)} types {found}" for found in typed_numbers.typed(cell.source, code))
            elif cell.cell_type == "code":
                yield from typed_beside_code(cell, code)


def typed_beside_code(cell, code):
    """What a code cell types in its figure's description, in its tables' captions, and as values for the prose."""
    found = portable.settings(cell)
    for told in typed_numbers.typed(typed_numbers.template_words(found.get("alt", "")), code):
        yield f"{name(cell)} types in its figure's description {told}"
    for caption in typed_numbers.table_captions(cell.source):
        yield from (f"{name(cell)} types in a caption {told}" for told in typed_numbers.typed(caption, code))
    for value, template in found.get("values", {}).items():
        if not typed_numbers.computes(template):
            yield f"{name(cell)} computes the value {value} from nothing: {template!r}"
        for told in typed_numbers.typed(typed_numbers.template_words(template), typed_numbers.Code()):
            yield f"{name(cell)} types in its value {value} {told}"


def no_typed_facts(page: str, facts: dict, code: dict):
    """The facts of a chapter keep no_typed_numbers, too. Their code is that of the sections in which they are shown.

    A claim is what others say; its truth may repeat the claim's numbers, and an answer those of its question. The table
    [run] is itself a source: it names the machine and the date.

    page: "02_lora"; facts: the content of its TOML file; code: of typed_numbers.code_by_label.
    """
    everywhere = code.get(page, typed_numbers.Code())
    head = facts.get("chapter", {})
    texts = [(text, text, everywhere, "") for text in [*head.values(), *head.get("know", [])] if isinstance(text, str)]
    texts += [(term["term"], term["text"], everywhere, "") for term in facts.get("term", [])]
    for kind, said, given in (("claim", "truth", "claim"), ("question", "answer", "question")):
        for entry in facts.get(kind, []):
            near = [code[label] for label in entry.get("shown", []) if label in code]
            texts.append((entry[given], entry[said], typed_numbers.together(near), entry[given]))
    for title, text, near, given in texts:
        yield from (f"{page}: {title[:60]!r} types {found}" for found in typed_numbers.typed(text, near, given))


def no_typed_page(page: str, text: str):
    """A page without code keeps no_typed_numbers, too: it has the values of the chapters, and no inputs."""
    yield from (f"{page} types {found}" for found in typed_numbers.typed(text, typed_numbers.Code()))


def packages() -> dict[str, tuple[str, ...]]:
    """The optional packages of each extra."""
    found = {}
    for name, package in PACKAGES.items():
        found[package.extra] = (*found.get(package.extra, ()), name)
    return found


def extras(notebook) -> tuple[str, ...]:
    """The extras that a notebook's set-up cell installs, such as ("notebooks", "gpu")."""
    found = EXTRAS.search(code_cells(notebook)[0].source)
    return tuple(found[1].split(",")) if found else ()


def setup_cell(notebook, repository: str, packages: dict[str, tuple[str, ...]]):
    """The first code cell is the set-up cell, word for word; it looks for every package of the extras that it installs.

    packages: what each extra brings.
    """
    cells = code_cells(notebook)
    chosen = extras(notebook) if cells else ()
    names = ["peftlab", *(name for extra in chosen or ("notebooks",) for name in packages.get(extra, ()))]
    listed = ", ".join(f'"{name}"' for name in names)
    needed = f"needed = [{listed}]"
    if len(needed) > MAX_COLUMNS:
        needed = f"needed = [\n    {listed}\n]"
    expected = SETUP.format(needed=needed, extras=",".join(chosen or ("notebooks",)), repository=repository)
    if not cells or cells[0].source.strip() != expected:
        yield "the first code cell is not the set-up cell: " + expected


def whole_chapter(notebook):
    """A chapter starts with its title, marks the sentence of its opening that is its answer, and ends as all do."""
    if not notebook.cells or not re.match(r"# \S", notebook.cells[0].source):
        yield "the first cell is not a title"
    answers = [portable.answers([cell.source]) for cell in notebook.cells[:2]]
    if len(sum(answers, [])) != 1 or len(portable.answers(portable.prose(notebook))) != 1:
        yield "the opening must mark one sentence as the chapter's answer, with <!--@answer-->"
    prose = "\n".join(cell.source for cell in prose_cells(notebook))
    headings = "\n".join(re.findall(r"^##+ .*$", prose, re.MULTILINE)).lower()
    yield from (f"no section on {part}" for part in ("summary", "exercises") if part not in headings)


EVERY_NOTEBOOK = (
    valid_format, executed_in_order, clean_outputs, short_cells, described_figures, portable_prose, stated_tolerances,
    narrow_code, few_verdicts, folded_everywhere, little_plumbing, nothing_remote, nothing_skipped, comparable_code,
    plain_voice, times_of_one_run,
)  # fmt: skip
