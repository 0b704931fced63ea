"""The fast path: LoRA on a Llama-like decoder, with a step written by hand.

A plain step spends most of a GPU's time on casts, copies and small kernels between the large products. This one gives
the same loss, gradients and steps (`tests/unit/test_fast.py` holds it to 1e-9 in float64) and does little else but the
products:

- `eligible`: which models and adapters it can take, and the reason where it cannot;
- `groups`: LoRA as extra columns and rows of the frozen weight;
- `pieces`: what lies between the products, each one kernel;
- `layer`: one block forward and backward;
- `step`: the whole model, with the loss made in chunks;
- `optimiser`: one flat tensor for all that is trained;
- `graph`: the step replayed as one CUDA graph for each shape.

`train` asks `find_path` for a `FastPath`, and lets it compute the gradient of each batch that it can read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.core.records import record_of
from peftlab.errors import PeftLabError
from peftlab.fast.eligible import Decoder, Refused, decoder_of
from peftlab.fast.graph import Graphs
from peftlab.fast.optimiser import FlatAdamW
from peftlab.fast.pieces import wide
from peftlab.fast.step import Batch, Step, read_batch
from peftlab.settings import Settings


def find_path(model: nn.Module, core: nn.Module, settings: Settings, device: torch.device) -> FastPath | str:
    """Return the fast path of a run, or the reason why it has to take the plain one.

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
        return FastPath(core, decoder_of(core), settings, device)
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
    """Compute the gradients of a run, and hold the model's weights meanwhile."""

    def __init__(self, model: nn.Module, decoder: Decoder, settings: Settings, device: torch.device) -> None:
        self.model, self.decoder, self.settings, self.device = model, decoder, settings, device
        self.step: Step | None = None
        self.graphs: Graphs | None = None
        self.scale: Tensor | None = None
        self.running: tuple[Any, ...] = ()
        self.how = ""
        self.plain_batches: list[str] = []

    def __enter__(self) -> FastPath:
        """Borrow the model's weights."""
        dtype = self.decoder.embedding.weight.dtype
        if self.settings.precision == "bf16":
            dtype = torch.bfloat16
        # memory_settings has marked the blocks that are to be computed again, the first ones
        blocks: Any = self.model.get_submodule("model.layers")
        marked = sum(block.gradient_checkpointing for block in blocks)
        pinned = self.settings.checkpointing == "pinned" and self.device.type == "cuda"
        self.step = Step(self.decoder, dtype, marked, pinned)
        self.scale = torch.zeros((), dtype=wide(self.step.like).dtype, device=self.device)
        self.running = self._running()
        self.how = self.step.told
        if self.device.type == "cuda":
            self.graphs = Graphs(self.step)
            self.how += ", and each shape of a batch is one CUDA graph"
        return self

    @property
    def told(self) -> str:
        """Say for the run's report that this path ran, how, and what the plain one had to compute."""
        return "; ".join([f"fast: {self.how}", *(f"the plain path where {reason}" for reason in self.plain_batches)])

    def __exit__(self, *exception: object) -> None:
        """Give the model its weights back."""
        if self.step is not None:
            self.step.give_back()
            self.step = self.graphs = None

    def optimizer(self, plain: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return AdamW over the flat tensor with the plain one's states and settings; another optimiser as it is."""
        if type(plain) is not torch.optim.AdamW or len(plain.param_groups) > 1:
            return plain
        assert self.step is not None
        flat = FlatAdamW(self.step.flat, plain.param_groups, plain.defaults["lr"])
        flat.load_state_dict(plain.state_dict())
        return flat

    @property
    def whole(self) -> nn.Parameter:
        """The flat tensor of which all trained parameters are views."""
        assert self.step is not None
        return self.step.flat.whole

    def begin(self) -> None:
        """Set the gradients to zero, before the first part of a batch.

        Raises:
            PeftLabError: since the run began, a callback has frozen what trains, or switched the adapters.
        """
        assert self.step is not None
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
        if record is None or self.step is None:
            return ()
        mine, kinds = record.activity, {(p.requires_grad, p.dtype, p.device) for p in self.step.flat.parameters}
        return mine.running, mine.rows, dict(mine.weights), kinds

    def read(self, batch: Mapping[str, Any]) -> Batch | None:
        """Return a batch as `gradients` takes it; None if the plain path has to compute it.

        Raises:
            PeftLabError: `fast=True`, and it has to.
        """
        # these turn a head by other angles in a longer text
        grows = getattr(self.decoder.rotary, "rope_type", "default") in ("dynamic", "longrope")
        try:
            return read_batch(batch, rounded=self.device.type == "cuda", counted=grows)
        except Refused as refusal:
            if self.settings.fast is True:
                raise refused(refusal) from None
            if str(refusal) not in self.plain_batches:
                self.plain_batches.append(str(refusal))
            return None

    def gradients(self, batch: Batch, divisor: Tensor) -> Tensor:
        """Add the gradient of the batch's summed loss, divided by `divisor`, to `grad`. Return the sum."""
        assert self.step is not None and self.scale is not None
        self.scale.fill_(1 / float(divisor))
        rows = self.step.rows(batch)
        if self.graphs is not None:
            return self.graphs.gradients(batch, rows, self.scale)
        return self.step.gradients(batch.to(self.device), rows, self.scale)
