"""The folder of one `peftlab train`: held by one run at a time, claimed by its settings, filled whole or not at all.

Only what a run made is ever replaced or removed. The folder's `RECORD` lists each file with the SHA-256 sums that it
had when a run wrote it: the last ones, since a kill may come between the record and the file. A file with another sum
is somebody's own. A folder without a record is taken only if it is empty, or if a run of a version that kept no record
can be recognised there; that run goes on, and nothing of it is removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peftlab.adapters.card import CARD, may_write
from peftlab.errors import PeftLabError
from peftlab.files import file_sum, write_atomically, write_together
from peftlab.foreign import read_fields

SETTINGS, METRICS, STATE, MODEL = "settings.json", "metrics.json", "run", "model"
RECORD, LOCK = ".peftlab-run.json", ".lock"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_encoder.safetensors")
# What transformers writes of a tokenizer, beside an adapter that has new tokens
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
STATE_FILES = ("tensors.safetensors", "state.json")  # of each checkpoint, by `peftlab.training.files`
STEP = r"step-\d{8,}|\.writing-\d+"
DRAFT = r"\.model-\w{8}(-old)?"
OF_SETTINGS = {"model", "data", "method", "seed", "lr", "batch_size"}  # which every version has written
ELSEWHERE = "Give --out another folder, a new or an empty one, or move those files away."


@dataclasses.dataclass
class Place:
    """An --out folder and what is known of it.

    Attributes:
        folder: where the run's files go.
        made: {path within the folder: the sums under which a run of ours wrote it}.
        recorded: whether the folder has a record; without one it is new, or an older version's.
    """

    folder: Path
    made: dict[str, list[str]]
    recorded: bool

    def note(self, sums: dict[str, str]) -> None:
        """Records files before they are written. What lies there now was recorded earlier, and still counts."""
        for path, new in sums.items():
            self.made[path] = [*(one for one in self.made.get(path, ()) if one != new), new][-4:]
        content = {"made by": "peftlab train", "format": 1, "files": self.made}
        write_atomically(self.folder / RECORD, (json.dumps(content, indent=1) + "\n").encode())
        self.recorded = True

    def is_ours(self, path: str) -> bool:
        """Whether a file is what a run wrote: recorded, unchanged, and reached through no link."""
        return not self.linked(path) and file_sum(self.folder / path) in self.made.get(path, ())

    def linked(self, path: str) -> bool:
        """Whether a link stands on the way to a file, so that it lies elsewhere."""
        parts = Path(path).parts
        return any((self.folder / Path(*parts[: n + 1])).is_symlink() for n in range(len(parts)))

    def foreign(self, full: bool) -> list[str]:
        """The files, among those that a run would write or remove, that no run made."""
        names = [SETTINGS, METRICS, *(() if full else ADAPTER), *self.made]
        found = [name for name in dict.fromkeys(names) if _there(self.folder / name) and not self.is_ours(name)]
        if CARD in found and not may_write(self.folder):
            found.remove(CARD)  # a card that a person took over is left alone
        for name in (STATE, MODEL) if full else (STATE,):
            path = self.folder / name
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                found.append(name)
            elif path.is_dir() and name == MODEL and not any(n.startswith(f"{MODEL}/") for n in self.made):
                found.append(f"{MODEL}/")
        return found


def look(
    out: str | Path, settings: dict[str, Any], resume: bool, inputs: Iterable[Any] = (), full: bool = False
) -> Place:
    """Judges an --out folder without changing anything.

    Args:
        settings: of the run; one that is there has to have the same.
        resume: whether to go on with a run that is there.
        inputs: what the run reads, the model and the data; of these, paths on this machine must not be in its way.
        full: whether the run writes a model, and not an adapter.

    Raises:
        PeftLabError: it is no folder, holds what no run made or another run, or its files are the run's input.
    """
    folder = Path(out).expanduser()
    if _there(folder) and not folder.is_dir():
        raise PeftLabError(f"--out {folder} is a file, or a link that leads nowhere; give a folder.")
    above = next((parent for parent in folder.absolute().parents if _there(parent)), folder)
    if not above.is_dir():
        raise PeftLabError(f"--out {folder} cannot be made, since {above} is a file; give another folder.")
    place = Place(folder, {}, False)
    _check_inputs(folder, inputs)
    if not folder.is_dir():
        return place
    if _foreign_lock(folder):
        raise PeftLabError(f"{folder} holds {LOCK}, which is no lock of a run. {ELSEWHERE}")
    if _there(folder / RECORD):
        place = Place(folder, _recorded(folder), True)
    elif any(path.name != LOCK for path in folder.iterdir()):
        place = _older(folder)
    begun = (folder / METRICS).exists() or any((folder / STATE).glob("step-*"))
    same = _settings_agree(place, settings, resume and begun)
    if not place.recorded and begun and not same:
        raise PeftLabError(
            f"{folder} holds a run of an older version, which kept no record of its files, so it cannot be started "
            "again there: its files might not all be its own. Use another --out, or remove that folder yourself."
        )
    if found := place.foreign(full):
        raise PeftLabError(
            f"{folder} holds {_listed(found)}, which no run here made, or which was changed since, and which would be "
            f"overwritten. {ELSEWHERE}"
        )
    return place


def claim(
    out: str | Path, settings: dict[str, Any], resume: bool, inputs: Iterable[Any] = (), full: bool = False
) -> Place:
    """Notes the settings in the folder, which is held, and removes what an earlier run left, unless it goes on.

    The arguments and the errors are those of `look`, which judges the folder first.
    """
    place = look(out, settings, resume, inputs, full)
    folder = place.folder
    sweep(place)
    begun = (folder / METRICS).exists() or any((folder / STATE).glob("step-*"))
    if not (resume and begun):
        # What an earlier run left must not be taken for the result of this one.
        for path in place.made:
            if place.is_ours(path):
                (folder / path).unlink()
        for checkpoint in _matching(folder / STATE, STEP):
            _empty(checkpoint, STATE_FILES)
        for leaf in (STATE, MODEL):
            with contextlib.suppress(OSError):
                (folder / leaf).rmdir()
        place.made.clear()
    content = _json(settings)
    place.note({SETTINGS: _sum(content)})
    write_atomically(folder / SETTINGS, content)
    return place


def write_metrics(place: Place, result: dict[str, Any]) -> None:
    """Writes `metrics.json`."""
    content = _json(result)
    place.note({METRICS: _sum(content)})
    write_atomically(place.folder / METRICS, content)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, so that no second run writes into it. A killed run releases it."""
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise PeftLabError(f"Another run is writing into {folder}; wait for it, or use another --out.") from None
    try:
        yield
    finally:
        lock.release()


