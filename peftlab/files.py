"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file so that a reader finds the old one or the new one whole, also after a kill or a power cut.

    The file gets the mode of any new file, and after an error nothing is left behind. Raises OSError as `open` does.
    """
    path = Path(path)
    # In the same folder, since a rename is one step only within a file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
