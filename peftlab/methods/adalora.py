"""Give each weight an update in the form of an SVD, and take rank away where it matters least while training.

    y = W x + b + s P diag(e) Q x,    x: (..., in),  y: (..., out),  Q: (r, in),  P: (out, r),  e: (r, 1)
    s = alpha / (r + 1e-5)            r is the rank at the start, init_r: s stays when ranks go

    L + w / (2 n) sum over n modules of |P^T P - I| + |Q Q^T - I|      keeps P and Q nearly orthonormal

A triplet is one column of P, one number of e and one row of Q. After each step every parameter has an importance, the
product of two averages: of its sensitivity |p dL/dp|, and of how much that varies. A triplet's is their sum. When
ranks are allocated, e is set to zero for all but the most important triplets of the whole model. How many stay
falls from n r to n target_r, n being the number of adapted modules (`budget`).

Paper: Zhang et al., *AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning*, 2023, arXiv:2303.10512,
sections 3.1 to 3.3. The mean of norms in place of a sum of their squares, and s, are Hugging Face peft's.
Book: chapter 7.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from peftlab.checks import check_fields, check_kinds, checked, number, one_of, whole
from peftlab.core.interface import Placement
from peftlab.core.records import placed, require_adapter, unwrap
from peftlab.core.sharding import is_piece
from peftlab.core.targets import Targets, find, is_conv1d
from peftlab.errors import PeftLabError, warn
from peftlab.methods.adalora_parts import AdaLoRAConv, AdaLoRALinear, check_host, orthogonality, remember
from peftlab.methods.parts import BIAS_MODES, trained_biases, trained_copies
from peftlab.methods.tokens import check_tokens, trained_rows


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig(Targets):
    """Say what AdaLoRA trains, with which rank it starts, and how ranks go.

    The steps are counted from 1. Until `tinit` all ranks stay; then the budget falls, at every step that `deltaT`
    divides; from step `total_step - tfinal` on the ranks stay as they are. `train` counts its own steps. In a loop of
    your own, add `pl.added_loss(model)` to the loss and call `pl.after_step(model, step)`.

    Attributes:
        init_r: the rank of each update at the start. target_r: the mean rank at the end; None is two thirds of
            `init_r`. If it is `init_r`, nothing is pruned.
        alpha: the update is scaled by alpha / init_r.
        dropout: the probability of dropping an entry of the adapter's input in training; in [0, 1).
        bias: which biases of the base train too: `"none"`, `"lora_only"` (those of the adapted modules) or `"all"`.
        total_step: the steps of the whole training. None takes the length of the run of `train`.
        tinit: the steps before the first allocation. None is 0 as in Hugging Face peft; where `total_step` is None too,
            a tenth of the run.
        tfinal: the steps after the last allocation. None is 0, or half of the run.
        deltaT: the steps from one allocation to the next.
        beta1: how much of the average of the sensitivity stays at a step, and `beta2` of that of its uncertainty.
        orth_reg_weight: the weight of the orthogonality in the loss.
        rank_pattern: {path of a module: a list with True for each triplet that is left}, as in a pruned adapter's
            folder. These modules start with the ranks that are left.
        init: `"normal"`: P and Q are normal with standard deviation 0.02 and e is zero. Or `"random"`, which changes
            the model's output before the first step and is for tests.
        trainable_tokens: ids of tokens whose rows of the word embeddings train in full, as in `LoRAConfig`.

    Raises:
        PeftLabError: a value is out of range; the message says what was found.

    >>> model = pl.attach(model, pl.AdaLoRAConfig(init_r=4, target_r=2, target_modules=["q_proj"], total_step=10))
    >>> print(pl.count_parameters(model))
    264 of 5,978 parameters train (4.4162%)
    """

    init_r: int = 12
    target_r: int | None = 8
    alpha: float = 8
    dropout: float = 0.0
    bias: str = "none"
    total_step: int | None = None
    tinit: int | None = None
    tfinal: int | None = None
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    rank_pattern: Mapping[str, Iterable[bool]] | None = None
    init: str = "normal"
    trainable_tokens: Iterable[int] | Mapping[str, Iterable[int]] | None = None

    method: ClassVar[str] = "adalora"
    peft_type: ClassVar[str] = "ADALORA"
    # Options of Hugging Face's LoRA that its AdaLoRA inherits, and that change what is computed or fail there
    unsupported: ClassVar[tuple[str, ...]] = (
        "use_dora", "use_qalora", "layer_replication", "alora_invocation_tokens", "target_parameters",
        "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens(self)
        check_kinds(self, "rank_pattern")
        check_fields(self, whole, "init_r", least=1, usual="4 to 64")
        check_fields(self, whole, "target_r", least=0, optional=True)
        check_fields(self, number, "alpha", above=0)
        check_fields(self, number, "dropout", least=0, below=1)
        check_fields(self, one_of, "bias", known=BIAS_MODES)
        check_fields(self, one_of, "init", known=("normal", "random"))
        check_fields(self, whole, "total_step", least=1, optional=True)
        check_fields(self, whole, "tinit", "tfinal", least=0, optional=True)
        check_fields(self, whole, "deltaT", least=1)
        check_fields(self, number, "beta1", "beta2", above=0, below=1)
        check_fields(self, number, "orth_reg_weight", least=0)
        if self.target_r is None:
            object.__setattr__(self, "target_r", max(1, round(2 * self.init_r / 3)))
        if self.total_step is not None:
            tinit, tfinal = self.tinit or 0, self.tfinal or 0
            object.__setattr__(self, "tinit", tinit)
            object.__setattr__(self, "tfinal", tfinal)
            if tinit >= self.total_step - tfinal:
                raise PeftLabError(
                    f"tinit ({tinit}) and tfinal ({tfinal}) leave no step of total_step ({self.total_step}) in which "
                    "ranks could be pruned. Lower one of them, or raise total_step."
                )
        if self.rank_pattern is not None:
            masks = {re.sub(r"\.lora_E(\.[^.]+)?$", "", key): mask for key, mask in self.rank_pattern.items()}
            object.__setattr__(self, "rank_pattern", {k: checked_mask(k, m, self.init_r) for k, m in masks.items()})

    def mask(self, path: str) -> tuple[bool, ...]:
        """Return which of the `init_r` triplets of a module are left."""
        table: Mapping[str, Any] = self.rank_pattern or {}
        if path not in table:  # saved from a model without its head, say
            path = next((key for key in table if path.endswith("." + key)), path)
        return table.get(path, (True,) * self.init_r)

    def parts(self, model: nn.Module) -> Iterator[Placement]:
        """Yield the adapter's parts: an update for each target, trained biases and trained copies."""
        targets = find(model, self, check=check_host)
        for path, host in targets.items():
            kind = AdaLoRAConv if isinstance(host, nn.Conv2d) else AdaLoRALinear
            yield Placement(path, "adalora", kind(host, sum(self.mask(path)), self))
        yield from trained_rows(model, self, targets)
        copies = list(trained_copies(model, self))
        yield from trained_biases(model, self.bias, targets, copied=[copy.path for copy in copies])
        yield from copies

    # -- what training asks for ------------------------------------------------------------------------------------

    def for_run(self, placements: Sequence[Placement], steps: int) -> Self:
        """Return the config of a run of so many steps.

        Raises:
            PeftLabError: there is no rank to prune, or no step to do it in.
        """
        self.check_target()
        if self.total_step is None:
            tinit = steps // 10 if self.tinit is None else self.tinit
            tfinal = steps // 2 if self.tfinal is None else self.tfinal
            if tinit >= steps - tfinal:
                raise PeftLabError(
                    f"The run has {steps} steps, and tinit ({tinit}) and tfinal ({tfinal}) leave none in which ranks "
                    "could be pruned. Lower them, or train for longer."
                )
            return replace(self, total_step=steps, tinit=tinit, tfinal=tfinal)
        parts = own_parts(placements)
        left = sum(int(part.kept.sum()) for part in parts)
        if self.total_step - (self.tfinal or 0) > steps and left > (self.target_r or 0) * len(parts):
            warn(
                f"The run has {steps} steps, and AdaLoRA would prune until step {self.total_step - (self.tfinal or 0)} "
                f"(total_step={self.total_step}, tfinal={self.tfinal}), so it ends with more than target_r="
                f"{self.target_r}. Set total_step={steps}, or leave it out.",
            )
        return self

    def check_target(self) -> None:
        """Refuse a rank at the end that is larger than the one at the start. (A folder may have both.)"""
        if self.target_r is not None and self.target_r > self.init_r:
            raise PeftLabError(
                f"target_r is {self.target_r} and init_r is {self.init_r}: AdaLoRA prunes from init_r down to "
                "target_r, so it cannot be larger. Lower target_r, or raise init_r."
            )

    def schedule(self) -> str:
        """Return the schedule in one line."""
        names = ("total_step", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
        told = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return f"AdaLoRA prunes from a mean rank of {self.init_r} to {self.target_r}, with {told}"

    def added_loss(self, placements: Sequence[Placement]) -> Tensor | None:
        """Return w / n times the sum over the n matrices P and Q of their distance from orthonormal ones."""
        matrices = [matrix for part in own_parts(placements) for matrix in (part.lora_A, part.lora_B.T)]
        if not matrices or self.orth_reg_weight == 0:
            return None
        refuse_pieces(matrices)
        # w / (2 n) sum of |Q Q^T - I| + |P^T P - I|
        return orthogonality(matrices) * (self.orth_reg_weight / len(matrices))

    def budget(self, step: int, start: int, modules: int) -> int:
        """Return how many triplets are left after a step.

        Args:
            start: how many there are at the start, in all modules.
        """
        assert self.total_step is not None and self.target_r is not None
        tinit, end = self.tinit or 0, self.total_step - (self.tfinal or 0)
        target = min(self.target_r * modules, start)
        if step <= tinit or step >= end:
            return start if step <= tinit else target
        # b = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_f - t_i))^3
        left = 1 - (step - tinit) / (end - tinit)
        return int((start - target) * left**3 + target)

    def after_step(self, placements: Sequence[Placement], step: int, usable: bool = True) -> list[nn.Parameter]:
        """Bring the importance up to date, and allocate ranks where the schedule says so.

        Returns the parameters that were changed.
        """
        parts = own_parts(placements)
        if self.total_step is None:
            raise PeftLabError(
                "AdaLoRA's schedule needs total_step, the number of steps of your loop: AdaLoRAConfig(total_step=...). "
                "pl.train knows it by itself."
            )
        self.check_target()
        refuse_pieces([p for part in parts for p in part.parameters()])
        if usable and all(p.grad is None for part in parts for p in part.parameters()):
            raise PeftLabError("There are no gradients; call after_step after optimizer.step() and before zero_grad().")
        tinit, end = self.tinit or 0, self.total_step - (self.tfinal or 0)
        # where pruning ends at the very first step, there is no other gradient to go by
        if usable and (step < end or (step == end and not parts[0].averages)):
            remember(parts, self.beta1, self.beta2)
        if (tinit < step < end and step % self.deltaT == 0) or step == end:
            self.allocate(parts, step)
        elif tinit < step < end:
            return []  # what was pruned may come back until the next allocation
        if step == end:
            for part in parts:
                part.averages = {}
        for part in parts:
            part.prune()
        return [part.lora_E for part in parts]

    def allocate(self, parts: Sequence[AdaLoRALinear], step: int) -> None:
        """Keep the most important triplets of all modules, as many as the budget has."""
        start = sum(len(part.kept) for part in parts)
        away = start - self.budget(step, start, len(parts))
        if not away or not all(part.averages for part in parts):
            return
        scores = [part.importance() for part in parts]
        # keep what lies above the k-th smallest; equals go together
        limit = torch.cat([score.to(scores[0].device) for score in scores]).cpu().kthvalue(away).values.item()
        for part, score in zip(parts, scores, strict=True):
            part.kept = score > limit

    # -- folders ---------------------------------------------------------------------------------------------------

    def as_it_stands(self, placements: Sequence[Placement]) -> Self:
        """Return the config with the masks of these parts, in the places of the first `init_r` triplets."""
        left = {}
        for path, _, part in placements:
            if isinstance(part, AdaLoRALinear):
                now = iter(part.held.tolist())
                left[path] = tuple(one and next(now) for one in self.mask(path))
        pruned = self.rank_pattern is not None or not all(map(all, left.values()))
        return replace(self, rank_pattern=left if pruned else None)

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the fields of Hugging Face's `adapter_config.json` that only AdaLoRA has."""
        tinit, tfinal = self.tinit or 0, self.tfinal or 0
        table: Mapping[str, Any] | None = self.rank_pattern
        return {
            "init_r": self.init_r,
            "target_r": self.target_r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "bias": self.bias,
            "fan_in_fan_out": any(is_conv1d(host) for host in hosts.values()),
            # peft refuses to open a folder without a schedule that has a step for pruning
            "total_step": tinit + tfinal + 1 if self.total_step is None else self.total_step,
            "tinit": tinit,
            "tfinal": tfinal,
            **{name: getattr(self, name) for name in ("deltaT", "beta1", "beta2", "orth_reg_weight")},
            "rank_pattern": None if table is None else {f"{path}.lora_E": list(mask) for path, mask in table.items()},
            "init_lora_weights": self.init != "random",
            **({} if self.trainable_tokens is None else {"trainable_token_indices": self.trainable_tokens}),
        }

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for this class: the reverse of `to_peft`."""
        counts = {name: fields.get(name) for name in ("total_step", "tinit", "tfinal")}
        # peft takes half a step, too, which somebody's division gave
        counts = {name: int(value) if isinstance(value, float) else value for name, value in counts.items()}
        return {
            "init_r": fields.get("init_r", 12),
            "target_r": fields.get("target_r", 8),
            "alpha": fields.get("lora_alpha", 8),
            "dropout": fields.get("lora_dropout", 0.0),
            "bias": fields.get("bias", "none"),
            "deltaT": fields.get("deltaT", 1),
            "beta1": fields.get("beta1", 0.85),
            "beta2": fields.get("beta2", 0.85),
            "orth_reg_weight": fields.get("orth_reg_weight", 0.5),
            "rank_pattern": fields.get("rank_pattern") or None,
            "trainable_tokens": fields.get("trainable_token_indices") or None,
            **counts,
        }


def own_parts(placements: Iterable[Placement]) -> list[AdaLoRALinear]:
    """Return AdaLoRA's parts among those of an adapter, without trained biases and copies."""
    return [part for _, _, part in placements if isinstance(part, AdaLoRALinear)]


def checked_mask(key: str, mask: Any, r: int) -> tuple[bool, ...]:
    """Require a list of `r` times True or False."""
    entries = tuple(mask)
    if len(entries) != r:
        raise PeftLabError(
            f"rank_pattern[{key!r}] must hold True or False for each of the {r} triplets (init_r); found "
            f"{len(entries)} entries."
        )
    return entries


def refuse_pieces(tensors: Iterable[Tensor]) -> None:
    """Refuse to train a model that `fully_shard` has divided."""
    if any(map(is_piece, tensors)):
        raise PeftLabError(
            "AdaLoRA cannot train where the model's parameters are divided among processes (fully_shard): the "
            "importance of a triplet needs whole matrices. Use DistributedDataParallel."
        )


@checked()
def adalora_ranks(model: nn.Module, name: str = "default") -> dict[str, int]:
    """Return {path of a module: its rank}, as the last allocation left it.

    Raises:
        PeftLabError: there is no such adapter, or it is not AdaLoRA's.

    >>> model = pl.attach(model, pl.AdaLoRAConfig(init_r=4, target_r=2, target_modules=["q_proj"]))
    >>> pl.adalora_ranks(model)
    {'model.layers.0.self_attn.q_proj': 4, 'model.layers.1.self_attn.q_proj': 4}
    """
    root = unwrap(model)
    config = require_adapter(root, name).configs[name]
    if not isinstance(config, AdaLoRAConfig):
        raise PeftLabError(f"The adapter {name!r} is of the method {config.method}, which has no ranks that change.")
    return {path: int(part.kept.sum()) for path, _, part in placed(root, name) if isinstance(part, AdaLoRALinear)}
