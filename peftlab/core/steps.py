"""Let adapters take part in training steps: what they add to the loss, and their work after the optimiser's step.

Most methods do neither. A config that does has what `interface.InTraining` lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from peftlab.checks import checked, whole
from peftlab.core.interface import Config, InTraining, Part, Placement
from peftlab.core.records import check_hosts, placed, record_of, unwrap


class Taking(NamedTuple):
    """Hold an adapter that takes part in training steps: its name, its config and its parts."""

    name: str
    config: InTraining
    placements: list[Placement]


def taking_part(root: nn.Module) -> list[Taking]:
    """Return the adapters that take part in training steps: those that run, train, and have such a config."""
    record = record_of(root)
    if record is None or not record.activity.running:
        return []
    activity = record.activity
    names = dict.fromkeys(activity.weights if activity.rows is None else activity.rows)
    found = ((name, record.configs[name]) for name in names if name is not None and record.trainable[name])
    return [Taking(name, config, placed(root, name)) for name, config in found if isinstance(config, InTraining)]


def begin_run(root: nn.Module, steps: int) -> None:
    """Give each adapter that takes part the config of a run of so many steps.

    What was chosen for an earlier run is chosen anew.
    """
    record = record_of(root)
    for name, config, placements in taking_part(root):
        assert record is not None
        given, chosen = record.chosen.get(name, (config, config))
        given = given if config is chosen else config
        record.configs[name] = cast(Config, given.for_run(placements, steps))
        record.chosen[name] = given, record.configs[name]


def schedules(root: nn.Module) -> str:
    """Return what the adapters that take part do in a run, in one line; empty if there are none."""
    return "; ".join(f"{name!r}: {config.schedule()}" for name, config, _ in taking_part(root))


@checked()
def added_loss(model: nn.Module) -> Tensor:
    """Return what the adapters that train add to the loss of a step, for a loop of your own; 0 if that is nothing.

    AdaLoRA adds how far its P and Q are from orthonormal. `pl.train` adds this by itself.

    Returns:
        A scalar with gradients. It does not depend on the batch, so add it once to the mean loss of a step.

    >>> _ = pl.attach(model, pl.AdaLoRAConfig(init_r=2, target_r=1, total_step=10))
    >>> tokens = torch.ones(1, 3, dtype=torch.long)
    >>> loss = model(tokens, labels=tokens).loss + pl.added_loss(model)
    """
    root = unwrap(model)
    check_hosts(root)
    terms = [config.added_loss(placements) for _, config, placements in taking_part(root)]
    like = next((p for p in root.parameters() if p.is_floating_point()), torch.empty(0))
    return sum((term for term in terms if term is not None), start=torch.zeros((), device=like.device))


@checked("step")
def after_step(model: nn.Module, step: int) -> None:
    """Let the adapters that train work after an optimiser step, in a loop of your own. Most methods do nothing.

    AdaLoRA brings the importance of its ranks up to date and prunes, as Hugging Face peft's `update_and_allocate`.
    `pl.train` does this by itself. Under `GradScaler` call `unscale_` before the step.

    Args:
        step: the number of the step, from 1.

    Raises:
        PeftLabError: there are no gradients (call this before `zero_grad`), or the adapter lacks a schedule.

    >>> _ = pl.attach(model, pl.AdaLoRAConfig(init_r=2, target_r=1, target_modules=["q_proj"], total_step=3))
    >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    >>> tokens = torch.tensor([[1, 2, 3]])
    >>> for step in (1, 2, 3):
    ...     loss = model(tokens, labels=tokens).loss + pl.added_loss(model)
    ...     loss.backward()
    ...     optimizer.step()
    ...     pl.after_step(model, step)
    ...     optimizer.zero_grad()
    >>> sum(pl.adalora_ranks(model).values())
    2
    """
    whole("step", step, least=0)
    root = unwrap(model)
    check_hosts(root)
    for _, config, placements in taking_part(root):
        config.after_step(placements, step)


def add_gradients(adapters: Sequence[Taking], scale: float) -> float:
    """Add the gradients of what adapters add to the loss, times `scale`, to `grad`. Return the addition itself."""
    value = 0.0
    for _, config, placements in adapters:
        term = config.added_loss(placements)
        if term is None or not term.requires_grad:
            continue
        mine = [p for _, _, part in placements for p in part.parameters() if p.requires_grad]
        # not backward(): under DistributedDataParallel that would average what is the same in all processes
        for p, gradient in zip(mine, torch.autograd.grad(term * scale, mine, allow_unused=True), strict=True):
            if gradient is not None:
                p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        value += float(term.detach())
    return value


def gathered(adapters: Sequence[Taking]) -> dict[str, Tensor]:
    """Return what the parts of these adapters have gathered in training, by names for a file."""
    return {f"{key}/{own}": tensor for key, part in _parts(adapters) for own, tensor in part.gathered().items()}


def take(adapters: Sequence[Taking], tensors: Mapping[str, Tensor]) -> None:
    """Give the parts back what `gathered` returned."""
    for key, part in _parts(adapters):
        mine = {name.removeprefix(f"{key}/"): t for name, t in tensors.items() if name.startswith(f"{key}/")}
        if mine:
            part.take(mine)


def _parts(adapters: Sequence[Taking]) -> Iterator[tuple[str, Part]]:
    for name, _, placements in adapters:
        for path, kind, part in placements:
            yield f"{path}/{name}/{kind}", part
