"""The loss of a language model without its whole logits: the head and the cross-entropy in chunks, both passes at once.

    z = h W^T + b                        h: (n, d),  W: (V, d),  z: (rows, V) of one chunk at a time
    log p = z - log sum over v of exp z_v
    L = - sum of the labels' log p       divide by n for the mean
    dL/dz = p - onehot
    dL/dh = dL/dz W,    dL/dW = dL/dz^T h

With a vocabulary of 128,000, the logits of 2,048 tokens are 0.5 GB in 16 bits, and their float32 copy, its logarithm
and the gradient 1 GB each. Nothing of this is needed twice: the gradient of a chunk follows from its logits at once.
So only one chunk lives at a time, and of the forward pass nothing is kept but dL/dh, which is as large as h. Only
positions with a label are computed.

Where Triton runs, one kernel turns the logits of a chunk into their gradient, in their place (`loss_kernel`). Elsewhere
a float32 copy of them is made first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.core.hooks import CHILD
from peftlab.core.records import as_transformer, unwrap, wrappings
from peftlab.core.triton_check import why_no_triton
from peftlab.errors import PeftLabError
from peftlab.training.encoding import IGNORE
from peftlab.training.labels import moved, readable
from peftlab.training.losses import (
    Learned,
    causal_lm_loss,
    default_loss,
    find_learned,
    hides_nothing,
    learned_rows,
    needed_output,
    next_labels,
    only_needed,
    with_balance,
)
from peftlab.training.model_facts import text_config
from peftlab.training.model_task import inner_model

CHUNK_BYTES = 1 << 28  # of a chunk's logits, but at least LEAST rows: a product of fewer mostly waits for W
LEAST = 256
SMALL = 64_000_000
# Names in configs of what multiplies the logits, and of what divides them
FACTORS, DIVISORS, CAP = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",), "final_logit_softcapping"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Form:
    """What a model does to its head's output: z <- cap tanh(scale z / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def of(self, z: Tensor) -> Tensor:
        """Return logits from what the head gave."""
        z = z * self.scale
        return z if self.cap is None else torch.tanh(z / self.cap) * self.cap


PLAIN = Form()


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, form: Form = PLAIN,
    rows: int | None = None,
) -> Tensor:  # fmt: skip
    """Return the cross-entropy of a head's logits with labels, summed, without the whole logits.

    Gradients are computed in the forward pass, where they are enabled. Under autocast the products are in its dtype.
    The rest is in float32, or float64 for float64 numbers.

    Args:
        hidden: (n, d), what the head reads.
        weight: (V, d), and `bias` (V,); frozen or trained.
        labels: (n,), from 0 to V - 1.
        form: a scaling or a cap of the logits.
        rows: positions in a chunk; by default as many as give 268 MB of logits.

    >>> h, W, labels = torch.randn(6, 4), torch.randn(10, 4), torch.tensor([1, 2, 3, 4, 5, 9])
    >>> whole = torch.nn.functional.cross_entropy(h @ W.T, labels, reduction="sum")
    >>> torch.allclose(chunked_cross_entropy(h, W, labels, rows=4), whole)
    True
    """
    return _CrossEntropy.apply(hidden, weight, bias, labels, form, rows, torch.is_grad_enabled())


