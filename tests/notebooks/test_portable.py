"""The book's Markdown is filled in right, reads the same everywhere, and becomes Sphinx's own on the site."""

import json
import re
import tomllib
from pathlib import Path

import nbformat
import portable
import pytest

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
BIBLIOGRAPHY = """
@article{hu2021lora,
  author = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip},
  year   = {2021},
  url    = {https://arxiv.org/abs/2106.09685},
}

@article{liu2021a,
  author = {Liu, Xiao and Zheng, Yanan},
  year   = {2021},
  doi    = {10.1/a(b)},
}

@article{liu2021b,
  author = {Liu, Xiao and Ji, Kaixuan},
  year   = {2021},
  eprint = {2110.07602},
}

@article{allal2025,
  author = {{Ben Allal}, Loubna and others},
  year   = {2025},
  url    = {https://example.org},
}
"""


def notebook(*sources):
    cells = [{"cell_type": "markdown", "metadata": {}, "source": source} for source in sources]
    return {"cells": cells, "metadata": {}}


SECOND = notebook(
    "# LoRA",
    '<a id="sec-why"></a>\n## Why',
    '### Deeper\n\n<a id="eq-one"></a>\n\n$$\na\n\\tag{}\n$$',
    '<a id="sec-how"></a>\n## How\n\n$$\nb\n$$\n\n<a id="eq-two"></a>\n\n$$\nc \\tag{9}\n$$',
    '<a id="sec-part"></a>\n### 7.7.7 Part',
    '<a id="fig-loss"></a>**Figure .** The loss.',
)


@pytest.fixture
def book(tmp_path):
    (tmp_path / "references.bib").write_text(BIBLIOGRAPHY, encoding="utf-8")
    (tmp_path / "start_here.md").write_text("# Start", encoding="utf-8")
    return portable.Book({"02_lora": SECOND, "03_qlora": notebook('# Q\n\n<a id="sec-nf4"></a>\n## NF4')}, tmp_path)


def test_numbers_of_sections_equations_and_figures():
    assert portable.targets("02_lora", portable.prose(SECOND)) == {
        "sec-why": "2.1", "eq-one": "2.1", "sec-how": "2.2", "eq-two": "2.2", "sec-part": "2.2.1", "fig-loss": "2.1",
    }  # fmt: skip
    once = portable.number_headings("02_lora", portable.prose(SECOND))
    assert "## 2.1 Why" in once[1] and "### 2.1.1 Deeper" in once[2] and "\\tag{2.1}" in once[2]
    assert "## 2.2 How" in once[3] and "c \\tag{2.2}" in once[3] and "### 2.2.1 Part" in once[4]
    assert once[5].endswith("**Figure 2.1.** The loss.") and once[0] == "# 2 LoRA"
    assert portable.number_headings("02_lora", once) == once
    assert portable.number_headings("start_here", ["# Start"]) == ["# Start"]
    code = "```python\n# a comment\n```"
    assert portable.number_headings("02_lora", [code]) == [code]


@pytest.mark.parametrize(
    "source, expected",
    [
        ("Can it? It can, at 0.34%<!--=share--> of 7.5.<!--@answer--> More.", ["It can, at 0.34% of 7.5."]),
        ("Before.\n\n**All of it.**<!--@answer--> More.", ["**All of it.**"]),
        ("Yes. **A** does: none of 12<!--=n-->.<!--@answer-->", ["**A** does: none of 12."]),
        ("**Yes.** One.<!--@answer--> Two.<!--@answer-->", ["One.", "Two."]),
        ("No mark.", []),
    ],
)
def test_the_marked_sentence_is_the_answer(source, expected):
    assert portable.answers([source]) == expected
    assert portable.ANSWER not in portable.markdown_for_site("02_lora", source)


def test_what_is_made_ends_at_its_own_mark(book):
    twice = "[a](x)<!--@made rows\nb-->\n\nText <!--@see sec-why-->.\n\n[c](x)<!--@made rows\nd\n-->"
    filled = book.fill("index", twice, {})
    assert [found["body"] for found in portable.MADE.finditer(filled)] == ["\nb", "\nd"]
    assert filled.startswith("[a](https://peftlab.github.io/peftlab/)<!--@made rows")


