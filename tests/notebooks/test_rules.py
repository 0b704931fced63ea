"""Each rule finds the fault it is there for, and passes what is right: a rule that never fires looks well too."""

import normalise
import pytest
import rules
import typed_numbers
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from peftlab.kit import measurements

REPOSITORY = "https://example.org/book"
ALT = "A curve that falls and levels."
FIGURE = {"mystnb": {"image": {"alt": ALT}}, "peftlab": {"alt": ALT}}
HIDDEN = {"jupyter": {"source_hidden": True}}
CAPTION = '<a id="fig-loss"></a>**Figure 1.1.** The loss.'


def printed(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def shown(kind, value):
    return new_output("display_data", data={kind: value})


PACKAGES = {"notebooks": ("peft", "matplotlib"), "gpu": ("bitsandbytes",)}
SETUP = rules.SETUP.format(
    needed='needed = ["peftlab", "peft", "matplotlib"]', extras="notebooks", repository=REPOSITORY
)


def chapter(*cells):
    """A small chapter without a fault, and `cells` after it; code cells are counted."""
    start = [
        new_markdown_cell("# LoRA\n\nWhy does a low-rank update suffice? Low rank suffices.<!--@answer-->"),
        new_code_cell(SETUP),
        new_markdown_cell("## Summary\n\nLow rank suffices."),
        new_markdown_cell("## Exercises\n\nNone yet."),
    ]
    notebook = new_notebook(cells=[*start, *cells])
    for count, cell in enumerate(rules.code_cells(notebook), start=1):
        if cell.execution_count is None:
            cell.execution_count = count
    return notebook


def problems(rule, *cells) -> list[str]:
    return list(rule(chapter(*cells)))


def code(source="x", outputs=(), **metadata):
    return new_code_cell(source, outputs=list(outputs), metadata=metadata)


FAULTS = [
    (rules.executed_in_order, [new_code_cell("x", execution_count=7)], "execution counts"),
    (rules.executed_in_order, [new_markdown_cell("")], "empty"),
    (rules.clean_outputs, [code("1/0", [new_output("error", ename="E", evalue="", traceback=[])])], "ended in E"),
    (rules.clean_outputs, [code("x", [printed("careful", "stderr")])], "stderr"),
    (rules.clean_outputs, [code("x", [printed("saved to /home/ada/run")])], "absolute path"),
    (rules.clean_outputs, [code("x", [shown("text/html", "<b>/content/run</b>")])], "absolute path"),
    (rules.clean_outputs, [code("x", [printed(r"C:\Users\ada")])], "absolute path"),
    (rules.clean_outputs, [code("x", [printed("<object at 0x7f3b2c1d9e80>")])], "memory address"),
    (rules.clean_outputs, [code("x", [shown("application/vnd.jupyter.widget-view+json", {})])], "nothing beside it"),
    (rules.short_cells, [code("x = 1\n" * 26)], "26 lines"),
    (rules.short_cells, [code("x = 1\n" * 10) for _ in range(5)], "median code"),
    (rules.short_cells, [new_markdown_cell("word " * 60) for _ in range(9)], "median prose"),
    (rules.described_figures, [code("plot()", [shown("image/png", "")], **FIGURE)], "caption"),
    (rules.described_figures, [code("plot()", [shown("image/png", "")]), new_markdown_cell(CAPTION)], "a description"),
    (
        rules.described_figures,
        [code("plot()", [shown("image/png", "")], peftlab={"alt": ALT}), new_markdown_cell(CAPTION)],
        "not filled in",
    ),
    (rules.described_figures, [code("plot()", [shown("image/svg+xml", "<svg/>")], **FIGURE)], "SVG"),
    (
        rules.described_figures,
        [code("plot()", [shown("image/png", "")], **FIGURE), new_markdown_cell(CAPTION)] * 2,
        "two figures",
    ),
    (rules.portable_prose, [new_markdown_cell("It is {glue:text}`x`.")], "a role of Sphinx"),
    (rules.portable_prose, [new_markdown_cell("As in {cite:p}`hu2021lora`.")], "a role of Sphinx"),
    (rules.portable_prose, [new_markdown_cell("Look:\n\n```{math}\nx\n```")], "a directive of Sphinx"),
    (rules.portable_prose, [new_markdown_cell(":::{note}\nLook.\n:::")], "a directive of Sphinx"),
    (rules.portable_prose, [new_markdown_cell("(sec-x)=\n## Title")], "a target of Sphinx"),
    (rules.portable_prose, [new_markdown_cell("It is\n<!--=x-->.")], "begins with a comment"),
    (rules.portable_prose, [new_markdown_cell("It is 3 <!-- really? -->.")], "binds nothing"),
    (rules.portable_prose, [code("x", [shown("application/papermill.record/text/plain", "3")])], "glues"),
    (rules.stated_tolerances, [code("x", [printed("3")], peftlab={"tolerance": {"absolute": 0}})], "above zero"),
    (rules.stated_tolerances, [code("x", [printed("3")], peftlab={"tolerance": {"percent": 3}})], "above zero"),
    (rules.stated_tolerances, [code("x", [printed("3")], peftlab={"tolerance": {"relative": 0.9}})], "would such"),
    (rules.stated_tolerances, [code("x", [printed("a")], peftlab={"tolerance": {"absolute": 1}})], "no number"),
    (rules.stated_tolerances, [code("x", [printed("3")], peftlab={"tolerence": {"absolute": 1}})], "nothing reads"),
    (rules.narrow_code, [code("x = " + "1" * 90)], "94 columns"),
    (rules.narrow_code, [code("x", [shown("text/markdown", "```python\n" + "y" * 89 + "\n```")])], "89 columns"),
    (rules.few_verdicts, [code("x", [printed("a: True\n" + "1\n" * 20 + "b: False\n")])], "2 of 22"),
    (rules.folded_everywhere, [code("x", tags=["hide-input"])], "folded in one place"),
    (rules.folded_everywhere, [code("x", jupyter={"source_hidden": True})], "folded in one place"),
    (rules.folded_everywhere, [code("x", cellView="form", tags=["hide-cell"], **HIDDEN)], "folded in one place"),
    (rules.little_plumbing, [code("x = 1\n" * 8 + "pl.table(\n    x\n)")], "3 of 11"),
    (rules.nothing_remote, [new_markdown_cell("![a](https://example.org/a.png)")], "remote image"),
    (rules.nothing_remote, [code("x", [shown("text/html", "<img src='http://example.org/a.png'>")])], "remote image"),
    (rules.nothing_skipped, [code("x", tags=["nbval-skip"])], "nbval-skip"),
    (rules.nothing_skipped, [code("x", tags=["raises-exception"])], "raises-exception"),
    (rules.nothing_skipped, [code("# NBVAL_IGNORE_OUTPUT\nx")], "use a tag"),
    (rules.nothing_skipped, [code("x", tags=["nbval-ignore-output"])], "does not check"),
    (rules.nothing_skipped, [code("x", tags=["nbval-ignore-output"]), code("assert x")], "prints nothing"),
    (rules.comparable_code, [code("plot();")], "`;`"),
    (rules.comparable_code, [code("clear_output()")], "clear_output"),
    (rules.plain_voice, [new_markdown_cell("It works!")], "exclamation"),
    (rules.plain_voice, [new_markdown_cell("One simply multiplies.")], "simply"),
]
FINE = [
    (rules.clean_outputs, [code("x", [printed("1/2 of it, in 3/var; see https://example.org/tmp/x </p>")])]),
    (rules.clean_outputs, [code("x", [shown("text/html", "<table><tr><td>1</td></tr></table>")])]),
    (rules.described_figures, [code("plot()", [shown("image/png", "")], **FIGURE), new_markdown_cell(CAPTION)]),
    (rules.portable_prose, [new_markdown_cell("It is 3<!--=x-->; `{a}`, `{ref}` and $\\{a\\}$.")]),
    (rules.portable_prose, [new_markdown_cell("So:\n\n```python\n{x}\n```")]),
    (rules.stated_tolerances, [code("x", [printed("3")], peftlab={"tolerance": {"absolute": 1, "relative": 0.1}})]),
    (rules.narrow_code, [code("x = " + "1" * 84, [printed("y" * 100)])]),
    (rules.few_verdicts, [code("x", [printed("the same bits: True\n")])]),
    (rules.folded_everywhere, [code("# @title The table\nx", tags=["hide-input"], cellView="form", **HIDDEN)]),
    (rules.little_plumbing, [code("x = 1\n" * 9 + "pl.table(x)")]),
    (rules.little_plumbing, [code("# @title The table\npl.table(x)", tags=["hide-input"])]),
    (rules.nothing_remote, [new_markdown_cell("[a page](https://example.org)")]),
    (rules.nothing_skipped, [code("x", tags=["nbval-ignore-output"]), code("check()", [printed("below 0.1")])]),
    (rules.plain_voice, [new_markdown_cell("`a != b`, $n!$ and ![loss](x.png)\n\n```python\nnot x != y\n```")]),
]


@pytest.mark.parametrize("rule, cells, message", FAULTS, ids=lambda v: getattr(v, "__name__", None))
def test_finds_the_fault(rule, cells, message):
    found = problems(rule, *cells)
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize("rule, cells", FINE, ids=lambda v: getattr(v, "__name__", None))
def test_passes_what_is_right(rule, cells):
    assert problems(rule, *cells) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ('rows = measured.where(section="latency", tokens=1)\nrows.column("seconds")', True),
        ('measured.one(section="latency", state="base")["busy_seconds"]', True),
        ('measured.where(\n    section=["fullsize", "latency"]).column("seconds")', True),
        ('measured.within_run(section="latency").column("seconds")', False),
        ('measured.where(section="latency").column("peak_bytes")', False),
        ('measured.where(section="rank").column("seconds")', False),
        ('one, other = (measured.one(section="latency", state=s) for s in "ab")\nmeasured.ratio(one, other, "seconds")',
         False),
    ],
)  # fmt: skip
def test_times_are_compared_within_one_run(source, fault):
    found = list(rules.times_of_one_run(chapter(code(source)), timed={"latency"}))
    assert bool(found) == fault and all("'latency'" in problem and "within_run" in problem for problem in found)


