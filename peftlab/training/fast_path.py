"""Take the fast path where it computes a run: choose it, hold the model meanwhile, and hand it the batches.

`find_path` gives the parts of the model that `peftlab.fast` computes with, or the reason why the plain path has to run.
While the run lasts, a `FastPath` has the model's weights, and computes the gradient of each batch that it can read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.core.records import record_of
from peftlab.errors import PeftLabError
from peftlab.fast import Decoder, Refused
from peftlab.fast.pieces import wide
from peftlab.fast.step import Batch, Graphs, Step, read_batch
from peftlab.settings import Settings
from peftlab.training.eligible import decoder_of


def find_path(model: nn.Module, core: nn.Module, settings: Settings) -> Decoder | str:
    """Return the parts of the model, if the fast path can take the run, or the reason for the plain one.

    Args:
        model: the model as given; `core`: the model inside torch's wrappers.

    Raises:
        PeftLabError: `fast=True`, and there is a reason.
    """
    try:
        if settings.fast is False:
            raise Refused("fast=False")
        if not torch.is_grad_enabled():
            raise Refused("gradients are switched off, by torch.no_grad or inference_mode")
        if settings.compile:
            raise Refused(f"compile={settings.compile!r} asks for the plain path")
        if core is not model:
            raise Refused(f"the model is wrapped in a {type(model).__name__}")
        if settings.loss is not None:
            raise Refused("the loss is your own")
        if settings.precision == "fp16":
            raise Refused("it computes in fp16, which needs a loss scale")
        return decoder_of(core)
    except Refused as refusal:
        if settings.fast is True:
            raise refused(refusal) from None
        if settings.checkpointing == "pinned":
            raise PeftLabError(
                f"checkpointing='pinned' is done by the fast path, which cannot take this run: {refusal}. Use "
                "checkpointing=True, which keeps the blocks' inputs on the GPU."
            ) from None
        return str(refusal)


def refused(reason: Refused) -> PeftLabError:
    """Return the error of `fast=True` where the fast path cannot be taken."""
    return PeftLabError(
        f"fast=True, and the fast path cannot take this run: {reason}. Change that, or pass fast='auto', which then "
        "takes the plain path."
    )


class FastPath:
    """Compute the gradients of a run. It borrows the model's weights, until `give_back`."""

    def __init__(self, model: nn.Module, decoder: Decoder, settings: Settings, device: torch.device) -> None:
        self.model, self.settings, self.device = model, settings, device
        dtype = torch.bfloat16 if settings.precision == "bf16" else decoder.embedding.weight.dtype
        # memory_settings has marked the blocks that are to be computed again, the first ones
        blocks: Any = model.get_submodule("model.layers")
        marked = sum(block.gradient_checkpointing for block in blocks)
        on_gpu = device.type == "cuda"
        self.scale = wide(torch.zeros((), dtype=dtype, device=device))
        # from here on the step has the model's weights, so what asks for memory stands above
        self.step = Step(decoder, dtype, marked, pinned=on_gpu and settings.checkpointing == "pinned")
        self.graphs = Graphs(self.step) if on_gpu else None
        self.how = f"{self.step.told}, and each shape of a batch is one CUDA graph" if on_gpu else self.step.told
        self.plain_batches: list[str] = []
        self.running = self._running()

    @property
    def told(self) -> str:
        """Say for the run's report that this path ran, how, and what the plain one had to compute."""
        return "; ".join([f"fast: {self.how}", *(f"the plain path where {reason}" for reason in self.plain_batches)])

    def give_back(self) -> None:
        """Give the model its weights back. The step's memory is freed, even if an error's traceback holds this."""
        self.step.give_back()
        del self.step, self.graphs

    def begin(self) -> None:
        """Set the gradients to zero, before the first part of a batch.

        Raises:
            PeftLabError: since the run began, a callback has frozen what trains, or switched the adapters.
        """
        if self._running() != self.running:
            raise PeftLabError(
                "Since this run began, its adapters were switched, merged or detached, or a part of what trains was "
                "frozen or moved to another dtype; the fast path cannot follow. Undo it before the callback ends, or "
                "pass fast=False."
            )
        self.step.flat.begin()

    def _running(self) -> tuple[Any, ...]:
        """Return all that may not change while the run lasts."""
        record = record_of(self.model)
        if record is None:
            return ()
        mine, kinds = record.activity, {(p.requires_grad, p.dtype, p.device) for p in self.step.flat.parameters}
        return mine.running, mine.rows, dict(mine.weights), kinds

    def read(self, batch: Mapping[str, Any]) -> Batch | None:
        """Return a batch as `gradients` takes it; None if the plain path has to compute it.

        Raises:
            PeftLabError: `fast=True`, and it has to.
        """
        try:
            return read_batch(batch, rounded=self.device.type == "cuda")
        except Refused as refusal:
            if self.settings.fast is True:
                raise refused(refusal) from None
            if str(refusal) not in self.plain_batches:
                self.plain_batches.append(str(refusal))
            return None

    def gradients(self, batch: Batch, divisor: Tensor) -> Tensor:
        """Add the gradient of the batch's summed loss, divided by `divisor`, to `grad`. Return the sum."""
        self.scale.fill_(1 / float(divisor))
        rows = self.step.rows(batch)
        if self.graphs is not None:
            return self.graphs.gradients(batch, rows, self.scale)
        return self.step.gradients(batch.to(self.device), rows, self.scale)
