"""Save and load adapter folders in Hugging Face peft's format, both ways from one table of keys.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. An adapter that is not called `default` lies in a
subfolder of its name. Each part of an adapter says under which key each of its parameters is stored. Saving reads that
table forwards and loading reads it backwards, so the two cannot disagree. Hugging Face's format holds only what a
network made (a prompt, say). The network itself lies in a second file, so that training can continue.

The file's metadata, which Hugging Face peft ignores, also holds SHA-256 sums of the tensors and of the config, and a
few numbers of the base's weights. So damage, mixed-up files and another base model are noticed. The files are written
together: if a save is killed, the folder loads as the whole old adapter or as the whole new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftlab.adapters.card import CARD, card, may_write
from peftlab.adapters.config_fields import CONFIG, TARGET_FIELDS, classes_of, from_fields, method_name, to_fields
from peftlab.adapters.fusing import fused
from peftlab.adapters.injection import add, check_name, prepare, settle
from peftlab.adapters.integrity import REST, base_sample, check_base, check_rest, rest_sample
from peftlab.adapters.judging import Allowance, check_ranks, check_sizes, warn_of_unknown
from peftlab.adapters.key_forms import check_foreign, read_as
from peftlab.adapters.key_table import (
    as_saved,
    base_name,
    check_keys,
    embedding_copies,
    encoder_table,
    entries,
    key_table,
    placed,
    sampled,
)
from peftlab.adapters.serving import Note, notes, serving_lines, warning
from peftlab.adapters.serving import portable as portable_form
from peftlab.adapters.vocabulary import lengthened, rows_of
from peftlab.checks import checked
from peftlab.core.embeddings import word_embeddings
from peftlab.core.hooks import base_modules
from peftlab.core.interface import Placement
from peftlab.core.records import as_transformer, require_adapter, unwrap
from peftlab.core.sharding import Processes, in_one_piece, piece_of, refuse_sharded
from peftlab.core.sums import check_sums, digest, with_sums
from peftlab.core.tensor_files import read_shapes, read_tensors, serialised
from peftlab.errors import PeftLabError, did_you_mean, warn
from peftlab.files import read_settled, settled, write_together
from peftlab.foreign import read_fields
from peftlab.methods.lora_starts import STARTED, from_weight, unfolded
from peftlab.patterns import bounded

WEIGHTS = "adapter_model.safetensors"
ENCODER = "adapter_encoder.safetensors"  # only this package reads it
FILES = (ENCODER, WEIGHTS, CONFIG)  # the order in which they are put in place; peft looks for the config first
FREE = ("base_model_name_or_path", "inference_mode", "revision", "peft_version")  # fields that may be edited


@checked()
def save_adapter(model: nn.Module, folder: str | os.PathLike, name: str = "default", *, portable: bool = False) -> Path:
    """Write an adapter so that both this package and Hugging Face peft can load it, with a model card beside it.

    Serving programs read less of a config than Hugging Face peft does. A warning names what llama.cpp, vLLM or SGLang
    would refuse or misread of a language model's adapter, such as rsLoRA's scaling.

    If `fully_shard` has divided the model, call this in every process. They gather whole tensors together, the first
    process writes them, and none goes on before that is done. Under DistributedDataParallel any one process can save.

    Args:
        folder: where to write. An adapter that is not called "default" goes into a subfolder of its name.
        portable: whether to write it so that all three read it rightly, as Hugging Face peft and this package still do:
            the scalings of rsLoRA and of alpha patterns are folded into B, all modules get the greatest rank (with
            zeros), and the targets are a list of names. The model is not changed. The adapter must be a LoRA without
            biases and without modules trained in full.

    Returns:
        The folder that holds the files. The card is `README.md`; one that a person wrote or took over stays as it is.

    Raises:
        PeftLabError: there is no such adapter, a parameter is not finite, the adapter has no portable form, or the
            folder holds files of these names that are no adapter's; or the model is sharded and a process does not
            come. Nothing is then written.

    >>> model = pl.attach(model, pl.LoRAConfig(r=4))
    >>> folder = pl.save_adapter(model, "my-adapter")
    >>> sorted(file.name for file in folder.iterdir())
    ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    root = unwrap(model)
    require_adapter(root, name)
    processes, call = Processes(root), f"save_adapter(model, ..., {name!r})"
    processes.meet(call)
    with bounded():
        state = adapter_state(root, name, portable)
        contents = files_of(state)
        told = serving_notes(state) if state.fields["peft_type"] == "LORA" else []  # they serve no other method
    if told:
        warn(warning(told))
    folder = Path(folder) if name == "default" else Path(folder) / name
    processes.write(call, lambda: write_adapter(folder, contents))
    return folder


