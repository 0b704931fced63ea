"""Pack the rendered site into one archive that opens by a double click, without a server: what `make archive` calls.

The archive is _build/html/peft-lab-book.zip, beside the pages that link to it. The same site gives the same bytes.
"""

import io
import json
import os
import sys
import zipfile
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
ARCHIVE = "peft-lab-book.zip"
EPUB = "peft-lab.epub"
MADE = "_static/made.js"  # says which downloads there are
FOLDER, OPEN = "peft-lab-book", "open-the-book.html"
PARTIAL = ".partial"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first moment that the format knows

OPENING = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="refresh" content="0; url=site/index.html">
<title>PEFT Lab</title>
</head>
<body><p><a href="site/index.html">Open the book</a></p></body>
</html>
"""
README = f"""PEFT Lab, the book, to read without a network
============================================

Unpack the archive, also onto a USB stick, and open {OPEN} with a double click. Any current browser shows the
book. PDFs are in site/pdf and the EPUB for e-readers is site/{EPUB}, where the archive has them. The notebooks
are in site/_sources/book.

A browser allows a page that was opened as a file less than a page from a server. So here
- search lists the pages that it finds, without extracts from them;
- the calculator does not start.
Both work from a server of your own. In the folder "site", give the command

    python3 -m http.server --bind 127.0.0.1 8000

and open http://127.0.0.1:8000 in the browser. Links to Colab, GitHub and papers need a network.

Text and figures are under CC BY 4.0, code is under the Apache License 2.0.
"""


def write(path: Path, data: bytes) -> None:
    """Write a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PARTIAL)
    part.write_bytes(data)
    os.replace(part, path)


def made(site: Path, archive: bool) -> str:
    """The script that tells the pages which downloads there are, with their sizes."""
    paths = [*sorted(site.glob("pdf/*.pdf")), site / EPUB, *([site / ARCHIVE] if archive else [])]
    sizes = {path.relative_to(site).as_posix(): path.stat().st_size for path in paths if path.is_file()}
    return f"// written by make pdf, make epub and make archive\nwindow.peftlabMade = {json.dumps(sizes)};\n"


def announce(site: Path) -> None:
    """Let the pages of `site` link to the downloads that are there."""
    write(site / MADE, made(site, archive=True).encode())


def zipped(files: dict[str, bytes], plain: Collection[str] = ()) -> bytes:
    """A ZIP of `files` in this order, without dates; those named in `plain` are not compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_STORED if name in plain else zipfile.ZIP_DEFLATED)
    return out.getvalue()


def pack(site: Path) -> bytes:
    """The archive of a site."""
    files = {f"{FOLDER}/{OPEN}": OPENING.encode(), f"{FOLDER}/README.txt": README.encode()}
    for path in sorted(site.rglob("*")):
        name = path.relative_to(site).as_posix()
        if path.is_file() and name not in (ARCHIVE, ".buildinfo") and path.suffix != PARTIAL:
            # the archive does not hold itself
            data = made(site, archive=False).encode() if name == MADE else path.read_bytes()
            files[f"{FOLDER}/site/{name}"] = data
    return zipped(dict(sorted(files.items())))


def main() -> int:
    if not (SITE / "index.html").is_file():
        print("archive: the book is not in _build/html; render it first: make book", file=sys.stderr)
        return 1
    data = pack(SITE)
    write(SITE / ARCHIVE, data)
    announce(SITE)
    print(f"archive: {(SITE / ARCHIVE).relative_to(ROOT)}, {len(data) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
