"""One run of training: its state, one update of it, its evaluation, and its way to disk and back."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.core.modes import mode, to_device
from peftlab.core.records import check_hosts, unwrap
from peftlab.errors import PeftLabError
from peftlab.settings import Settings
from peftlab.training.buffers import Buffers
from peftlab.training.encoding import Collator
from peftlab.training.losses import default_loss
from peftlab.training.metrics import mean_loss
from peftlab.training.optimizers import make_optimizer
from peftlab.training.precision import autocast, check_trainable_dtypes
from peftlab.training.ranks import Ranks
from peftlab.training.schedule import DataOrder, derived_seed, learning_rate_at, seed_everything, warmup_steps


class TrainingError(PeftLabError):
    """Training cannot go on: a loss or a gradient is not finite, or nothing is learned.

    The model holds the last good state, the one after the step before.
    """


@dataclasses.dataclass(repr=False)
class History:
    """What happened, a row a step.

    Attributes:
        steps: dicts with ``step`` (from 1), ``loss`` (mean over the batch's labels, before the update), ``lr``,
            ``tokens`` (labels in the batch) and ``grad_norm`` (before clipping); an update that fp16 had to skip, its
            gradient having overflowed, has ``grad_norm`` None.
        evaluations: dicts with ``step``, ``loss`` and one entry a metric.
        best: the evaluation with the lowest loss, or the highest value of the monitored metric.
        stopped_early: patience ran out before the last step.
        seconds: time spent training, over all the pieces of a resumed run; not compared by ``==``.
    """

    steps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    evaluations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best: dict[str, Any] | None = None
    stopped_early: bool = False
    seconds: float = dataclasses.field(default=0.0, compare=False)

    def __repr__(self) -> str:
        """One line, for a notebook shows the value of a cell's last expression."""
        words = f"{len(self.steps)} steps"
        if self.steps:
            words += f", loss {self.steps[0]['loss']:.3f} to {self.steps[-1]['loss']:.3f}"
        if self.best is not None:
            scores = ", ".join(f"{key} {value:.3f}" for key, value in self.best.items() if key != "step")
            words += f"; best of {len(self.evaluations)} evaluations after step {self.best['step']}: {scores}"
        return f"<History: {words}{'; stopped early' if self.stopped_early else ''}>"


class Run:
    """The state of a run between two steps, and the way from one step to the next.

    Raises:
        PeftLabError: there is no example, nothing requires gradients, or a trainable parameter is float16.
    """

    def __init__(
        self,
        model: nn.Module,
        train_data: Sequence[Mapping[str, Any]],
        settings: Settings,
        *,
        device: torch.device,
        ranks: Ranks,
    ):
        if not len(train_data):
            raise PeftLabError("The training data holds no example.")
        self.model, self.settings, self.device, self.ranks = model, settings, device, ranks
        self.train_data, self.evaluation_data = train_data, settings.evaluation_data
        self.collate = settings.collate or Collator(settings.tokenizer)
        self.loss, self.metrics = settings.loss, settings.metrics or {}
        self.core = unwrap(model)
        check_hosts(self.core)
        self.trainable = {name: p for name, p in self.core.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise PeftLabError(
                f"There is nothing to train: none of the model's {sum(1 for _ in model.parameters())} parameters "
                "requires gradients. Attach an adapter, pl.attach(model, pl.LoRAConfig(...)), or let the one you have "
                "train: pl.load_adapter(..., trainable=True) or pl.activate(model, name, trainable=True)."
            )
        check_trainable_dtypes(self.trainable.items())
        lengths = [len(example["input_ids"]) for example in train_data] if settings.group_by_length else None
        examples = len(train_data)
        self.order = DataOrder(examples, settings.batch, settings.total_examples(examples), settings.seed, lengths)
        self.warmup = warmup_steps(settings.warmup, len(self.order))
        self.optimizer = make_optimizer(
            settings.optimizer, self.trainable, settings.learning_rate, settings.weight_decay, device
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.step = 0
        self.history = History()
        self.best_values: dict[str, Tensor] = {}
        self.finished = False
        self.buffers = Buffers(self.core)
        self.identity: dict[str, Any] = {}
        self._looked_for_gradients = False

    # -- one update ----------------------------------------------------------------------------------------------

    def update(self) -> dict[str, Any]:
        """One optimiser step; returns its row for the history. The gradients stay until ``clear``."""
        settings, chosen = self.settings, self.order.at(self.step)
        parts = [chosen[at : at + settings.batch_size] for at in range(0, len(chosen), settings.batch_size)]
        lr = learning_rate_at(self.step, len(self.order), settings.learning_rate, self.warmup, settings.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        seed_everything(derived_seed(settings.seed, "step", self.step, self.ranks.rank))
        held = self.buffers.hold()
        try:
            loss, labels = self._gradients(parts)
            norm = self._clip(chosen)
        except TrainingError:
            self.buffers.restore(held)  # the forward pass has moved running statistics already
            raise
        self.scaler.step(self.optimizer)  # a plain optimizer.step() but for fp16
        self.scaler.update()
        self.step += 1
        row = {"step": self.step, "loss": loss, "lr": lr, "tokens": labels, "grad_norm": norm}
        self.history.steps.append(row)
        return row

    def _gradients(self, parts: list[list[int]]) -> tuple[float, int]:
        """Leave the gradient of the mean loss over all parts' labels in ``grad``; returns that loss and the labels."""
        totals, counts = [], []
        for number, part in enumerate(parts):
            mine, counted = self.ranks.share(part)
            batch = to_device(self.collate([self.train_data[index] for index in mine]), self.device)
            with autocast(self.device, self.settings.precision):
                loss = self.loss or default_loss(self.model, batch.get("labels"))
                total, count = loss(self.model, batch)
            if not total.requires_grad:
                raise TrainingError(
                    "The loss does not depend on any parameter that requires gradients. Is the adapter disabled, or is "
                    "reentrant checkpointing on under a frozen embedding (then pass checkpointing='reentrant')?"
                )
            total, count = total * int(counted), torch.as_tensor(count, device=self.device) * int(counted)
            count = self.ranks.sum(count)
            if number == 0:
                provisional = count.clamp(min=1) * len(parts)
            # N, all labels of the update, is known after the last part; until then each part is divided by a guess N'
            with self.ranks.unsynchronised(last=number == len(parts) - 1):
                self.scaler.scale(total / provisional).backward()
            totals.append(self.ranks.sum(total.double() if total.device.type != "mps" else total))
            counts.append(count)
        sums, labels = [float(total) for total in totals], int(sum(counts))
        wrong = [index for part, value in zip(parts, sums, strict=True) if not math.isfinite(value) for index in part]
        if wrong:
            raise self._stop(f"the loss is {sum(sums)}", wrong)
        if not labels:
            raise self._stop("nothing is labelled", sum(parts, []))
        # g = (N' / N) g', times the number of processes, over which DistributedDataParallel took the mean
        if len(parts) * self.ranks.world > 1:
            factor = int(provisional) / labels * self.ranks.world
            for parameter in self.trainable.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        return sum(sums) / labels, labels

    def _clip(self, chosen: list[int]) -> float | None:
        """Clip to the global norm |g| = sqrt(sum of g_i^2): g <- g min(1, max_norm / |g|); returns |g|.

        Under fp16 a gradient that overflowed is no error: the optimiser skips it and the loss scale is halved, and
        only a scale that fell below 1 says that the gradient itself is at fault. Then, and only then, None is returned.
        """
        self._look_for_gradients()
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.settings.max_grad_norm is None else self.settings.max_grad_norm
        norm = float(nn.utils.clip_grad_norm_(self.trainable.values(), limit))
        if math.isfinite(norm):
            return norm
        if self.scaler.is_enabled() and self.scaler.get_scale() >= 1.0:
            return None
        raise self._stop(f"the gradient's norm is {norm}", chosen)

    def _look_for_gradients(self) -> None:
        if self._looked_for_gradients:
            return
        self._looked_for_gradients = True
        without = [name for name, p in self.trainable.items() if p.grad is None]
        if without:
            warnings.warn(
                f"{len(without)} of {len(self.trainable)} trainable parameters got no gradient in the first step and "
                f"may not train at all; the first is {without[0]}.",
                stacklevel=4,
            )

    def _stop(self, what: str, examples: list[int]) -> TrainingError:
        shown = ", ".join(map(str, examples[:16])) + (", ..." if len(examples) > 16 else "")
        return TrainingError(
            f"Step {self.step + 1} of {len(self.order)}: {what}, with examples {shown} of the training data. The model "
            f"keeps its parameters of step {self.step}. Look at those examples; if they are sound, lower the learning "
            f"rate ({self.settings.learning_rate}) or add warm-up, or compute in precision='fp32'."
        )

    def clear(self) -> None:
        """Free the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    # -- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the model as it is, note it in the history, and keep the values if they are the best so far."""
        row: dict[str, Any] = {"step": self.step}
        seed_everything(derived_seed(self.settings.seed, "evaluation", self.step))
        if self.evaluation_data is not None:
            with autocast(self.device, self.settings.precision):
                row["loss"] = mean_loss(
                    self.model,
                    self.evaluation_data,
                    self.collate,
                    loss=self.loss,
                    batch_size=self.settings.batch_size,
                )
        with mode(self.model, False), torch.no_grad():
            for name, metric in self.metrics.items():
                row[name] = float(metric(self.model))
        row = self.ranks.agree(row)
        if not math.isfinite(row.get("loss", 0.0)):
            raise TrainingError(
                f"After step {self.step} the evaluation loss is {row['loss']}; the learning rate is high."
            )
        self.history.evaluations.append(row)
        monitor, best = self.settings.monitor, self.history.best
        if monitor in row:
            sign = -1 if monitor == "loss" else 1
            if best is None or sign * row[monitor] > sign * best[monitor]:
                self.history.best = row
                if self.settings.restore_best:
                    self.best_values = {name: p.detach().clone() for name, p in self.trainable.items()}
        return row

    def out_of_patience(self) -> bool:
        """As many evaluations since the best one as patience allows."""
        if self.settings.patience is None or self.history.best is None:
            return False
        later = [row for row in self.history.evaluations if row["step"] > self.history.best["step"]]
        return len(later) >= self.settings.patience

    def restore_best(self) -> None:
        """Put the best evaluation's values into the model, if they were kept."""
        with torch.no_grad():
            for name, value in self.best_values.items():
                self.trainable[name].copy_(value)
