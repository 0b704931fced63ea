"""A run's state as tensors and plain values, and the folder that takes it up again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftlab.errors import PeftLabError
from peftlab.training import files
from peftlab.training.identity import differences, run_identity
from peftlab.training.run import Run

# Settings that do not change a result, what the digest of the data holds, and functions that have no name to compare
NO_IDENTITY = ("tokenizer", "evaluation_data", "folder", "save_every", "resume", "progress", "collate", "callback")


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> tuple[dict[str, Tensor], dict]:
    """The optimiser's states by parameter name: tensors as ``optimizer/<parameter>/<state>``, the rest as plain values.

    Args:
        names: the parameter's name by the ``id`` of the parameter.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for parameter, states in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in states.items():
            if isinstance(value, Tensor):
                # 8-bit states share one code book among all parameters, and a file may share no tensor
                tensors[f"optimizer/{name}/{key}"] = value.clone() if value.data_ptr() in seen else value
                seen.add(value.data_ptr())
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: dict[int, str], tensors: dict[str, Tensor], scalars: dict
) -> None:
    """The inverse of ``optimizer_state``."""
    states: dict[str, dict] = {name: dict(values) for name, values in scalars.items()}
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            name, _, state = key.removeprefix("optimizer/").rpartition("/")
            states.setdefault(name, {})[state] = tensor
    whole = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    whole["state"] = {
        index: states[names[id(parameter)]] for index, parameter in enumerate(order) if names[id(parameter)] in states
    }
    optimizer.load_state_dict(whole)


def save(run: Run, folder: Path) -> None:
    """Write the run's state into its folder (the first process does; the others wait)."""
    if run.ranks.first:
        tensors, scalars = optimizer_state(run.optimizer, {id(p): name for name, p in run.trainable.items()})
        tensors |= {f"trainable/{name}": p for name, p in run.trainable.items()}
        tensors |= {f"best/{name}": value for name, value in run.best_values.items()}
        tensors |= {f"buffer/{name}": buffer for name, buffer in run.buffers.to_store().items()}
        record = {
            "finished": run.finished,
            "history": dataclasses.asdict(run.history),
            "optimizer": scalars,
            "scaler": run.scaler.state_dict(),
            "identity": run.identity,
        }
        files.write(folder, run.step, tensors, record)
    run.ranks.wait()


def resume_or_start(run: Run, folder: Path, resume: bool) -> None:
    """Put the run where the one in the folder stopped, or begin it there; nothing is loaded before all is checked.

    Raises:
        PeftLabError: ``resume`` is False and there is one; or it is another run; or it cannot be read.
    """
    settings = {key: value for key, value in vars(run.settings).items() if key not in NO_IDENTITY}
    if run.loss is not None:
        settings["loss"] = getattr(run.loss, "__qualname__", type(run.loss).__name__)
    settings |= {"metrics": sorted(run.metrics), "processes": run.ranks.world}
    run.identity = run_identity(settings, run.core, run.train_data, run.evaluation_data)
    if run.ranks.first:
        files.clean(folder)
    checkpoint = files.newest(folder)
    run.ranks.wait()
    if checkpoint is None:
        save(run, folder)  # the values it starts from: a new adapter need not be drawn the same again
        return
    if not resume:
        raise PeftLabError(
            f"{folder} holds a run ({checkpoint.name}). Pass resume=True to go on with it, choose another folder, or "
            "delete this one."
        )
    record, tensors = files.read(checkpoint)
    changed = differences(record["identity"], run.identity)
    if changed:
        raise PeftLabError(
            f"{folder} holds another run: {'; '.join(changed)}. Make them the same to go on with it, or choose another "
            "folder."
        )
    names = {id(p): name for name, p in run.trainable.items()}
    load_optimizer_state(run.optimizer, names, tensors, record["optimizer"])
    with torch.no_grad():
        for name, parameter in run.trainable.items():
            parameter.copy_(tensors[f"trainable/{name}"])
    run.buffers.restore(_part(tensors, "buffer"))
    run.best_values = {name: value.to(run.device) for name, value in _part(tensors, "best").items()}
    if run.scaler.is_enabled():
        run.scaler.load_state_dict(record["scaler"])
    run.step, run.finished = record["step"], record["finished"]
    run.history = type(run.history)(**record["history"])
    run.ranks.wait()


def _part(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors called ``kind/...``, without that beginning."""
    return {key.removeprefix(f"{kind}/"): value for key, value in tensors.items() if key.startswith(f"{kind}/")}
