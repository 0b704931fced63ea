"""Train two vectors for each weight, between two random matrices that all weights share.

    y = W x + c + b * (B (d * (A x))),    x: (..., in),  y: (..., out),  d: (r,),  b: (out,)

A, (r, in), and B, (out, r), are drawn once and never train. There is one pair for all layers of an adapter, as large as
the largest of them needs. Each layer takes the part that fits it: the first columns of A and the first rows of B. b is
zero at the start, so the model starts as it was.

Paper: Kopiczko et al., *VeRA: Vector-based Random Matrix Adaptation*, 2023, arXiv:2310.11454, section 3.1.
Book: chapter 7, "The LoRA family".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.checks import check_fields, number, one_of, whole
from peftlab.core.interface import Part, Placement
from peftlab.core.records import own_tensor
from peftlab.core.targets import CONVOLUTIONS, Targets, check_carrier, find, is_conv1d, shape_of
from peftlab.errors import PeftLabError
from peftlab.methods.parts import BIAS_MODES, cast, first_input, trained_biases, trained_copies, widened


class Projections(Part):
    """Hold the random pair. All parts of one adapter hold this same module, so there is one copy of it.

    It stands on no host. As a part, it is among the state that a training run stores.

    Attributes:
        vera_A: (r, the largest in). vera_B: (the largest out, r).
    """

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, shapes: Iterable[tuple[int, int]], config: VeRAConfig) -> None:
        super().__init__()
        inside, outside = (max(sizes) for sizes in zip(*shapes, strict=True))
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        # Kaiming's rule: uniform within sqrt(6 / the number of columns). A is drawn first.
        for name, size in (("vera_A", (config.r, inside)), ("vera_B", (outside, config.r))):
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(size[1]))
            drawn = torch.empty(size).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn, persistent=config.save_projection)

    def round_to(self, hosts: Iterable[nn.Module]) -> None:
        """Round the numbers to the dtypes of the layers, as Hugging Face peft does before it widens them again.

        Beside a bfloat16 base the pair of a key is therefore another one than beside a float32 base.
        """
        for host in hosts:
            dtype = getattr(host, "compute_dtype", own_tensor(host, "weight").dtype)
            if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
                self.to(dtype)


class VeRALinear(Part):
    """Add the update b * (B (d * (A x))) to what a linear layer returns.

    The layer is an `nn.Linear`, a `Conv1D` or a quantised linear.

    Attributes:
        vera_lambda_d: (r,). vera_lambda_b: (out,).
        shared: the random pair.
    """

    def __init__(self, host: nn.Module, shared: Projections, config: VeRAConfig) -> None:
        super().__init__()
        self.inside, outside = shape_of(host)
        self.dropout, self.shared = config.dropout, shared
        # Conv1D stores its weight (in, out)
        self.transposed = is_conv1d(host) or (config.fan_in_fan_out and not isinstance(host, nn.Linear))
        random = config.init == "random"
        self.vera_lambda_d = nn.Parameter(
            torch.randn(config.r) if random else torch.full((config.r,), config.d_initial)
        )
        self.vera_lambda_b = nn.Parameter(torch.ones(outside) if random else torch.zeros(outside))
        self.keys = {name: "{path}." + name for name in ("vera_lambda_d", "vera_lambda_b")}
        pair = {f"shared.{name}": f"base_model.{name}" for name in ("vera_A", "vera_B")}
        if config.save_projection:
            self.keys |= pair
        else:
            self.drawn_keys = pair

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return this layer's part of the pair: A, (r, in), and B, (out, r)."""
        return self.shared.vera_A[:, : self.inside], self.shared.vera_B[: len(self.vera_lambda_b)]

    def after(self, host: nn.Module, args: tuple, kwargs: dict, output: Tensor, base: Tensor) -> Tensor:
        """Add the update. x: (..., in), output: (..., out)."""
        x = cast(first_input(args, kwargs), self.vera_lambda_d.dtype)
        x = F.dropout(x, self.dropout, self.training)
        A, B = (matrix.to(x.device, self.vera_lambda_d.dtype) for matrix in self.pair())
        # y = W x + c + b * (B (d * (A x)))
        low = self.vera_lambda_d * F.linear(x, A)  # (..., r)
        return (output + self.vera_lambda_b * F.linear(low, B)).to(output.dtype)

    def merged(self, host: nn.Module) -> dict[str, Tensor]:
        """Return the host's weight with the update folded in, not yet rounded to the host's dtype."""
        weight = widened(own_tensor(host, "weight"))
        A, B = (widened(matrix).to(weight.device) for matrix in self.pair())
        # W' = W + diag(b) B diag(d) A
        delta = (widened(self.vera_lambda_b)[:, None] * B) @ (widened(self.vera_lambda_d)[:, None] * A)
        return {"weight": weight + (delta.T if self.transposed else delta)}


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(Targets):
    """Say what VeRA adapts, how wide the random pair is, and where the vectors start.

    Attributes:
        r: the rank of the update; a positive whole number. It costs r numbers per layer, so it is larger than LoRA's.
        projection_prng_key: the seed that the random pair is drawn from; a whole number that fits in 64 bits. The pair
            is that of Hugging Face peft for this key, r, the largest layer and the dtype of the base.
        save_projection: whether the adapter's file holds the pair. Without it the file is much smaller, and whoever
            loads it draws the pair from the key again.
        dropout: the probability of dropping an entry of the adapter's input in training; in [0, 1).
        d_initial: where each entry of d starts. b starts at zero.
        bias: which biases of the base train too: `"none"`, `"lora_only"` (those of the adapted modules; `"vera_only"`,
            peft's word, means the same) or `"all"`.
        fan_in_fan_out: detected automatically for Linear and Conv1D (the flag is ignored there). Set it only for custom
            layers that store their weight as (in, out).
        init: `"zero"`, as above; or `"random"`, where b is one and d is normal, so that the model's output changes
            before the first step. It is for tests, and peft's `init_weights=False`.

    Raises:
        PeftLabError: a value is out of range; the message says what was found.

    >>> model = pl.attach(model, pl.VeRAConfig(r=4, target_modules=["q_proj"]))
    >>> pl.count_parameters(model).trainable
    40
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    dropout: float = 0.0
    d_initial: float = 0.1
    bias: str = "none"
    fan_in_fan_out: bool = False
    init: str = "zero"

    method: ClassVar[str] = "vera"
    peft_type: ClassVar[str] = "VERA"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, whole, "r", least=1, usual="64 to 1024")
        check_fields(self, whole, "projection_prng_key", least=-(2**63), ceiling=2**64 - 1)
        check_fields(self, number, "dropout", least=0, below=1)
        check_fields(self, number, "d_initial")
        check_fields(self, one_of, "bias", known=(*BIAS_MODES, "vera_only"))
        check_fields(self, one_of, "init", known=("zero", "random"))
        check_fields(self, one_of, "save_projection", "fan_in_fan_out", known=(True, False))
        if self.bias == "vera_only":
            object.__setattr__(self, "bias", "lora_only")

    def parts(self, model: nn.Module) -> Iterator[Placement]:
        """Yield the two vectors of each target around one pair, trained biases and trained copies."""
        targets = find(model, self, check=check_linear)
        shared = Projections(map(shape_of, targets.values()), self)
        shared.round_to(targets.values())
        for path, host in targets.items():
            yield Placement(path, "vera", VeRALinear(host, shared, self))
        copies = list(trained_copies(model, self))
        yield from trained_biases(model, self.bias, targets, copied=[copy.path for copy in copies])
        yield from copies

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the fields of Hugging Face's `adapter_config.json` that only VeRA has."""
        targets: dict[str, Any] = {}
        if self.exclude_modules is not None:  # peft's VeRA has no such field: name what was found
            targets = {"target_modules": sorted(find(model, self)), "exclude_modules": None}
        return targets | {
            "r": self.r,
            "projection_prng_key": self.projection_prng_key,
            "save_projection": self.save_projection,
            "vera_dropout": self.dropout,
            "d_initial": self.d_initial,
            "bias": {"lora_only": "vera_only"}.get(self.bias, self.bias),
            "fan_in_fan_out": self.fan_in_fan_out or any(is_conv1d(host) for host in hosts.values()),
            "init_weights": self.init != "random",
        }

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for this class: the reverse of `to_peft`."""
        return {
            "r": fields.get("r", 256),
            "projection_prng_key": fields.get("projection_prng_key", 0),
            "save_projection": fields.get("save_projection", True),
            "dropout": fields.get("vera_dropout", 0.0),
            "d_initial": fields.get("d_initial", 0.1),
            "bias": fields.get("bias", "none"),
            "fan_in_fan_out": bool(fields.get("fan_in_fan_out", False)),
            "init": "zero" if fields.get("init_weights", True) else "random",
        }


def check_linear(model: nn.Module, path: str, host: nn.Module) -> None:
    """Refuse a module that cannot carry VeRA."""
    check_carrier(model, path, host)
    if isinstance(host, (nn.Embedding, *CONVOLUTIONS)):
        kind = "an embedding" if isinstance(host, nn.Embedding) else "a convolution"
        raise PeftLabError(f"{path} is {kind}; VeRA adapts linear layers. Leave it out, or use LoRAConfig.")
