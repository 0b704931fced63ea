"""Take the README's picture: a page of the rendered book, in the system's Chromium.

    python tools/screenshot.py                                  book/02_lora.html -> book/_static/readme.png
    python tools/screenshot.py book/start_here.html out.png --width 390
"""

import argparse
import functools
import http.server
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("book", "unit")]

from browser import Browser, find_chromium  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", nargs="?", default="book/02_lora.html", help="a page below _build/html")
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "book" / "_static" / "readme.png")
    parser.add_argument("--at", help="an element's id to scroll to, such as a figure's name")
    parser.add_argument("--below", type=int, default=0, help="pixels to scroll further down")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    binary = find_chromium()
    if binary is None or not (SITE / arguments.page).is_file():
        print("screenshot: needs Chromium, and the rendered book (make book)", file=sys.stderr)
        return 1
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(SITE))
    handler.func.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, Browser(binary) as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.page(width=arguments.width, height=arguments.height, dark=arguments.dark)
        page.open(f"http://127.0.0.1:{server.server_port}/{arguments.page}")
        if arguments.at:
            page.evaluate(f"document.getElementById({arguments.at!r}).scrollIntoView({{block: 'center'}})")
        page.evaluate(f"window.scrollBy(0, {arguments.below})")
        browser.pump(0.5)
        page.screenshot(arguments.out)
        server.shutdown()
    print(f"screenshot: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
