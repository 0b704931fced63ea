"""Find the intruder dimensions of an adapter, and scale them down.

    W = U S V^T,    W' = W + dW = U' S' V'^T
    u'_j is an intruder if max over i of |u_i . u'_j| < threshold, for j = 1 .. top_k

Full fine-tuning moves the strong singular vectors of a weight only a little. A LoRA trained long or at a high rate adds
strong ones that resemble none of W's. With them the model forgets more of what it knew. Scaled down to a share, they
cost less of that, and some of what was learned:

    dW' = dW + (scale - 1) sum over intruders of s'_j u'_j v'_j^T,    then rounded to rank r by its own SVD

Paper: Shuttleworth et al., *LoRA vs Full Fine-tuning: An Illusion of Equivalence*, 2024, arXiv:2410.21228. Hugging Face
peft has the second half as `reduce_intruder_dimension`, to which `reduce_intruders` is held.
Book: section *Intruders* of the chapter on the LoRA family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftlab.adapters.injection import attach, check_name
from peftlab.adapters.key_table import placed
from peftlab.checks import checked, number, whole
from peftlab.core.interface import BESIDE, Part, Placement
from peftlab.core.records import Record, own_tensor, require_adapter, unwrap
from peftlab.core.sharding import refuse_sharded
from peftlab.core.targets import is_conv1d
from peftlab.errors import PeftLabError
from peftlab.methods.dora import DoRAConv, DoRAEmbedding, DoRALinear
from peftlab.methods.lora import LoRAEmbedding, LoRALinear
from peftlab.methods.lora_conv import LoRAConv
from peftlab.methods.parts import widened

LOW_RANK = (LoRALinear, LoRAEmbedding, LoRAConv, DoRALinear, DoRAEmbedding, DoRAConv)


class Spectrum(NamedTuple):
    """Say how a changed weight's strongest singular vectors compare with those of the base's weight.

    Attributes:
        similarity: for each of the strongest left singular vectors, strongest first, the largest |cosine| with one of
            the base's.
        singular_values: its singular values.
        intruders: the places, from 0, of those below the threshold.
    """

    similarity: tuple[float, ...]
    singular_values: tuple[float, ...]
    intruders: tuple[int, ...]


@dataclass(frozen=True)
class IntruderReport:
    """Say which intruder dimensions an adapter has.

    Attributes:
        count: how many there are in all modules together.
        top_k: how many singular vectors of each module were looked at.
        threshold: below which similarity one is an intruder.
        by_module: the `Spectrum` of each module, by path.
    """

    count: int
    top_k: int
    threshold: float
    by_module: dict[str, Spectrum]

    def __str__(self) -> str:
        having = sum(bool(one.intruders) for one in self.by_module.values())
        return (
            f"{self.count} intruders among the {self.top_k} strongest singular vectors of {len(self.by_module)} "
            f"modules; {having} modules have some"
        )


@checked()
@torch.no_grad()
def find_intruders(
    model: nn.Module, name: str = "default", *, top_k: int = 10, threshold: float = 0.5
) -> IntruderReport:
    """Compare the strongest singular vectors of each adapted weight with those of the base's.

    An embedding counts as the matrix (width, vocabulary), a convolution as (out, in k ...). A DoRA's weight is compared
    with its magnitudes. Modules trained in full are left out.

    Args:
        model: a model with an adapter of a method that can be merged; it need not be active.
        name: the adapter's name.
        top_k: how many of the changed weight's singular vectors are looked at, the strongest first.
        threshold: the similarity below which one is an intruder.

    Raises:
        PeftLabError: there is no such adapter, it cannot be merged, or the model is merged already.

    >>> model = pl.attach(model, pl.LoRAConfig(r=2, alpha=64, init="random"))
    >>> report = pl.find_intruders(model)
    >>> report.count > 0, len(report.by_module)
    (True, 4)
    """
    check_limits(top_k, threshold)
    root, _ = adapter_of(model, name)
    found: dict[str, Spectrum] = {}
    for placement in placed(root, name):
        path, _, part = placement
        host = root.get_submodule(path)
        if placement.kind in BESIDE:
            continue
        if not part.overrides("merged"):
            raise PeftLabError(
                f"Adapter {name!r} changes more than weights, on {path} (a {type(part).__name__}), so it has no "
                "singular vectors to compare."
            )
        for parameter, value in part.merged(host).items():
            for key, base, merged in pairs_of(path, host, part, parameter, value):
                found[key] = compare(base, merged, top_k, threshold)[0]
    return IntruderReport(sum(len(one.intruders) for one in found.values()), top_k, threshold, found)


@checked("new_name")
@torch.no_grad()
def reduce_intruders(
    model: nn.Module,
    name: str = "default",
    *,
    new_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold: float = 0.5,
    scale: float = 0.75,
) -> IntruderReport:
    """Attach a copy of a LoRA adapter whose intruder dimensions are scaled down, and make it the active one.

    The numbers are those of Hugging Face peft's `reduce_intruder_dimension`, where `scale` is called
    `mitigation_lambda`. As there, the strongest r of the new update's dimensions are kept. Trained biases, heads and
    rows are copied, too. Of a DoRA the direction W + s B A is treated, and its magnitudes are copied (peft starts them
    anew). Conv1D and embeddings, of which peft takes the transpose, are treated as the matrices (out, in) that they
    stand for.

    Args:
        model: a model with a LoRA or DoRA on layers.
        name: the adapter to start from; it stays as it is.
        new_name: the name of the new one.
        top_k, threshold: which singular vectors are intruders, as for `find_intruders`.
        scale: what is left of an intruder; 1 leaves all, 0 takes them out.

    Returns:
        The intruders that were found, of W + s B A.

    Raises:
        PeftLabError: there is no such adapter, it is of another method or stands on parameters (experts) or grouped
            convolutions, the new name is taken, or the model is merged. The model is then as it was.

    >>> model = pl.attach(model, pl.LoRAConfig(r=2, alpha=64, init="random"))
    >>> report = pl.reduce_intruders(model, scale=0.5)
    >>> list(pl.attached(model)), report.count > 0
    (['default', 'intruder_reduced'], True)
    """
    check_limits(top_k, threshold)
    number("scale", scale, least=0, most=1)
    root, record = adapter_of(model, name)
    check_name(new_name)
    if new_name in record.configs:
        raise PeftLabError(f"An adapter named {new_name!r} is attached already; give another new_name.")
    found, factors = {}, {}
    placements = placed(root, name)
    for placement in placements:
        path, _, part = placement
        if placement.kind in BESIDE:
            continue
        if type(part) not in LOW_RANK:
            raise PeftLabError(
                f"Adapter {name!r} has a {type(part).__name__} on {path}; intruders are reduced of LoRA and DoRA on "
                "layers alone."
            )
        host: Any = root.get_submodule(path)
        if getattr(host, "groups", 1) > 1:
            raise PeftLabError(
                f"{path} is a convolution of {host.groups} groups, and LoRA there is no weight's update."
            )
        base = matrix(host, part, own_tensor(host, "weight"))
        found[path], factors[path] = reduced(base, part, top_k, threshold, scale)
    dtype = next(parameter.dtype for _, _, part in placements for parameter in part.parameters())
    attach(root, record.configs[name], new_name, adapter_dtype=dtype)
    fill(placements, placed(root, new_name), factors)
    return IntruderReport(sum(len(one.intruders) for one in found.values()), top_k, threshold, found)


def reduced(
    base: Tensor, part: Any, top_k: int, threshold: float, scale: float
) -> tuple[Spectrum, tuple[Tensor, Tensor] | None]:
    """Return what was found, and the new B, (out, r), and A, (r, in); None where nothing is to change."""
    a, b = part.lora_A.to(base.dtype).flatten(1), part.lora_B.to(base.dtype).flatten(1)
    merged = base + (b @ a) * part.scaling
    spectrum, (u, s, vh) = compare(base, merged, top_k, threshold)
    if not spectrum.intruders:
        return spectrum, None
    own = list(spectrum.intruders)
    # dW' = dW + (scale - 1) sum of s_j u_j v_j^T over the intruders
    update = merged + (scale - 1) * (u[:, own] * s[own]) @ vh[own] - base
    u, s, vh = torch.linalg.svd(update / part.scaling, full_matrices=False)
    r = a.shape[0]
    root = s[:r].sqrt()  # shared by both, so that neither is much larger than the other
    return spectrum, (u[:, :r] * root, root[:, None] * vh[:r])


def fill(old: list[Placement], new: list[Placement], factors: Mapping[str, tuple[Tensor, Tensor] | None]) -> None:
    """Copy an adapter's parameters into another one of the same config, with the new factors where there are some."""
    for placement, (_, _, other) in zip(old, new, strict=True):
        for own, value in placement.part.state_dict().items():
            other.state_dict()[own].copy_(value)
        pair = None if placement.kind in BESIDE else factors[placement.path]
        if pair is not None:
            for own, value in zip(("lora_B", "lora_A"), pair, strict=True):
                parameter = other.get_parameter(own)
                rows = slice(0, value.shape[0]), slice(0, value.shape[1])
                whole_value = torch.zeros_like(parameter.flatten(1))  # a rank above the weight's leaves zeros
                whole_value[rows] = value.to(parameter.dtype)
                parameter.copy_(whole_value.view_as(parameter))


