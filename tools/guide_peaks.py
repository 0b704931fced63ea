"""Estimate the memory of every step that the book's decision guide may need: book/_ext/peftlab_book/guide_peaks.json.

Run it after a change to the rules of the guide or to the built-in shapes: a test says so. It takes some minutes, keeps
what is known, and goes on where it was stopped. After a change to the memory estimate give `--anew`.

    .venv/bin/python tools/guide_peaks.py [--anew]
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "book" / "_ext"))

from peftlab_book import guide  # noqa: E402  # the path comes first

from peftlab.files import write_atomically  # noqa: E402
from peftlab.memory import BUILT_IN, load_shape  # noqa: E402


def main() -> None:
    """Estimate what is not known, and write after each shape."""
    known = guide.stored() if guide.PEAKS.is_file() and "--anew" not in sys.argv else {}
    for name in BUILT_IN:
        shape, before = load_shape(name), known.get(name, {})
        steps = list(guide.steps_of(shape))
        lengths = {str(n): guide.peaks_of(shape, steps, n, before.get(str(n), {})) for n in guide.SEQUENCES}
        known[name] = lengths
        ordered = {name: known[name] for name in BUILT_IN if name in known}
        text = json.dumps(ordered, separators=(",", ":")).replace('},"', '},\n"')
        write_atomically(guide.PEAKS, (text + "\n").encode())
        print(name, flush=True)


if __name__ == "__main__":
    main()
