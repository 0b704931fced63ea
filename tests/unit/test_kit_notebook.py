"""The notebook kit: sources, numbers in prose, tables, a quiet start; and all of it in a kernel, run under nbval."""

import io
import json
import os
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from patience import HUNG_SECONDS

import peftlab.kit.exercises.grading as grading
from peftlab.errors import PeftLabError
from peftlab.kit import notebook, tables
from peftlab.kit.measurements import Results


def shown(function, *arguments, **options):
    """What a function of the kit prints outside a notebook."""
    buffer = io.StringIO()
    with redirect_stdout(buffer):
        function(*arguments, **options)
    return buffer.getvalue()


class Sample:
    """A class to show."""

    size = 3

    def first(self):
        """The first."""

        return self.size

    @property
    def second(self):
        """The second."""
        # a remark that stays
        return 2 * self.size


def test_source_is_the_source():
    text = shown(notebook.show_source, grading.number)
    assert text.startswith("def number(\n    right: float, *, near")
    assert '"""Grade a number.' in text


def test_docstrings_can_be_left_out():
    text = shown(notebook.show_source, Sample, docstring=False)
    assert '"""' not in text
    assert "# a remark that stays" in text
    compile(text, "shown", "exec")  # what is left is still Python


def test_methods_can_be_chosen():
    text = shown(notebook.show_source, Sample, methods=["second"], docstring=False)
    assert "size = 3" in text and "@property" in text and "def second" in text
    assert "def first" not in text


def test_a_part_can_be_cut():
    text = shown(notebook.show_source, Sample, between=("def first", "return self.size"), docstring=False)
    assert text == "def first(self):\n    return self.size\n"
    with pytest.raises(PeftLabError, match="no line with 'nowhere'"):
        notebook.show_source(Sample, between=("nowhere", "return"))


def test_faults_of_show_source_are_named():
    with pytest.raises(PeftLabError, match="defines no third; it defines: first, second"):
        notebook.show_source(Sample, methods=["third"])
    with pytest.raises(PeftLabError, match="not an instance"):
        notebook.show_source(Sample())


@pytest.mark.parametrize(
    ("value", "fmt", "text"),
    [(0.9512, ".0%", "95%"), (460800, ",", "460,800"), (14.4, "{:.1f} GB", "14.4 GB"), ("below", "", "below")],
)
def test_glue_formats(monkeypatch, value, fmt, text):
    kept = []
    monkeypatch.setattr(notebook, "_display", lambda data, metadata: kept.append((data, metadata)))
    notebook.glue("x", value, fmt)
    [(data, metadata)] = kept
    assert data == {notebook.GLUE_PREFIX + "text/plain": repr(text)}
    assert metadata == {"scrapbook": {"name": "x", "mime_prefix": notebook.GLUE_PREFIX}}


def test_glue_names_the_value_that_does_not_fit():
    with pytest.raises(PeftLabError, match=r"glue 'x': the format '.1%' does not fit 'a'"):
        notebook.glue("x", "a", ".1%")


def test_quiet_keeps_the_readers_own_warnings():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        notebook.quiet()
        notebook.quiet()  # twice is once
        warnings.warn_explicit("theirs", UserWarning, "file.py", 1, module="transformers.modeling")
        warnings.warn_explicit("theirs", UserWarning, "file.py", 1, module="torch")
        warnings.warn_explicit("mine", UserWarning, "file.py", 1, module="torchlight")
        warnings.warn_explicit("mine", UserWarning, "file.py", 1, module="__main__")
        filters = [entry for entry in warnings.filters if entry[0] == "ignore" and entry[3] is not None]
    assert [str(entry.message) for entry in caught] == ["mine", "mine"]
    assert len([f for f in filters if "transformers" in f[3].pattern]) == 1


ROWS = [{"r": 8, "score": 0.9512, "name": "a<b"}, {"r": 16, "score": None, "name": "c"}]


def test_tables_are_laid_out_and_escaped():
    laid = tables.lay_out(ROWS, {"name": "name", "score": ("exact match", ".1%"), "r": ("r", lambda r: f"r={r}")})
    assert laid == (["name", "exact match", "r"], [["a<b", "95.1%", "r=8"], ["c", "", "r=16"]], [False, True, True])
    text = tables.as_html(*laid, caption='say "x"')
    assert '<td style="text-align: left; white-space: nowrap">a&lt;b</td>' in text
    assert 'aria-label="say &quot;x&quot;"' in text
    assert tables.as_text(*laid[:2]).splitlines()[1] == "a<b   95.1%        r=8"
    long = tables.as_html(["name"], [["a" * 25], ["b"]], [False])
    assert "nowrap" not in long  # one long cell: all cells of the column may wrap
    zeros = tables.lay_out([{"error": -0.0001}, {"error": 0.02}], {"error": ("error", "+.1%")})
    assert zeros[1] == [["0.0%"], ["+2.0%"]]
    with pytest.raises(PeftLabError, match="no row has a column 'scor'.*Did you mean 'score'"):
        tables.lay_out(ROWS, {"scor": "score"})


def measured(**changes):
    given = {"gpu": "NVIDIA H100 80GB HBM3", "cpu": "x", "versions": {"torch": "2.11.0", "peft": "0.21.0"},
             "date": "2026-11-24", "command": "peftlab bench lora --out lora.json"}
    return Results("lora", given | changes, ROWS)


