"""The rendered book as files: it builds strictly and quickly, and its links and buttons lead somewhere."""

import json
import re
import tomllib
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
COLAB = "https://colab.research.google.com/github"


def test_renders_without_a_warning(build, site):
    status, output, _ = build
    assert status == 0 and "WARNING" not in output


def test_no_internal_link_is_dead(site, pages):
    dead = []
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(urljoin(f"http://book/{name}", link))
            if parts.netloc != "book" or parts.scheme != "http":
                continue
            path = unquote(parts.path).lstrip("/") or "index.html"
            if not (site / path).is_file():
                dead.append(f"{name}: {link}: no such file")
            elif parts.fragment and path in pages and unquote(parts.fragment) not in pages[path].ids:
                dead.append(f"{name}: {link}: no such place in the page")
    assert dead == []


def test_repository_links_name_what_exists(pages):
    """Links into the repository, Colab's included, name a file of this checkout on the main branch."""
    colab = REPOSITORY.replace("https://github.com", COLAB)
    wrong = []
    for name, page in pages.items():
        for link in page.links:
            if link.startswith(COLAB) and not link.startswith(colab + "/"):
                wrong.append(f"{name}: {link}: another repository than {REPOSITORY}")
            if not (found := re.match(rf"(?:{colab}|{REPOSITORY})/(?:blob|edit|tree)/(\w+)/([^#?]+)", link)):
                continue
            branch, path = found.groups()
            if branch != "main" or not (ROOT / unquote(path)).exists():
                wrong.append(f"{name}: {link}: not in the checkout")
    assert wrong == []


def test_every_notebook_page_has_its_colab_button(pages):
    notebooks = [p for p in sorted((ROOT / "book").glob("*.ipynb")) if f"book/{p.stem}.html" in pages]
    assert notebooks
    for notebook in notebooks:
        expected = f"{REPOSITORY.replace('https://github.com', COLAB)}/blob/main/book/{notebook.name}"
        assert expected in pages[f"book/{notebook.stem}.html"].links


def test_no_mark_and_no_markup_is_left_in_a_page(site, pages):
    """What prose binds has arrived, and Sphinx has understood every role that stood in for plain text."""
    for name in pages:
        text = re.sub(r"<(pre|code|script)\b.*?</\1>", "", (site / name).read_text(encoding="utf-8"), flags=re.DOTALL)
        left = re.search(r"<!--[=@]|\{(?:ref|eq|doc|glue|cite)[\w:]*\}", text)
        assert left is None, f"{name}: {text[left.start() - 60 : left.end() + 60]!r}"


def test_every_page_of_the_book_is_in_the_table_of_contents(pages):
    sources = {p.stem for pattern in ("*.ipynb", "*.md") for p in (ROOT / "book").glob(pattern)}
    rendered = {Path(name).stem for name in pages if name.startswith("book/")}
    assert sources == rendered


def test_chapters_bear_the_number_of_their_file(site, pages):
    chapters = [name for name in pages if re.match(r"book/\d\d_", name)]
    assert chapters
    for name in chapters:
        number = int(Path(name).stem[:2])
        text = (site / name).read_text(encoding="utf-8")
        assert re.search(rf'<h1><span class="section-number">{number}\.', text), f"{name} is not headed {number}."
        article = text.split("<article", 1)[1].split("</article", 1)[0]
        assert {int(n) for n in re.findall(r'<span class="section-number">(\d+)\.', article)} == {number}


def test_vendored_scripts_are_those_of_the_manifest():
    import vendor

    assert [problem for folder in (vendor.SITE, vendor.TESTS) for problem in vendor.check(folder)] == []
    for folder in (vendor.SITE, vendor.TESTS):
        for package in json.loads((folder / "manifest.json").read_text(encoding="utf-8")).values():
            assert "LICENSE" in package["files"] and package["licence"], f"{package['package']} without its licence"