def write_adapter(folder: Path, contents: dict[str, bytes | None]) -> None:
    """Write the files of an adapter's folder, all or none; a card that is a person's stays."""
    check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if contents[ENCODER] is None and not _has_encoder(folder):
        del contents[ENCODER]  # the file, if there is one, is no adapter's
    if not may_write(folder):
        del contents[CARD]
    write_together(folder, contents)


def check_place(folder: Path) -> None:
    """Refuse a folder with files of these names that are no adapter's; an adapter may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise PeftLabError(f"{folder} is a file; save_adapter writes into a folder. Give another path.")
    paths = settled(folder, (WEIGHTS, CONFIG))
    try:
        if CONFIG in paths and "peft_type" not in read_fields(paths[CONFIG]):
            raise PeftLabError(f"it has no peft_type, which every adapter's {CONFIG} has")
        if WEIGHTS in paths and CONFIG not in paths:
            read_shapes(paths[WEIGHTS])
    except PeftLabError as error:
        raise PeftLabError(
            f"{folder} holds {' and '.join(sorted(paths))} of something else than an adapter ({error}), and "
            "save_adapter would overwrite it. Save into another folder, or move that away."
        ) from None


class State(NamedTuple):
    """Hold what an adapter's folder is made of.

    Attributes:
        root: the model; None for a folder that is made from another folder.
        method: the method's name in the catalogue.
        fields: the contents of the config.
        tensors: those of the adapter's file, and `encoder` those of the file beside it.
        metadata: what the adapter's file says beside its tensors and their sums.
        parameters: how many parameters the adapter has.
        tied: paths of adapted modules whose weight is the word embeddings' own.
    """

    root: nn.Module | None
    method: str
    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    encoder: dict[str, Tensor]
    metadata: dict[str, str]
    parameters: int
    tied: tuple[str, ...] = ()


def adapter_files(
    model: nn.Module, name: str = "default", about: Mapping[str, Any] | None = None
) -> dict[str, bytes | None]:
    """Return the card and the files of an adapter's folder by name, in the order of `FILES`.

    A file that the adapter does not have is None. The card tells `about`, what is known of the training. All processes
    of a sharded model must call this together.
    """
    return files_of(adapter_state(model, name), about)


def files_of(state: State, about: Mapping[str, Any] | None = None, earlier: str = "") -> dict[str, bytes | None]:
    """Return the card and the files of a folder, as `adapter_files` does.

    Args:
        earlier: the text of another card of the same adapter, from which this one takes what only that one knows.
    """
    text = json.dumps(state.fields, indent=2, sort_keys=True)
    sums = with_sums(state.tensors, json.loads(text), state.metadata, FREE)
    notes_shown = serving_lines(state.fields, state.tensors, serving_notes(state))
    return {
        CARD: card(state.root, state.method, state.fields, state.parameters, about, notes_shown, earlier),
        ENCODER: serialised(state.encoder, {"format": "pt"}) if state.encoder else None,
        WEIGHTS: serialised(state.tensors, sums),
        CONFIG: text.encode(),
    }


def serving_notes(state: State) -> list[Note]:
    """Return what serving programs would refuse or misread; they serve language models."""
    return notes(state.fields, state.tensors, state.tied) if state.fields.get("task_type") == "CAUSAL_LM" else []


def adapter_state(model: nn.Module, name: str, portable: bool = False) -> State:
    """Return what the folder of an attached adapter is made of."""
    root = unwrap(model)
    config = require_adapter(root, name).configs[name]
    placements = in_one_piece(placed(root, name))
    tensors = {}
    for key, parameter in key_table(placements).items():
        if not torch.isfinite(parameter).all():
            raise PeftLabError(
                f"{key} holds values that are not finite; the adapter was not saved. Look at how it was trained: the "
                "loss has probably diverged."
            )
        tensors[key] = parameter.detach().cpu().contiguous().clone()  # shared biases have several keys
    encoder = {key: value.detach().cpu().contiguous().clone() for key, value in encoder_table(placements).items()}

    fields = to_fields(root, config, placements)
    if portable:
        fields, tensors = portable_form(fields, tensors, base_modules(root))
    else:
        tensors |= embedding_copies(root, fields, placements)
    metadata = {"format": "pt", "peftlab_base": json.dumps(base_sample(root, *sampled(placements)))}
    if (rows := rows_of(root)) is not None:
        metadata["peftlab_vocabulary"] = str(rows)
    if encoder:
        metadata["peftlab_encoder"] = digest(encoder)
    init = getattr(config, "init", "")
    if rest := rest_sample(root, (path for path, _, part in placements if part.on_rest)):
        metadata[REST] = json.dumps(rest)
    if from_weight(init) and not portable:
        metadata[STARTED] = init
    parameters = sum(parameter.numel() for placement in placements for parameter in placement.part.parameters())
    tied = tied_paths(root, placements)
    return State(root, method_name(config), fields, tensors, encoder, metadata, parameters, tied)


def tied_paths(root: nn.Module, placements: Iterable[Placement]) -> tuple[str, ...]:
    """Return the paths of adapted output heads whose weight is the word embeddings' own."""
    words = word_embeddings(root)
    head = None if words is None else as_transformer(root).get_output_embeddings()
    if words is None or head is None or getattr(head, "weight", None) is not words[1].weight:
        return ()
    return tuple(path for path, part, _ in placements if part == "lora" and root.get_submodule(path) is head)


