"""Add to a frozen weight the Hadamard product (entry by entry) of two products of thin matrices.

    y = W x + b + dW x,    dW = s (A1 B1) * (A2 B2),    A1, A2: (out, r),  B1, B2: (r, in),  s = alpha / r

Each of the two products has rank r, and their Hadamard product has a rank of up to r squared. So with twice the
parameters of LoRA an update can have a far higher rank, though not any of that rank.

A convolution counts as a matrix, (out, in k k). With `use_effective_conv2d` each of the two is a small kernel between
two matrices instead, T with its channels turned by A and B: sum over i, j of T[i, j] A[i, out] B[j, in],
T: (r, r, k, k), A: (r, out), B: (r, in).

Paper: Hyeon-Woo, Ye-Bin and Oh, *FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning*,
2021, arXiv:2108.06098, section 2.2; for convolutions proposition 3. As an adapter: Yeh et al., *Navigating
Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation*, 2023, arXiv:2309.14859, section 3.2.
Book: chapter 7, the LoRA family.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlab.checks import check_fields, one_of
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

KEYS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")


class LoHa(DeltaWeight):
    """Add the update s (A1 B1) * (A2 B2) to what a layer returns.

    Attributes:
        hada_w1_a, hada_w2_a: (out, r); (r, out) beside a kernel.
        hada_w1_b, hada_w2_b: (r, in), or (r, in / groups k k) of a convolution; (r, in / groups) beside a kernel.
        hada_t1, hada_t2: the kernels, (r, r, k, k), or (r, r, k, 1) of a Conv1d; None without.
        scaling: s, rounded to float32, as Hugging Face peft multiplies by it.
    """

    keys = {name: "{path}." + name for name in KEYS}

    def __init__(self, host: nn.Module, r: int, alpha: float, config: LoHaConfig) -> None:
        super().__init__(host, config)
        self.scaling = torch.tensor(alpha / r, dtype=torch.float32, device="cpu").item()
        outside, inside, *kernel = self.shape
        self.hada_t1 = self.hada_t2 = None
        if config.use_effective_conv2d and math.prod(kernel) > 1:
            sizes = (r, outside), (r, inside)
            self.hada_t1, self.hada_t2 = (
                nn.Parameter(torch.empty(r, r, kernel[0], *(kernel[1:] or [1]))) for _ in range(2)
            )
        else:
            sizes = (outside, r), (r, inside * math.prod(kernel))
        self.hada_w1_a, self.hada_w2_a = (nn.Parameter(torch.empty(sizes[0])) for _ in range(2))
        self.hada_w1_b, self.hada_w2_b = (nn.Parameter(torch.empty(sizes[1])) for _ in range(2))
        for parameter in self.parameters():
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(self.hada_w2_b)  # one factor is zero, so the model starts as it was

    def factors(self, own: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return A1, B1, A2 and B2, and the kernels where there are any."""
        return tuple(own[name] for name in KEYS if name in own)

    def product(self, *factors: Tensor) -> Tensor:
        """Return dW / s, (out, in), or (out, in / groups, k, k) where there are kernels."""
        a1, b1, a2, b2, *kernels = factors
        if kernels:
            first, second = (
                torch.einsum("ijkl,ip,jq->pqkl", kernel, a, b)
                for kernel, a, b in zip(kernels, (a1, a2), (b1, b2), strict=True)
            )
        else:
            first, second = a1 @ b1, a2 @ b2
        # dW / s = (A1 B1) * (A2 B2)
        return first * second

    def product_and_pull(self, *factors: Tensor) -> tuple[Tensor, Pull]:
        """Return dW / s, (out, in), and what gives the gradients of the factors from its own."""
        a1, b1, a2, b2 = factors
        first, second = a1 @ b1, a2 @ b2

        def pull(gradient: Tensor) -> tuple[Tensor, ...]:
            # With P = A1 B1: dL/dP = dL/ddW * (A2 B2), dL/dA1 = dL/dP B1^T, dL/dB1 = A1^T dL/dP; A2 and B2 likewise
            of_first, of_second = gradient * second, gradient * first
            return of_first @ b1.T, a1.T @ of_first, of_second @ b2.T, a2.T @ of_second

        return first * second, pull


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(Targets):
    """Say what LoHa trains and how it starts.

    Attributes:
        r: the rank of each of the two products; a positive whole number.
        alpha: the numerator of the scaling s = alpha / r.
        rank_dropout: the probability of leaving a row of the update (an output of the layer) out of a training step;
            the rows that stay are divided by their share. In [0, 1).
        module_dropout: the probability of leaving the whole update of a layer out of a training step; in [0, 1).
        use_effective_conv2d: give convolutions with a kernel larger than one a small kernel between two matrices, which
            has fewer parameters. Linear layers know no difference.
        init_weights: whether B2 starts at zero, so that the model starts as it was. `False` draws all matrices at
            random and is for tests.
        rank_pattern, alpha_pattern: another r or alpha for the paths whose end matches a key, e.g. `{"layers.0.*": 4}`.

    Raises:
        PeftLabError: a value is out of range; the message says what was found.

    >>> model = pl.attach(model, pl.LoHaConfig(r=4, target_modules=["q_proj"]))
    >>> print(pl.count_parameters(model))
    512 of 6,224 parameters train (8.2262%)
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True
    rank_pattern: Mapping[str, Any] = field(default_factory=dict)
    alpha_pattern: Mapping[str, Any] = field(default_factory=dict)

    method: ClassVar[str] = "loha"
    peft_type: ClassVar[str] = "LOHA"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self)
        check_fields(self, one_of, "init_weights", known=(True, False))

    def parts(self, model: nn.Module) -> Iterator[Placement]:
        """Yield an update for each target, and the trained copies."""
        targets = find_plain(model, self, "LoHa")
        check_patterns(self, targets)
        for path, host in targets.items():
            r, alpha = by_pattern(self.rank_pattern, path, self.r), by_pattern(self.alpha_pattern, path, self.alpha)
            yield Placement(path, "loha", LoHa(host, r, alpha, self))
        yield from trained_copies(model, self)

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the fields of Hugging Face's `adapter_config.json` that only LoHa has."""
        return shared_fields(self, hosts)

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for this class: the reverse of `to_peft`."""
        return shared_arguments(fields) | {"init_weights": bool(fields.get("init_weights", True))}
