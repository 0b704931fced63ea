"""The settings of a run, checked when they are put together, before a model is touched."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from peftlab.errors import PeftLabError, did_you_mean
from peftlab.training.schedule import SCHEDULES


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides a run's result, but for the model and the data; stored in its checkpoints.

    The fields are those of ``peftlab.train``; ``loss`` and ``metrics`` are the names of functions, ``examples`` counts
    the training data, ``evaluation_examples`` the evaluation data (None without), ``processes`` who share a batch.

    Raises:
        PeftLabError: a value that no run can have; the message names the field, the value and what is possible.
    """

    examples: int
    evaluation_examples: int | None
    steps: int | None
    epochs: float | None
    batch_size: int
    accumulation: int
    learning_rate: float
    weight_decay: float
    warmup: float
    schedule: str
    max_grad_norm: float | None
    precision: str
    checkpointing: bool | str
    optimizer: str
    seed: int
    group_by_length: bool
    evaluate_every: int | None
    patience: int | None
    monitor: str
    restore_best: bool
    loss: str | None
    metrics: list[str]
    save_every: int | None
    processes: int

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise PeftLabError("The training data holds no example.")
        if self.evaluation_examples == 0:
            raise PeftLabError("The evaluation data holds no example; pass evaluation_data=None to do without.")
        if self.steps is not None and self.epochs is not None:
            raise PeftLabError(f"Give steps ({self.steps}) or epochs ({self.epochs}), not both.")
        for name in ("steps", "batch_size", "accumulation", "evaluate_every", "patience", "save_every"):
            self._positive(name, whole=True)
        for name in ("epochs", "learning_rate", "max_grad_norm"):
            self._positive(name, whole=False)
        if self.learning_rate > 1000:
            raise PeftLabError(
                f"learning_rate={self.learning_rate} is no learning rate; LoRA takes about 1e-4 to 1e-2."
            )
        for name in ("weight_decay", "warmup"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise PeftLabError(f"{name} is a number from 0 on, not {value!r}.")
        if self.schedule not in SCHEDULES:
            near = did_you_mean(self.schedule, SCHEDULES)
            raise PeftLabError(f"schedule is one of {list(SCHEDULES)}, not {self.schedule!r}.{near}")
        if self.checkpointing not in (True, False, "reentrant"):
            raise PeftLabError(f"checkpointing is True, False or 'reentrant', not {self.checkpointing!r}.")
        if not isinstance(self.seed, int):
            raise PeftLabError(f"seed is a whole number, not {self.seed!r}.")
        self._check_evaluation()

    @property
    def batch(self) -> int:
        """Examples an update."""
        return self.batch_size * self.accumulation

    @property
    def total_examples(self) -> int:
        """Examples of the whole run, counted with repetition."""
        if self.steps is not None:
            return self.steps * self.batch
        return max(1, math.ceil((1 if self.epochs is None else self.epochs) * self.examples))

    @property
    def evaluates(self) -> bool:
        """There is something to evaluate."""
        return self.evaluation_examples is not None or bool(self.metrics)

    def _check_evaluation(self) -> None:
        taken = {"step", "loss"} & set(self.metrics)
        if taken:
            raise PeftLabError(
                f"A metric cannot be called {sorted(taken)[0]!r}: the evaluation's own rows use that name."
            )
        wants = [name for name in ("evaluate_every", "patience", "restore_best") if getattr(self, name)]
        if wants and not self.evaluates:
            raise PeftLabError(f"{wants[0]} needs something to evaluate: pass evaluation_data or metrics.")
        if self.patience and not self.evaluate_every:
            raise PeftLabError("patience counts evaluations: say how often with evaluate_every=...")
        if self.monitor == "loss" and self.evaluation_examples is None and (self.patience or self.restore_best):
            raise PeftLabError(f"monitor='loss' needs evaluation_data; or choose one of the metrics {self.metrics}.")
        if self.monitor != "loss" and self.monitor not in self.metrics:
            near = did_you_mean(self.monitor, ["loss", *self.metrics])
            raise PeftLabError(
                f"monitor={self.monitor!r} is neither 'loss' nor one of the metrics {self.metrics}.{near}"
            )

    def _positive(self, name: str, whole: bool) -> None:
        value: Any = getattr(self, name)
        if value is None and name not in ("batch_size", "accumulation", "learning_rate"):
            return
        if not _is_number(value) or value <= 0 or (whole and not isinstance(value, int)):
            raise PeftLabError(f"{name} is a positive {'whole ' if whole else ''}number, not {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
