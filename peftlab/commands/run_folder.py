"""The folder of `peftlab train`: one run at a time holds it, and its files appear completely or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftlab.errors import PeftLabError
from peftlab.files import write_atomically

SETTINGS, METRICS, STATE, MODEL = "settings.json", "metrics.json", "run", "model"


def claim(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """Write the settings into the folder, or compare them with those of the run that is there."""
    file = folder / SETTINGS
    begun = (folder / METRICS).exists() or any((folder / STATE).glob("step-*"))
    if file.exists() and resume and begun:  # a run that saved no state cannot be continued
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PeftLabError(f"{file} cannot be read ({error}); use --no-resume to start again.") from None
        changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        if changed:
            told = ", ".join(
                f"--{k.replace('_', '-')} was {_told(before.get(k))}, now {_told(settings.get(k))}" for k in changed
            )
            raise PeftLabError(
                f"{folder} holds another run ({told}). Use another --out, or --no-resume to start again."
            )
        return
    # Remove what an earlier run left, so that nobody takes it for the result of this one.
    for leftover in (METRICS, "adapter_config.json", "adapter_model.safetensors"):
        (folder / leftover).unlink(missing_ok=True)
    for leftover in (STATE, MODEL):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    write_json(file, settings)


def _told(value: Any) -> Any:
    return "not given" if value is None else value


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, so that no second run writes into it. A killed run releases it."""
    import filelock

    if folder.exists() and not folder.is_dir():
        raise PeftLabError(f"--out {folder} is a file; give a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise PeftLabError(f"Another run is writing into {folder}; wait for it, or use another --out.") from None
    try:
        yield
    finally:
        lock.release()


def save(model: Any, tokenizer: Any, folder: Path, adapter: bool) -> int:
    """Save what was trained, in one step, and return its size in bytes."""
    if adapter:
        from peftlab.adapters.checkpoint import WEIGHTS, save_adapter

        save_adapter(model, folder)
        return (folder / WEIGHTS).stat().st_size
    from peftlab.assets.models import quiet

    draft = Path(tempfile.mkdtemp(dir=folder, prefix=".model-"))
    try:
        with quiet():
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
        os.chmod(draft, 0o755)
        replace_folder(draft, folder / MODEL)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return sum(file.stat().st_size for file in (folder / MODEL).glob("*.safetensors"))


def replace_folder(new: Path, old: Path) -> None:
    """Replace a folder by another one. If that fails, the old one is still there."""
    aside = new.with_name(new.name + "-old")
    if old.exists():
        old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        if aside.exists():
            aside.rename(old)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file completely or not at all."""
    write_atomically(file, (json.dumps(value, indent=2) + "\n").encode())