def write_card(model: Any, place: Place, about: Mapping[str, Any]) -> None:
    """Write the adapter's model card anew, with what the run has measured since it was saved."""
    from peftlab.adapters.checkpoint import adapter_files

    if may_write(place.folder):
        content = adapter_files(model, about=about)[CARD]
        assert content is not None  # every adapter has a card
        place.note({CARD: _sum(content)})
        write_atomically(place.folder / CARD, content)


def save(
    model: Any,
    tokenizer: Any,
    place: Place,
    adapter: bool,
    about: Mapping[str, Any] | None = None,
    new_tokens: bool = False,
) -> int:
    """Save what was trained, in one step, with `about` in its model card; returns its size in bytes.

    Beside an adapter with new tokens lies the tokenizer that has them.
    """
    folder = place.folder
    if adapter:
        from peftlab.adapters.checkpoint import WEIGHTS, adapter_files

        files = tokenizer_files(tokenizer) if new_tokens else {}
        files |= {name: content for name, content in adapter_files(model, about=about).items() if content is not None}
        if not may_write(folder):
            del files[CARD]
        place.note({name: _sum(content) for name, content in files.items()})
        write_together(folder, files)
        return (folder / WEIGHTS).stat().st_size
    from peftlab.assets.models import quiet

    draft = Path(tempfile.mkdtemp(dir=folder, prefix=".model-"))
    try:
        with quiet():
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
        os.chmod(draft, 0o755)
        sums = ((path, file_sum(path)) for path in sorted(draft.rglob("*")))  # None for what is no file
        place.note({f"{MODEL}/{path.relative_to(draft).as_posix()}": one for path, one in sums if one is not None})
        replace_folder(draft, folder / MODEL, lambda before: None)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    sweep(place)
    return sum(file.stat().st_size for file in (folder / MODEL).glob("*.safetensors"))


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """Return the files of a tokenizer, by name."""
    from peftlab.assets.models import quiet

    with tempfile.TemporaryDirectory() as draft, quiet():
        tokenizer.save_pretrained(draft)
        return {name: (Path(draft) / name).read_bytes() for name in TOKENIZER if (Path(draft) / name).is_file()}


def replace_folder(new: Path, old: Path, dispose: Callable[[Path], Any] | None = None) -> None:
    """Put a folder in another's place; if that fails, the other is there as before.

    `dispose` is given the other, under the name NEW-old; without it that folder is removed.
    """
    aside = new.with_name(new.name + "-old")
    if old.exists():
        old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        if aside.exists():
            aside.rename(old)
        raise
    if aside.exists():
        dispose(aside) if dispose else shutil.rmtree(aside, ignore_errors=True)


