"""Add to a frozen weight the Kronecker product of two small matrices.

    y = W x + b + dW x,    dW = s C ⊗ D,    C: (a, c),  D: (b, d),  out = a b,  in = c d,  s = alpha / r

dW consists of a times c blocks, and each of them is D times one number of C. D is often large enough to be the product
of two thin matrices, D = A B, A: (b, r), B: (r, d). If r is at least half of D's larger side, that would save nothing,
and D is one matrix. C is the smaller of the two, and one matrix, unless `decompose_both` asks for thin factors of it
too, where r is less than half of its larger side.

The kernel of a convolution belongs to D, (b, d, k, k). With `use_effective_conv2d` and a rank that does not leave D
whole, D is a kernel T with its channels turned by two matrices: sum over i, j of T[i, j] A[i, b] B[j, d].

Paper: Yeh et al., *Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation*, 2023,
arXiv:2309.14859, section 3.3; the product is from Edalati et al., *KronA*, 2022, arXiv:2212.10650.
Book: chapter 7, the LoRA family.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlab.checks import check_fields, one_of, whole
from peftlab.core.interface import Placement
from peftlab.core.targets import Targets, by_pattern, check_patterns
from peftlab.methods.delta_weight import (
    DeltaWeight,
    Pull,
    check_settings,
    find_plain,
    shared_arguments,
    shared_fields,
)
from peftlab.methods.parts import trained_copies

KEYS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
INITS = (True, False, "lycoris")


class LoKr(DeltaWeight):
    """Add the update s C ⊗ D to what a layer returns.

    Attributes:
        lokr_w1: C, (a, c); or None, and then lokr_w1_a, (a, r), and lokr_w1_b, (r, c).
        lokr_w2: D, (b, d, k, ...); or None, and then lokr_w2_a, (b, r), and lokr_w2_b, (r, d k ...).
        lokr_t2: a kernel, (r, r, k, k), or (r, r, k, 1) of a Conv1d; beside it lokr_w2_a is (r, b), and
            lokr_w2_b (r, d).
        scaling: s.
    """

    keys = {name: "{path}." + name for name in KEYS}

    def __init__(self, host: nn.Module, r: int, alpha: float, config: LoKrConfig) -> None:
        super().__init__(host, config)
        self.scaling, self.rescales = alpha / r, config.rank_dropout_scale
        outside, inside, *kernel = self.shape
        a, b = factors(outside, config.decompose_factor)
        c, d = factors(inside, config.decompose_factor)
        sizes: dict[str, tuple[int, ...]] = {"lokr_w1": (a, c)}
        if config.decompose_both and r < max(a, c) / 2:
            sizes = {"lokr_w1_a": (a, r), "lokr_w1_b": (r, c)}
        if r >= max(b, d) / 2:
            sizes |= {"lokr_w2": (b, d, *kernel)}
        elif config.use_effective_conv2d and math.prod(kernel) > 1:
            sizes |= {"lokr_t2": (r, r, kernel[0], *(kernel[1:] or [1])), "lokr_w2_a": (r, b), "lokr_w2_b": (r, d)}
        else:
            sizes |= {"lokr_w2_a": (b, r), "lokr_w2_b": (r, d * math.prod(kernel))}
        for name in KEYS:
            self.register_parameter(name, nn.Parameter(torch.empty(sizes[name])) if name in sizes else None)
            if name in sizes:
                nn.init.kaiming_uniform_(self.get_parameter(name), a=math.sqrt(5))
        # One factor is zero, so the model starts as it was.
        zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}[config.init_weights]
        for name in sizes.keys() & set(zero):
            nn.init.zeros_(self.get_parameter(name))

    def factors(self, own: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return C and D. Each is a parameter or is made from two or three."""
        first, second = (own[name] if name in own else None for name in ("lokr_w1", "lokr_w2"))
        if first is None:
            first = own["lokr_w1_a"] @ own["lokr_w1_b"]
        if "lokr_t2" in own:
            second = torch.einsum("ijkl,ip,jq->pqkl", own["lokr_t2"], own["lokr_w2_a"], own["lokr_w2_b"])
        elif second is None:
            second = own["lokr_w2_a"] @ own["lokr_w2_b"]
        return first, second

    def product(self, *factors: Tensor) -> Tensor:
        """Return dW / s. Its entries lie as those of the weight do."""
        first, second = factors
        # Where D is whole in a Conv1d, it is (b, d, k), and C is set against its last two sides, (d, k), instead of its
        # first two. Hugging Face peft does so (as torch.kron does with a matrix), and so its folders are read.
        if second.dim() > 2:
            first = first[None] if second.dim() == 3 else first[..., None, None]
        # dW / s = C ⊗ D
        return kronecker(first, second)

    def product_and_pull(self, *factors: Tensor) -> tuple[Tensor, Pull]:
        """Return dW / s, (out, in), and what gives the gradients of C and D from its own."""
        first, second = factors
        (a, c), (b, d) = first.shape, second.shape

        def pull(gradient: Tensor) -> tuple[Tensor, ...]:
            # With the blocks of dL/ddW as rows, (a c, b d): dL/dC multiplies each with D; dL/dD adds them up by C
            blocks = gradient.view(a, b, c, d).transpose(1, 2).reshape(a * c, b * d)
            return torch.mv(blocks, second.reshape(-1)).view(a, c), torch.mv(blocks.T, first.reshape(-1)).view(b, d)

        return kronecker(first, second), pull

    def kept_rows(self, dtype: torch.dtype) -> Tensor:
        """Draw which rows of dW stay. In peft's LoKr their numbers are float32, whatever the adapter's dtype is."""
        return super().kept_rows(torch.float32)