class _CrossEntropy(torch.autograd.Function):
    """Compute the summed loss, and in the same pass its gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, form: Form, rows: int | None,
        train: bool,
    ) -> Tensor:  # fmt: skip
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        wants = [train and wanted for wanted in ctx.needs_input_grad[:3]]
        with torch.autocast(device, enabled=False):
            h, w = hidden.to(dtype), weight.to(dtype)
            b = None if bias is None else bias.to(dtype)
            wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
            # dL/dh is written chunk by chunk; what belongs to the head is a sum over chunks
            grads = [
                make(one, dtype=kind) if wanted and one is not None else None
                for make, wanted, one, kind in (
                    (torch.empty_like, wants[0], hidden, hidden.dtype),
                    (torch.zeros_like, wants[1], weight, wide),
                    (torch.zeros_like, wants[2], bias, wide),
                )
            ]
            log_p = h.new_empty((len(h), 1), dtype=wide)  # of the labels
            in_place = kernel_on(h.device) if form == PLAIN and dtype != torch.float64 else None
            step = rows or chunk_rows(len(h), len(w), (dtype if in_place else wide).itemsize)
            for at in range(0, len(h), step):
                here = slice(at, at + step)
                # z = h W^T + b
                z = F.linear(h[here], w, b)
                if in_place:
                    dz = in_place(z, labels[here], log_p[here])
                else:
                    z = z.to(wide)
                    dz = into_gradient(z, labels[here], log_p[here], form).to(dtype)
                if grads[0] is not None:
                    # dL/dh = dL/dz W, written straight into its rows
                    if dtype == hidden.dtype:
                        torch.mm(dz, w, out=grads[0][here])
                    else:
                        grads[0][here] = dz @ w
                if grads[1] is not None:
                    # dL/dW = dL/dz^T h, summed in float32 or better
                    grads[1] += dz.T @ h[here]
                if grads[2] is not None:
                    # dL/db = sum of dL/dz over the rows
                    grads[2] += dz.sum(0, dtype=wide)
                del z, dz  # before the next chunk is made
        ctx.dtypes = [None if one is None else one.dtype for one in (hidden, weight, bias)]
        ctx.save_for_backward(*grads)
        return -log_p.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if one is None else (one * gradient).to(dtype) for one, dtype in grads), None, None, None, None


def into_gradient(z: Tensor, labels: Tensor, log_p: Tensor, form: Form = PLAIN) -> Tensor:
    """Turn what the head gave for a chunk into the gradient of the summed loss with respect to it.

    z: (rows, V), in float32 or better, written over. labels: (rows,). log_p: (rows, 1), gets the logarithms of the
    labels' probabilities.
    """
    slope = None
    if form.scale != 1:
        z.mul_(form.scale)
    if form.cap is not None:
        z.div_(form.cap).tanh_()
        slope = 1 - z * z
        z.mul_(form.cap)
    own = labels[:, None]
    # log p = z - log sum_v exp z_v
    z.sub_(z.amax(1, keepdim=True))
    torch.gather(z, 1, own, out=log_p)
    sums = z.exp_().sum(1, keepdim=True)
    log_p.sub_(sums.log())
    # dL/dz = p - onehot. At the label that is p - 1 = expm1(log p).
    z.div_(sums).scatter_(1, own, log_p.expm1())
    if slope is not None:
        z.mul_(slope)
    if form.scale != 1:
        z.mul_(form.scale)
    return z


@cache
def kernel_on(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Return what `into_gradient` does as one kernel of Triton, if it runs on the device."""
    if why_no_triton(device) is not None:
        return None
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor] = import_module("peftlab.training.loss_kernel").into_gradient
    return kernel


