"""A run's state: writing it into a folder, and continuing a run from there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftlab.core.steps import gathered, take
from peftlab.errors import PeftLabError
from peftlab.training import files
from peftlab.training.identity import differences, run_identity
from peftlab.training.run import Run

# These settings are left out when two runs are compared. They do not change a result, or the digest of the data covers
# them, or they are functions, which cannot be compared.
NO_IDENTITY = (
    "tokenizer", "evaluation_data", "folder", "save_every", "resume", "progress", "collate", "callback", "fast",
    "chunked_loss", "compile",
)  # fmt: skip


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> tuple[dict[str, Tensor], dict]:
    """Return the optimiser's states: tensors named `optimizer/<parameter>/<state>`, and plain values by parameter.

    Args:
        names: {`id` of a parameter: its name}.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for parameter, states in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in states.items():
            if isinstance(value, Tensor):
                # all parameters share the code book of 8-bit states, but a file may not hold a tensor twice
                tensors[f"optimizer/{name}/{key}"] = value.clone() if value.data_ptr() in seen else value
                seen.add(value.data_ptr())
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: dict[int, str], tensors: dict[str, Tensor], scalars: dict
) -> None:
    """Load what `optimizer_state` returned."""
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
    """Write the run's state into its folder. The first process writes; the others wait."""
    if run.ranks.first:
        tensors, scalars = optimizer_state(run.optimizer, {id(p): name for name, p in run.trainable.items()})
        tensors |= {f"trainable/{name}": p for name, p in run.trainable.items()}
        tensors |= {f"best/{name}": value for name, value in run.best_values.items()}
        tensors |= {f"buffer/{name}": buffer for name, buffer in run.buffers.to_store().items()}
        tensors |= {f"method/{name}": tensor for name, tensor in gathered(run.adapters).items()}
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
    """Continue the run that the folder holds, or start a new one there.

    Everything is checked before anything is loaded.

    Raises:
        PeftLabError: `resume` is False and the folder holds a run; or it holds another run; or it cannot be read.
    """
    settings = {key: value for key, value in vars(run.settings).items() if key not in NO_IDENTITY}
    if run.loss is not None:
        settings["loss"] = getattr(run.loss, "__qualname__", type(run.loss).__name__)
    settings |= {"metrics": sorted(run.metrics), "processes": run.ranks.world}
    if run.history.schedule:
        settings["schedule of the adapter"] = run.history.schedule
    run.identity = run_identity(settings, run.core, run.train_data, run.evaluation_data)
    if run.ranks.first:
        files.clean(folder)
    checkpoint = files.newest(folder)
    run.ranks.wait()
    if checkpoint is None:
        save(run, folder)  # the starting values: an adapter attached later may start from other random numbers
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
    with torch.no_grad():
        for name, parameter in run.trainable.items():
            parameter.copy_(tensors[f"trainable/{name}"])
    load_optimizer_state(run.optimizer, names, tensors, record["optimizer"])
    run.buffers.restore(_part(tensors, "buffer"))
    take(run.adapters, _part(tensors, "method"))
    run.best_values = {name: value.to(run.device) for name, value in _part(tensors, "best").items()}
    if run.scaler.is_enabled():
        run.scaler.load_state_dict(record["scaler"])
    run.step, run.finished = record["step"], record["finished"]
    run.history = type(run.history)(**record["history"])
    run.ranks.wait()


def _part(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return the tensors named `kind/...`, without that prefix."""
    return {key.removeprefix(f"{kind}/"): value for key, value in tensors.items() if key.startswith(f"{kind}/")}