@pytest.mark.parametrize(
    "mark, filled",
    [
        ("<!--@cite hu2021lora-->", "[Hu et al., 2021](https://arxiv.org/abs/2106.09685)<!--@cite hu2021lora-->"),
        ("<!--@cite-t allal2025-->", "[Ben Allal et al. (2025)](https://example.org)<!--@cite-t allal2025-->"),
        ("<!--@cite liu2021a-->", "[Liu and Zheng, 2021](https://doi.org/10.1/a%28b%29)<!--@cite liu2021a-->"),
        ("<!--@see fig-loss-->", "[Figure 2.1](#fig-loss)<!--@see fig-loss-->"),
        ("<!--@see sec-part-->", "[Section 2.2.1](#sec-part)<!--@see sec-part-->"),
        ("[old](#old)<!--@see sec-nf4-->", f"[Section 3.1]({portable.SITE}/03_qlora.html#sec-nf4)<!--@see sec-nf4-->"),
        ("<!--@eq eq-two-->", "[(2.2)](#eq-two)<!--@eq eq-two-->"),
        ("[words](x)<!--@page 03_qlora-->", f"[words]({portable.SITE}/03_qlora.html)<!--@page 03_qlora-->"),
        ("<!--@title sec-part-->", "[Section 2.2.1: Part](#sec-part)<!--@title sec-part-->"),
        ("[a](x)<!--@made rows\nb: c\n-->", f"[a]({portable.SITE}/02_lora.html)<!--@made rows\nb: c-->"),
        ("[a](x)<!--@made rows-->", f"[a]({portable.SITE}/02_lora.html)<!--@made rows-->"),
        ("<!--@page 03_qlora-->", f"[Chapter 3]({portable.SITE}/03_qlora.html)<!--@page 03_qlora-->"),
        ("(at 3%<!--=share-->)", "(at 14.4\u00a0GB<!--=share-->)"),
        ("**<!--=share-->**", "**14.4\u00a0GB<!--=share-->**"),
    ],
)
def test_marks_are_filled_in_once_and_for_all(book, mark, filled):
    values = {"share": "14.4 GB"}
    assert book.fill("02_lora", mark, values) == filled
    assert book.fill("02_lora", filled, values) == filled


@pytest.mark.parametrize(
    "mark, told",
    [
        ("<!--=x-->", "no cell of 02_lora computes the value x"),
        ("<!--@cite nobody-->", "nobody is not in references.bib"),
        ("<!--@see sec-x-->", "nothing is marked with sec-x"),
        ("<!--@page 09_x-->", "there is no page 09_x"),
    ],
)
def test_what_is_missing_is_named(book, mark, told):
    with pytest.raises(ValueError, match=told):
        book.fill("02_lora", mark, {})


def test_two_papers_of_one_name_and_year_are_told_apart():
    found = portable.papers(BIBLIOGRAPHY.replace("Ji, Kaixuan", "Zheng, Yanan"))
    assert [found[key][1] for key in ("liu2021a", "liu2021b", "hu2021lora")] == ["2021a", "2021b", "2021"]


@pytest.mark.parametrize(
    "stored, fresh, tolerance, differs",
    [
        ("loss 1.25 at 3", "loss 1.25 at 3", {}, False),
        ("loss 1.25", "loss 1.26", {}, True),
        ("loss 1.25", "loss 1.26", {"absolute": 0.01}, False),
        ("loss 1.25", "loss 1.27", {"absolute": 0.01}, True),
        ("1,000 of 2,000", "1,090 of 1,810", {"relative": 0.1}, False),
        ("1,000 of 2,000", "1,090 of 1,790", {"relative": 0.1}, True),
        ("x  9.8%", "x 10.1%", {"absolute": 0.5}, False),  # the column moves
        ("x 9.8%", "y 9.8%", {"absolute": 0.5}, True),
        ("x 9.8%", "x 9.8% 1", {"absolute": 0.5}, True),
        ("-0.5", "0.5", {"absolute": 0.1}, True),
        ("2e-7", "3e-7", {"absolute": 1e-7}, False),
        ("2e-7", "3e-7", {"relative": 0.1}, True),
        ("nan", "1.0", {"relative": 0.1}, True),
        ("layer4 is bf16", "layer5 is bf16", {"absolute": 3}, True),  # a name, not a number
    ],
)
def test_numbers_may_move_as_far_as_the_cell_says_and_words_not_at_all(stored, fresh, tolerance, differs):
    assert bool(portable.near(stored, fresh, tolerance)) is differs


def test_the_plugin_settles_what_is_near_and_nothing_else():
    from bound_numbers import settled

    def outputs(loss, picture="a"):
        table = {"data": {"text/html": f"<td>{loss}</td>", "image/png": picture}, "output_type": "display_data"}
        printed = {"output_type": "stream", "name": "stdout", "text": f"loss {loss}\n"}
        return [nbformat.from_dict(output) for output in (printed, table)]

    assert settled(outputs(1.3), outputs(1.2), {"absolute": 0.1}) == outputs(1.2)
    assert settled(outputs(1.4), outputs(1.2), {"absolute": 0.1}) == outputs(1.4)


