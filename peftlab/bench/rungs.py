"""The rungs of the speed ladder: one optimisation each, in plain PyTorch, short enough to be read in the book.

A step is made of a loss and an optimiser. Each rung changes one thing of the rung before it.

The plain pieces are `autocast_loss` or `plain_loss`, and torch's AdamW. Then come `Masters`, `compile_layers`,
`ChunkedLoss`, `Flat` and `in_one_graph`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Tensor]
RATE = 1e-5


def loop(
    model: Any, batch: Batch, loss: Callable[[Any, Batch], Tensor], optimizer: Any
) -> Callable[[], Tensor]:
    """Return a function that makes one training step on a batch."""

    def step() -> Tensor:
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step


def autocast_loss(model: Any, batch: Batch) -> Tensor:
    """Compute the loss with float32 adapters: autocast casts the inputs of each product to bf16."""
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
        return model(**batch).loss


def plain_loss(model: Any, batch: Batch) -> Tensor:
    """Compute the loss in the dtype of the weights."""
    return model(**batch).loss


class Masters:
    """AdamW on float32 copies of bf16 parameters, so that small updates are not rounded away."""

    def __init__(self, trained: list[nn.Parameter]) -> None:
        self.trained: list[Tensor] = list(trained)
        self.masters = [p.detach().float() for p in trained]
        self.adamw = torch.optim.AdamW(self.masters, lr=RATE)

    @torch.no_grad()
    def step(self) -> None:
        """Update the copies, then round them into the parameters."""
        for master, parameter in zip(self.masters, self.trained, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        self.adamw.step()
        torch._foreach_copy_(self.trained, self.masters)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.trained:
            parameter.grad = None


def compile_layers(layers: Any) -> None:
    """Let torch.compile join what lies between the products of each block into few kernels."""
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)


class ChunkedLoss(torch.autograd.Function):
    """The mean loss of hidden states without whole logits: forward and backward, some rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, rows: int
    ) -> Tensor:
        """hidden: (n, d); head: (vocabulary, d), frozen; labels: (n,), -100: none."""
        gradient, count = torch.empty_like(hidden), (labels != -100).sum()
        total = hidden.new_zeros((), dtype=torch.float32)
        pieces = [t.split(rows) for t in (hidden, labels, gradient)]
        for x, label, into in zip(*pieces, strict=True):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                logits = (x @ head.T).float()
                loss = F.cross_entropy(logits, label, reduction="sum") / count
            into.copy_(torch.autograd.grad(loss, x)[0])
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> Any:
        """Pass on the gradient, which the forward pass has computed already."""
        return ctx.saved_tensors[0] * given[0], None, None, None


def chunked_loss(model: Any, batch: Batch, rows: int = 1024) -> Tensor:
    """Compute the loss of a language model by `ChunkedLoss`."""
    hidden = hidden_states(model.model, batch["input_ids"])[:, :-1]
    labels = batch["labels"][:, 1:].flatten()
    return ChunkedLoss.apply(hidden.flatten(0, 1), model.lm_head.weight, labels, rows)


def hidden_states(body: Any, ids: Tensor) -> Tensor:
    """Run a Llama's blocks on whole rows, without padding.

    transformers looks first whether the rows are packed. For that it waits for the GPU, and within a CUDA graph it
    chooses another mask.
    """
    x = body.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    angles = body.rotary_emb(x, position_ids=positions)
    for block in body.layers:
        x = block(x, attention_mask=None, position_embeddings=angles)
    return body.norm(x)


class Flat:
    """AdamW on one float32 tensor for all that is trained: a few kernels in place of dozens."""

    def __init__(self, trained: list[nn.Parameter]) -> None:
        self.values = torch.cat([p.detach().flatten() for p in trained])
        self.gradient = torch.zeros_like(self.values)
        at = 0
        for parameter in trained:  # parameters and their gradients become views
            there = slice(at, at := at + parameter.numel())
            parameter.data = self.values[there].view_as(parameter)
            parameter.grad = self.gradient[there].view_as(parameter)
        self.master = nn.Parameter(self.values.float())
        on_gpu = self.master.is_cuda
        self.adamw = torch.optim.AdamW(
            [self.master], lr=RATE, fused=True, capturable=on_gpu
        )

    @torch.no_grad()
    def step(self) -> None:
        """Update the master, then round it into the parameters."""
        self.master.grad = self.gradient.float()
        self.adamw.step()
        self.values.copy_(self.master)

    def zero_grad(self) -> None:
        """Set the gradient to zero, in place: the parameters' gradients are views of it."""
        self.gradient.zero_()


def in_one_graph(step: Callable[[], Any]) -> Callable[[], None]:
    """Record a step's kernels once, and return a function that launches all of them at once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
