"""Every notebook of the book keeps the rules of rules.py and lies in its stored form."""

import io
import re
import tomllib
from pathlib import Path

import matplotlib.image
import normalise
import portable
import pytest
import refresh
import rules
import typed_numbers

from peftlab import memory
from peftlab.commands import doctor
from peftlab.kit.figures import block
from peftlab.kit.figures.style import png
from peftlab.optional import PACKAGES

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if path.parent == BOOK and re.match(r"\d\d_", path.name)]
FACTS, PAGES = sorted(BOOK.glob("facts/*.toml")), [ROOT / "index.md", *sorted(BOOK.glob("*.md"))]
WITHOUT_CODE = [*PAGES, ROOT / "README.md"]
MOST_MISSED = 0.05


def title(path: Path) -> str:
    return path.relative_to(BOOK).with_suffix("").as_posix()


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=title)
def notebook(request):
    return normalise.read(request.param)


@pytest.mark.parametrize("rule", rules.EVERY_NOTEBOOK, ids=lambda rule: rule.__name__)
def test_keeps_the_rule(notebook, rule):
    assert list(rule(notebook)) == [], rule.__doc__


def test_starts_with_the_set_up_cell(notebook):
    if rules.code_cells(notebook):  # a page of prose alone needs no package
        assert list(rules.setup_cell(notebook, REPOSITORY, rules.packages())) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=title)
def test_the_set_up_cell_brings_what_doctor_says_the_chapter_needs(path):
    chosen = rules.extras(normalise.read(path))
    brought = {name for extra in chosen for name in rules.packages()[extra]}
    (needed,) = (chapter.packages for chapter in doctor.CHAPTERS if chapter.number == int(path.name[:2]))
    assert set(needed) <= brought
    assert set(chosen) - {"notebooks"} == {PACKAGES[name].extra for name in needed} - {"notebooks"}


@pytest.mark.parametrize("path", CHAPTERS, ids=title)
def test_chapter_is_whole(path):
    assert list(rules.whole_chapter(normalise.read(path))) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=title)
def test_prose_is_filled_in(path):
    """Values are those that the cells computed; references, citations and numbers are those of the book as it is."""
    notebook = normalise.read(path)
    book, prose = portable.Book.read(BOOK), portable.prose(notebook)
    values = portable.stored_values(notebook) | portable.runs(BOOK)
    expected = [book.fill(path.stem, source, values) for source in portable.number_headings(path.stem, prose)]
    assert prose == expected, "run: make prose"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=title)
def test_every_value_that_prose_names_is_computed(path):
    notebook = normalise.read(path)
    computed = {name for cell in rules.code_cells(notebook) for name in portable.settings(cell).get("values", {})}
    used = {found["name"] for source in portable.prose(notebook) for found in portable.VALUE.finditer(source)}
    assert used - set(portable.runs(BOOK)) <= computed and set(portable.stored_values(notebook)) == computed


@pytest.mark.parametrize("path", CHAPTERS, ids=title)
def test_a_chapter_says_how_long_it_runs(path):
    """Its first table names what was measured, on which hardware, and an estimate for a T4 that is called one."""
    (row,) = (line for source in portable.prose(normalise.read(path)) for line in source.splitlines()
              if line.startswith("| Time |"))  # fmt: skip
    named = {found["name"] for found in portable.VALUE.finditer(row)}
    own = {name for name in portable.runs(BOOK) if name.startswith(f"run-{path.name[:2]}-") and "memory" not in name}
    assert own and own <= named and named - own <= {"run-gpu"}
    assert "two CPU cores" in row and re.search("a T4, .*we estimate", row)
    assert ("run-gpu" in named) == (f"run-{path.name[:2]}-gpu" in own)


@pytest.fixture(scope="module")
def notebooks():
    return {path.stem: normalise.read(path) for path in NOTEBOOKS}


@pytest.mark.parametrize("path", CHAPTERS, ids=title)
def test_no_number_is_typed(path):
    assert list(rules.no_typed_numbers(normalise.read(path))) == [], rules.no_typed_numbers.__doc__


@pytest.mark.parametrize("path", FACTS, ids=lambda path: path.stem)
def test_no_number_is_typed_in_facts(path, notebooks):
    facts, code = tomllib.loads(path.read_text(encoding="utf-8")), typed_numbers.code_by_label(notebooks)
    assert list(rules.no_typed_facts(path.stem, facts, code)) == [], rules.no_typed_numbers.__doc__


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_no_number_is_typed_on_a_page(path):
    assert list(rules.no_typed_page(path.stem, path.read_text(encoding="utf-8"))) == [], rules.no_typed_numbers.__doc__


