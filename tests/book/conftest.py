"""Build the book once, serve it on this machine alone, and open it in the system's Chromium."""

import functools
import http.server
import json
import os
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import Browser, find_chromium
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "_build" / "html"


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class PageReader(HTMLParser):
    """What the tests ask of a page's source: ids, links, and the number of formulas."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.formulas = 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.update(values[name] for name in ("id", "name") if values.get(name))
        if tag in ("a", "link") and values.get("href"):
            self.links.append(values["href"])
        if "math" in (values.get("class") or "").split():
            self.formulas += 1


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """The outcome of rendering the book anew: (exit status, output, seconds).

    These tests belong to one worker. Should two workers have some of them all the same, the second waits and takes the
    first one's book: two builds in one folder break each other.
    """
    import build_book

    if "PYTEST_XDIST_WORKER" not in os.environ:
        return build_book.build()
    shared = tmp_path_factory.getbasetemp().parent  # of all workers of this run
    outcome = shared / "book.json"
    with FileLock(shared / "book.lock"):
        if not outcome.is_file():
            outcome.write_text(json.dumps(build_book.build()), encoding="utf-8")
    return tuple(json.loads(outcome.read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def site(build) -> Path:
    """The folder of the rendered book."""
    status, output, _ = build
    if status:
        pytest.fail("the book did not render:\n" + output[-3000:], pytrace=False)
    return SITE


@pytest.fixture(scope="session")
def pages(site) -> dict[str, PageReader]:
    """Every page of the site by its path, read. 404.html, whose links start at the host's root, is left out."""
    paths = sorted(p for p in site.rglob("*.html") if "_static" not in p.parts and p.name != "404.html")
    return {p.relative_to(site).as_posix(): PageReader(p.read_text(encoding="utf-8")) for p in paths}


@pytest.fixture(scope="session")
def address(site) -> str:
    """The site served over http: pages behave differently as files."""
    handler = functools.partial(QuietHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    """A running Chromium. Without one these tests are skipped on a person's machine, and fail in CI."""
    binary = find_chromium()
    if binary is None:
        told = "no Chromium or Chrome found, so the rendered pages are not opened (Debian: apt install chromium)"
        if os.environ.get("CI"):
            pytest.fail(told, pytrace=False)
        pytest.skip(told)
    with Browser(binary) as running:
        yield running