def test_sections_are_timed_if_their_rows_say_so(monkeypatch, tmp_path):
    run = {"host": "90ab34cd", "cpu": "two cores", "date": "2026-11-22"}
    given = {"gpu": None, "cpu": "two cores", "versions": {"torch": "2.11.0"}, "date": "2026-11-22", "command": "x"}
    new = [{"section": "latency", "seconds": 1.0, "processes": 3, "run": "aaaaaa"},
           {"section": "rank", "seconds": 1.0, "run": "aaaaaa"}]  # fmt: skip
    measurements.write(tmp_path / "new.json", "new", {**given, "runs": {"aaaaaa": run}}, new)
    measurements.write(tmp_path / "old.json", "old", given, [{"section": "fullsize", "seconds": 1.0}])
    monkeypatch.setattr(measurements, "FOLDER", tmp_path)
    assert rules.timed_sections() == {"latency"}


def test_every_rule_passes_a_chapter_without_faults():
    notebook = chapter(code("x = 1", [printed("1\n")]))
    assert [p for rule in rules.EVERY_NOTEBOOK for p in rule(notebook)] == []
    assert list(rules.setup_cell(notebook, REPOSITORY, PACKAGES)) == list(rules.whole_chapter(notebook)) == []


def test_every_rule_has_a_fault_it_finds():
    covered = {rule for rule, _, _ in FAULTS} | {rules.valid_format, rules.times_of_one_run}  # tests of their own
    assert covered == set(rules.EVERY_NOTEBOOK)