def _has_encoder(folder: Path) -> bool:
    """Say whether the adapter in a folder has an encoder in a second file."""
    paths = settled(folder, FILES)
    if WEIGHTS not in paths or ENCODER not in paths:
        return False
    try:
        return "peftlab_encoder" in read_tensors(paths[WEIGHTS])[1]
    except PeftLabError:
        return False


@checked()
def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    name: str = "default",
    *,
    trainable: bool = False,
    adapter_dtype: torch.dtype | str | None = None,
) -> nn.Module:
    """Load an adapter folder of this package or of Hugging Face peft, attach it and make it the active one.

    If the adapter was trained on a lengthened vocabulary, whose new rows it holds, the model is lengthened too, until
    the last adapter is detached. The tokenizer is not known here; save it beside the adapter, and load it from there.

    Args:
        folder: the folder, or its parent if the adapter lies in a subfolder of its name.
        trainable: whether the adapter trains further; by default a loaded adapter is frozen. If a network made a prompt
            and this package saved it, a trainable prompt has that network again; otherwise it is the prompt alone. And
            a LoRA that this package saved with its start from the weight (PiSSA, OLoRA) trains on beside that start;
            otherwise it is a plain LoRA of twice the rank.
        adapter_dtype: as for `attach`.

    Raises:
        PeftLabError: a folder or file is missing, damaged or pickled; the method or the base model is another one; keys
            are missing, extra or misshapen; the name is in use; the vocabulary was longer in training, and the folder
            does not hold the new rows (the message says what to do). The model is then as it was.

    >>> model = pl.attach(model, pl.LoRAConfig(r=4))
    >>> folder = pl.save_adapter(model, "my-adapter")
    >>> model = pl.load_adapter(pl.detach(model), folder, name="copy")
    >>> pl.attached(model)["copy"].r
    4
    """
    root = unwrap(model)
    check_name(name)
    refuse_sharded(root, "load_adapter cannot divide a new adapter with it", "Load first, then call fully_shard.")
    with bounded():
        saved = read_folder(Path(folder), name)
        fields, tensors = fused(root, saved.fields, saved.tensors)
        saved = saved._replace(fields=fields, tensors=tensors)
        started = saved.metadata.get(STARTED) if trainable else None
        config = from_fields(root, unfolded(saved.fields, started))
        check_ranks(saved.folder, config, {key: tuple(tensor.shape) for key, tensor in saved.tensors.items()})
        warn_of_unknown(saved.folder, saved.fields, classes_of(saved.fields), TARGET_FIELDS)
        if not (trainable and saved.encoder):
            config = config.as_stored()
        allowance = Allowance(saved.folder, saved.tensors, saved.encoder)
        check_base(root, saved.folder, saved.metadata, base_name(root) or type(root).__name__)
        tokens, recorded = getattr(config, "trainable_tokens", None), saved.metadata.get("peftlab_vocabulary", "")
        with lengthened(root, saved.folder, tokens, saved.tensors, recorded):
            placements, unseen = prepare(root, name, config, adapter_dtype, allowance)
            saved = saved._replace(tensors=read_as(key_table(placements), saved.tensors, saved.folder))
            settle(root, placements)
            saved = saved._replace(tensors=as_saved(root, placements, saved.tensors))
            check_fit(root, placements, saved)
            fill(placements, saved)
            together = check_rest(root, saved.folder, saved.metadata)
            made: list[Any] = [part for path, name_of, part in placements if path in together and name_of == "lora"]
            for part in made:
                part.on_rest = True  # so that it is saved with that note again
    add(root, name, config, placements, unseen, trainable=trainable)
    return model