def compare(
    base: Tensor, merged: Tensor, top_k: int, threshold: float
) -> tuple[Spectrum, tuple[Tensor, Tensor, Tensor]]:
    """Return the spectrum of a changed weight, (out, in), and its singular value decomposition."""
    left, _, _ = torch.linalg.svd(base, full_matrices=False)
    u, s, vh = torch.linalg.svd(merged, full_matrices=False)
    # the largest |u_i . u'_j| over i
    similarity = (u[:, :top_k].T @ left).abs().amax(dim=1)
    intruders = tuple((similarity < threshold).nonzero().flatten().tolist())
    return Spectrum(tuple(similarity.tolist()), tuple(s[:top_k].tolist()), intruders), (u, s, vh)


def pairs_of(
    path: str, host: nn.Module, part: Part, parameter: str, value: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (path, the base's matrix, the changed one) for a merged parameter: one, or one for each expert."""
    stored = own_tensor(host, parameter)
    if parameter == "weight" and part.parameter is None:
        base = matrix(host, part, stored)
        if base.dim() == 2:
            yield path, base, matrix(host, part, value).to(base.dtype)
    elif value.dim() == 3:
        for expert, (base, merged) in enumerate(zip(widened(stored), value, strict=True)):
            turned = getattr(part, "transposed", False)
            one, other = (base.mT, merged.mT) if turned else (base, merged)
            yield f"{path}.{parameter}[{expert}]", one, other.to(one.dtype)
    elif value.dim() == 2:
        yield f"{path}.{parameter}", widened(stored), value


def matrix(host: nn.Module, part: Part, stored: Tensor) -> Tensor:
    """Return a weight as (out, in), in float32 or wider: a convolution's is flattened, an embedding's transposed."""
    dtype = torch.float64 if stored.dtype == torch.float64 else torch.float32
    weight = widened(stored).to(dtype)
    turned = is_conv1d(host) or isinstance(host, nn.Embedding) or getattr(part, "transposed", False)
    return weight.T if turned else weight.flatten(1) if weight.dim() > 1 else weight


def check_limits(top_k: int, threshold: float) -> None:
    """Refuse limits that mean nothing."""
    whole("top_k", top_k, least=1)
    number("threshold", threshold, least=0, most=1)


def adapter_of(model: nn.Module, name: str) -> tuple[nn.Module, Record]:
    """Return the model inside torch's wrappers and its record, which has an adapter of this name."""
    root = unwrap(model)
    record = require_adapter(root, name)
    if record.activity.merged:
        raise PeftLabError("The model is merged, so its weights are not the base's; call unmerge(model) first.")
    refuse_sharded(root, "Singular vectors need whole weights", "Do this before fully_shard, or on a loaded adapter.")
    return root, record
