"""Save and restore adapters in the checkpoints of transformers' `Trainer`.

`Trainer` saves a model by `save_pretrained`, which holds the base alone. With this callback each `checkpoint-N` also
holds every attached adapter, in Hugging Face's format, in its folder `adapter`. A resumed run starts from it:

    trainer = Trainer(model=model, ..., callbacks=[AdapterCallback()])
    trainer.train(resume_from_checkpoint=True)

An adapter that takes part in training steps, AdaLoRA's, does so here too. What it adds to the loss comes in by its
gradient, after `Trainer` has clipped the others, and is not in the loss that `Trainer` logs. The checkpoint holds all
that such an adapter needs to go on, in one more file, since its own is pruned.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftlab.adapters.checkpoint import check_config, check_fit, fill, read_folder, save_adapter
from peftlab.adapters.injection import attached
from peftlab.adapters.key_forms import read_as
from peftlab.adapters.key_table import as_saved, key_table, placed
from peftlab.checks import checked
from peftlab.core.records import record_of, require_adapter, unwrap
from peftlab.core.sharding import in_one_piece, is_sharded
from peftlab.core.steps import Taking, add_gradients, after_step, begin_run, gathered, schedules, take, taking_part
from peftlab.core.tensor_files import read_tensors, serialised
from peftlab.errors import PeftLabError
from peftlab.files import write_atomically

FOLDER = "adapter"
STEPS = "training.safetensors"


class AdapterCallback(TrainerCallback):
    """Save the attached adapters with each checkpoint, and restore them when a run is resumed.

    Attributes:
        resume_from: the checkpoint folder that `train(resume_from_checkpoint=...)` was given. It is needed only if the
            folder lies outside `output_dir`, since `Trainer` does not tell its callbacks.
    """

    @checked()
    def __init__(self, resume_from: str | os.PathLike | None = None) -> None:
        self.resume_from = resume_from

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        """Write the adapters into the checkpoint that was just saved."""
        model = rest["model"]
        if args.should_save or is_sharded(unwrap(model)):  # all processes of a sharded model save together
            for name in attached(model):
                save_adapter(model, checkpoint_folder(args, state) / FOLDER, name)
            adapters = taking_part(unwrap(model))
            if adapters and args.should_save:
                file = checkpoint_folder(args, state) / FOLDER / STEPS
                whole = {key: tensor.detach().cpu().contiguous() for key, tensor in state_of(adapters).items()}
                write_atomically(file, serialised(whole, {"schedule": schedules(unwrap(model))}))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """Add the gradient of what adapters add to the loss."""
        add_gradients(taking_part(unwrap(rest["model"])), 1.0)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """Let adapters work after the step that was just made, as `pl.after_step` does."""
        if taking_part(unwrap(rest["model"])):
            after_step(rest["model"], state.global_step + 1)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """Restore the adapters of the checkpoint that the run resumes from.

        Raises:
            PeftLabError: that checkpoint holds no adapter, another one, or a damaged one.
        """
        record = record_of(unwrap(rest["model"]))
        if record is not None:
            record.activity.saving_known = True  # `Trainer` calls save_pretrained, and this callback adds the adapters
        begin_run(unwrap(rest["model"]), state.max_steps)
        if state.global_step > 0:
            given = self.resume_from
            restore_adapters(rest["model"], Path(given) if given else checkpoint_folder(args, state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        """Restore the adapters of the best checkpoint, if `load_best_model_at_end` is set."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            restore_adapters(rest["model"], Path(state.best_model_checkpoint))


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder that `Trainer` uses for the current step."""
    assert args.output_dir is not None  # TrainingArguments fills it in
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def restore_adapters(model: nn.Module, checkpoint: Path) -> None:
    """Copy the saved weights of every attached adapter into the model; the parameters stay the same objects."""
    if not (checkpoint / FOLDER).is_dir():
        raise PeftLabError(
            f"{checkpoint} holds no adapter: it was saved without AdapterCallback, or the run stopped while saving. "
            "Resume from another checkpoint, or say where it lies with AdapterCallback(resume_from=...)."
        )
    taking = taking_part(unwrap(model))
    for name in attached(model):
        if all(name != other.name for other in taking):
            restore_adapter(model, checkpoint / FOLDER, name)
    if taking:
        restore_taking(unwrap(model), taking, checkpoint / FOLDER / STEPS)


@torch.no_grad()
def restore_taking(root: nn.Module, adapters: list[Taking], file: Path) -> None:
    """Restore the adapters that take part in training steps, with their parameters before pruning.

    Raises:
        PeftLabError: the checkpoint has no such file, or that of another adapter.
    """
    if not file.is_file():
        raise PeftLabError(f"{file.parent} lacks {STEPS}, which {adapters[0].name!r} needs to go on. Begin a new run.")
    tensors, metadata = read_tensors(file)
    mine = {key: p for key, p in state_of(adapters).items() if "/parameter/" in key}
    same = all(key in tensors and tensors[key].shape == p.shape for key, p in mine.items())
    if not same or metadata.get("schedule") != schedules(root):
        raise PeftLabError(
            f"{file} is that of another run: {metadata.get('schedule')!r}, and this one is {schedules(root)!r}. Make "
            "them the same, or begin a new run."
        )
    for key, parameter in mine.items():
        parameter.copy_(tensors[key])
    take(adapters, tensors)


def state_of(adapters: list[Taking]) -> dict[str, Tensor]:
    """Return the whole parameters of these adapters, and what they have gathered."""
    parameters = {
        f"{path}/{name}/{kind}/parameter/{own}": p
        for name, _, placements in adapters
        for path, kind, part in placements
        for own, p in part.named_parameters()
    }
    return parameters | gathered(adapters)


def restore_adapter(model: nn.Module, folder: Path, name: str) -> None:
    """Copy an adapter folder's weights into the attached adapter of that name.

    Raises:
        PeftLabError: the folder is missing or damaged, or holds another config, base, keys or shapes. Nothing is then
            copied.
    """
    root = unwrap(model)
    require_adapter(root, name)
    saved, placements = read_folder(folder, name), placed(root, name)
    saved = saved._replace(tensors=read_as(key_table(placements), saved.tensors, saved.folder))
    check_config(root, name, placements, saved)
    saved = saved._replace(tensors=as_saved(root, placements, saved.tensors))
    check_fit(root, in_one_piece(placements), saved)
    fill(placements, saved)