def chunk_rows(count: int, vocabulary: int, itemsize: int) -> int:
    """Return how many of `count` positions a chunk has, with logits of so many bytes. All chunks are about equal."""
    most = max(LEAST, CHUNK_BYTES // (vocabulary * itemsize))
    return max(1, -(-count // max(1, -(-count // most))))


class WithLabelsRead(dict):
    """A batch, and what its loss in chunks reads in its labels.

    Attributes:
        needed: the argument that makes the model skip what comes before the first label.
        learned: the rows of what the head reads that have a label; None where the logits are to stay whole.
    """

    needed: Mapping[str, int] = MappingProxyType({})
    learned: Learned | None = None


class ChunkedLoss:
    """Compute the loss of a run: in chunks where that is the model's own loss, and from whole logits elsewhere.

    The model runs as always, with its hooks and wrappers, but for its head: that gives a stand-in of one column, and
    what it was to read goes to `chunked_cross_entropy`. Whether the model does anything else to its logits is seen in
    the first batch: there the stand-in is the real head's answer at the last position, and what the model makes of it
    must be what `Form` says.

    Attributes:
        told: what was done, for the report of the run: "in chunks", or "whole: " and the reason. Logits of a batch that
            take less than `SMALL` bytes in float32 stay whole, too, unless `wish` is True. So small runs keep their
            last bits.

    Raises:
        PeftLabError: `wish` is True, and the loss cannot be computed in chunks.
    """

    def __init__(self, model: nn.Module, wish: bool | str = "auto") -> None:
        self.wish, self.told, self.form = wish, "whole: they are small", form_of(model)
        self.head: nn.Linear | None = None
        self.seen = False  # whether a batch has shown that the form is right
        found = "chunked_loss=False" if wish is False else plain_head(model)
        if isinstance(found, nn.Linear):
            self.head = found
        else:
            self._whole(found)

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return (the summed loss, the number of labels)."""
        if not isinstance(batch, WithLabelsRead):
            batch = self.with_labels_read(model, batch)
        head = self.head  # once: the thread that makes batches may find meanwhile that the logits stay whole
        if head is None or batch.learned is None:
            return default_loss(model, batch)(model, batch)
        before = None if self.seen else generators(head.weight.device)
        with read_by(head, answer=not self.seen) as read:
            output = needed_output(model, batch, batch.needed)
        if before is not None:
            reason = self._difference(read, output)
            if reason is not None:
                self._whole(reason)
                restore_generators(before)
                return default_loss(model, batch)(model, batch)
            self.seen, self.told = True, "in chunks"
        (hidden,) = read.inputs  # (b, k, d), or (b, n + t, d) behind a prompt
        chosen, wanted = batch.learned.rows(hidden), batch.learned.labels
        if chosen is None:  # the head reads other positions than most models' heads
            labels = next_labels(readable(batch["labels"]), hidden.shape[1])
            chosen, wanted = learned_rows(hidden, labels, head.out_features)
        total = chunked_cross_entropy(chosen, head.weight, wanted, bias=head.bias, form=self.form)
        return with_balance(model, output, total, torch.tensor(len(wanted)))

    def moved(self, model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> WithLabelsRead:
        """Return a batch on the device, but for what a causal language model's loss reads on the CPU: the labels, and
        a mask that hides nothing, which is left out.

        Raises:
            PeftLabError: a label is no token.
        """
        if device.type != "cuda" or default_loss(model, batch) is not causal_lm_loss:
            return self.with_labels_read(model, moved(batch, device))
        left = ("labels", "attention_mask") if hides_nothing(batch) else ("labels",)
        rest = {key: value for key, value in batch.items() if key not in left}
        return self.with_labels_read(model, {**moved(rest, device), "labels": batch["labels"]})

    def with_labels_read(self, model: nn.Module, batch: Mapping[str, Any]) -> WithLabelsRead:
        """Return the batch and what follows from its labels.

        Raises:
            PeftLabError: a label is no token; or `chunked_loss=True`, and the loss needs whole logits.
        """
        found, head = WithLabelsRead(batch), self.head
        if head is None:
            return found
        if default_loss(model, batch) is not causal_lm_loss:
            self._whole("it is not that of a causal language model")
            return found
        labels = readable(batch["labels"])
        known = labels != IGNORE
        if self.pays(int(known.sum())):
            found.needed = only_needed(model, known)
            # where the head most likely reads; a slice of one row, or of everything, is contiguous
            rows, length = labels.shape
            positions = found.needed.get("logits_to_keep", length)
            found.learned = find_learned(
                next_labels(labels, positions), head.out_features, head.weight.device,
                contiguous=positions == length or rows == 1,
            )  # fmt: skip
        return found

    def pays(self, labels: int) -> bool:
        """Say whether the logits of so many labels are computed in chunks."""
        head = self.head  # another thread may find meanwhile that the logits stay whole
        return head is not None and (self.wish is True or 4 * labels * head.out_features > SMALL)

    def _difference(self, read: Read, output: Any) -> str | None:
        """Return why the model's logits do not follow from what its head read; None if they do."""
        logits = getattr(output, "logits", output)
        if len(read.inputs) != 1 or read.inputs[0].ndim != 3 or not isinstance(logits, Tensor):
            return "its forward does not call its head once, for the logits"
        answer = self.form.of(read.answer)
        near = 1e-5 if logits.dtype in (torch.float32, torch.float64) else 2e-2
        if logits.shape != answer.shape or (logits - answer).abs().max() > near * answer.abs().max():
            return "its logits are more than what its head gives, scaled and capped"
        return None

    def _whole(self, reason: str) -> None:
        if self.wish is True:
            raise PeftLabError(
                f"chunked_loss=True, and the loss of this model needs whole logits: {reason}. Pass chunked_loss='auto'."
            )
        self.head, self.told = None, f"whole: {reason}"


class Read:
    """What a head was given in one pass: its inputs, and where it was asked, its answer to the last position."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.answer = torch.empty(0)


@contextmanager
def read_by(head: nn.Linear, answer: bool) -> Iterator[Read]:
    """Let a head note what it reads inside the block, and give one column in the place of its logits.

    Args:
        answer: give the real logits of the last position instead.
    """
    read = Read()

    def forward(hidden: Tensor) -> Tensor:
        read.inputs.append(hidden)
        # Wrappers such as DistributedDataParallel follow the output to find which parameters it came from.
        column = hidden[..., :1]
        if not answer:
            return column
        with torch.no_grad():
            read.answer = F.linear(hidden[:, -1:], head.weight, head.bias)
        return read.answer + 0 * column[:, -1:].to(read.answer.dtype)

    vars(head)["forward"] = forward
    try:
        yield read
    finally:
        del vars(head)["forward"]


def plain_head(model: nn.Module) -> nn.Linear | str:
    """Return a model's head if it is a plain linear layer, frozen or trained, and else why it is not."""
    core = unwrap(model)
    try:
        head: Any = as_transformer(inner_model(model)).get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    if head is None:
        return "the model names no head"
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}"
    if CHILD in head._modules:
        return "its head has an adapter"
    if "forward" in vars(head) or any(getattr(head, hooks) for hooks in HOOKS):
        return "its head has hooks, or is offloaded"
    if any(hasattr(one, "_orig_mod") for one in wrappings(model)):
        return "the model is compiled as a whole"
    if core is not model and any(one.requires_grad for one in head.parameters()):
        return f"its head trains under {type(model).__name__}"
    return head


def form_of(model: nn.Module) -> Form:
    """Return what a model's config says it does to its logits."""
    config = text_config(model)
    factors = [getattr(config, name, None) or 1.0 for name in FACTORS]
    divisors = [getattr(config, name, None) or 1.0 for name in DIVISORS]
    return Form(math.prod(factors) / math.prod(divisors), getattr(config, CAP, None))


def generators(device: torch.device) -> list[Tensor]:
    """Return the states of the generators that a forward pass may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def restore_generators(states: list[Tensor]) -> None:
    """Put generators back, so that a pass that is repeated draws the same numbers."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
