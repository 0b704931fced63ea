"""The training loop.

It trains the parameters that require gradients and knows nothing of how they came to: an adapter, biases, a head or the
whole model are all the same to it. One optimiser step, over a batch cut into parts that fit into memory, is

    L  = sum over all labels of nll / N        N labels in the whole batch, not in its parts
    g  = dL/dtheta, scaled down to at most max_grad_norm
    theta <- optimiser(theta, g, lr of this step)

and everything a step draws on, its examples, learning rate and random numbers, follows from the seed and the step's
number (``schedule``). The state between two steps is therefore the trainable parameters, the optimiser's states and
a number, which is what a checkpoint holds (``state``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from peftlab.core.checkpointing import memory_settings
from peftlab.core.modes import device_of, mode
from peftlab.progress import Bar
from peftlab.settings import Settings, settings_from, takes
from peftlab.training import state
from peftlab.training.precision import choose_precision
from peftlab.training.ranks import Ranks
from peftlab.training.run import History, Run, TrainingError
from peftlab.training.schedule import borrowed_generators

__all__ = ["History", "TrainingError", "train"]


@takes(Settings)
def train(model: nn.Module, train_data: Sequence[Mapping[str, Any]], **given: Any) -> History:
    """Train the parameters of ``model`` that require gradients, in place.

    Args:
        model: the model with whatever is to train.
        train_data: encoded examples (see ``peftlab.training.encoding``): anything with a length and integer indices.
        {settings}

    Raises:
        PeftLabError: a setting is wrong or unknown, nothing requires gradients, or the folder holds another run.
        TrainingError: a loss or a gradient is not finite. The model keeps the parameters of the last good step.
    """
    device = device_of(model)
    ranks = Ranks(model)
    settings = settings_from(given)
    settings = replace(settings, precision=choose_precision(settings.precision, device))
    run = Run(model, train_data, settings, device=device, ranks=ranks)
    folder = settings.folder() if callable(settings.folder) else settings.folder
    folder = None if folder is None else Path(folder)
    if folder is not None:
        state.resume_or_start(run, folder, settings.resume)
    with (
        borrowed_generators(),
        mode(model, True),
        memory_settings(model, settings.checkpointing),
        Bar(len(run.order), "Training", enabled=settings.progress and ranks.first, initial=run.step) as bar,
    ):
        try:
            _loop(run, bar, folder)
        finally:
            run.clear()
    run.restore_best()
    return run.history


def _loop(run: Run, bar: Bar, folder: Path | None) -> None:
    """From the run's step to its end: update, evaluate, decide, save, in this order, so that a saved state is whole."""
    every, save_every, callback = run.settings.evaluate_every, run.settings.save_every or 50, run.settings.callback
    began = time.monotonic()
    while not run.finished:
        row = run.update()
        if callback is not None:
            callback(run.model, row)
        run.clear()
        bar.update(note=f"loss {row['loss']:.3f}")
        last = run.step == len(run.order)
        if run.settings.evaluates and (last or (every and run.step % every == 0)):
            run.evaluate()
            run.history.stopped_early = not last and run.out_of_patience()
        run.finished = last or run.history.stopped_early
        if folder is not None and (run.finished or run.step % save_every == 0):
            run.history.seconds, began = run.history.seconds + time.monotonic() - began, time.monotonic()
            state.save(run, folder)
    run.history.seconds += time.monotonic() - began
