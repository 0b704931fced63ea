"""The state of a run on disk. It is written whole or not at all.

A run's folder holds one finished checkpoint, `step-00000120`:

    tensors.safetensors   trainable/<parameter>, optimizer/<parameter>/<state>, buffer/<name>, best/<parameter>
    state.json            step, history, plain values of the optimiser and the loss scale, the run's identity,
                          the SHA-256 of the tensors

A checkpoint is first written into a folder with another name and forced to the disk. Then the folder is renamed, which
happens completely or not at all. Only then is the older checkpoint removed. So the newest folder `step-*` is always
complete, even if the process was killed. Reading these files cannot execute code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftlab.errors import PeftLabError
from peftlab.files import sync

FORMAT = 1
TENSORS, RECORD = "tensors.safetensors", "state.json"
STEP, DRAFT = r"step-\d{8,}", r"\.writing-\d+"


def newest(folder: Path) -> Path | None:
    """The newest finished checkpoint in a run's folder, or None."""
    finished = [path for path in _folders(folder, STEP) if (path / RECORD).exists()]
    return max(finished, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def write(folder: Path, step: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write the checkpoint of a step, and remove the older ones.

    Raises:
        PeftLabError: it cannot be written (a full disk, no permission). The older checkpoint is still whole.
    """
    target = folder / f"step-{step:08d}"
    draft = folder / f".writing-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, draft / TENSORS)
        with open(draft / TENSORS, "rb+") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        with open(draft / RECORD, "w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, "step": step, "sha256": digest, **record}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        sync(draft)
        if not target.exists():
            draft.rename(target)
        elif (target / RECORD).exists():  # another process did the same step; both wrote the same
            shutil.rmtree(draft)
        else:  # somebody else's folder of that name; with the record in it, it is a checkpoint
            for name in (TENSORS, RECORD):
                os.replace(draft / name, target / name)
            draft.rmdir()
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise PeftLabError(f"The checkpoint of step {step} cannot be written into {folder}: {error}") from error
    for older in _folders(folder, STEP):
        if int(older.name.removeprefix("step-")) < step:
            _remove(older)


def read(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the record and the tensors of a checkpoint, on the CPU.

    Raises:
        PeftLabError: a file is missing, damaged, or of another format.
    """
    advice = f"Delete {checkpoint} to start the run again."
    try:
        with open(checkpoint / RECORD, encoding="utf-8") as file:
            record = json.load(file)
        with open(checkpoint / TENSORS, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, RecursionError) as error:
        raise PeftLabError(f"The checkpoint {checkpoint} cannot be read: {error}. {advice}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise PeftLabError(f"The checkpoint {checkpoint} is not of format {FORMAT}, which this version reads. {advice}")
    if digest != record.get("sha256"):
        raise PeftLabError(f"{checkpoint / TENSORS} is damaged: its SHA-256 differs from the recorded one. {advice}")
    return record, load_file(checkpoint / TENSORS)


def clean(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for draft in _folders(folder, DRAFT):
        shutil.rmtree(draft, ignore_errors=True)


def _folders(folder: Path, pattern: str) -> list[Path]:
    """The folders in a run's folder with names of ours; other files and folders may lie there too."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if re.fullmatch(pattern, path.name) and path.is_dir()]


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; a file that is none of its two stays, and the folder with it."""
    for name in (TENSORS, RECORD):
        with contextlib.suppress(OSError):
            (checkpoint / name).unlink()
    with contextlib.suppress(OSError):
        checkpoint.rmdir()
