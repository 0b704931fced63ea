"""The training loop.

The loop trains the parameters that require gradients. It does not know whether these are an adapter, biases, a head or
the whole model. A batch is cut into parts that fit into memory. One optimiser step over it computes

    L  = sum over all labels of nll / N        N counts the labels of the whole batch, not of one part
    g  = dL/dtheta, scaled down to at most max_grad_norm
    theta <- optimiser(theta, g, lr of this step)

The examples, the learning rate and the random numbers of a step depend only on the seed and the step's number (see
`schedule`). So the state between two steps is small: the trainable parameters, the optimiser's states and a number. A
checkpoint holds just that (see `state`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from peftlab.checks import PATH, checked
from peftlab.core.modes import device_of
from peftlab.progress import Bar
from peftlab.settings import Settings, settings_from, takes
from peftlab.training import state
from peftlab.training.chunked import ChunkedLoss
from peftlab.training.precision import choose_precision
from peftlab.training.ranks import Ranks
from peftlab.training.run import History, Run, TrainingError

__all__ = ["History", "TrainingError", "train"]


@checked("train_data")
@takes(Settings)
def train(model: nn.Module, train_data: Sequence[Mapping[str, Any]], **given: Any) -> History:
    """Train the parameters of `model` that require gradients, in place.

    Args:
        model: the model with whatever is to train.
        train_data: encoded examples (see `peftlab.training.encoding`): a list, a data set, a `DatasetDict` (its
            split train), columns, a DataFrame; with `steps` also a generator (`peftlab.training.rows`). Columns
            that the model's forward does not name are ignored, as by transformers' Trainer.
        {settings}

    Raises:
        PeftLabError: a setting is wrong or unknown, nothing requires gradients, or the folder holds another run.
        TrainingError: a loss or a gradient is not finite. The model keeps the parameters of the last good step.

    >>> data = [pl.encode_text(tokenizer, text) for text in ("the cat runs", "a dog sleeps")]
    >>> _ = pl.attach(model, pl.LoRAConfig(r=2, target_modules=["q_proj", "v_proj"]))
    >>> pl.train(model, data, tokenizer=tokenizer, steps=3, learning_rate=1e-2, progress=False)
    <History: 3 steps, loss 3.4... to 3.3...>
    """
    device = device_of(model)
    ranks = Ranks(model)
    settings = settings_from(given)
    settings = replace(settings, precision=choose_precision(settings.precision, device, model))
    run = Run(model, train_data, settings, device=device, ranks=ranks)
    folder = PATH.require("what folder returns", settings.folder()) if callable(settings.folder) else settings.folder
    folder = None if folder is None else Path(folder)
    if folder is not None:
        state.resume_or_start(run, folder, settings.resume)
    shown = settings.progress and ranks.first
    with run.ready(), Bar(len(run.order), "Training", enabled=shown, initial=run.step) as bar:
        run.clear()  # a gradient that an earlier backward pass left would count in the first step
        try:
            _loop(run, bar, folder)
        finally:
            run.clear()
    run.history.logits = run.loss.told if isinstance(run.loss, ChunkedLoss) else ""
    run.history.compiled = run.layers.told
    run.restore_best()
    return run.history


def _loop(run: Run, bar: Bar, folder: Path | None) -> None:
    """Run the steps that are left. Each updates, evaluates, decides whether to stop, and then saves, in this order.

    A saved state therefore includes the evaluation and the decision of its step.
    """
    every, save_every, callback = run.settings.evaluate_every, run.settings.save_every or 50, run.settings.callback
    began = time.monotonic()
    while not run.finished:
        row = run.update()
        if callback is not None:
            run.settle()
            callback(run.model, row)
        run.clear()
        bar.update(note=f"loss {run.history.steps[-1]['loss']:.3f}" if run.history.steps else "")
        last = run.step == len(run.order)
        if run.settings.evaluates and (last or (every and run.step % every == 0)):
            run.evaluate()
            run.history.stopped_early = not last and run.out_of_patience()
        run.finished = last or run.history.stopped_early
        if folder is not None and (run.finished or run.step % save_every == 0):
            run.history.seconds, began = run.history.seconds + time.monotonic() - began, time.monotonic()
            run.settle()
            state.save(run, folder)
    run.settle()
    run.history.seconds += time.monotonic() - began