def sweep(place: Place) -> None:
    """Removes what saving a model leaves: drafts of killed processes, and the model before.

    What somebody else put beside that model is moved into the new one. Where the new one has a file of that name, it
    stays where it is.
    """
    folder = place.folder
    for draft in _matching(folder, DRAFT):
        if not draft.name.endswith("-old"):
            shutil.rmtree(draft, ignore_errors=True)
            continue
        if not (folder / MODEL).exists():  # killed between the two renames
            draft.rename(folder / MODEL)
            continue
        for path in sorted(draft.rglob("*"), reverse=True):
            inner = path.relative_to(draft)
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):
                    path.rmdir()
            elif not path.is_symlink() and file_sum(path) in place.made.get(f"{MODEL}/{inner.as_posix()}", ()):
                path.unlink()
            elif not _there(folder / MODEL / inner):
                (folder / MODEL / inner).parent.mkdir(parents=True, exist_ok=True)
                path.rename(folder / MODEL / inner)
        with contextlib.suppress(OSError):
            draft.rmdir()


def _check_inputs(folder: Path, inputs: Iterable[Any]) -> None:
    """Refuses a folder that is what the run reads, or whose own files are."""
    out = Path(os.path.realpath(folder))
    for given in inputs:
        source = Path(str(given)).expanduser()
        if not source.exists():
            continue
        source = Path(os.path.realpath(source))
        names = (RECORD, LOCK, SETTINGS, METRICS, STATE, MODEL, *ADAPTER, *TOKENIZER)
        at_it = source == out or (out in source.parents and source.relative_to(out).parts[0] in names)
        if at_it:
            raise PeftLabError(
                f"{given} would be overwritten: the run reads it, and --out {folder} is where it writes. Give --out "
                "another folder."
            )


def _settings_agree(place: Place, settings: dict[str, Any], going_on: bool) -> bool:
    """Whether the folder's settings are those of this run, where it goes on with one that is there."""
    file = place.folder / SETTINGS
    if not (file.exists() and going_on):
        return False
    try:
        before = read_fields(file)
    except PeftLabError as error:
        raise PeftLabError(f"{str(error).rstrip('.')}; use --no-resume to start again.") from None
    changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
    if changed:
        told = ", ".join(
            f"--{k.replace('_', '-')} was {_told(before.get(k))}, now {_told(settings.get(k))}" for k in changed
        )
        again = ", or --no-resume to start again" if place.recorded else ""
        raise PeftLabError(f"{place.folder} holds another run ({told}). Use another --out{again}.")
    return True


def _recorded(folder: Path) -> dict[str, list[str]]:
    """The files of a folder's record."""
    try:
        files = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
        made = {str(path): [str(one) for one in sums] for path, sums in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PeftLabError(
            f"{folder / RECORD}, the record of what a run made here, cannot be read ({error}). {ELSEWHERE}"
        ) from None
    mine = {SETTINGS, METRICS, *ADAPTER, *TOKENIZER}
    return {
        path: sums
        for path, sums in made.items()
        if path in mine or (path.startswith(f"{MODEL}/") and ".." not in Path(path).parts)
    }


def _older(folder: Path) -> Place:
    """The place of a run of an older version, recognised by its settings and the form of its files.

    Raises:
        PeftLabError: the folder holds something else.
    """
    found = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir() if path.name != LOCK)
    settings = _read(folder / SETTINGS)
    states = [_read(path / "state.json") for path in _matching(folder / STATE, STEP)]
    metrics = _read(folder / METRICS)
    ours = (
        OF_SETTINGS <= settings.keys()
        and all({"format", "step", "sha256", "identity"} <= state.keys() for state in states)
        and (not _there(folder / METRICS) or metrics.get("settings") == settings)
        and (states or metrics or not any(_there(folder / name) for name in (STATE, MODEL, *ADAPTER)))
    )
    if not ours:
        raise PeftLabError(f"{folder} is no folder of a run, and it holds {_listed(found or [LOCK])}. {ELSEWHERE}")
    # When such a run began, it removed every adapter and model that lay there; what lies there now is its own.
    paths = [folder / name for name in (SETTINGS, METRICS, *ADAPTER)]
    if not (folder / MODEL).is_symlink():
        paths += sorted((folder / MODEL).rglob("*"))
    sums = ((path, file_sum(path)) for path in paths if not path.is_symlink())  # None for what is no file
    made = {path.relative_to(folder).as_posix(): [one] for path, one in sums if one is not None}
    return Place(folder, made, False)


def _foreign_lock(folder: Path) -> bool:
    """Whether a file called like our lock is not one: ours is empty."""
    lock = folder / LOCK
    return _there(lock) and (lock.is_symlink() or not lock.is_file() or lock.stat().st_size > 0)


def _matching(folder: Path, pattern: str) -> list[Path]:
    """The folders inside a folder with names of ours; links are not ours."""
    if not folder.is_dir() or folder.is_symlink():
        return []
    found = (path for path in folder.iterdir() if re.fullmatch(pattern, path.name))
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def _empty(folder: Path, names: Iterable[str]) -> None:
    """Removes files of ours from a folder, and the folder if nothing else is in it."""
    for name in names:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _read(file: Path) -> dict[str, Any]:
    """A JSON object in a file, or an empty dict."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more


def _told(value: Any) -> Any:
    return "not given" if value is None else value


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
