"""Estimate the memory of every step that the book's decision guide may need: book/_ext/peftlab_book/guide_peaks.json.

Run it after a change to the rules of the guide, the built-in shapes or the memory estimate: a test says so. It takes
some minutes, and goes on where it was stopped if the rules have not changed.

    .venv/bin/python tools/guide_peaks.py [--anew]
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "book" / "_ext"))

from peftlab_book import guide  # noqa: E402  # the path comes first

from peftlab.files import write_atomically  # noqa: E402
from peftlab.memory import BUILT_IN  # noqa: E402


def main() -> None:
    """Fill in what is missing, and write after each shape."""
    found = guide.stored() if guide.PEAKS.is_file() and "--anew" not in sys.argv else {}
    found = {name: found[name] for name in BUILT_IN if name in found}
    for name in BUILT_IN:
        if name not in found:
            found[name] = {str(sequence): guide.peaks_of(name, sequence) for sequence in guide.SEQUENCES}
            print(name, flush=True)
            text = json.dumps(found, separators=(",", ":")).replace('},"', '},\n"')
            write_atomically(guide.PEAKS, (text + "\n").encode())


if __name__ == "__main__":
    main()