@pytest.mark.parametrize("path", CHAPTERS, ids=title)
def test_a_number_that_loses_its_mark_is_found(path):
    """Take each mark of a chapter away in turn: the number left behind is found, unless it is an input by chance."""
    tried, missed = 0, []
    for cells, code in typed_numbers.sections(normalise.read(path)):
        for source in (cell.source for cell in cells if cell.cell_type == "markdown"):
            for value in portable.VALUE.finditer(source):
                if re.search(r"\d", value["text"]):
                    left = source[: value.start()] + value["text"] + source[value.end() :]
                    tried += 1
                    missed += [value["name"]] * (list(typed_numbers.typed(left, code)) == [])
    assert tried and len(missed) <= MOST_MISSED * tried, missed


@pytest.mark.parametrize("path", FACTS + WITHOUT_CODE, ids=lambda path: path.stem)
def test_every_value_that_facts_and_pages_name_is_stored(path, notebooks):
    values = portable.values_of_all(notebooks.values())
    if path in WITHOUT_CODE:
        values |= portable.runs(BOOK)
    text = path.read_text(encoding="utf-8")
    assert {found["name"] for found in portable.VALUE.finditer(text)} <= set(values)
    if path in WITHOUT_CODE:
        assert portable.Book.read(BOOK).fill(path.stem, text, values) == text, "run: make prose"


@pytest.mark.parametrize("path", WITHOUT_CODE, ids=lambda path: path.stem)
def test_a_page_without_code_reads_plainly_on_github(path):
    text = path.read_text(encoding="utf-8")
    assert list(portable.raw_markup(text)) == []
    for address in re.findall(r"\]\(((?!\w+:|#)[^)]+)\)", portable.FENCE.sub("", text)):
        assert (path.parent / address.partition("#")[0]).exists(), address


@pytest.mark.parametrize("path", [BOOK / "start_here.md", ROOT / "README.md"], ids=lambda path: path.stem)
def test_the_table_of_chapters_says_what_the_facts_say(path):
    row = re.compile(r"^\| \[?(\d)[ |\[]+([^\]]+)\]\((?:book/)?(\w+)\.ipynb\)(?: \||:) ([^|]+) \|", re.MULTILINE)
    rows = row.findall(path.read_text(encoding="utf-8"))
    facts = {facts.stem: tomllib.loads(facts.read_text(encoding="utf-8")).get("chapter") for facts in FACTS}
    expected = [(str(f["number"]), f["title"], page, f["question"]) for page, f in facts.items() if f]
    assert rows == expected and len(rows) == len(CHAPTERS)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_drawings_of_a_page_are_those_that_code_draws(path):
    for name, method in refresh.DRAWING.findall(path.read_text(encoding="utf-8")):
        drawn, stored = (matplotlib.image.imread(file) for file in (io.BytesIO(png(block(method))), BOOK / name))
        assert drawn.shape == stored.shape and abs(drawn - stored).mean() < 0.01, "run: make prose"


def test_the_start_page_quotes_what_chapter_2_prints():
    quoted = re.search(r'it answers "([^"]+)"', (BOOK / "start_here.md").read_text(encoding="utf-8"))
    printed = (BOOK / "02_lora.ipynb").read_text(encoding="utf-8")
    assert f'"answer: {" ".join(quoted[1].split())}' in printed


def test_the_readme_counts_right():
    found = re.search(r"# ([\d,]+) of ([\d,]+) parameters train \(([\d.]+)%\)", (ROOT / "README.md").read_text())
    trained, whole = (int(number.replace(",", "")) for number in found.groups()[:2])
    made = memory.count("smollm2-135m", "lora", r=8, targets=["q_proj", "v_proj"])
    assert (made.trainable, made.total) == (trained, whole) and f"{100 * trained / whole:.4f}" == found[3]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=title)
def test_lies_in_its_stored_form(path):
    expected = normalise.normalise(normalise.read(path))
    assert path.read_text(encoding="utf-8") == expected, f"run: python tools/normalise.py book/{title(path)}.ipynb"


def test_there_are_chapters():
    assert CHAPTERS, "no chapter in book/"
