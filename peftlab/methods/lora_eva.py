"""Start LoRA from the data: A reads the directions in which a layer's inputs vary most (EVA).

    X = the inputs of a layer, one row per token, less their mean;    X = U S V^T;    A = V_r^T,  B = 0

X does not fit in memory, so V is kept up to date batch by batch: the SVD of [S V^T; the new rows; the shift of the
mean] has the same V as that of all rows. It is done when the first r directions no longer turn (their cosines with
those of the step before are above `tau`).

The ranks can move between layers. Direction i of a layer explains the share S_i^2 / sum S^2 of its inputs' variance.
Of all directions of all layers, at most rho r from each, those with the greatest shares are taken, as many as all the
ranks together. A layer of which none is taken gets no adapter. Layers that read the same inputs share one SVD.

Paper: Paischer et al., *One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation*, 2024,
arXiv:2410.07170, section 3. Hugging Face peft calls it `initialize_lora_eva_weights`; the numbers here are its.
Book: section *Other starts* of the chapter on the LoRA family.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftlab.checks import number, one_of, shown, whole
from peftlab.core.modes import device_of, mode, to_device
from peftlab.core.targets import CONVOLUTIONS, by_pattern, find
from peftlab.errors import PeftLabError
from peftlab.methods.lora_starts import seeded
from peftlab.methods.parts import first_input

DEFAULTS: dict[str, Any] = {
    "rho": 2.0, "tau": 0.99, "use_label_mask": True, "label_mask_value": -100, "whiten": False,
    "adjust_scaling_factors": True,
}  # fmt: skip
SEED = 42  # of the randomised SVD, peft's
PASSES, STEPS = 100, 10_000  # the most passes over the data, and the most batches, before it is given up


class Directions:
    """Keep the directions in which rows vary most, as more rows come.

    Attributes:
        count: how many directions are kept.
        v: the directions so far, (count, in); None before the first rows.
        s: their singular values, (count,).
        still: for each direction, whether the last rows hardly turned it.
    """

    def __init__(self, count: int, tau: float) -> None:
        self.count, self.tau = count, tau
        self.v: Tensor | None = None
        self.s = torch.zeros(0)
        self.still = torch.zeros(count, dtype=torch.bool)
        self.rows, self.mean, self.variance = 0, torch.zeros(0), torch.tensor(0.0)

    def add(self, x: Tensor) -> None:
        """Take new rows, (rows, in) in float32, unless they are fewer than the directions."""
        n, before = len(x), self.v
        if n < self.count:
            return
        mean = x.sum(0, dtype=torch.float64) / n
        centred = x - (mean if before is None else x.mean(0))  # in float32 from the second batch on, as in peft
        spread = (x - mean).square().sum(dtype=torch.float64)
        total = self.rows + n
        if before is None:
            self.mean, self.variance = mean, spread
            x = (x.double() - mean).to(x.dtype)
        else:
            shift = self.mean - x.mean(0)
            self.variance = self.variance + spread + self.rows * n / total * (self.mean - mean).square().sum()
            self.mean = (self.mean * self.rows + mean * n) / total
            # [S V^T; X - mean; sqrt(n m / (n + m)) (mean of before - mean)]
            weight = (torch.tensor(self.rows / total, dtype=torch.float64) * n).sqrt().to(shift)
            x = torch.vstack([self.s[:, None] * before, centred, (weight * shift)[None]])
        with seeded(x.device, SEED):
            _, s, v = torch.svd_lowrank(x, q=min(2 * self.count, *x.shape), niter=4)
        v = v.mH
        # the sign of a direction is free: its largest entry is positive
        v = v * v.gather(1, v.abs().argmax(1, keepdim=True)).sign()
        self.v, self.s, self.rows = v[: self.count], s[: self.count], total
        if before is not None:
            self.still = torch.nn.functional.cosine_similarity(self.v, before).cpu() >= self.tau

    def shares(self) -> Tensor:
        """Return the share of the variance that each direction explains."""
        return self.s.square() / self.variance


class Inputs:
    """Collect what layers are called with, token by token, without padding and without tokens that have no label."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], options: Mapping[str, Any]) -> None:
        self.model, self.layers, self.options = model, layers, options
        self.device = device_of(model)

    def run(self, batch: Any, paths: Iterable[str], take: Callable[[str, Tensor], None]) -> None:
        """Run the model on a batch, and hand over each layer's rows, (rows, in) in float32, while it is called."""
        mask = None
        if isinstance(batch, Mapping):
            batch = to_device(dict(batch), self.device)
            mask = self.mask(batch)

        def hook_of(path: str) -> Any:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                x = first_input(args, kwargs).detach()
                x = x[mask] if mask is not None and x.shape[:-1] == mask.shape else x.flatten(0, -2)
                take(path, x.float())

            return hook

        hooks = [self.layers[path].register_forward_pre_hook(hook_of(path), with_kwargs=True) for path in paths]
        try:
            with torch.no_grad(), mode(self.model, training=False):
                if isinstance(batch, Mapping):
                    self.model(**batch)
                elif isinstance(batch, (tuple, list)):
                    self.model(*(one.to(self.device) for one in batch))
                else:
                    self.model(batch.to(self.device))
        finally:
            for hook in hooks:
                hook.remove()

    def mask(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Return which tokens count, (batch, tokens); None for a batch that is no text."""
        tokens = batch.get("input_ids")
        if not isinstance(tokens, Tensor):
            return None
        mask = batch.get("attention_mask")
        mask = torch.ones_like(tokens).bool() if mask is None else mask.bool()
        labels = batch.get("labels")
        if self.options["use_label_mask"] and isinstance(labels, Tensor) and labels.shape == mask.shape:
            mask = mask & (labels != self.options["label_mask_value"])
        return mask


def directions(
    model: nn.Module, layers: Mapping[str, nn.Module], ranks: Mapping[str, int], data: Iterable[Any],
    options: Mapping[str, Any],
) -> dict[str, Tensor]:  # fmt: skip
    """Return {path: A of its new rank, (r, in)}; a layer without a rank has a tensor of no rows.

    Args:
        layers: the layers to start, by path. ranks: the rank that each would have.
        data: batches, as the model is called with; they are read again and again until the directions stand still.

    Raises:
        PeftLabError: there is no batch, a layer is never called, a batch has too few tokens, or the directions do not
            come to rest.
    """
    if isinstance(data, (str, bytes, Mapping, Tensor)) or not isinstance(data, Iterable):
        raise PeftLabError(f"data is {shown(data)}; give a list of batches, each as the model is called with.")
    batches = list(itertools.islice(data, STEPS))
    if wrong := [one for one in batches if not isinstance(one, (Mapping, tuple, list, Tensor))]:
        raise PeftLabError(f"data holds {shown(wrong[0])}; its entries are batches, as the model is called with.")
    if not batches:
        raise PeftLabError("data holds no batch, and init='eva' starts from the inputs of the layers. Give some.")
    inputs = Inputs(model, layers, options)
    called: dict[str, Seen] = {}
    inputs.run(batches[0], layers, lambda path, x: called.update({path: called.get(path) or seen(x)}))
    for path in layers:
        if path not in called:
            raise PeftLabError(f"{path} is not called in the first batch of data, so init='eva' cannot start it.")
    first = {path: called[path] for path in layers}  # in the model's order, by which equal shares are told apart
    leader = leaders(first)
    most = {path: min(round(ranks[path] * options["rho"]), first[path].width) for path in layers}
    for path, same in leader.items():
        most[same] = max(most[same], most[path])
    most = {path: most[same] for path, same in leader.items()}
    kept = {path: Directions(most[path], options["tau"]) for path, same in leader.items() if path == same}
    chosen, done = dict(most), dict.fromkeys(kept, False)
    limit = min(PASSES * len(batches), STEPS)
    for step, batch in enumerate(itertools.chain.from_iterable(itertools.repeat(batches))):
        done = {path: bool(one.still[: chosen[path]].all()) for path, one in kept.items()}
        if all(done.values()):
            break
        if step == limit:
            raise stuck(kept, done, first, len(batches))
        inputs.run(batch, [path for path in kept if not done[path]], lambda path, x: kept[path].add(x))
        if all(one.v is not None for one in kept.values()):
            chosen = distribute(kept, leader, most, sum(ranks.values()))
    result = {}
    for path, same in leader.items():
        one = kept[same]
        assert one.v is not None
        a = one.v[: chosen[path]]
        result[path] = a / one.s[: chosen[path], None].sqrt() if options["whiten"] else a
    return result


def started(config: Any, model: nn.Module, data: Iterable[Any]) -> tuple[Any, dict[str, dict[str, Tensor]]]:
    """Return a LoRA config with the ranks that the data give its layers, and {path: {"lora_A": its start}}.

    Raises:
        PeftLabError: as for `directions`; or a target is no linear layer.
    """
    if config.target_parameters:
        raise PeftLabError("init='eva' starts linear layers; leave target_parameters out, or use init='kaiming'.")
    layers = find(model, config)
    for path, host in layers.items():
        if isinstance(host, (nn.Embedding, *CONVOLUTIONS)):
            raise PeftLabError(
                f"init='eva' starts linear layers, and {path} is a {type(host).__name__}. Leave it out, or use "
                "init='kaiming'."
            )
    options = {**DEFAULTS, **config.init_options}
    ranks = {path: by_pattern(config.rank_pattern, path, config.r) for path in layers}
    found = directions(model, layers, ranks, data, options)
    new_ranks, alphas = {}, {}
    for path in layers:
        r, alpha = len(found[path]), by_pattern(config.alpha_pattern, path, config.alpha)
        if r != ranks[path] and options["adjust_scaling_factors"]:
            alpha *= r / ranks[path]
        if r and r != config.r:
            new_ranks[re.escape(path)] = r
        if r and alpha != config.alpha:
            alphas[re.escape(path)] = alpha
    left = [path for path in layers if len(found[path])]
    if len(left) < len(layers):
        fewer = {"target_modules": left, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    else:
        fewer = {}
    config = replace(config, rank_pattern=new_ranks, alpha_pattern=alphas, **fewer)
    return config, {path: {"lora_A": found[path]} for path in left}


class Seen(NamedTuple):
    """Say what a layer was called with: how many rows, how wide, and a hash of the numbers, which may be many."""

    rows: int
    width: int
    hash: str


def seen(x: Tensor) -> Seen:
    """Return what is kept of a layer's first input, (rows, in) in float32."""
    return Seen(len(x), x.shape[1], hashlib.sha256(x.cpu().contiguous().numpy().tobytes()).hexdigest())


def leaders(first: Mapping[str, Seen]) -> dict[str, str]:
    """Return {path: the first path with the same inputs}, those that are first before the others."""
    groups: dict[Seen, list[str]] = {}
    for path, input in first.items():
        groups.setdefault(input, []).append(path)
    followers = {path: group[0] for group in groups.values() for path in group[1:]}
    return {group[0]: group[0] for group in groups.values()} | followers


def distribute(
    kept: Mapping[str, Directions], leader: Mapping[str, str], most: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Return how many directions each layer gets, of `budget` in all."""
    owners = [(path, share) for path, same in leader.items() for share in kept[same].shares()[: most[path]].cpu()]
    order = torch.stack([share for _, share in owners]).argsort(descending=True)
    taken = Counter(owners[int(i)][0] for i in order[:budget])
    counts = {path: taken[path] for path in leader}
    for path, same in leader.items():  # the layer whose directions are kept has the most of those that share them
        if path != same and counts[path] > counts[same]:
            counts[path], counts[same] = counts[same], counts[path]
    return counts


def stuck(kept: Mapping[str, Directions], done: Mapping[str, bool], first: Mapping[str, Seen], n: int) -> PeftLabError:
    """Return the error for directions that do not come to rest."""
    path = next(path for path, rested in done.items() if not rested)
    if kept[path].v is None:
        return PeftLabError(
            f"init='eva' keeps {kept[path].count} directions of {path}'s inputs, and the batches of data have fewer "
            f"tokens that count (the first has {first[path].rows}). Give larger batches, a smaller r or rho, or "
            "init_options={'use_label_mask': False}."
        )
    return PeftLabError(
        f"The directions of {path}'s inputs still turn after many passes over {n} batches of data. Give more or larger "
        "batches, or a smaller tau in init_options."
    )


def checked_options(init: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a start, checked.

    Raises:
        PeftLabError: this start has no such option, or its value is out of range.
    """
    if given and init != "eva":
        raise PeftLabError(f"init_options are for init='eva', and init is {init!r}. Leave init_options out.")
    checks: dict[str, Any] = {
        "rho": lambda name, value: number(name, value, least=1, usual="1 or 2"),
        "tau": lambda name, value: number(name, value, least=0, most=1),
        "label_mask_value": whole,
    }
    found = {}
    for key, value in given.items():
        one_of("an entry of init_options", key, DEFAULTS)
        name = f"init_options[{key!r}]"
        found[key] = checks[key](name, value) if key in checks else one_of(name, value, (True, False))
    return found
