"""One run of training: its state, one update, one evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.checks import shown
from peftlab.core.checkpointing import memory_settings
from peftlab.core.interface import Part
from peftlab.core.modes import mode
from peftlab.core.records import check_hosts, unwrap
from peftlab.core.sharding import refuse_sharded
from peftlab.core.steps import add_gradients, begin_run, schedules, taking_part
from peftlab.errors import PeftLabError, warn
from peftlab.settings import Settings
from peftlab.training import varlen
from peftlab.training.ahead import Batches, Prepared
from peftlab.training.buffers import Buffers
from peftlab.training.chunked import ChunkedLoss
from peftlab.training.compiling import Layers
from peftlab.training.encoding import Collator
from peftlab.training.fast_path import FastPath, find_path
from peftlab.training.fitting import choose_blocks
from peftlab.training.inputs import Inputs, example_lengths
from peftlab.training.labels import moved
from peftlab.training.loraplus import loraplus_groups
from peftlab.training.losses import Loss, sum_and_count
from peftlab.training.masters import WithMasters
from peftlab.training.metrics import mean_loss
from peftlab.training.optimizers import flattened, make_optimizer, note_wrong, skips_when_told, step_unless
from peftlab.training.positions import spared
from peftlab.training.precision import AUTOCAST, autocast, check_trainable_dtypes
from peftlab.training.ranks import Ranks
from peftlab.training.rows import EVALUATION, TRAINING, rows_of
from peftlab.training.schedule import (
    DataOrder,
    borrowed_generators,
    derived_seed,
    learning_rate_at,
    seed_everything,
    warmup_steps,
)


class TrainingError(PeftLabError):
    """The error of a run that cannot go on: a loss or a gradient is not finite, or no example has a label.

    The model keeps the parameters that it had after the last good step.

    >>> issubclass(pl.TrainingError, pl.PeftLabError)
    True
    """


@dataclasses.dataclass(repr=False)
class History:
    """What happened in a run, with one row per step.

    Attributes:
        steps: dicts with `step` (from 1), `loss` (mean over the batch's labels, before the update), `lr`,
            `tokens` (labels in the batch) and `grad_norm` (before clipping). If the gradient overflowed in fp16, the
            update was skipped and `grad_norm` is None. `added_loss` is what the adapter's method adds to the loss, if
            it does; `loss` is without it.
        evaluations: dicts with `step`, `loss` and one entry per metric.
        best: the evaluation with the lowest loss, or the highest value of the monitored metric.
        stopped_early: whether patience ran out before the last step.
        seconds: time spent training, summed over all pieces of a resumed run. `==` ignores it.
        compiled: under `compile="layers"`, what is compiled and the lengths of batches, or why nothing is. `==` ignores
            it.
        path: which path computed the steps, "fast" (`peftlab.fast`) or "plain", and why. `==` ignores it, too.
        logits: how the loss was computed, "in chunks" (`peftlab.training.chunked`) or "whole", and why, likewise.
        checkpointing: under `checkpointing="fit"`, how many blocks are computed again, or why all are, likewise.
        schedule: what the methods of the adapters chose for this run, such as AdaLoRA's steps, likewise.
        packing: under `packing=True`, how attention keeps to its example, by torch's varlen kernel
            (`peftlab.training.varlen`) or by a mask, and why, likewise.

    >>> pl.History(steps=[{"loss": 3.0}, {"loss": 1.5}])
    <History: 2 steps, loss 3.000 to 1.500>
    """

    steps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    evaluations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best: dict[str, Any] | None = None
    stopped_early: bool = False
    seconds: float = dataclasses.field(default=0.0, compare=False)
    compiled: str = dataclasses.field(default="", compare=False)
    path: str = dataclasses.field(default="", compare=False)
    logits: str = dataclasses.field(default="", compare=False)
    checkpointing: str = dataclasses.field(default="", compare=False)
    schedule: str = dataclasses.field(default="", compare=False)
    packing: str = dataclasses.field(default="", compare=False)

    def __repr__(self) -> str:
        """Return one line, because a notebook shows the value of a cell's last expression."""
        words = f"{len(self.steps)} steps"
        if self.steps:
            words += f", loss {self.steps[0]['loss']:.3f} to {self.steps[-1]['loss']:.3f}"
        if self.best is not None:
            scores = ", ".join(f"{key} {value:.3f}" for key, value in self.best.items() if key != "step")
            words += f"; best of {len(self.evaluations)} evaluations after step {self.best['step']}: {scores}"
        return f"<History: {words}{'; stopped early' if self.stopped_early else ''}>"


@dataclasses.dataclass
class Measured:
    """What one step measured, and what is needed to go back if it was wrong.

    Attributes:
        values: the summed loss of each part, and the norm of the gradient.
        row: the step's row of the history, without its loss and norm.
        parts: the examples of each part.
        held: copies of the buffers before the step.
    """

    values: Tensor
    row: dict[str, Any]
    parts: list[list[int]]
    held: dict[str, Tensor]
    sent: torch.cuda.Event | None = None

    def send(self) -> None:
        """Let the values be copied to the CPU when the GPU has them."""
        on_gpu, self.values = self.values.is_cuda, self.values.to("cpu", non_blocking=True)
        if on_gpu:
            self.sent = torch.cuda.Event()
            self.sent.record()

    def read(self) -> list[float]:
        """Return the values. This waits for them."""
        if self.sent is not None:
            self.sent.synchronize()
        return self.values.tolist()


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
        self.model, self.settings, self.device, self.ranks = model, settings, device, ranks
        self.core = unwrap(model)
        check_hosts(self.core)
        refuse_sharded(
            self.core,
            "train works in one process or under DistributedDataParallel",
            "Write the loop yourself, and let every process call save_adapter.",
        )
        with autocast(device, settings.precision):  # packing is tried in it
            collate = settings.collate or Collator(settings.tokenizer)
            self.collate = Inputs(model, collate, loss=settings.loss, packing=settings.packing)
        self.train_data, self.evaluation_data = self._rows(train_data), self._read_evaluation()
        if not len(self.train_data):
            raise PeftLabError("The training data holds no example.")
        self.loss: Loss = settings.loss or ChunkedLoss(model, settings.chunked_loss)
        self.metrics = settings.metrics or {}
        self.trainable = {name: p for name, p in self.core.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise PeftLabError(
                f"There is nothing to train: none of the model's {sum(1 for _ in model.parameters())} parameter "
                "tensors requires gradients. Attach an adapter, pl.attach(model, pl.LoRAConfig(...)), or let the one "
                "you have train: pl.load_adapter(..., trainable=True) or pl.activate(model, name, trainable=True)."
            )
        check_trainable_dtypes(self.trainable.items())
        kinds = {(p.device, p.dtype) for p in self.trainable.values()}
        self.alike = len(kinds) == 1 and next(iter(kinds))[0].type in ("cpu", "cuda")
        parts = (module for module in self.core.modules() if isinstance(module, Part) and module.skips)
        self.skipping = {id(parameter) for part in parts for parameter in part.parameters()}
        lengths = example_lengths(self.train_data) if settings.group_by_length else None
        examples = len(self.train_data)
        self.order = DataOrder(examples, settings.batch, settings.total_examples(examples), settings.seed, lengths)
        self.warmup = warmup_steps(settings.warmup, len(self.order))
        self.optimizer = make_optimizer(
            settings.optimizer, self.trainable, settings.learning_rate, settings.weight_decay, device,
            loraplus_groups(self.core, self.trainable, settings),
        )  # fmt: skip
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]  # under LoRA+ each group has its own
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.step = 0
        self.history = History()
        self.best_values: dict[str, Tensor] = {}
        self.finished = False
        self.buffers = Buffers(self.core)
        self.identity: dict[str, Any] = {}
        self._looked_for_gradients = False
        self.layers = Layers(model if settings.compile else None)
        if self.layers.blocks:
            self.layers.choose_lengths(self.collate, self.train_data, self.order, settings.batch_size)
        self.fast: FastPath | None = None
        self.batches = Batches(self.train_data, self.collate, self._moved, device, ranks)
        self.checkpointing = settings.checkpointing
        if self.checkpointing == "fit":
            self.checkpointing, self.history.checkpointing = self._fit()
        self.path = find_path(model, self.core, settings)
        self.by_kernel = self.collate.packing and self._packed_rows_take_the_kernel()
        begin_run(self.core, len(self.order))
        self.history.schedule, self.adapters = schedules(self.core), taking_part(self.core)
        self.pending: Measured | None = None
        self.wrong = torch.zeros((), device=device)  # 1 once a step was not finite
        self.one = torch.ones((), device=device)

    def _fit(self) -> tuple[bool | int, str]:
        """Choose how many blocks are computed again, under `checkpointing="fit"`."""
        try:
            lengths = example_lengths(self.train_data)
        except PeftLabError:
            lengths = []
        tokens = max(lengths, default=0) * self.settings.batch_size
        chunked = isinstance(self.loss, ChunkedLoss) and self.loss.pays(tokens)
        return choose_blocks(self.model, self.settings, self.device, lengths, chunked)

    def _rows(self, data: Any) -> Sequence[Any]:
        """The training data as rows, checked when they are read; a collate of the user's own gets them as they are."""
        steps = self.settings.steps
        wanted = None if steps is None else steps * self.settings.batch
        rows = rows_of(data, "train_data", splits=TRAINING, wanted=wanted, endless=wanted is not None)
        return rows if self.settings.collate else self.collate.examples(rows, "train_data")

    def _read_evaluation(self) -> Sequence[Any] | None:
        if self.settings.evaluation_data is None:
            return None
        rows = rows_of(self.settings.evaluation_data, "evaluation_data", splits=EVALUATION, endless=False)
        return rows if self.settings.collate else self.collate.examples(rows, "evaluation_data")

    def _packed_rows_take_the_kernel(self) -> bool:
        """Choose how packed rows attend, and say so in the history."""
        settings = self.settings
        if not isinstance(self.path, str):
            reason = "the fast path makes a mask of its own"
        elif settings.compile:
            reason = f"compile={settings.compile!r}"
        else:
            dtype: Any = AUTOCAST[settings.precision] or getattr(self.core, "dtype", torch.float32)
            with autocast(self.device, settings.precision):
                reason = varlen.why_not(self.model, self.collate.facts, self.device, dtype)
        kernel = f"by torch's varlen kernel in rows from {varlen.LONG:,} tokens on"
        self.history.packing = f"by a mask of blocks: {reason}" if reason else kernel
        return not reason

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Make the model ready for steps inside the block, and put everything back afterwards."""
        with (
            borrowed_generators(),
            mode(self.model, True),
            memory_settings(self.model, self.checkpointing),
            self.layers.on(),
            self.fast_path(),
            spared(),
            self.batches.thread(),
            varlen.used(self.model) if self.by_kernel else contextlib.nullcontext(),
        ):
            yield

    @contextlib.contextmanager
    def fast_path(self) -> Iterator[None]:
        """Compute the steps inside the block by `peftlab.fast`, if it can take this run."""
        if isinstance(self.path, str) or self.finished:
            if not self.finished:
                self.history.path = f"plain: {self.path}"
            yield
            return
        path, plain = FastPath(self.core, self.path, self.settings, self.device), self.optimizer
        try:
            self.fast, self.optimizer, self.history.path = path, flattened(plain, path.step.flat), path.told
            self.batches.read_fast = path.read
            yield
        finally:
            self.fast, self.optimizer, self.history.path = None, plain, path.told
            self.batches.read_fast = None
            path.give_back()

    # -- one update ----------------------------------------------------------------------------------------------

    def update(self) -> dict[str, Any]:
        """Make one optimiser step and return its row for the history. The gradients stay until `clear`.

        On a GPU the row has its loss and norm, and is in the history, only after the next step or `settle`.
        """
        settings, chosen = self.settings, self.order.at(self.step)
        parts = [chosen[at : at + settings.batch_size] for at in range(0, len(chosen), settings.batch_size)]
        lr, *rates = (
            learning_rate_at(self.step, len(self.order), peak, self.warmup, settings.schedule)
            for peak in (settings.learning_rate, *self.peaks)
        )
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        seed = derived_seed(settings.seed, "step", self.step, self.ranks.rank)
        seed_everything(seed)
        if self.fast is not None:
            self.fast.begin()
        held = self.buffers.hold()
        try:
            try:
                totals, labels = self._gradients(parts)
            except Exception as error:
                if not self.layers.failed(error):
                    raise
                self.clear()  # and once more, from the beginning
                self.buffers.restore(held)
                seed_everything(seed)
                totals, labels = self._gradients(parts)
            added = add_gradients(self.adapters, self.scaler.get_scale()) if labels else 0.0
            norm = self._clip()
        except PeftLabError:
            self.buffers.restore(held)  # the forward pass has already changed running statistics
            self.settle()  # if the step before was wrong, that is what has to be said
            raise
        row = {"step": self.step + 1, "loss": math.nan, "lr": lr, "tokens": labels, "grad_norm": None}
        numbers = [*totals, norm]
        wide = max({torch.float32, *(number.dtype for number in numbers)}, key=lambda dtype: dtype.itemsize)
        measured = Measured(torch.stack([number.to(self.device, wide) for number in numbers]), row, parts, held)
        # Under fp16 the scaler has to see the gradients before the step, and to change its scale after it. Adapters
        # that work after a step have to know that it was made.
        skips = skips_when_told(self.optimizer, self.device) and not self.adapters
        if not labels or self.scaler.is_enabled() or not skips:
            self._read(measured)
            self.scaler.step(self.optimizer)  # the same as optimizer.step(), except under fp16
            self.scaler.update()
            self.step += 1
            self._after_step(row, added)
            return row
        # The CPU goes on while the GPU computes, and reads one step later. Were this step wrong, the GPU itself leaves
        # the parameters as they are, now and in the step that follows.
        note_wrong(self.wrong, measured.values, self.one)
        step_unless(self.wrong, self.optimizer)
        measured.send()
        self.step += 1
        self.settle()
        self.pending = measured
        return row

    def _after_step(self, row: dict[str, Any], added: float) -> None:
        """Let the adapters work that take part in a step, and the optimiser follow what they changed."""
        for _, config, placements in self.adapters:
            row["added_loss"] = added
            changed = config.after_step(placements, self.step, usable=row["grad_norm"] is not None)
            if isinstance(self.optimizer, WithMasters):
                self.optimizer.follow(changed)

    def settle(self) -> None:
        """Read what the last step measured, if that is still to be done: add its row to the history.

        Raises:
            TrainingError: it was not finite. The parameters and buffers are those of the step before.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            self._read(pending)

    def _read(self, measured: Measured) -> None:
        """Check a step's numbers, and add its row to the history.

        Under fp16 a gradient may overflow without any fault of the model. The optimiser then skips the step, the loss
        scale is halved, and `grad_norm` is None. It is an error only if the scale has fallen below 1.
        """
        *sums, norm = measured.read()
        row, parts, labels = measured.row, measured.parts, measured.row["tokens"]
        wrong = [index for part, value in zip(parts, sums, strict=True) if not math.isfinite(value) for index in part]
        if wrong:
            raise self._stop(measured, f"the loss is {sum(sums)}", wrong)
        if not labels:
            raise self._stop(measured, "nothing is labelled", sum(parts, []))
        overflow = not math.isfinite(norm) and self.scaler.is_enabled() and self.scaler.get_scale() >= 1.0
        if not math.isfinite(norm) and not overflow:
            raise self._stop(measured, f"the gradient's norm is {norm}", sum(parts, []))
        row["loss"], row["grad_norm"] = sum(sums) / labels, None if overflow else norm
        self.history.steps.append(row)

    def _gradients(self, parts: list[list[int]]) -> tuple[list[Tensor], int]:
        """Put the gradient of the mean loss into `grad`. Return each part's summed loss and the labels of all parts."""
        totals, counts = [], []
        for number, part in enumerate(parts):
            prepared = self.batches.get(part)
            read = prepared.fast_batch
            total, count = (torch.empty(0), read.learned) if read is not None else self._loss_of(prepared, part)
            del prepared  # the backward pass needs no more of a batch than autograd keeps
            if number == 0:
                provisional = count.clamp(min=1)
                provisional = provisional * len(parts) if len(parts) > 1 else provisional
            following = parts[number + 1] if number + 1 < len(parts) else self._next_step()
            if following:
                self.batches.begin(following)
            # N, the labels of the whole batch, is known only after the last part. Until then divide by a guess N'.
            if self.fast is not None and read is not None:
                total = self.fast.gradients(read, provisional)
            else:
                with self.ranks.unsynchronised(last=number == len(parts) - 1):
                    self.scaler.scale(total / provisional).backward()
            total = total.detach()
            if len(parts) > 1:  # copies: the next part may write where this one's numbers stand
                total, count = total.clone(), count.clone()
            totals.append(self.ranks.sum(total.double() if self.ranks.world > 1 else total))
            counts.append(count)
        labels = int(sum(counts[1:], start=counts[0]))
        # g = (N' / N) g'. DistributedDataParallel took the mean over the processes, so multiply by their number.
        if labels and len(parts) * self.ranks.world > 1:
            factor = int(provisional) / labels * self.ranks.world
            torch._foreach_mul_([p.grad for p in self._leaves() if p.grad is not None], factor)
        return totals, labels

    def _next_step(self) -> list[int]:
        """Return the first part of the next step; nothing if this step is the last."""
        following = self.order.at(self.step + 1) if self.step + 1 < len(self.order) else []
        return following[: self.settings.batch_size]

    def _moved(self, batch: Any) -> Any:
        """Return a batch on the device of the model."""
        if isinstance(self.loss, ChunkedLoss):
            return self.loss.moved(self.model, batch, self.device)
        return moved(batch, self.device)

    def _loss_of(self, prepared: Prepared, part: list[int]) -> tuple[Tensor, Tensor]:
        """Return the summed loss of a part, with a graph behind it, and the number of its labels in all processes."""
        counted = prepared.counted
        batch = prepared.batch if prepared.on_device else self._moved(prepared.batch)
        whole = len(part) == self.settings.batch_size
        with self.layers.batch(batch, whole), autocast(self.device, self.settings.precision):
            total, count = sum_and_count(self.loss(self.model, batch))
        if not total.requires_grad and self.skipping:
            total = total + torch.zeros_like(total, requires_grad=True)  # all parts were left out of this step
        if not total.requires_grad:
            raise TrainingError(
                "The loss does not depend on any parameter that requires gradients. Is the adapter disabled, or is "
                "reentrant checkpointing on under a frozen embedding (then pass checkpointing='reentrant')?"
            )
        return total if counted else total * 0, self.ranks.sum_of_counts(count, counted, self.device)

    def _leaves(self) -> list[nn.Parameter]:
        """Return what holds the gradients: the trained parameters, or the flat tensor of which they are views."""
        return [*self.trainable.values()] if self.fast is None else [self.fast.step.flat.whole]

    def _clip(self) -> Tensor:
        """Clip to the global norm |g| = sqrt(sum of g_i^2): g <- g min(1, max_norm / |g|). Return |g|."""
        self._look_for_gradients()
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.settings.max_grad_norm is None else float(self.settings.max_grad_norm)
        leaves = self._leaves()
        # .grad is read once per parameter: each read costs about a microsecond
        gradients = [gradient for leaf in leaves if (gradient := leaf.grad) is not None]
        if not self.alike or not gradients:
            return nn.utils.clip_grad_norm_(leaves, limit)
        # the same calls, without those that ask each gradient in Python for its device
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if limit < math.inf:
            torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _look_for_gradients(self) -> None:
        if self._looked_for_gradients:
            return
        self._looked_for_gradients = True
        without = [name for name, p in self.trainable.items() if p.grad is None and id(p) not in self.skipping]
        if without:
            warn(
                f"{len(without)} of {len(self.trainable)} trainable parameters got no gradient in the first step and "
                f"may never train; the first is {without[0]}.",
            )

    def _stop(self, measured: Measured, what: str, examples: list[int]) -> TrainingError:
        """Go back to before a step that cannot be made, and return the error."""
        self.buffers.restore(measured.held)
        self.step = measured.row["step"] - 1
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
        """Evaluate the model, add a row to the history, and keep the parameters if they are the best so far."""
        self.settle()
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
                row[name] = _as_number(name, metric(self.model))
        row = self.ranks.agree(row)
        if not math.isfinite(row.get("loss", 0.0)):
            raise TrainingError(
                f"After step {self.step} the evaluation loss is {row['loss']}. The learning rate may be too high."
            )
        self.history.evaluations.append(row)
        monitor, best = self.settings.monitor, self.history.best
        if monitor in row:
            better = operator.lt if monitor == "loss" else operator.gt
            if best is None or better(row[monitor], best[monitor]):
                self.history.best = row
                if self.settings.restore_best:
                    self.best_values = {name: p.detach().clone() for name, p in self.trainable.items()}
        return row

    def out_of_patience(self) -> bool:
        """Say whether as many evaluations have passed since the best one as patience allows."""
        if self.settings.patience is None or self.history.best is None:
            return False
        later = [row for row in self.history.evaluations if row["step"] > self.history.best["step"]]
        return len(later) >= self.settings.patience

    def restore_best(self) -> None:
        """Copy the best evaluation's parameters back into the model, if they were kept."""
        with torch.no_grad():
            for name, value in self.best_values.items():
                self.trainable[name].copy_(value)


def _as_number(name: str, value: Any) -> float:
    """Require that a metric of the user's gave a number."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # a tensor of several values is a RuntimeError in older torch
        raise PeftLabError(f"The metric {name!r} must return a number, found {shown(value)}.") from None
