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
    """A graph with the tensors that it reads and the one that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    loss: Tensor


class Graphs:
    """The graphs of a run by the shape of the batch."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.recorded: dict[tuple, Recorded] = {}
        self.seen: set[tuple] = set()
        self.pool = torch.cuda.graph_pool_handle()

    def gradients(self, batch: Batch, rows: Rows, scale: Tensor) -> Tensor:
        """Do what `Step.gradients` does. The first batch of a shape runs as usual, and its second records the graph."""
        inputs = [
            tensor
            for tensor in (*batch, rows.cos, rows.sin, rows.sin_back, *rows.masks.values(), scale)
            if tensor is not None
        ]
        shape = (batch.blocks is None, *(tensor.shape for tensor in inputs))
        recorded = self.recorded.get(shape)
        if recorded is None:
            if shape not in self.seen or len(self.recorded) >= MOST_GRAPHS:
                self.seen.add(shape)
                return self.step.gradients(batch, rows, scale)
            recorded = self.recorded[shape] = self._record(batch, rows, scale, inputs)
        for held, given in zip(recorded.inputs, inputs, strict=True):
            if held is not given:
                held.copy_(given, non_blocking=True)
        recorded.graph.replay()
        return recorded.loss.clone()

    def _record(self, batch: Batch, rows: Rows, scale: Tensor, inputs: list[Tensor]) -> Recorded:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            loss = self.step.gradients(batch, rows, scale)
        return Recorded(graph, inputs, loss)
