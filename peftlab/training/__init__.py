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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from peftlab.core.checkpointing import memory_settings
from peftlab.core.modes import device_of, mode
from peftlab.progress import Bar
from peftlab.training import state
from peftlab.training.encoding import Collator
from peftlab.training.inputs import Inputs
from peftlab.training.losses import Loss
from peftlab.training.precision import choose_precision
from peftlab.training.ranks import Ranks
from peftlab.training.rows import EVALUATION, TRAINING, examples_of_steps, rows_of
from peftlab.training.run import History, Run, TrainingError
from peftlab.training.schedule import borrowed_generators
from peftlab.training.settings import Settings

__all__ = ["History", "TrainingError", "train"]


def train(
    model: nn.Module,
    train_data: Sequence[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    evaluation_data: Sequence[Mapping[str, Any]] | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 8,
    accumulation: int = 1,
    learning_rate: float = 2e-4,
    weight_decay: float = 0.0,
    warmup: float = 0.0,
    schedule: str = "linear",
    max_grad_norm: float | None = 1.0,
    precision: str = "auto",
    checkpointing: bool | str = False,
    optimizer: str = "adamw",
    seed: int = 0,
    group_by_length: bool = False,
    evaluate_every: int | None = None,
    patience: int | None = None,
    monitor: str = "loss",
    restore_best: bool = False,
    folder: str | Path | None = None,
    save_every: int | None = None,
    resume: bool = True,
    progress: bool = True,
    loss: Loss | None = None,
    metrics: Mapping[str, Callable[[nn.Module], float]] | None = None,
    collate: Callable[[list], dict[str, Any]] | None = None,
    callback: Callable[[nn.Module, dict[str, Any]], None] | None = None,
) -> History:
    """Train the parameters of ``model`` that require gradients, in place.

    Args:
        train_data: encoded examples (see ``peftlab.training.encoding``): a list, a data set, a ``DatasetDict`` (its
            split train), columns, a DataFrame; with ``steps`` also a generator (``peftlab.training.rows``). Columns
            that the model's forward does not name are ignored, as by transformers' Trainer.
        tokenizer: gives the padding id; only needed for the default ``collate``, ``Collator(tokenizer)``.
        evaluation_data: encoded examples for the evaluation loss; without it ``metrics`` alone are evaluated.
        steps, epochs: how long; one of the two. A step is one update; without either it is one epoch.
        batch_size, accumulation: an update is made from ``batch_size`` x ``accumulation`` examples, ``batch_size`` of
            them in memory at a time. Only memory and time depend on how the product is split, not the result.
        learning_rate, warmup, schedule: peak; share of the steps (below 1) or number of steps (from 1) of warm-up;
            "linear", "cosine" or "constant" after it. The formula is ``schedule.learning_rate_at``.
        weight_decay: of matrices; biases, norms and other vectors do not decay.
        max_grad_norm: gradients are scaled down to this global norm; None leaves them.
        precision: "fp32" (no autocast: each module in its own dtype), "bf16", "fp16", or "auto", which asks the device.
        checkpointing: recompute activations in the backward pass instead of keeping them; True, or "reentrant".
        optimizer: "adamw", "adamw8bit", "paged-adamw8bit" (bitsandbytes; without it a warning and "adamw") or "sgd".
        seed: decides the order of the data and every random number of the run. The global generators of torch, Python
            and numpy are used during the run and put back after it.
        group_by_length: batches of examples of like length, to save padding.
        evaluate_every: evaluate after so many steps; always after the last.
        patience: stop after so many evaluations without a better ``monitor``: "loss", where lower is better, or the
            name of a metric, where higher is better.
        restore_best: end with the parameters of the best evaluation instead of the last step's.
        folder: where to keep the run, so that it can be killed at any moment and go on to the same result, to the bit
            on the same machine. Only trained values are in it; the model and its adapters must be made again first.
        save_every: write the state after so many steps (50, if there is a folder), at the start and at the end.
        resume: go on with the run in ``folder``, if one is there; False refuses a folder that holds one.
        loss: ``(model, batch) -> (sum, number of labels)``; by default that of the model's task, as transformers has
            it (``peftlab.training.losses``).
        metrics: by name, functions of the model (in eval mode, without gradients) that give a number.
        callback: called with the model and the step's row after each update, while the gradients are still there.

    Raises:
        PeftLabError: a setting is wrong, nothing requires gradients, or the folder holds another run.
        TrainingError: a loss or a gradient is not finite. The model keeps the parameters of the last good step.
    """
    device = device_of(model)
    ranks = Ranks(model)
    inputs = Inputs(model, collate or Collator(tokenizer), loss=loss)
    wanted = examples_of_steps(steps, batch_size, accumulation)
    train_data = rows_of(train_data, "train_data", splits=TRAINING, wanted=wanted, endless=wanted is not None)
    if collate is None:  # a collate of your own gets the rows as they are
        train_data = inputs.examples(train_data, "train_data")
    if evaluation_data is not None:
        evaluation_data = rows_of(evaluation_data, "evaluation_data", splits=EVALUATION, endless=False)
        evaluation_data = evaluation_data if collate else inputs.examples(evaluation_data, "evaluation_data")
    settings = Settings(
        examples=len(train_data),
        evaluation_examples=None if evaluation_data is None else len(evaluation_data),
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        accumulation=accumulation,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        schedule=schedule,
        max_grad_norm=max_grad_norm,
        precision=choose_precision(precision, device),
        checkpointing=checkpointing,
        optimizer=optimizer,
        seed=seed,
        group_by_length=group_by_length,
        evaluate_every=evaluate_every,
        patience=patience,
        monitor=monitor,
        restore_best=restore_best,
        loss=None if loss is None else getattr(loss, "__qualname__", type(loss).__name__),
        metrics=sorted(metrics or ()),
        save_every=save_every,
        processes=ranks.world,
    )
    run = Run(
        model,
        settings,
        device=device,
        ranks=ranks,
        train_data=train_data,
        evaluation_data=evaluation_data,
        collate=inputs,
        loss=loss,
        metrics=metrics or {},
    )
    folder = None if folder is None else Path(folder)
    if folder is not None:
        state.take_up(run, folder, resume)
    with (
        borrowed_generators(),
        mode(model, True),
        memory_settings(model, checkpointing),
        Bar(len(run.order), "Training", enabled=progress and ranks.first, initial=run.step) as bar,
    ):
        try:
            _loop(run, bar, folder, save_every or 50, callback)
        finally:
            run.clear()
    run.restore_best()
    return run.history


def _loop(run: Run, bar: Bar, folder: Path | None, save_every: int, callback: Callable | None) -> None:
    """From the run's step to its end: update, evaluate, decide, save, in this order, so that a saved state is whole."""
    every = run.settings.evaluate_every
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