class Saved(NamedTuple):
    """Hold an adapter's folder after reading.

    Attributes:
        folder: where it lies.
        fields: the fields of its config.
        tensors: its tensors.
        metadata: the metadata of their file.
        encoder: the weights of the network that made those tensors, if it was saved.
    """

    folder: Path
    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    encoder: dict[str, Tensor] = {}  # noqa: RUF012


def read_folder(folder: Path, name: str) -> Saved:
    """Read an adapter's files, and check that they are whole and belong together.

    The config is judged by the tensors' shapes before a tensor is read.
    """
    folder = locate(folder, name)

    def read(paths: dict[str, Path]) -> Saved:
        config, file, second = (paths.get(kind, folder / kind) for kind in (CONFIG, WEIGHTS, ENCODER))
        fields, there = read_fields(config), ENCODER in paths
        check_sizes(folder, fields, read_shapes(file), read_shapes(second) if there else {})
        tensors, metadata = read_tensors(file)
        check_sums(folder / CONFIG, folder / WEIGHTS, fields, tensors, metadata, FREE)
        check_foreign(folder, tensors)
        encoder: dict[str, Tensor] = {}
        if "peftlab_encoder" in metadata and there:
            encoder, _ = read_tensors(second)
            if digest(encoder) != metadata["peftlab_encoder"]:
                raise PeftLabError(
                    f"{folder / ENCODER} and {WEIGHTS} were not saved together, or one was changed. Save the adapter "
                    f"again, or delete {ENCODER}, which only further training needs."
                )
        return Saved(folder, fields, tensors, metadata, encoder)

    return read_settled(folder, FILES, read)


