"""Let LoRA be extra columns and rows of the frozen weight, so that it costs no pass of its own.

The linears of a block that read the same x are one group: q, k and v; o; gate and up; down. Stacked, with A (R, K) and
the block-diagonal sB (N, R),

    u  = x A^T                          (M, R)
    y  = [x | u] [W | sB]^T + b         (M, N)      one product
    du = dy sB                          (M, R)
    dx = [dy | du] [W; A]               (M, K)      one product
    dA = du^T x,    dB_i = s_i dy_i^T u_i

M counts the tokens. One buffer holds [W | sB] and, below, A:

            K      R
    N    |  W  |  sB |      the first N rows are the factor of the first product,
    R    |  A  |     |      the first K columns that of the second

A dense base in the dtype of the products lends its weights: they move into the buffer while the run lasts, and the
model's own parameters are views of it. A 4-bit base has one buffer for each kind of group, into which its weight is
decoded for one layer at a time.

What is trained is one flat tensor, and the parameters and their gradients are views of it, each in its own place. So
clipping and AdamW take a few kernels instead of hundreds:

    theta = [A_1, B_1, A_2, ...],    g likewise
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.methods.lora import LoRALinear
from peftlab.quantization.weights import decode_into, is_quantized

ALIGNED = 64  # rows of a buffer begin at multiples of so many elements, which products read fastest


def room(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return an uninitialised (rows, columns) buffer of aligned rows."""
    return like.new_empty(rows, -(-columns // ALIGNED) * ALIGNED)[:, :columns]


def as_rows(linear: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put a contiguous copy of a lent weight into a state dict: `save_pretrained` takes no other tensors."""
    state[f"{prefix}weight"] = state[f"{prefix}weight"].contiguous()


@dataclass
class Shared:
    """The buffer that the 4-bit groups of one kind decode into, and which of them it holds."""

    buffer: Tensor
    holds: Group | None = None


@dataclass
class Member:
    """A linear layer of a group, its LoRA if it has one, and where both lie: rows of W and of B, columns of u."""

    linear: nn.Linear
    lora: LoRALinear | None
    rows: slice
    columns: slice
    grad_b: Tensor | None = field(default=None)


class Group:
    """The linears of a block that read the same x, with their LoRA, as one product.

    Args:
        parts: each linear with its LoRA or None.
        like: a tensor with the device and the dtype of the products.
    """

    def __init__(self, parts: Sequence[tuple[nn.Linear, LoRALinear | None]], like: Tensor) -> None:
        self.members: list[Member] = []
        n = r = 0
        for linear, lora in parts:
            rank = 0 if lora is None else len(lora.lora_A)
            self.members.append(Member(linear, lora, slice(n, n + linear.out_features), slice(r, r + rank)))
            n, r = n + linear.out_features, r + rank
        self.n, self.r, self.k = n, r, parts[0][0].in_features
        self.adapted = [member for member in self.members if member.lora is not None]
        self.coded = is_quantized(parts[0][0].weight)
        self.lends = not self.coded and parts[0][0].weight.dtype == like.dtype
        self.like = like
        biases = [linear.bias for linear, _ in parts]
        self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases]).to(like.dtype)
        self.flat_a: Tensor | None = None  # all A of the group in the flat tensor, (R, K), and their gradient
        self.grad_a: Tensor | None = None
        self.shared: Shared | None = None
        self.whole: Tensor | None = None
        self.saving: list[Any] = []  # the handles of `as_rows`
        self.a = self.b = like.new_zeros(0)

    def parameters(self) -> list[nn.Parameter]:
        """Return all A, then all B."""
        loras = [member.lora for member in self.adapted if member.lora is not None]
        return [*(lora.lora_A for lora in loras), *(lora.lora_B for lora in loras)]

    # -- the weights ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def borrow(self) -> None:
        """Move the weights into one buffer with room for sB and A."""
        if self.coded:
            self.a, self.b = self.like.new_zeros(self.r, self.k), self.like.new_zeros(self.n, self.r)
            return
        alone = len(self.members) == 1 and not self.r and self.lends
        if alone:
            self.whole = self.members[0].linear.weight.detach()
            return
        self.whole = room(self.n + self.r, self.k + self.r, self.like)
        self.whole[:, self.k :].zero_()
        self.a, self.b = self.whole[self.n :, : self.k], self.whole[: self.n, self.k :]
        for member in self.members:
            mine = self.whole[member.rows, : self.k]
            mine.copy_(member.linear.weight)
            if self.lends:
                member.linear.weight.data = mine
                self.saving.append(member.linear.register_state_dict_post_hook(as_rows))

    @torch.no_grad()
    def give_back(self) -> None:
        """Give the model weights of their own again, bit for bit those that it lent."""
        self.shared = None
        while self.saving:
            self.saving.pop().remove()
        if self.whole is not None and self.lends and (self.r or len(self.members) > 1):
            for member in self.members:
                member.linear.weight.data = member.linear.weight.detach().clone(memory_format=torch.contiguous_format)
        self.whole, self.a, self.b = None, self.like.new_zeros(0), self.like.new_zeros(0)

    @property
    def size(self) -> int:
        """How many numbers the whole buffer takes."""
        return (self.n + self.r) * (-(-(self.k + self.r) // ALIGNED) * ALIGNED)

    @torch.no_grad()
    def read_adapters(self) -> None:
        """Copy A and sB from the trained parameters, rounded to the dtype of the products."""
        if self.flat_a is not None:
            self.a.copy_(self.flat_a)
        for member in self.adapted:
            assert member.lora is not None
            torch.mul(member.lora.lora_B, member.lora.scaling, out=self.b[member.rows, member.columns])

    def weight(self) -> Tensor:
        """Return the buffer (N + R, K + R). A 4-bit weight is decoded, unless it was the last one of its kind."""
        if self.shared is None:
            assert self.whole is not None
            return self.whole
        whole = self.shared.buffer[: self.size].view(self.n + self.r, -1)[:, : self.k + self.r]
        if self.shared.holds is not self:
            self.shared.holds = self
            for member in self.members:
                decode_into(whole[member.rows, : self.k], member.linear.weight)
            whole[: self.n, self.k :].copy_(self.b)
            whole[self.n :, : self.k].copy_(self.a)
        return whole

    # -- the two passes ------------------------------------------------------------------------------------------

    def inputs(self, rows: int) -> Tensor:
        """Return room for [x | u]."""
        return room(rows, self.k + self.r, self.like)

    def outputs(self, rows: int) -> Tensor:
        """Return room for [dy | du]."""
        return room(rows, self.n + self.r, self.like)

    def forward(self, xu: Tensor, u: Tensor | None = None, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return y and u. xu: [x | .], of which u is filled in; a u that is known already is copied there."""
        if self.r:
            u = torch.mm(xu[:, : self.k], self.a.t()) if u is None else u
            xu[:, self.k :].copy_(u)
        factor = self.weight()[: self.n].t()
        if self.bias is None:
            return torch.mm(xu, factor, out=out), u
        return torch.addmm(self.bias, xu, factor, out=out), u

    def low(self, dy: Tensor) -> Tensor:
        """Fill in du in [dy | .], (M, N + R), and return the whole."""
        if self.r:
            torch.mm(dy[:, : self.n], self.b, out=dy[:, self.n :])
        return dy

    def back(self, dy: Tensor) -> Tensor:
        """Return dx, (M, K), of [dy | du]."""
        return torch.mm(dy, self.weight()[:, : self.k])

    def gradients(self, dy: Tensor, x: Tensor, u: Tensor | None) -> None:
        """Add dA and dB to the flat gradient. dy: [dy | du], x: (M, K), u: (M, R)."""
        if self.grad_a is None or u is None:
            return
        add_product(self.grad_a, dy[:, self.n :].t(), x)
        for member in self.adapted:
            assert member.lora is not None and member.grad_b is not None
            add_product(member.grad_b, dy[:, member.rows].t(), u[:, member.columns], member.lora.scaling)


def add_product(out: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """out += scale a b. A sum of 16-bit products is kept in float32, if `out` is."""
    if out.dtype == a.dtype:
        out.addmm_(a, b, alpha=scale)
    elif out.device.type == "cuda" and out.dtype == torch.float32:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, alpha=scale, out=out)
    else:
        out.add_(a @ b, alpha=scale)


class Flat:
    """The trained parameters in one tensor.

    Attributes:
        whole: all of them, with the gradient of all of them in `whole.grad`, in float32 or wider.
        parameters: each, in its order; `gradients`: its part of the gradient.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        first = self.parameters[0]
        self.whole = nn.Parameter(first.detach().new_empty(sum(p.numel() for p in self.parameters)))
        self.whole.grad = torch.zeros_like(self.whole)
        self.gradients = self.views(self.whole.grad)
        self.places = self.views(self.whole.detach())
        self._gather()

    def _gather(self) -> None:
        """Let each parameter be its place in the tensor, with the values that it has now."""
        for parameter, place in zip(self.parameters, self.places, strict=True):
            if parameter.data_ptr() != place.data_ptr():
                place.copy_(parameter.detach())
                parameter.data = place

    def views(self, whole: Tensor) -> list[Tensor]:
        """Return the part of a tensor like `whole` that belongs to each parameter, in its shape."""
        sizes = [p.numel() for p in self.parameters]
        return [part.view(p.shape) for part, p in zip(whole.split(sizes), self.parameters, strict=True)]

    def begin(self) -> None:
        """Set all gradients to zero, and let each parameter's `grad` be its part of them."""
        assert self.whole.grad is not None
        self._gather()  # a callback may have put new values in a parameter's place, p.data = ...
        self.whole.grad.zero_()
        if self.parameters[0].grad is not self.gradients[0]:
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = gradient

    def give_back(self) -> None:
        """Give each parameter memory of its own again."""
        for parameter in self.parameters:
            parameter.grad = None
            parameter.data = parameter.detach().clone()
