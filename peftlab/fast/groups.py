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
clipping and AdamW take a few kernels instead of dozens:

    theta = [A_1, B_1, A_2, ...],    g likewise
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
    """Which group the buffer holds that the 4-bit groups of one kind decode into."""

    holds: Group | None = None


@dataclass
class Adapted:
    """The LoRA of a group's linear, its rows of sB, its columns of u, and the gradient of B."""

    lora: LoRALinear
    rows: slice
    columns: slice
    grad_b: Tensor


class Group:
    """The linears of a block that read the same x, with their LoRA, as one product.

    Args:
        parts: each linear with its LoRA or None.
        like: a tensor with the device and the dtype of the products.
    """

    def __init__(self, parts: Sequence[tuple[nn.Linear, LoRALinear | None]], like: Tensor) -> None:
        self.linears: list[tuple[nn.Linear, slice]] = []  # with their rows of W
        self.adapted: list[Adapted] = []
        first, n, r = parts[0][0], 0, 0
        for linear, lora in parts:
            rows = slice(n, n := n + linear.out_features)
            self.linears.append((linear, rows))
            if lora is not None:
                self.adapted.append(Adapted(lora, rows, slice(r, r := r + len(lora.lora_A)), like))
        self.n, self.r, self.k = n, r, first.in_features
        self.coded = is_quantized(first.weight)
        self.lends = not self.coded and first.weight.dtype == like.dtype
        self.lent: list[tuple[nn.Linear, Any]] = []  # with the handles of `as_rows`
        self.like = like
        biases = [linear.bias.detach() for linear, _ in parts if linear.bias is not None]  # all have one, or none
        self.bias = torch.cat(biases).to(like.dtype) if biases else None
        self.shared = Shared()
        self.whole = self.a = self.b = like  # until `borrow`
        self.flat_a = self.grad_a = like  # all A of the group in the flat tensor, (R, K), and their gradient
        self.u: Tensor | None = None  # from the forward pass to the backward pass

    def parameters(self) -> list[nn.Parameter]:
        """Return all A, then all B."""
        loras = [one.lora for one in self.adapted]
        return [*(lora.lora_A for lora in loras), *(lora.lora_B for lora in loras)]

    # -- the weights ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def borrow(self) -> None:
        """Move the weights into one buffer with room for sB and A."""
        if self.coded:
            self.a, self.b = self.like.new_zeros(self.r, self.k), self.like.new_zeros(self.n, self.r)
            return
        self.whole = room(self.n + self.r, self.k + self.r, self.like)
        self.whole[:, self.k :].zero_()
        self.a, self.b = self.whole[self.n :, : self.k], self.whole[: self.n, self.k :]
        self.shared.holds = self
        for linear, rows in self.linears:
            mine = self.whole[rows, : self.k]
            mine.copy_(linear.weight)
            if self.lends:
                linear.weight.data = mine
                self.lent.append((linear, linear.register_state_dict_post_hook(as_rows)))

    @torch.no_grad()
    def give_back(self) -> None:
        """Give the model weights of their own again, bit for bit those that it lent."""
        while self.lent:
            linear, handle = self.lent.pop()
            handle.remove()
            linear.weight.data = linear.weight.detach().clone(memory_format=torch.contiguous_format)
        self.shared, self.whole, self.a, self.b = Shared(), self.like, self.like, self.like

    def place(self, flat: Flat, at: int) -> int:
        """Take the places of A and of the gradients in the flat tensor, from `at` on. Return where they end."""
        end = at + self.r * self.k
        self.flat_a = flat.whole.detach()[at:end].view(self.r, self.k)
        self.grad_a = flat.gradient[at:end].view(self.r, self.k)
        for one in self.adapted:
            at, end = end, end + one.lora.lora_B.numel()
            one.grad_b = flat.gradient[at:end].view_as(one.lora.lora_B)
        return end

    @torch.no_grad()
    def read_adapters(self) -> None:
        """Copy A and sB from the trained parameters, rounded to the dtype of the products. What a step left is old."""
        self.u = None
        if self.coded:
            self.shared.holds = None
        if self.r:
            self.a.copy_(self.flat_a)
        for one in self.adapted:
            torch.mul(one.lora.lora_B, one.lora.scaling, out=self.b[one.rows, one.columns])

    def weight(self) -> Tensor:
        """Return the buffer (N + R, K + R). A 4-bit weight is decoded, unless it was the last one of its kind."""
        if self.shared.holds is not self:
            self.shared.holds = self
            for linear, rows in self.linears:
                decode_into(self.whole[rows, : self.k], linear.weight)
            self.whole[: self.n, self.k :].copy_(self.b)
            self.whole[self.n :, : self.k].copy_(self.a)
        return self.whole

    # -- the two passes ------------------------------------------------------------------------------------------

    def inputs(self, rows: int) -> Tensor:
        """Return room for [x | u]."""
        return room(rows, self.k + self.r, self.like)

    def outputs(self, rows: int) -> Tensor:
        """Return room for [dy | du]."""
        return room(rows, self.n + self.r, self.like)

    def forward(self, xu: Tensor, out: Tensor | None = None) -> Tensor:
        """Return y. xu: [x | .], of which u is filled in. If this was run before, u is known."""
        if self.r:
            if self.u is None:
                self.u = torch.mm(xu[:, : self.k], self.a.t())
            xu[:, self.k :].copy_(self.u)
        factor = self.weight()[: self.n].t()
        if self.bias is None:
            return torch.mm(xu, factor, out=out)
        return torch.addmm(self.bias, xu, factor, out=out)

    def low(self, dy: Tensor) -> Tensor:
        """Fill in du in [dy | .], (M, N + R), and return the whole."""
        if self.r:
            torch.mm(dy[:, : self.n], self.b, out=dy[:, self.n :])
        return dy

    def back(self, dy: Tensor) -> Tensor:
        """Return dx, (M, K), of [dy | du]."""
        return torch.mm(dy, self.weight()[:, : self.k])

    def gradients(self, dy: Tensor, x: Tensor) -> None:
        """Add dA and dB to the flat gradient, and forget u. dy: [dy | du], x: (M, K)."""
        if self.u is None:
            return
        add_product(self.grad_a, dy[:, self.n :].t(), x)
        for one in self.adapted:
            add_product(one.grad_b, dy[:, one.rows].t(), self.u[:, one.columns], one.lora.scaling)
        self.u = None


def share(groups: Sequence[Group]) -> None:
    """Give those of the groups of one kind that are in 4 bits one buffer to decode into."""
    coded = [group for group in groups if group.coded]
    if coded:
        buffer = room(max(g.n + g.r for g in coded), max(g.k + g.r for g in coded), coded[0].like)
        shared = Shared()
        for group in coded:
            group.shared, group.whole = shared, buffer[: group.n + group.r, : group.k + group.r]


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
        whole: all of them, and `gradient`, the gradient of all of them, in float32 or wider.
        parameters: each, in its order; `gradients`: its part of the gradient.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        first = self.parameters[0]
        self.whole = nn.Parameter(first.detach().new_empty(sum(p.numel() for p in self.parameters)))
        self.gradient = self.whole.grad = torch.zeros_like(self.whole)
        self.gradients = self.views(self.gradient)
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
        self._gather()  # a callback may have put new values in a parameter's place, p.data = ...
        self.gradient.zero_()
        if self.parameters[0].grad is not self.gradients[0]:
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = gradient

    def give_back(self) -> None:
        """Give each parameter memory of its own again."""
        for parameter in self.parameters:
            parameter.grad = None
            parameter.data = parameter.detach().clone()
