"""Add to a frozen weight W a trained product of two thin matrices, s B A.

    y = W x + b + s B A x,    x: (..., in),  y: (..., out),  A: (r, in),  B: (out, r),  s = alpha / r

Paper: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2021, arXiv:2106.09685, section 4.1; the scaling
alpha / sqrt(r) is from Kalajdzievski, 2023, arXiv:2312.03732.
Book: section 2.2, "The update"; also 2.3, "The gradients, by hand", 2.4, "How to start, and how not to", and 2.10, "The
scaling: alpha over r, or over its root".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.catalogue import METHODS
from peftlab.checks import LARGEST, check_fields, check_kinds, number, one_of, whole
from peftlab.core.embeddings import looked_up, scaled
from peftlab.core.experts import find_parameters, linear_outside, old_names, renamed
from peftlab.core.hooks import base_modules
from peftlab.core.interface import Part, Placement
from peftlab.core.records import own_tensor
from peftlab.core.targets import (
    ALL_LINEAR,
    CONVOLUTIONS,
    Targets,
    all_linear,
    by_pattern,
    check_names,
    check_patterns,
    check_regex,
    find,
    heads,
    in_any_order,
    is_conv1d,
    names_match,
    shape_of,
)
from peftlab.errors import PeftLabError
from peftlab.methods.lora_conv import LoRAConv, biased, start
from peftlab.methods.lora_eva import checked_options, started
from peftlab.methods.lora_loftq import started as loftq
from peftlab.methods.lora_parameter import LoRAParameter
from peftlab.methods.lora_starts import CONVERT, FAST, STARTED, LoRAStarted, folded, from_weight
from peftlab.methods.parts import BIAS_MODES, cast, first_input, trained_biases, trained_copies, widened
from peftlab.methods.tokens import check_tokens, trained_rows


class LoRALinear(Part):
    """Add the update s B (A x) to what a linear layer returns.

    The layer is an `nn.Linear`, a `Conv1D` or a quantised linear.

    Attributes:
        lora_A: (r, in).
        lora_B: (out, r).
        lora_B_bias: (out,) or None.
        scaling: s.
    """

    keys = {
        "lora_A": "{path}.lora_A.weight",
        "lora_B": "{path}.lora_B.weight",
        "lora_B_bias": "{path}.lora_B.bias",
    }

    def __init__(self, host: nn.Module, r: int, scaling: float, config: LoRAConfig) -> None:
        super().__init__()
        inside, outside = shape_of(host)
        self.scaling, self.dropout = scaling, config.dropout
        # Conv1D stores its weight (in, out)
        self.transposed = is_conv1d(host) or (config.fan_in_fan_out and not isinstance(host, nn.Linear))
        self.lora_A = nn.Parameter(torch.empty(r, inside))
        self.lora_B = nn.Parameter(torch.zeros(outside, r))
        self.lora_B_bias = nn.Parameter(torch.zeros(outside)) if config.lora_bias else None
        start(self.lora_A, self.lora_B, config.init)

    def after(
        self, host: nn.Module, args: tuple, kwargs: dict, output: Tensor, base: Tensor
    ) -> Tensor:
        """Add the update. x: (..., in), output: (..., out)."""
        x = cast(first_input(args, kwargs), self.lora_A.dtype)
        x = F.dropout(x, self.dropout, self.training)
        # y = W x + b + s B (A x): two thin products, not one with the large BA
        low = F.linear(x, self.lora_A)  # (..., r)
        update = F.linear(low, self.lora_B, self.lora_B_bias) * self.scaling
        return (output + update).to(output.dtype)

    def delta(self) -> Tensor:
        """Return the update of the weight, (out, in), in the adapter's dtype.

        It has gradients.
        """
        # dW = s B A
        return (self.lora_B @ self.lora_A) * self.scaling

    def merged(self, host: nn.Module) -> dict[str, Tensor]:
        """Return the host's parameters with the update folded in, not yet rounded to the host's dtype."""
        # W' = W + s B A. Not delta(): it rounds a product of 16-bit factors before it is added.
        delta = (widened(self.lora_B) @ widened(self.lora_A)) * self.scaling
        delta = delta.T if self.transposed else delta
        parameters = {"weight": widened(own_tensor(host, "weight")) + delta}
        if self.lora_B_bias is not None:
            parameters["bias"] = biased(host, self.lora_B_bias, self.scaling)
        return parameters


class LoRAEmbedding(Part):
    """Add the update of an embedding: look up a column of A for each token, then multiply it by B.

        y = W[token] + s B A[:, token],    W: (vocabulary, width)

    Attributes:
        lora_A: (r, vocabulary), zero at the start.
        lora_B: (width, r), normal at the start.
    """

    keys = {"lora_A": "{path}.lora_embedding_A", "lora_B": "{path}.lora_embedding_B"}

    def __init__(self, host: nn.Embedding, r: int, scaling: float, config: LoRAConfig) -> None:
        super().__init__()
        if config.lora_bias:
            raise PeftLabError("lora_bias cannot be used on an embedding; leave it out, or leave the embedding out.")
        vocabulary, width = shape_of(host)
        self.scaling = scaling
        # Here A is zero and B is not (as in loralib and peft). So a token that never occurs keeps its embedding.
        self.lora_A = nn.Parameter(torch.zeros(r, vocabulary))
        self.lora_B = nn.Parameter(torch.randn(width, r))
        if config.init == "random":
            nn.init.normal_(self.lora_A)

    def after(self, host: nn.Module, args: tuple, kwargs: dict, output: Tensor, base: Tensor) -> Tensor:
        """Add the update. output: (..., width)."""
        return (output + self.update(host, args, kwargs)).to(output.dtype)

    def update(self, host: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        """Return what is added for each token, (..., width)."""
        assert isinstance(host, nn.Embedding)
        tokens, scale = looked_up(host, args, kwargs)
        rows = F.embedding(
            tokens, self.lora_A.T, host.padding_idx, host.max_norm, host.norm_type, host.scale_grad_by_freq,
            host.sparse,
        )  # fmt: skip
        # y = W[token] + s B A[:, token]. Gemma scales what it looks up, so the update is scaled too.
        return scaled(F.linear(rows, self.lora_B) * self.scaling, scale)

    def delta(self) -> Tensor:
        """Return the update of the weight, (vocabulary, width), in the adapter's dtype and with gradients."""
        return (self.lora_B @ self.lora_A).T * self.scaling

    def merged(self, host: nn.Module) -> dict[str, Tensor]:
        """Return the host's weight with the update folded in, not yet rounded to the host's dtype."""
        delta = (widened(self.lora_B) @ widened(self.lora_A)).T * self.scaling
        return {"weight": widened(own_tensor(host, "weight")) + delta}


