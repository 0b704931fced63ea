"""Replay a whole step as one CUDA graph.

A step launches some three thousand kernels. Launched one by one from Python they take longer than they run, on a small
model or a slow host. A graph is recorded once and then launched as a whole. It fixes the addresses of all tensors, so
there is one for each shape of a batch, and its inputs are copied to where they were when it was recorded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftlab.fast.layer import Rows
from peftlab.fast.step import Batch, Step

MOST_GRAPHS = 16  # each holds little of its own, for all take their memory from one pool


@dataclass
class Recorded:
    """A graph, the tensors that it reads, what was last copied there, and the tensor that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    copied: list[Tensor]
    loss: Tensor


class Graphs:
    """The graphs of a run by the shape of the batch."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.recorded: dict[tuple, Recorded] = {}
        self.seen: set[tuple] = set()
        self.pool = torch.cuda.graph_pool_handle()

    def gradients(self, batch: Batch, rows: Rows, scale: Tensor) -> Tensor:
        """Do what `Step.gradients` does. The first batch of a shape runs as usual, and its second records the graph.

        Args:
            batch: may still be on the CPU.
            scale: always the same tensor, which is written to.
        """
        given = [*batch[:4], rows.cos, rows.sin, rows.sin_back, *(m for m in rows.masks.values() if m is not None)]
        shape = tuple(tensor.shape for tensor in given)
        recorded = self.recorded.get(shape)
        if recorded is None:
            if shape not in self.seen or len(self.recorded) >= MOST_GRAPHS:
                self.seen.add(shape)
                return self.step.gradients(batch.to(scale.device), rows, scale)
            recorded = self.recorded[shape] = self._record(batch, rows, scale, given)
        for index, (held, tensor) in enumerate(zip(recorded.inputs, given, strict=True)):
            if recorded.copied[index] is not tensor:
                held.copy_(tensor, non_blocking=True)
        recorded.copied = given
        recorded.graph.replay()
        return recorded.loss.clone()

    def _record(self, batch: Batch, rows: Rows, scale: Tensor, given: list[Tensor]) -> Recorded:
        inputs = [tensor.to(scale.device, copy=True) for tensor in given]
        ids, places, back, labels, cos, sin, sin_back, *others = inputs
        masks = iter(others)
        held = Batch(ids, places, back, labels, batch.learned, None, None)
        own = {window: None if mask is None else next(masks) for window, mask in rows.masks.items()}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            loss = self.step.gradients(held, Rows(rows.b, rows.s, cos, sin, sin_back, own), scale)
        return Recorded(graph, inputs, given, loss)
