"""Write files completely or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Write a file so that a reader always finds a complete one, the old or the new, even after a kill or a power cut.

    The file gets the usual mode of a new file. After an error nothing is left behind. Raises OSError as `open` does.
    """
    path = Path(path)
    # In the same folder, because only within one file system is a rename a single step.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