def prose(text, *cells):
    return [new_markdown_cell("## Start\n\n" + text), *cells]


TYPED = [
    (prose("LoRA needs 14.4 GB."), "14.4 GB"),
    (prose("It needs 14.4\u00a0GB, and 3<!--=gpus--> GPUs."), "14.4 GB"),
    (prose("It needs 8, 9 or 16 GB."), ["8 GB", "9 GB", "16 GB"]),
    (prose("From 0.5 to 7 seconds"), ["0.5 seconds", "7 seconds"]),
    (prose("It is 31%, or $31$ %, of `31` per cent."), ["31 %", "31 %", "31 per cent"]),
    (prose("It is 2.5 times as slow, and by 3 points worse."), ["2.5 times", "3 points"]),
    (prose("It took 19-23 ms."), ["19 ms", "23 ms"]),
    (prose("It trains 460,800 parameters at -.5 nats."), ["460,800", "-.5 nats"]),
    (prose("It trains 35M parameters."), "35 M"),
    (prose("This happened in 54 runs."), "54"),
    (prose("So 135 models ran on 4096 tokens."), ["135", "4096"]),
    (prose("It has 4.4<!--=times--> GB, once 35%."), "35 %"),
    (prose("| method | accuracy |\n| --- | --- |\n| LoRA | 81.0% |"), "81.0 %"),
    (prose("[Chapter 2](x)<!--@page 02_lora--> has 97% right."), "97 %"),
    (prose("The paper reports 11 billion<!--@cite x-->. We saw 12 billion."), "12 billion"),
    (prose('You will read "84 GB". We found 85 GB.'), "85 GB"),
    # a literal of the code that is another thing, or the same by chance
    (prose("It needs 16 GB.", code("r = 16")), "16 GB"),
    (prose("It loses 10%.", code("warmup = 0.1")), "10 %"),
    (prose("It took 2 seconds.", code("steps = 2")), "2 seconds"),
    (prose("The loss is 0.010.", code("rate = 0.01")), "0.010"),
    (prose("It has 16 heads.", code("print(f'{heads} of 16 heads')")), "16"),
    (prose("It has 16 heads.", code("pl.table(rows, caption='16 heads')")), ["16", "in a caption 16"]),
    ([*prose("Look.", code("r = 16")), new_markdown_cell("## Next\n\nThe rank is 16.")], "16"),
    # figures, captions and values
    ([new_markdown_cell('<a id="fig-a"></a>**Figure 1.3.** It peaks at 54.5 GB.')], "54.5 GB"),
    ([code("x", peftlab={"alt": "A line from {a:.1f} to 2.7."})], "in its figure's description 2.7"),
    ([code("x", peftlab={"alt": "Bars: {'; '.join(f'{n} at 27%' for n in names)}."})], "figure's description 27 %"),
    ([code("x", peftlab={"values": {"a": "{x:.1f} of 57"}})], "in its value a 57"),
    ([code("pl.table(x, caption=f'{n} runs of 57')")], "in a caption 57"),
    (prose("**3. Launches** (easy, 5 minutes). It costs 90 ms.", code("answer = None")), "90 ms"),
]
NOT_TYPED = [
    prose("It needs 14.4\u00a0GB<!--=peak-->, **31%<!--=share-->** (2.5<!--=times--> times)."),
    prose("See [Section 2.8](#sec-a)<!--@see sec-a-->, [(2.1)](#eq-a)<!--@eq eq-a-->, chapters 3 and 4, Figure 1.2."),
    prose("[Hu et al., 2021](https://x.org/2106)<!--@cite hu--> trained 11 billion, a third of 33%."),
    prose("84 GB stand in [a course](https://example.org/84)."),
    prose('Is it "10 to 15 GB"? No: 10 GB is too much, and 15 too.'),
    prose("$d = 384$, $x^2 + 0.5$, `lr=0.01`, `0.1 GB` and\n\n$$\n0.31 + 7\n$$\n\n```python\nx = 14.4\n```"),
    prose("SmolLM2-135M, Llama-3.1-8B, a 7B model, a 70B shape, a 135M model, Qwen2.5, GPT-2, H100, IA3 and r2"),
    prose("An RTX 4090, cards of 24 or 32 GB, a card of 48 GB, an 80 GB card, and the 80 GB of our card"),
    prose("It takes 8 bits or 16 bits, 8-bit states, 2 or 4 bytes, and 16 bytes."),
    prose("1. First, from 0 to 1\n2. Step 1, layers 3 to 5, block 15"),
    prose("Read it in 20 minutes or 2 hours, on 21 August 2026, or of 2025."),
    prose("| minutes | what |\n| --- | --- |\n| 0-10 | Start |"),
    prose("r = 16, a rate of 0.01, 4 heads, 1,024 words", code("r, rate, heads, words = 16, 0.01, [4], 1024")),
    prose("It reads 3.25 billion and 12.5%, and 80 GB.", code("a, b, c = 3.25e9, 0.125, 80e9")),
    prose("The guide says 8 GB.", code("rows = [('guide', '8 GB')]")),
    [*prose("Look.", code("tokens = 1024")), new_markdown_cell("## Next\n\nThere are 1,024 tokens.")],
    prose("**3. Launches** (easy, 5 minutes). 32 blocks cost 90 ms.", code("pl.check('x', 32 * 90)")),
    prose("**4. Open** (open, 30 minutes). Try 0.98 with 48 blocks."),
    [code("x", peftlab={"alt": "A line from {a:.1f} to {b[3]:.2%}.", "values": {"a": "{x / 8:.1f} points"}})],
]