# Values of peft's `init_lora_weights` (in lower case) that leave the base's weights alone.
BASE_KEPT = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Targets):
    """Say what LoRA trains and how it starts.

    Attributes:
        r: the rank of the update; a positive whole number.
        alpha: the numerator of the scaling s = alpha / r.
        dropout: the probability of dropping an entry of the adapter's input in training; in [0, 1).
        bias: which biases of the base train too: `"none"`, `"lora_only"` (those of the adapted modules) or `"all"`.
        use_rslora: scale by alpha / sqrt(r) instead, so that the update keeps its size as r grows.
        init: how A and B start. `"kaiming"` draws A uniformly within 1 / sqrt(in), as in Hugging Face peft, and
            `"gaussian"` from a normal of standard deviation 1 / r; B is zero. `"orthogonal"` draws both from spaces
            that are orthogonal, so that B A is zero and neither is, as in peft, and for odd r too.
            `"pissa"` starts from the largest singular values and vectors of the weight, `"pissa_niter_4"` does so by a
            fast SVD with 4 iterations (or another number), and `"olora"` from its QR factors. The base stays as it is,
            and what A and B started from is subtracted beside it (`methods/lora_starts.py`); a folder holds a plain
            LoRA of rank 2 r. On a 4-bit base they start from what its codes stand for.
            `"eva"` starts A from the directions in which a layer's inputs vary most, and moves ranks between layers
            (`methods/lora_eva.py`). It needs `attach(..., data=batches)`.
            `"loftq"` starts from what four bits have lost of the weights (`methods/lora_loftq.py`). It needs
            `attach(..., data=whole)` with the model before it was quantised, or `quantize_and_attach`.
            `"random"` draws B too, so the model's output changes before the first step; it is for tests.
        init_options: settings of the start. For `"eva"` these, with peft's defaults: `rho` (2.0; a layer gets at most
            rho r directions, and with 1.0 no rank moves), `tau` (0.99), `use_label_mask` (True: tokens without a label
            do not count), `label_mask_value` (-100), `whiten` (False) and `adjust_scaling_factors` (True: alpha grows
            with a layer's rank).
        lora_bias: give B a bias of its own, zero at the start.
        fan_in_fan_out: detected automatically for Linear and Conv1D (the flag is ignored there). Set it only for custom
            layers that store their weight as (in, out).
        rank_pattern, alpha_pattern: another r or alpha for the paths whose end matches a key, e.g. `{"layers.0.*": 4}`.
        target_parameters: names, or endings of paths, of parameters to adapt as such, e.g. `["experts.gate_up_proj",
            "experts.down_proj", "gate.weight"]`: the fused experts of a mixture, each with an update of its own of rank
            r, and its router. With these and no `target_modules` nothing else is adapted. In the mixtures that Hugging
            Face peft converts (Mixtral, Qwen3-MoE, DeepSeek-V3 and others), `"all-linear"` and the older names of the
            experts' layers (`"w1"`, `"gate_proj"`, ..., `"gate"`) mean these parameters, and the fused gate and up get
            rank 2 r and 2 alpha. Without dropout, lora_bias, fan_in_fan_out and trained biases.
        trainable_tokens: ids of tokens whose rows of the word embeddings train in full, and no other rows. A head that
            shares the embeddings' weight follows. `{"embed_tokens": [5, 9], "lm_head": [5, 9]}` names the modules, as
            for a head with a weight of its own. `None` takes the tokens that `add_tokens` added, if there are any.

    Raises:
        PeftLabError: a value is out of range; the message says what was found.

    >>> model = pl.attach(model, pl.LoRAConfig(r=4, target_modules=["q_proj"]))
    >>> print(pl.count_parameters(model))
    256 of 5,968 parameters train (4.2895%)
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    init: str = "kaiming"
    init_options: Mapping[str, Any] = field(default_factory=dict)
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: Mapping[str, Any] = field(default_factory=dict)
    alpha_pattern: Mapping[str, Any] = field(default_factory=dict)
    target_parameters: Iterable[str] | None = None
    trainable_tokens: Iterable[int] | Mapping[str, Iterable[int]] | None = None

    method: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"

    def __post_init__(self) -> None:
        check_names(self, "target_parameters")
        if isinstance(self.target_parameters, str):
            raise PeftLabError(
                f"target_parameters is {self.target_parameters!r}; give a list of names, such as "
                f"[{self.target_parameters!r}]."
            )
        if not self.target_parameters:
            object.__setattr__(self, "target_parameters", None)
        elif isinstance(self.target_modules, (list, tuple, set, frozenset)) and not self.target_modules:
            object.__setattr__(self, "target_modules", None)  # peft's way to say that no module is adapted
        super().__post_init__()
        check_tokens(self)
        check_kinds(self, "rank_pattern", "alpha_pattern", "init_options")
        for key in (*self.rank_pattern, *self.alpha_pattern):
            check_regex(key)
        check_fields(self, whole, "r", least=1, usual="4 to 64")
        check_fields(self, number, "alpha", above=0, usual="r to 4 r")
        check_fields(self, number, "dropout", least=0, below=1)
        check_fields(self, one_of, "bias", known=BIAS_MODES)
        if not (isinstance(self.init, str) and FAST.fullmatch(self.init)):
            check_fields(self, one_of, "init", known=METHODS["lora"].starts)
        check_fields(self, one_of, "use_rslora", "lora_bias", "fan_in_fan_out", known=(True, False))
        object.__setattr__(self, "init_options", checked_options(self.init, self.init_options))
        ranks = {key: whole(f"rank_pattern[{key!r}]", r, least=1) for key, r in self.rank_pattern.items()}
        alphas = {
            key: number(f"alpha_pattern[{key!r}]", a, above=0, ceiling=LARGEST) for key, a in self.alpha_pattern.items()
        }
        object.__setattr__(self, "rank_pattern", ranks)
        object.__setattr__(self, "alpha_pattern", alphas)

    def scaling(self, path: str = "") -> float:
        """Return s, the factor in front of B A: alpha / r, or alpha / sqrt(r) with `use_rslora`."""
        r, alpha = by_pattern(self.rank_pattern, path, self.r), by_pattern(self.alpha_pattern, path, self.alpha)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def parts(self, model: nn.Module) -> Iterator[Placement]:
        """Yield the adapter's parts: a low-rank update for each target, trained biases and trained copies."""
        config = self.for_model(model)
        parameters = find_parameters(model, config.target_parameters or ())
        targets = {} if parameters and config.target_modules is None else find(model, config)
        config.check_parameters(model, parameters, targets)
        check_patterns(config, targets, parameters)
        for path, host in targets.items():
            part = self.part_for(host, by_pattern(config.rank_pattern, path, self.r), config.scaling(path))
            yield Placement(path, self.method, part)
        for path, (host_path, host, name) in parameters.items():
            r = by_pattern(config.rank_pattern, path, self.r)
            # Hugging Face peft wraps the parameters of one module around each other, the last one outermost.
            inside = [other for other in host._parameters if f"{host_path}.{other}" in parameters]
            depth = len(inside) - 1 - inside.index(name)
            yield Placement(
                host_path, f"lora_{name}", LoRAParameter(path, host, name, r, config.scaling(path), self, depth)
            )
        hosts = [*targets, *(host_path for host_path, _, _ in parameters.values())]
        yield from trained_rows(model, self, hosts)
        copies = list(trained_copies(model, self))
        yield from trained_biases(model, self.bias, targets, copied=[copy.path for copy in copies])
        yield from copies

    def start_from(self, model: nn.Module, data: Any) -> tuple[Self, Mapping[str, Mapping[str, Tensor]]]:
        """Return the config with the ranks that EVA finds, and what A and B of EVA and LoftQ start from."""
        if self.init == "loftq":
            if type(self) is not LoRAConfig:
                raise PeftLabError(f"init='loftq' starts a plain LoRA, and this is a {type(self).__name__}.")
            return self, loftq(self.for_model(model), model, data)
        if self.init != "eva":
            return super().start_from(model, data)
        if data is None:
            raise PeftLabError(
                "init='eva' starts from the inputs of the layers: pl.attach(model, config, data=batches), with batches "
                "as the model is called with."
            )
        return started(self.for_model(model), model, data)

    def part_for(self, host: nn.Module, r: int, scaling: float) -> Part:
        """Return the part that stands on a target. A variant of LoRA returns another one."""
        if from_weight(self.init):
            return LoRAStarted(host, r, scaling, self)
        if isinstance(host, nn.Embedding):
            return LoRAEmbedding(host, r, scaling, self)
        kind = LoRAConv if isinstance(host, CONVOLUTIONS) else LoRALinear
        return kind(host, r, scaling, self)

    def for_model(self, model: nn.Module) -> Self:
        """Return the config with the names of this model, where they mean experts that are fused now.

        A fused parameter gets the rank and the alpha of all layers that it holds, so that its scaling is that of each.
        """
        old, spec = old_names(model), self.target_modules
        if old is None or spec is None:
            return self
        if isinstance(spec, str):
            if spec.lower() != ALL_LINEAR:
                return self
            linear = all_linear(model, {path: module for path, module in base_modules(model).items() if path})
            stay = linear_outside(model, old, linear)
            _, meant, fused = renamed(model, old.now)
        else:
            stay, meant, fused = renamed(model, spec)
        if not meant:
            return self
        named = tuple(self.target_parameters or ())
        ranks = {rf".*\.{re.escape(name)}": self.r * count for name, count in fused.items()}
        alphas = {rf".*\.{re.escape(name)}": self.alpha * count for name, count in fused.items()}
        return replace(
            self,
            target_modules=stay or None,
            target_parameters=tuple(dict.fromkeys((*named, *meant))),
            rank_pattern={**self.rank_pattern, **ranks},
            alpha_pattern={**self.alpha_pattern, **alphas},
        )

    def check_parameters(
        self, model: nn.Module, parameters: Mapping[str, Any], targets: Mapping[str, nn.Module]
    ) -> None:
        """Refuse what cannot be combined with adapted parameters."""
        if not parameters:
            return
        first = next(iter(parameters))
        for wrong, why in {
            "dropout": "the update is not computed from an input that could be dropped",
            "lora_bias": "the parameter is no layer whose output could get a bias",
            "fan_in_fan_out": "how it lies is known from its module",
        }.items():
            if getattr(self, wrong):
                raise PeftLabError(
                    f"{wrong} cannot be used with adapted parameters such as {first} (experts, routers): {why}. Set it "
                    f"to {'0' if wrong == 'dropout' else 'False'}, or name modules in target_modules and no parameters."
                )
        if self.bias != "none":
            raise PeftLabError(
                f"bias={self.bias!r} cannot be used with adapted parameters such as {first}: the biases of experts and "
                "routers are not added to what their modules return. Use bias='none'."
            )
        if self.layers_to_transform is not None:
            raise PeftLabError(
                f"layers_to_transform chooses among modules, and would leave parameters such as {first} in all blocks. "
                "Name the parameters block by block in target_parameters, and the modules in target_modules."
            )
        whole = heads(model, self)
        for path, (host_path, _, _) in parameters.items():
            if self.exclude_modules is not None and any(
                names_match(self.exclude_modules, one) for one in (host_path, path)
            ):
                raise PeftLabError(
                    f"exclude_modules names {host_path}, and {path} is to be adapted. As in Hugging Face peft, "
                    "exclude_modules does not reach parameters: name those to adapt in target_parameters, and the "
                    "other modules in target_modules."
                )
            if host_path in targets:
                raise PeftLabError(
                    f"{path} is named in target_parameters, and its module in target_modules; name one of them."
                )
            if any(host_path == head or host_path.startswith(head + ".") for head in whole):
                raise PeftLabError(
                    f"modules_to_save trains {host_path} in full, so {path} needs no adapter; name one of them."
                )

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the fields of Hugging Face's `adapter_config.json` that only LoRA has."""
        config = self.for_model(model)
        fields = {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "bias": self.bias,
            "use_rslora": self.use_rslora,
            "lora_bias": self.lora_bias,
            "fan_in_fan_out": self.fan_in_fan_out or any(is_conv1d(host) for host in hosts.values()),
            # peft draws A by this before it loads, and its "orthogonal" refuses odd ranks
            "init_lora_weights": {"random": False, "gaussian": "gaussian"}.get(self.init, True),
            **({} if self.trainable_tokens is None else {"trainable_token_indices": self.trainable_tokens}),
        }
        paths = [*hosts, *find_parameters(model, config.target_parameters or ())]
        fields["rank_pattern"] = in_any_order(config.rank_pattern, paths)
        fields["alpha_pattern"] = in_any_order(config.alpha_pattern, paths)
        if config.target_parameters:
            fields["target_parameters"] = sorted(config.target_parameters)
        return folded(fields) if from_weight(self.init) else fields

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for this class: the reverse of `to_peft`.

        `init_lora_weights` says how a training run began. If it only chose A and B, it is ignored, because the weights
        are about to be loaded. PiSSA and OLoRA also subtracted s B A from the base's weights, and the published base
        gives the same A and B again. The fast PiSSA drew random numbers for them, CorDA and LoRA-GA took them from
        data, and LoftQ rounded the base, so their adapters are refused.

        Raises:
            PeftLabError: the run changed the base's weights in a way that cannot be found again, so on the published
                base the adapter would compute something else.
        """
        init = fields.get("init_lora_weights", True)
        again = fields.get(STARTED) or {"pissa": "pissa", "olora": "olora"}.get(str(init).lower())
        if init == "loftq":
            options = fields.get("loftq_config") or {}
            raise PeftLabError(
                "The adapter was trained with init_lora_weights='loftq', which rounds the base's weights to what "
                f"{options.get('loftq_bits', 4)} bits hold, {options.get('loftq_iter', 1)} times. One time with 4 bits "
                "is the base of quantize_model(model, double_quant=False): load the adapter there, with "
                "init_lora_weights set to true in adapter_config.json. For others, merge it where it was trained."
            )
        if again is None and str(init).lower() not in BASE_KEPT:
            raise PeftLabError(
                f"The adapter was trained with init_lora_weights={init!r}, which may change the base's weights at the "
                f"start, so it does not fit the base as published. {CONVERT} If this model already holds the changed "
                "weights, set init_lora_weights to true in adapter_config.json."
            )
        return {
            **({} if again is None else {"init": again}),
            "r": fields.get("r", 8),
            "alpha": fields.get("lora_alpha", 8),
            "dropout": fields.get("lora_dropout", 0.0),
            "bias": fields.get("bias", "none"),
            "use_rslora": fields.get("use_rslora", False),
            "lora_bias": fields.get("lora_bias", False),
            "fan_in_fan_out": bool(fields.get("fan_in_fan_out", False)),
            "rank_pattern": fields.get("rank_pattern") or {},
            "alpha_pattern": fields.get("alpha_pattern") or {},
            "target_parameters": fields.get("target_parameters") or None,
            "trainable_tokens": fields.get("trainable_token_indices") or None,
        }

    # Options of Hugging Face's LoRA that this file does not have. An adapter that uses one must not load as another.
    unsupported: ClassVar[tuple[str, ...]] = (
        "use_dora", "use_qalora", "layer_replication", "alora_invocation_tokens",
        "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
    )  # fmt: skip