def kronecker(first: Tensor, second: Tensor) -> Tensor:
    """Return first ⊗ second, (a b, c d, ...): a block of `second`, (b, d, ...), for each number of `first`, (a, c).

    torch.kron fails for some tensors with sides of 1.
    """
    left = first.reshape([side for size in first.shape for side in (size, 1)])  # (a, 1, c, 1, ...)
    right = second.reshape([side for size in second.shape for side in (1, size)])  # (1, b, 1, d, ...)
    return (left * right).reshape([m * n for m, n in zip(first.shape, second.shape, strict=True)])


def factors(size: int, most: int) -> tuple[int, int]:
    """Return two whole numbers whose product is `size`, the first not above `most`.

    If `most` divides `size`, it is the first. Otherwise the first is the largest divisor that is neither above `most`
    nor above the second, and at least 1. -1 sets no limit: the two are then as close as can be, (16, 16) for 256 and
    (8, 16) for 128.
    """
    if most > 0 and size % most == 0:
        return most, size // most
    limit = math.isqrt(size) if most == -1 else min(most, math.isqrt(size))
    first = next((n for n in range(limit, 0, -1) if size % n == 0), 1)
    return first, size // first


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(Targets):
    """Say what LoKr trains and how it starts.

    Attributes:
        r: the rank of a factor that is a product of thin matrices; a positive whole number. A rank of at least half
            the factor's larger side leaves it whole.
        alpha: the numerator of the scaling s = alpha / r. It counts as well where both factors are whole.
        decompose_both: make C a product of thin matrices, too, where the rank is small enough.
        decompose_factor: the first side of C, and its second, where it divides the layer's sizes; a small one gives a
            small C and a large D. -1 makes C and D as alike as can be, which takes the fewest parameters.
        rank_dropout: the probability of leaving a row of the update (an output of the layer) out of a training step; in
            [0, 1).
        rank_dropout_scale: divide the rows that stay by their share, so that the update keeps its size.
        module_dropout: the probability of leaving the whole update of a layer out of a training step; in [0, 1).
        use_effective_conv2d: give convolutions with a kernel larger than one a small kernel between two matrices, where
            the rank does not leave D whole. Linear layers know no difference.
        init_weights: which factor starts at zero, so that the model starts as it was: `True` takes C, and `"lycoris"`
            takes D, as the LyCORIS repository does. `False` draws all matrices at random and is for tests.
        rank_pattern, alpha_pattern: another r or alpha for the paths whose end matches a key, e.g. `{"layers.0.*": 4}`.

    Raises:
        PeftLabError: a value is out of range; the message says what was found.

    >>> model = pl.attach(model, pl.LoKrConfig(r=4, target_modules=["q_proj"]))
    >>> print(pl.count_parameters(model))
    64 of 5,776 parameters train (1.1080%)
    """

    r: int = 8
    alpha: float = 8
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout: float = 0.0
    rank_dropout_scale: bool = False
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool | str = True
    rank_pattern: Mapping[str, Any] = field(default_factory=dict)
    alpha_pattern: Mapping[str, Any] = field(default_factory=dict)

    method: ClassVar[str] = "lokr"
    peft_type: ClassVar[str] = "LOKR"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self)
        check_fields(self, one_of, "decompose_both", "rank_dropout_scale", known=(True, False))
        check_fields(self, one_of, "init_weights", known=INITS)
        check_fields(self, whole, "decompose_factor", least=-1, usual="4 to 16, or -1")

    def parts(self, model: nn.Module) -> Iterator[Placement]:
        """Yield an update for each target, and the trained copies."""
        targets = find_plain(model, self, "LoKr")
        check_patterns(self, targets)
        for path, host in targets.items():
            r, alpha = by_pattern(self.rank_pattern, path, self.r), by_pattern(self.alpha_pattern, path, self.alpha)
            yield Placement(path, "lokr", LoKr(host, r, alpha, self))
        yield from trained_copies(model, self)

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the fields of Hugging Face's `adapter_config.json` that only LoKr has."""
        own = ("decompose_both", "decompose_factor", "rank_dropout_scale")
        return shared_fields(self, hosts) | {name: getattr(self, name) for name in own}

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for this class: the reverse of `to_peft`."""
        factor, init = fields.get("decompose_factor", -1), fields.get("init_weights", True)
        return shared_arguments(fields) | {
            "decompose_both": bool(fields.get("decompose_both", False)),
            # less than -1 is to peft a limit that only a first factor of 1 keeps
            "decompose_factor": 1 if isinstance(factor, int) and factor < -1 else factor,
            "rank_dropout_scale": bool(fields.get("rank_dropout_scale", False)),
            "init_weights": init if init == "lycoris" else bool(init),
        }