@pytest.mark.parametrize("cells, found", TYPED)
def test_a_typed_number_is_found(cells, found):
    wanted = [found] if isinstance(found, str) else found
    told = problems(rules.no_typed_numbers, *cells)
    assert len(told) == len(wanted), told
    assert all(any(f" {one}: ..." in problem for problem in told) for one in wanted), told


@pytest.mark.parametrize("cells", NOT_TYPED)
def test_a_bound_number_and_one_that_names_a_thing_may_stand(cells):
    assert problems(rules.no_typed_numbers, *cells) == []


def test_a_value_computed_from_nothing_is_found():
    (told,) = problems(rules.no_typed_numbers, code("x", peftlab={"values": {"a": "{2 / 3:.1f}"}}))
    assert "from nothing" in told


def test_typed_numbers_of_facts_and_pages_are_found():
    chapter = {"title": "T", "question": "Do 7 do?", "know": ["chapter 2"]}
    claim = {"claim": "It saves 10 GB.", "truth": "It saves 10 GB, or 3%, at r = 8, of 9<!--=a-->.", "shown": ["sec-a"]}
    question = {"question": "97% or 94%?", "answer": "97% beat 95%.", "shown": []}
    facts = {"chapter": chapter, "claim": [claim], "question": [question], "term": [{"term": "a", "text": "Of 512."}]}
    cells = [new_markdown_cell('<a id="sec-a"></a>\n## A'), code("r = 8")]
    by_label = typed_numbers.code_by_label({"02_lora": new_notebook(cells=cells)})
    told = list(rules.no_typed_facts("02_lora", facts, by_label))
    assert [t.split(" types ")[1].split(":")[0] for t in told] == ["7", "512", "3 %", "95 %"]
    assert "'It saves 10 GB.'" in told[2]
    assert list(rules.no_typed_page("start", "Fetch 189\u00a0MB<!--=a-->, then 640 MB.")) == [
        "start types 640 MB: ...Fetch •, then 640 MB...."
    ]


