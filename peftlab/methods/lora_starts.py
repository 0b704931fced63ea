"""Start LoRA from the weight that it changes: from what the weight does most (PiSSA, OLoRA).

A plain LoRA starts at nothing: B is zero. Here it starts from a part of the weight W itself, s B0 A0, and trains that:

    W = U S V^T,   s B0 A0 = U_r S_r V_r^T,   B0 = U_r sqrt(S_r / s),   A0 = sqrt(S_r / s) V_r^T       PiSSA
    W = Q R,         B0 A0 = Q_r R_r,         B0 = Q_r,                 A0 = R_r                       OLoRA

    y = (W - s B0 A0) x + b + s B A x  =  W x + b + s (B A - B0 A0) x

    W: (out, in),  A and A0: (r, in),  B and B0: (out, r);    U_r, V_r, Q_r: r columns,  R_r: r rows, the first ones

At the start A = A0 and B = B0, so y is the base's, bit for bit. Hugging Face peft writes W - s B0 A0 over the base's
weight. Then the base cannot be shared with another adapter, detaching does not give it back, in 16 bits it is rounded
anew, and a folder fits no base that anybody has published. So here the base stays, and A0 and B0 stay beside A and B:
r (in + out) more numbers that do not train, and two more thin products. They keep no activation.

A folder needs neither the base's change nor this file: it holds a plain LoRA of rank 2 r,

    s (B A - B0 A0) = s B' A',    A' = [A; A0],    B' = [B, -B0]

with an alpha that keeps s: 2 alpha, or sqrt(2) alpha for rsLoRA.

Papers: Meng et al., *PiSSA*, 2024, arXiv:2404.02948, section 3; Büyükakyüz, *OLoRA*, 2024, arXiv:2406.01775, section 3.
Book: section *Other starts* of the chapter on the LoRA family.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.core.hooks import base_modules
from peftlab.core.interface import Part
from peftlab.core.records import own_tensor, sizes_of
from peftlab.core.sharding import whole
from peftlab.core.targets import CONVOLUTIONS, is_conv1d, shape_of
from peftlab.errors import PeftLabError, warn
from peftlab.methods.lora_conv import biased
from peftlab.methods.parts import cast, first_input, is_offloaded, is_readable, widened
from peftlab.quantization.weights import dense, is_quantized

FAST = re.compile(r"pissa_niter_([1-9]\d{0,3})")  # PiSSA by a randomised SVD with so many iterations
STARTED = "peftlab_start"  # says in a folder's metadata with which `init` A' and B' began
SEED = 42  # of the randomised SVD: a run that goes on later finds the same start


def from_weight(init: Any) -> bool:
    """Say whether an `init` starts from a part of the weight, which is then taken out of it."""
    return init in ("pissa", "olora") or (isinstance(init, str) and bool(FAST.fullmatch(init)))


class LoRAStarted(Part):
    """Add s (B A - B0 A0) x to what a linear layer returns.

    Attributes:
        lora_A, start_A: (r, in); the second is A0, a buffer.
        lora_B, start_B: (out, r).
        lora_B_bias: (out,) or None.
        scaling: s.
    """

    keys = {
        "folded_A": "{path}.lora_A.weight",
        "folded_B": "{path}.lora_B.weight",
        "lora_B_bias": "{path}.lora_B.bias",
    }

    start_A: Tensor
    start_B: Tensor

    def __init__(self, host: nn.Module, r: int, scaling: float, config: Any) -> None:
        super().__init__()
        self.init = config.init
        check_linear(host, r, config.init)
        inside, outside = shape_of(host)
        self.scaling, self.dropout = scaling, config.dropout
        self.transposed = is_conv1d(host) or (config.fan_in_fan_out and not isinstance(host, nn.Linear))
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(r, inside)), nn.Parameter(torch.zeros(outside, r))
        self.lora_B_bias = nn.Parameter(torch.zeros(outside)) if config.lora_bias else None
        self.register_buffer("start_A", torch.zeros(r, inside))
        self.register_buffer("start_B", torch.zeros(outside, r))

    def settle(self, host: nn.Module) -> None:
        """Take A0 and B0 from the host's weight, and start A and B there."""
        weight = weight_of(host, self.init)
        if weight.is_meta:  # a model without numbers, to count or to plan with
            return
        a, b = factors(weight.T if self.transposed else weight, len(self.start_A), self.scaling, self.init)
        if not (a.any() and b.any()):
            warn(
                f"A weight of {type(host).__name__} {sizes_of(host)} is zero, so init={self.init!r} starts it from "
                "nothing, and PiSSA's A and B would both stay zero. Leave that layer out, or use init='kaiming'.",
            )
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)
        self.start_A.copy_(self.lora_A)  # rounded as A is, so that nothing is left of the difference
        self.start_B.copy_(self.lora_B)

    def after(self, host: nn.Module, args: tuple, kwargs: dict, output: Tensor, base: Tensor) -> Tensor:
        """Add the update. x: (..., in), output: (..., out)."""
        x = cast(first_input(args, kwargs), self.lora_A.dtype)
        dropped = F.dropout(x, self.dropout, self.training)
        # y = W x + b + s (B (A x) - B0 (A0 x)); what is taken out of W is not dropped
        update = F.linear(F.linear(dropped, self.lora_A), self.lora_B, self.lora_B_bias)
        update -= F.linear(F.linear(x, self.start_A), self.start_B)  # in place: one wide tensor less
        update = update * self.scaling
        return (output + update).to(output.dtype)

    def delta(self) -> Tensor:
        """Return the update of the weight, (out, in), in the adapter's dtype and with gradients."""
        return (self.lora_B @ self.lora_A - self.start_B @ self.start_A) * self.scaling

    def merged(self, host: nn.Module) -> dict[str, Tensor]:
        """Return the host's parameters with the update folded in, not yet rounded to the host's dtype."""
        # W' = W + s (B A - B0 A0)
        delta = widened(self.lora_B) @ widened(self.lora_A) - widened(self.start_B) @ widened(self.start_A)
        delta = (delta.T if self.transposed else delta) * self.scaling
        parameters = {"weight": widened(own_tensor(host, "weight")) + delta}
        if self.lora_B_bias is not None:
            parameters["bias"] = biased(host, self.lora_B_bias, self.scaling)
        return parameters

    @property
    def folded_A(self) -> Tensor:
        """A' = [A; A0], (2 r, in): what a folder holds."""
        a = whole(self.lora_A)
        return torch.cat([a, self.start_A.to(a.device)])

    @property
    def folded_B(self) -> Tensor:
        """B' = [B, -B0], (out, 2 r)."""
        b = whole(self.lora_B)
        return torch.cat([b, -self.start_B.to(b.device)], dim=1)

    def as_saved(self, root: nn.Module, path: str, own: str, tensor: Tensor) -> Tensor:
        """Return A' or B' for an A or B that peft saved without its start, which this base's weight gives again."""
        if own == "folded_A" and tensor.shape == self.start_A.shape:
            check_unconverted(root, path, self.init)
            return torch.cat([tensor.to(self.start_A), self.start_A])
        if own == "folded_B" and tensor.shape == self.start_B.shape:
            return torch.cat([tensor.to(self.start_B), -self.start_B], dim=1)
        return tensor

    def weight_in_peft(self, host: nn.Module) -> Tensor:
        """Return W - s B0 A0, as it is stored."""
        start = widened(self.start_B) @ widened(self.start_A) * self.scaling
        return widened(own_tensor(host, "weight")) - (start.T if self.transposed else start)

    def values_from(self, own: str, tensor: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Yield A and A0 from A', or B and B0 from B'."""
        r = len(self.start_A)
        if own == "folded_A":
            return [(self.lora_A, tensor[:r]), (self.start_A, tensor[r:])]
        if own == "folded_B":
            return [(self.lora_B, tensor[:, :r].contiguous()), (self.start_B, -tensor[:, r:])]
        return super().values_from(own, tensor)


def check_linear(host: nn.Module, r: int, init: str) -> None:
    """Refuse a host that is no linear layer, or has fewer singular values than r."""
    if isinstance(host, (nn.Embedding, *CONVOLUTIONS)):
        raise PeftLabError(
            f"init={init!r} starts linear layers from their weights, and {type(host).__name__} {sizes_of(host)} is "
            "none. Leave it out of target_modules, or use init='kaiming'."
        )
    inside, outside = shape_of(host)
    if r > min(inside, outside):
        raise PeftLabError(
            f"r is {r}, and a weight of {outside} x {inside} has no more than {min(inside, outside)} directions for "
            f"init={init!r}. Choose a smaller r (rank_pattern: for this layer alone), or init='kaiming'."
        )


def weight_of(host: nn.Module, init: str) -> Tensor:
    """Return a host's weight as it is stored, in float32; for 4-bit codes the numbers that they stand for.

    Raises:
        PeftLabError: the weight is not in memory, or not finite.
    """
    stored = own_tensor(host, "weight")
    if is_offloaded(host, stored):
        raise PeftLabError(
            f"init={init!r} reads the weights, and some are offloaded (accelerate brings them in for each call). Load "
            "the model without offloading, or use init='kaiming'."
        )
    if not is_readable(stored):
        raise PeftLabError(
            f"init={init!r} reads the weights, and some are held in {stored.dtype}. Load the base in 16 or 32 bits, or "
            "quantise it with quantize_model."
        )
    weight = dense(stored, torch.float32) if is_quantized(stored) else stored.detach().to(torch.float32)
    if not weight.is_meta and not weight.isfinite().all():
        raise PeftLabError(
            f"init={init!r} reads the weights, and one of {type(host).__name__} {sizes_of(host)} holds values that are "
            "not finite. Load the base again."
        )
    return weight


def factors(weight: Tensor, r: int, scaling: float, init: str) -> tuple[Tensor, Tensor]:
    """Return A0, (r, in), and B0, (out, r), for a weight, (out, in) in float32.

    >>> from peftlab.methods.lora_starts import factors
    >>> a, b = factors(torch.diag(torch.tensor([8.0, 2.0])), r=1, scaling=2.0, init="pissa")
    >>> 2 * b @ a
    tensor([[8., 0.],
            [0., 0.]])
    """
    if init == "olora":
        # W = Q R
        q, right = torch.linalg.qr(weight)
        return right[:r], q[:, :r]
    fast = FAST.fullmatch(init)
    if fast:
        with seeded(weight.device, SEED):
            u, s, v = torch.svd_lowrank(weight, r, niter=int(fast[1]))
        vt = v.T
    else:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    # s B0 A0 = U_r S_r V_r^T, with the square root of S_r / s on both sides
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * vt[:r], u[:, :r] * root


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Let a device draw from this seed inside the block, and go on after it as if it had drawn nothing there."""
    generator = torch.default_generator
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


def folded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `adapter_config.json` for the plain LoRA of rank 2 r that a folder holds.

    s = alpha / r = 2 alpha / 2 r, or alpha / sqrt(r) = sqrt(2) alpha / sqrt(2 r)
    """
    factor = math.sqrt(2) if fields["use_rslora"] else 2
    return {
        **fields,
        "r": 2 * fields["r"],
        "lora_alpha": factor * fields["lora_alpha"],
        "rank_pattern": {key: 2 * r for key, r in fields["rank_pattern"].items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in fields["alpha_pattern"].items()},
    }


def unfolded(fields: Mapping[str, Any], init: str | None) -> dict[str, Any]:
    """Return the fields of the LoRA of rank r that `folded` was given, for a folder that says how it started."""
    tables = [fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    if not from_weight(init) or not all(isinstance(table, Mapping) for table in tables):
        return dict(fields)  # a wrong field is for the config itself to refuse
    if any(not isinstance(r, int) or r % 2 for r in (fields.get("r", 1), *tables[0].values())):
        return dict(fields)
    factor = math.sqrt(2) if fields.get("use_rslora") else 2
    return {
        **fields,
        STARTED: init,
        "r": fields["r"] // 2,
        "lora_alpha": round(fields["lora_alpha"] / factor, 12),
        "rank_pattern": {key: r // 2 for key, r in (fields.get("rank_pattern") or {}).items()},
        "alpha_pattern": {k: round(alpha / factor, 12) for k, alpha in (fields.get("alpha_pattern") or {}).items()},
    }


CONVERT = (
    "Where it was trained, convert it with Hugging Face peft: "
    "model.save_pretrained(folder, path_initial_model_for_weight_conversion=...)."
)


def check_unconverted(root: nn.Module, path: str, init: str) -> None:
    """Refuse a folder of peft without its start, where this base would not give the start again that it had.

    Raises:
        PeftLabError: the weight is quantised or tied, or peft starts such a layer from something else.
    """
    host = root.get_submodule(path)
    weight = own_tensor(host, "weight")
    tied = [other for other, module in base_modules(root).items() if module._parameters.get("weight") is weight]
    why = ""
    if is_quantized(weight):
        why = f"{path} is held in four bits here, and its factors are others than those of the full weight"
    elif is_conv1d(host) and init == "olora":
        why = f"peft takes the factors of {path}, a Conv1D, from the transposed weight"
    elif len(tied) > 1:
        why = f"peft changed the weight of {path} together with that of {', '.join(set(tied) - {path})} (tied weights)"
    if why:
        raise PeftLabError(
            f"The adapter was trained with init_lora_weights={init!r}, which changes the base's weights, and its start "
            f"cannot be found again: {why}. {CONVERT}"
        )
