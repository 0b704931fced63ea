"""Every notebook of the book keeps the rules of rules.py and lies in its stored form."""

import re
import tomllib
from pathlib import Path

import normalise
import portable
import pytest
import rules

from peftlab.commands import doctor
from peftlab.optional import PACKAGES

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if path.parent == BOOK and re.match(r"\d\d_", path.name)]


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
    book, values, prose = portable.Book.read(BOOK), portable.stored_values(notebook), portable.prose(notebook)
    expected = [book.fill(path.stem, source, values) for source in portable.number_headings(path.stem, prose)]
    assert prose == expected, "run: make prose"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=title)
def test_every_value_that_prose_names_is_computed(path):
    notebook = normalise.read(path)
    computed = {name for cell in rules.code_cells(notebook) for name in portable.settings(cell).get("values", {})}
    used = {found["name"] for source in portable.prose(notebook) for found in portable.VALUE.finditer(source)}
    assert used <= computed and set(portable.stored_values(notebook)) == computed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=title)
def test_lies_in_its_stored_form(path):
    expected = normalise.normalise(normalise.read(path))
    assert path.read_text(encoding="utf-8") == expected, f"run: python tools/normalise.py book/{title(path)}.ipynb"


def test_there_are_chapters():
    assert CHAPTERS, "no chapter in book/"
