"""Rotate what a frozen layer reads, block by block, by matrices that stay (nearly) orthogonal.

    y = W R' x + b,    R: (in, in), of blocks (n, n) on its diagonal,    x: (..., in),  y: (..., out)

R' is the transposed R: as in Hugging Face peft, each block multiplies a row of features, x R. A rotation keeps the
lengths of a layer's inputs and the angles between them. Each block is Cayley's transform of a trained skew-symmetric
Q, of which only the n (n - 1) / 2 numbers above the diagonal are kept:

    exact:           R = (I - Q)(I + Q)^-1
    Cayley-Neumann:  R = I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4 = (I + Q)(I - Q)^-1 (I - Q^4)

The second needs no inverse. It is orthogonal but for the factor I - Q^4, and its Q has the other sign, so an adapter of
one form means something else in the other.

Paper: Qiu et al., *Controlling Text-to-Image Diffusion by Orthogonal Finetuning*, 2023, arXiv:2306.07280, section 3;
acting on the input, and with the series: Qiu et al., *Orthogonal Finetuning Made Scalable*, 2025, arXiv:2506.19847.
Book: chapter 7, the LoRA family.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftlab.checks import check_fields, number, one_of, whole
from peftlab.core.interface import Part, Placement
from peftlab.core.records import own_tensor
from peftlab.core.targets import CONVOLUTIONS, Targets, check_carrier, is_conv1d, shape_of
from peftlab.errors import PeftLabError
from peftlab.methods.delta_weight import find_by_default
from peftlab.methods.parts import first_input, trained_biases, trained_copies, widened

BIASES = ("none", "all", "oft_only")


class Rotation(nn.Module):
    """Hold the rotations of `width` features in blocks.

    Attributes:
        weight: (blocks, n (n - 1) / 2): the numbers above the diagonal of each Q, row by row; (1, ...) for all blocks.
        blocks, size: their number, and their side n.
    """

    def __init__(self, width: int, config: OFTConfig) -> None:
        super().__init__()
        if config.r:
            self.blocks = nearest_divisor(width, config.r)
            self.size = width // self.blocks
        else:
            self.size = nearest_divisor(width, config.oft_block_size or 0)  # the config has filled it in
            self.blocks = width // self.size
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        self.most = config.eps if config.coft else None
        count = 1 if config.block_share else self.blocks
        self.weight = nn.Parameter(torch.zeros(count, self.size * (self.size - 1) // 2))
        if not config.init_weights:
            nn.init.normal_(self.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate features, (..., width), in the dtype of the weight."""
        if self.most is not None and self.training:
            with torch.no_grad():  # as in Hugging Face peft, the optimiser goes on from the nearest allowed value
                self.weight.copy_(self.allowed(self.weight))
        rotations = self.matrices(self.weight)
        pieces = x.to(self.weight.dtype).unflatten(-1, (self.blocks, self.size))
        # x_i R_i for the i-th piece of x
        shared = len(rotations) == 1
        rotated = pieces @ rotations[0] if shared else torch.einsum("...rk,rkc->...rc", pieces, rotations)
        return rotated.flatten(-2).to(x.dtype)

    def matrices(self, weight: Tensor) -> Tensor:
        """Return the rotations, (blocks, n, n), or (1, n, n) for all blocks."""
        if self.most is not None:
            weight = weight + (self.allowed(weight) - weight).detach()
        upper = torch.zeros(len(weight), self.size, self.size, device=weight.device, dtype=weight.dtype)
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=weight.device)
        upper[:, rows, columns] = weight
        q = upper - upper.mT
        eye = torch.eye(self.size, device=q.device, dtype=q.dtype)
        if self.terms is None:
            # R = (I - Q)(I + Q)^-1
            wide = q.float() if q.dtype.itemsize < 4 else q
            return torch.linalg.solve(eye + wide, eye - wide, left=False).to(q.dtype)
        # R = I + 2 Q + 2 Q^2 + ... + Q^last
        power, rotations, last = q, torch.add(eye, q, alpha=2), last_power(self.terms)
        for k in range(2, last + 1):
            power = power @ q
            rotations = torch.add(rotations, power, alpha=2 if k < last else 1)
        return rotations

    def allowed(self, weight: Tensor) -> Tensor:
        """Return the numbers of the nearest Q whose norm is at most eps / sqrt(blocks)."""
        assert self.most is not None
        # peft holds this bound as a float32 number
        most = (self.most / torch.tensor(float(len(weight)), device="cpu").sqrt()).item()
        size = math.sqrt(2) * weight.norm(dim=1, keepdim=True)  # each number is in Q twice
        return torch.where(size <= most, weight, most * weight / size)