def test_an_invalid_or_old_notebook_is_found():
    notebook = chapter()
    notebook.metadata["widgets"] = {}
    notebook.nbformat_minor = 4
    assert len([p for p in rules.valid_format(notebook) if "widgets" in p or "cell ids" in p]) == 2


def test_set_up_cell_and_parts_are_demanded():
    notebook = chapter()
    notebook.cells[1].source += "\nimport torch"
    assert "set-up cell" in next(rules.setup_cell(notebook, REPOSITORY, PACKAGES))
    notebook.cells[1].source = SETUP.replace('"peft", ', "")  # it would not notice that peft is missing
    assert "set-up cell" in next(rules.setup_cell(notebook, REPOSITORY, PACKAGES))
    notebook.cells[1].source = SETUP.replace("[notebooks]", "[notebooks,gpu]")  # nor that bitsandbytes is
    assert "set-up cell" in next(rules.setup_cell(notebook, REPOSITORY, PACKAGES))
    del notebook.cells[2:]
    notebook.cells[0].source = "LoRA"
    assert len(list(rules.whole_chapter(notebook))) == 4  # title, answer, summary, exercises


def test_stored_form_is_stable_and_quiet():
    cell = code("x = 1  \n", [printed("a"), printed("b\n")], execution={"iopub.execute_input": "now"}, tags=["keep"])
    notebook = chapter(cell)
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    for number, one in enumerate(rules.code_cells(notebook)):
        one.execution_count = 10 * number + 3
    ids = [c.id for c in notebook.cells]
    text = normalise.normalise(notebook)
    again = normalise.nbformat.reads(text, as_version=4)
    assert normalise.normalise(again) == text
    assert [c.id for c in again.cells] == ids
    assert [c.execution_count for c in rules.code_cells(again)] == [1, 2]
    stored = again.cells[-1]
    assert stored.source == "x = 1" and stored.metadata == {"tags": ["keep"]}
    assert len(stored.outputs) == 1 and stored.outputs[0].text == "ab\n"
    assert "widgets" not in again.metadata
    assert again.metadata.language_info == {"name": "python"}


def test_stored_form_keeps_the_figure_beside_a_widget_and_a_folded_solution():
    view = "application/vnd.jupyter.widget-view+json"
    output = shown("image/png", "abc")
    output.data[view] = {"model_id": "random"}
    cell = code("x", [output], jupyter={"source_hidden": True, "outputs_hidden": False})
    [*_, stored] = normalise.nbformat.reads(normalise.normalise(chapter(cell)), as_version=4).cells
    assert set(stored.outputs[0].data) == {"image/png"}
    assert stored.metadata == {"jupyter": {"source_hidden": True}}


def test_an_unexecuted_cell_is_not_counted_as_executed():
    notebook = chapter(code("x"))
    notebook.cells[-1].execution_count = None
    again = normalise.nbformat.reads(normalise.normalise(notebook), as_version=4)
    assert list(rules.executed_in_order(again)) != []
