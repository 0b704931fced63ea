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

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftlab.errors import PeftLabError

FORMAT = 1
TENSORS, RECORD = "tensors.safetensors", "state.json"


def newest(folder: Path) -> Path | None:
    """Return the newest finished checkpoint in a run's folder, or None."""
    return max(folder.glob("step-*"), default=None) if folder.is_dir() else None


def write(folder: Path, step: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> Path:
    """Write the checkpoint of a step, remove the older ones, and return its folder.

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
        _sync_folder(draft)
        if target.exists():  # another process finished the same step, with the same result
            shutil.rmtree(draft)
        else:
            draft.rename(target)
        _sync_folder(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise PeftLabError(f"The checkpoint of step {step} cannot be written into {folder}: {error}") from error
    for older in folder.glob("step-*"):
        if older.name < target.name:
            shutil.rmtree(older, ignore_errors=True)
    return target


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
    except (OSError, ValueError) as error:
        raise PeftLabError(f"The checkpoint {checkpoint} cannot be read: {error}. {advice}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise PeftLabError(f"The checkpoint {checkpoint} is not of format {FORMAT}, which this version reads. {advice}")
    if digest != record.get("sha256"):
        raise PeftLabError(f"{checkpoint / TENSORS} is damaged: its SHA-256 differs from the recorded one. {advice}")
    return record, load_file(checkpoint / TENSORS)


def clean(folder: Path) -> None:
    """Remove the unfinished checkpoints that killed processes left behind."""
    for draft in folder.glob(".writing-*"):
        shutil.rmtree(draft, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk. Windows has no such call and does not need one."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