class OFTLayer(Part):
    """Rotate the input of a layer. The features of a convolution, which has a kernel of 1, are its channels.

    Attributes:
        rotation: of the layer's inputs.
    """

    keys = {"rotation.weight": "{path}.oft_R.weight"}

    def __init__(self, host: Any, config: OFTConfig) -> None:
        super().__init__()
        self.convolution = isinstance(host, nn.Conv2d)
        self.rotation = Rotation(host.in_channels if self.convolution else shape_of(host)[0], config)

    def before(self, host: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Rotate the input. x: (..., in); of a convolution (batch, in, height, width)."""
        x = first_input(args, kwargs)
        # y = W R' x + b
        rotated = self.rotation(x.movedim(-3, -1)).movedim(-1, -3) if self.convolution else self.rotation(x)
        return ((rotated, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): rotated})

    def merged(self, host: Any) -> dict[str, Tensor]:
        """Return the host's weight with the rotation folded in, not yet rounded to the host's dtype."""
        if self.convolution and host.groups > 1:
            raise PeftLabError(
                f"A rotation of the channels of a Conv2d with groups={host.groups} cannot be merged: it mixes channels "
                "that different groups read. Keep the adapter attached."
            )
        weight = widened(own_tensor(host, "weight"))
        rotations = self.rotation.matrices(widened(self.rotation.weight))
        # W R', block by block
        pieces = weight.flatten(1).unflatten(1, (self.rotation.blocks, self.rotation.size))
        return {"weight": (pieces.transpose(0, 1) @ rotations.mT).transpose(0, 1).reshape(weight.shape)}


class OFTEmbedding(Part):
    """Rotate what an embedding looks up.

    Attributes:
        rotation: of the embedding's width.
    """

    keys = {"rotation.weight": "{path}.oft_embedding_R.weight"}

    def __init__(self, host: nn.Embedding, config: OFTConfig) -> None:
        super().__init__()
        self.rotation = Rotation(host.embedding_dim, config)

    def after(self, host: nn.Module, args: tuple, kwargs: dict, output: Tensor, base: Tensor) -> Tensor:
        """Rotate the rows. output: (..., width)."""
        return self.rotation(output)

    def merged(self, host: nn.Module) -> dict[str, Tensor]:
        """Return the table with rotated rows, not yet rounded to its dtype."""
        weight = widened(own_tensor(host, "weight"))
        rotations = self.rotation.matrices(widened(self.rotation.weight))
        pieces = weight.unflatten(1, (self.rotation.blocks, self.rotation.size))
        return {"weight": (pieces.transpose(0, 1) @ rotations).transpose(0, 1).reshape(weight.shape)}


def last_power(terms: int) -> int:
    """Return the last power of Q in peft's series of so many terms. One fewer, except that 4 terms make the third."""
    return 1 if terms == 2 else max(3, terms - 1)


def nearest_divisor(width: int, wanted: int) -> int:
    """Return the divisor of a width that is nearest to a number, of two alike the smaller; at most the width."""
    if wanted >= width:
        return width
    divisors = [n for n in range(1, width + 1) if width % n == 0]
    return min(divisors, key=lambda n: (abs(n - wanted), n))


@dataclass(frozen=True, kw_only=True)
class OFTConfig(Targets):
    """Say what OFT rotates, and how.

    Attributes:
        oft_block_size: the side n of a block. Where it does not divide a layer's input, the nearest number that does is
            taken. `None` takes 32, or what `r` leaves.
        r: the number of blocks instead of their side, brought to a divisor in the same way; 0 leaves it to the side.
        bias: which biases of the base train too: `"none"`, `"oft_only"` (those of the adapted modules) or `"all"`.
        coft: hold each rotation near the identity: in training, each pass first shortens a Q whose norm is above
            eps / sqrt(blocks) to that length.
        eps: how far; only with `coft`.
        block_share: one rotation for all blocks of a layer.
        use_cayley_neumann: make R from the first powers of Q. `False` inverts I + Q: exactly orthogonal, and slower.
        num_cayley_neumann_terms: how many terms of the series; 2 or more.
        module_dropout: it is kept in the folder and has no effect. Hugging Face peft 0.21 makes the layer that would
            set blocks to the identity, and never calls it.
        init_weights: whether all Q start at zero, so that the model starts as it was. `False` is for tests.

    Raises:
        PeftLabError: a value is out of range; the message says what was found.

    >>> model = pl.attach(model, pl.OFTConfig(oft_block_size=4, target_modules=["q_proj"]))
    >>> print(pl.count_parameters(model))
    48 of 5,760 parameters train (0.8333%)
    """

    r: int = 0
    oft_block_size: int | None = None
    bias: str = "none"
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    module_dropout: float = 0.0
    init_weights: bool = True

    method: ClassVar[str] = "oft"
    peft_type: ClassVar[str] = "OFT"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, whole, "r", least=0)
        check_fields(self, whole, "oft_block_size", least=0, usual="16 to 64", optional=True)
        if self.oft_block_size is None:
            object.__setattr__(self, "oft_block_size", 0 if self.r else 32)
        if bool(self.r) == bool(self.oft_block_size):
            raise PeftLabError(
                f"r is {self.r} and oft_block_size is {self.oft_block_size}; give one of them, and no other: r "
                "blocks of that size make up a layer's input."
            )
        check_fields(self, one_of, "bias", known=BIASES)
        flags = ("coft", "block_share", "use_cayley_neumann", "init_weights")
        check_fields(self, one_of, *flags, known=(True, False))
        check_fields(self, number, "eps", least=0, usual="6e-5")
        check_fields(self, number, "module_dropout", least=0, most=1)
        check_fields(self, whole, "num_cayley_neumann_terms", least=2, ceiling=1000, usual="5")

    def parts(self, model: nn.Module) -> Iterator[Placement]:
        """Yield a rotation for each target, trained biases and trained copies."""
        targets = find_by_default(model, self, check_rotatable)
        for path, host in targets.items():
            part = OFTEmbedding(host, self) if isinstance(host, nn.Embedding) else OFTLayer(host, self)
            yield Placement(path, "oft", part)
        copies = list(trained_copies(model, self))
        yield from trained_biases(model, self.bias, targets, copied=[copy.path for copy in copies])
        yield from copies

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the fields of Hugging Face's `adapter_config.json` that only OFT has."""
        names = (
            "r", "oft_block_size", "bias", "coft", "eps", "block_share", "use_cayley_neumann",
            "num_cayley_neumann_terms", "module_dropout", "init_weights",
        )  # fmt: skip
        # the release tells peft which series is meant: before 0.18 the last term counted twice
        return {name: getattr(self, name) for name in names} | {"fan_in_fan_out": False, "peft_version": "0.18.0"}

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for this class: the reverse of `to_peft`.

        Raises:
            PeftLabError: an older release of peft wrote the folder, whose series was another one.
        """
        series = bool(fields.get("use_cayley_neumann", True))
        terms = fields.get("num_cayley_neumann_terms", 5)
        found = re.match(r"(\d+)\.(\d+)", str(fields.get("peft_version")))
        if series and (found is None or tuple(map(int, found.groups())) < (0, 18)):
            raise PeftLabError(
                "The adapter's use_cayley_neumann is true, and a Hugging Face peft before 0.18 wrote it (peft_version "
                f"is {fields.get('peft_version')!r}). Its series was another one, so the adapter would compute "
                "something else here and in newer releases. Load it with peft 0.17, or train it again."
            )
        return {
            "r": fields.get("r", 0),
            "oft_block_size": fields["oft_block_size"],
            "bias": fields.get("bias", "none"),
            "coft": bool(fields.get("coft", False)),
            "eps": fields.get("eps", 6e-5),
            "block_share": bool(fields.get("block_share", False)),
            "use_cayley_neumann": series,
            "num_cayley_neumann_terms": terms if series else max(terms, 2),  # without the series it means nothing
            "module_dropout": fields.get("module_dropout", 0.0),
            "init_weights": bool(fields.get("init_weights", True)),
        }


def check_rotatable(model: nn.Module, path: str, host: Any) -> None:
    """Refuse a layer for which there is no rotation."""
    check_carrier(model, path, host)
    if is_conv1d(host) or isinstance(host, (nn.Conv1d, nn.Conv3d)):
        raise PeftLabError(
            f"{path} is a {type(host).__name__}, for which OFT has no form, in Hugging Face peft as here; it stands on "
            "Linear, Embedding and Conv2d layers. Name other layers in target_modules, or use LoRAConfig."
        )
    if isinstance(host, CONVOLUTIONS) and math.prod(host.kernel_size) > 1:
        raise PeftLabError(
            f"{path} is a Conv2d with a kernel of {tuple(host.kernel_size)}. There Hugging Face peft adds up patches "
            "that overlap, so the model changes before it trains, and a merged weight computes something else. OFT "
            "stands on convolutions with a kernel of 1 here; leave the layer out, or use LoHaConfig or LoKrConfig."
        )