def test_the_site_gets_sphinx_own_numbers_and_labels(book):
    numbered = portable.number_headings("02_lora", portable.prose(SECOND))
    filled = [book.fill("02_lora", source, {}) for source in numbered]
    figure = {"cell_type": "code", "metadata": {"mystnb": {"image": {"alt": "A curve."}}}, "source": "plot()"}
    pages = notebook(*filled, "See [Section 2.1](#sec-why)<!--@see sec-why-->, 3<!--=x-->, <!--@eq eq-one-->.")
    pages["cells"].insert(5, figure)
    made = portable.for_site("02_lora", pages)["cells"]
    assert made[1]["source"] == "(sec-why)=\n## Why"
    assert "```{math}\n:label: eq-one\na\n```" in made[2]["source"]
    assert "$$\nb\n$$" in made[3]["source"] and ":label: eq-two" in made[3]["source"]
    assert made[5]["metadata"]["mystnb"]["figure"] == {"caption": "The loss.", "name": "fig-loss"}
    assert made[6]["source"] == "See [Section 2.1](#sec-why), 3, {eq}`eq-one`."
    assert "figure" not in figure["metadata"]["mystnb"] or len(made) == 7


@pytest.mark.parametrize(("source", "metadata", "expected"), [
    ("# @title Table: ranks\nx", {"tags": ["hide-input"]}, "Table: ranks (show the code)"),
    ("# @title Report: ranks\nx", {"tags": ["hide-cell"]}, "Report: ranks (show the report)"),
    ("# @title Solution 1\nx", {"tags": ["hide-cell"], "mystnb": {"code_prompt_show": "Show it"}}, "Show it"),
    ("# @title Not folded\nx", {}, None),
    ("x", {"tags": ["hide-input"]}, None),
])  # fmt: skip
def test_the_bar_of_a_folded_cell_says_what_it_shows(source, metadata, expected):
    made = portable.folded_for_site(source, metadata)
    assert made.get("mystnb", {}).get("code_prompt_show") == expected and made.get("tags") == metadata.get("tags")


def test_a_cell_of_provenance_alone_has_no_bar():
    folded = {"tags": ["hide-input", "other"]}
    both = "# @title Where they come from\npl.provenance(a)\npl.provenance(b)  # the second line"
    assert portable.folded_for_site(both, folded)["tags"] == ["other", "remove-input"]
    assert portable.folded_for_site(both + "\npl.table(a)", folded)["tags"] == ["hide-input", "other"]


def test_the_site_gets_the_directive_in_place_of_its_link():
    made = portable.markdown_for_site
    assert made("appendix", "A\n\n[b](c)<!--@made rows\nd: e-->\n\nF") == "A\n\n```{rows}\nd: e\n```\n\nF"
    assert made("appendix", "[b](c)<!--@made rows-->") == "```{rows}\n```"
    assert made("appendix", "In [Section 2.1: Why](u)<!--@title sec-why-->.") == "In [Section 2.1: Why](#sec-why)."


RUN = '[run]\ncpu = "two cores"\nseconds_cpu = 12.4\nmemory_gb = 1.23\n'


def test_pages_may_name_what_a_chapters_run_took(tmp_path):
    (tmp_path / "facts").mkdir()
    (tmp_path / "facts" / "02_lora.toml").write_text(RUN + 'gpu = "H100"\nseconds_gpu = 7\n')
    (tmp_path / "facts" / "03_qlora.toml").write_text(RUN)
    (tmp_path / "facts" / "practice.toml").write_text(RUN)
    assert portable.runs(tmp_path) == {
        "run-02-cpu": "12 s", "run-02-memory": "1.2 GB", "run-02-gpu": "7 s", "run-gpu": "H100",
        "run-02-t4": "7 s to 12 s", "run-03-cpu": "12 s", "run-03-memory": "1.2 GB", "run-03-t4": "at most 12 s",
    }  # fmt: skip


@pytest.mark.parametrize("path", sorted(BOOK.glob("*.ipynb")), ids=lambda path: path.stem)
def test_what_the_colab_button_opens_reads_plainly(path):
    """The button opens this path of the repository (tests/book holds the link to it). Rendered, no markup is left."""
    from markdown_it import MarkdownIt

    render = MarkdownIt("commonmark", {"html": True}).enable("table").render
    for source in portable.prose(json.loads(path.read_text(encoding="utf-8"))):
        html = render(re.sub(r"\$\$.*?\$\$|\$[^$]*\$", "x", source, flags=re.DOTALL))
        seen = re.sub(r"<code>.*?</code>", "", re.sub(r"<!--.*?-->", "", html), flags=re.DOTALL)
        seen = re.sub(r"<[^>]+>", "", seen)
        raw = re.search(r"\{[a-z:-]+\}|&lt;!--|--&gt;|\]\(|^\([\w-]+\)=|\*\*|:label:", seen, re.MULTILINE)
        assert raw is None, f"{raw[0]!r} in {source[:200]!r}"


def test_the_site_is_where_the_package_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert portable.SITE == project["urls"]["Documentation"] + "/book"