class Outline(HTMLParser):
    """The texts of a piece of HTML by the innermost element that holds them; every element must be closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts = [], {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            inside = self.open[-1] if self.open else ""
            self.texts[inside] = self.texts.get(inside, "") + data.strip()


@pytest.mark.parametrize("changes, badge", [
    ({}, "Measured on NVIDIA H100 80GB HBM3, 2026-11-24"),
    ({"gpu": None, "cpu": "two <cores> & more"}, "Measured on two <cores> & more, 2026-11-24"),
    ({"command": "peftlab bench x --out 'a<b>.json'"}, "Measured on NVIDIA H100 80GB HBM3, 2026-11-24"),
])  # fmt: skip
def test_a_badge_folds_out_the_versions_and_the_command(changes, badge):
    source = measured(**changes)
    texts = Outline(tables.badge(source)).texts
    assert texts["summary"] == badge
    assert "peft 0.21.0, torch 2.11.0" in texts["p"] and texts["code"] == source.provenance["command"]
    assert "\n\n" not in tables.badge(source), "an empty line would end the HTML in Markdown"


@pytest.mark.parametrize("call", [
    lambda: notebook.table(measured()),
    lambda: notebook.table(measured().where(r=8)),
    lambda: notebook.table([{"mean": 0.5}], source=measured()),
    lambda: notebook.provenance(measured()),
])  # fmt: skip
def test_what_was_measured_shows_its_badge_and_in_text_its_line(monkeypatch, call):
    kept = []
    monkeypatch.setattr(notebook, "_display", kept.append)
    call()
    [data] = kept
    assert data["text/html"].endswith(tables.badge(measured()))
    assert data["text/plain"].splitlines()[-1] == measured().cite()


def test_rows_of_a_live_run_have_no_badge(monkeypatch):
    kept = []
    monkeypatch.setattr(notebook, "_display", kept.append)
    notebook.table([{"r": 8}])
    assert "<details" not in kept[0]["text/html"] and "Measured" not in kept[0]["text/plain"]


@pytest.mark.parametrize("wrong", ["lora", [{"r": 8}], None])
def test_a_badge_needs_measurements(wrong):
    with pytest.raises(PeftLabError, match="source must be a Results, found"):
        notebook.provenance(wrong)


CELLS = [
    "import peftlab as pl\n\npl.notebook.start()",
    "pl.glue('score', 0.9512, '.0%')",
    "pl.show_source(pl.exercises.grade)",
    "pl.notebook.table([{'r': 8, 'score': 0.95}], caption='Scores')",
    "pl.figures.bars({'a': 1.0, 'b': 2.0}, x_label='memory (GB)')",
    "pl.widgets.lora_stepper()",
    "pl.widgets.lora_calculator()",
    "pl.check('lora.count', None)",
    "import warnings\n\nwarnings.warn_explicit('noise', UserWarning, 'f.py', 1, module='transformers.x')",
]
VIEW = "application/vnd.jupyter.widget-view+json"


one_kernel = pytest.mark.xdist_group("kit kernel")  # tests of one worker share the notebook


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A notebook with one cell for each piece of the kit, executed in a kernel."""
    from nbclient import NotebookClient

    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    kernel = {"name": "python3", "display_name": "Python 3"}
    made = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    folder = tmp_path_factory.mktemp("notebook")
    client = NotebookClient(made, timeout=HUNG_SECONDS, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment())
    return made


@one_kernel
def test_outputs_in_a_kernel(executed):
    outputs = [cell.outputs for cell in executed.cells]
    assert [len(output) for output in outputs] == [0, 1, 1, 1, 1, 1, 1, 1, 0], "each cell has its one output, no stderr"
    assert outputs[1][0].data == {notebook.GLUE_PREFIX + "text/plain": "'95%'"}
    assert outputs[2][0].data["text/markdown"].startswith("```python\ndef grade(")
    assert outputs[3][0].data["text/html"].startswith('<div role="region" tabindex="0"')
    for output in outputs[4:7]:
        assert "image/png" in output[0].data
    for output in outputs[5:7]:
        assert VIEW in output[0].data and "0x" not in output[0].data["text/plain"]


def environment():
    """For a process in another folder: finds the checkout, and takes no option from this test run."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    return kept | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}


@one_kernel
def test_outputs_are_the_same_the_next_time(executed, tmp_path):
    """Strict nbval passes with a widget in the stored outputs and without, and sees a number that has changed."""
    stored = json.loads(json.dumps(executed))
    stored["metadata"].pop("widgets", None)
    assert stored["cells"][5]["outputs"][0]["data"].pop(VIEW)  # the stepper's; the calculator's stays
    stored["cells"][1]["outputs"][0]["data"] = {notebook.GLUE_PREFIX + "text/plain": "'96%'"}
    nbformat.write(nbformat.from_dict(stored), tmp_path / "kit.ipynb")
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "--nbval", "-c", os.devnull, "."]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    told = [line.split()[1:4] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    failed = [[place.rsplit("/", 1)[-1], *cell] for place, *cell in told]  # some releases of pytest put a folder first
    assert failed == [["kit.ipynb::Cell", "1", "-"]], done.stdout[-3000:]
    assert f"{len(CELLS) - 1} passed" in done.stdout


def test_a_claim_that_does_not_hold_lets_a_reader_go_on(capsys, monkeypatch):
    monkeypatch.delenv("PEFTLAB_STRICT", raising=False)
    notebook.expect("at least half is right", True)
    assert capsys.readouterr().out == ""
    notebook.expect("at least half is right", False)
    assert capsys.readouterr().out.startswith("Expected: at least half is right. It came out otherwise here")
    monkeypatch.setenv("PEFTLAB_STRICT", "1")
    with pytest.raises(PeftLabError, match="at least half is right"):
        notebook.expect("at least half is right", False)