def check_fit(root: nn.Module, placements: Iterable[Placement], saved: Saved) -> None:
    """Require that a folder's base, keys and shapes are those of this model and these parts."""
    check_base(root, saved.folder, saved.metadata, base_name(root) or type(root).__name__)
    check_keys(root, saved.folder, saved.fields, placements, saved.tensors)
    encoder = encoder_table(placements)
    if encoder and {key: tensor.shape for key, tensor in saved.encoder.items()} != {
        key: parameter.shape for key, parameter in encoder.items()
    }:
        raise PeftLabError(
            f"{saved.folder} holds the output of the adapter's encoder, but the encoder itself is not there (no "
            f"{ENCODER}, or one of other shapes), so training cannot continue. Save it with this package, or attach "
            "the adapter without an encoder."
        )


@torch.no_grad()
def fill(placements: Iterable[Placement], saved: Saved) -> None:
    """Copy saved tensors into an adapter's parts, in place of the values that the parts started with."""
    # An encoder's output is not copied; its weights (next loop) reproduce it.
    for key, placement, own, _ in entries(p for p in placements if not p.part.encoder_keys):
        for tensor, value in placement.part.values_from(own, saved.tensors[key]):
            tensor.copy_(piece_of(value, tensor))
    for key, parameter in encoder_table(placements).items():
        parameter.copy_(piece_of(saved.encoder[key], parameter))


def check_config(root: nn.Module, name: str, placements: list[Placement], saved: Saved) -> None:
    """Require that with a folder's weights an attached adapter computes the same as the saved one did.

    Where the adapter stands is checked by `check_keys`. Both configs are brought to one form first, since peft may
    write another.
    """
    attached, other = to_fields(root, require_adapter(root, name).configs[name], placements), saved.fields
    mine, theirs = (to_fields(root, from_fields(root, fields), placements) for fields in (attached, other))
    for field in mine.keys() - {*TARGET_FIELDS}:
        if mine[field] != theirs.get(field):
            raise PeftLabError(
                f"The adapter in {saved.folder} has {field}={theirs.get(field)!r}; the attached {name!r} has "
                f"{mine[field]!r}. Attach it with the config that was saved."
            )


def locate(folder: Path, name: str) -> Path:
    """Return the folder that holds an adapter's two files."""
    for candidate in (folder / name, folder) if name != "default" else (folder,):
        if read_settled(candidate, FILES, lambda paths: {CONFIG, WEIGHTS} <= paths.keys()):
            return candidate
    if not folder.is_dir():
        near = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        raise PeftLabError(f"There is no adapter folder {str(folder)!r}.{did_you_mean(folder.name, near)}")
    pickles = [file for end in ("bin", "pt", "pth") for file in sorted(folder.glob(f"adapter_model.{end}"))]
    if pickles and not (folder / WEIGHTS).exists():
        raise PeftLabError(
            f"{pickles[0]} is a pickle, which can run code when it is opened, so it is not read. Convert it; with "
            f"weights_only=True torch runs no code: {conversion(pickles[0], folder / WEIGHTS)}"
        )
    if any(folder.glob("pytorch_lora_weights.*")):
        raise PeftLabError(
            f"{folder} holds pytorch_lora_weights, the form of diffusers, which has other keys and no {CONFIG}. Only "
            "folders of Hugging Face peft are read: load it in diffusers, and save it with Hugging Face peft's "
            "save_pretrained."
        )
    there = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    hint = f" It holds adapters named {', '.join(map(repr, there))}; give one as name." if there else ""
    raise PeftLabError(f"{folder} lacks {CONFIG} or {WEIGHTS}.{hint}")


def conversion(pickle: Path, file: Path) -> str:
    """Return the Python code that converts a pickle of tensors to a safetensors file, running nothing of the pickle."""
    return (
        "import torch; from safetensors.torch import save_file; "
        f"tensors = torch.load({str(pickle)!r}, map_location='cpu', weights_only=True); "
        f"save_file({{key: tensor.clone().contiguous() for key, tensor in tensors.items()}}, {str(file)!r})"
    )
