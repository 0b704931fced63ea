"""Put a small two-layer network, a bottleneck, into each block, with a residual connection around it.

    a(x) = s (W_up f(W_down x + b_down) + b_up),    x: (..., d),  W_down: (m, d),  W_up: (d, m)

m = d / reduction factor. The placement says what the bottleneck reads and where its answer is added. Below, F is the
feed-forward, h is what a sub-layer computed, x is what entered it, and LN is the norm after the addition in models that
have it there, such as BERT.

    houlsby    h + a(h)             after attention and after the feed-forward, before the block adds x
               (Houlsby et al. 2019, arXiv:1902.00751, section 2.1)
    pfeiffer   y + a(y)             y = x + h, what leaves the block; in BERT LN(x + h + a(LN(x + h)))
               (Pfeiffer et al. 2021, AdapterFusion, arXiv:2005.00247, section 2.1)
    parallel   F(x) + a(x)          beside the feed-forward, reading what it reads
               (He et al. 2022, arXiv:2110.04366, section 3.3; s = 4 in their experiments)

Some models have a dropout after a projection. A houlsby adapter runs before that dropout, not after it.

Book: section 5.1, "Where they sit"; also 5.2, "Nothing changes at the start".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlab.catalogue import METHODS
from peftlab.checks import check_fields, number, one_of, whole
from peftlab.core.hooks import base_modules
from peftlab.core.interface import Part, Placement
from peftlab.core.targets import Targets, check_called, find, heads, linear_endings, linear_shape, shape_of
from peftlab.default_targets import PLACEMENTS, blocks_in, norm_behind, places, places_in
from peftlab.errors import PeftLabError
from peftlab.methods.parts import cast, first_input, trained_copies

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "linear": lambda x: x
}  # fmt: skip
KEYS = {
    f"bottleneck.{name}.{kind}": f"{{path}}.adapter_{name}.{kind}"
    for name in ("down", "up")
    for kind in ("weight", "bias")
}


class Bottleneck(nn.Module):
    """Compute a(x) = s (W_up f(W_down x + b_down) + b_up). x: (..., d)."""

    def __init__(self, d: int, config: AdapterConfig) -> None:
        super().__init__()
        m = config.bottleneck(d)
        self.scaling, self.dropout, self.activation = config.scaling, config.dropout, ACTIVATIONS[config.activation]
        self.down, self.up = nn.Linear(d, m), nn.Linear(m, d)
        start(self.down, self.up, config.init)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the adapter adds, in its own dtype."""
        x = cast(x, self.down.weight.dtype)
        # a(x) = s (W_up f(W_down x + b_down) + b_up)
        update = self.up(self.activation(self.down(x)))
        update = update if self.scaling == 1 else update * self.scaling
        return F.dropout(update, self.dropout, self.training)


class After(Part):
    """Return y + a(y): read what the host returns and add to it."""

    keys = KEYS

    def __init__(self, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.bottleneck = bottleneck

    def after(self, host: nn.Module, args: tuple, kwargs: dict, output: Any, base: Any) -> Any:
        """Add the update to the output, or to its first entry where a block returns several."""
        y = output[0] if isinstance(output, (tuple, list)) else output
        return with_first(output, (y + self.bottleneck(y)).to(y.dtype))


class Beside(Part):
    """Return F(x) + a(x): read what the host F reads and add to what it returns."""

    keys = KEYS

    def __init__(self, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.bottleneck = bottleneck

    def after(self, host: nn.Module, args: tuple, kwargs: dict, output: Any, base: Any) -> Any:
        """Add the update of the input to the output, or to its first entry where a module returns several."""
        y = output[0] if isinstance(output, (tuple, list)) else output
        update = self.bottleneck(first_input(args, kwargs))
        return with_first(output, (y + update.view_as(y)).to(y.dtype))  # Llama 4's experts return (batch x tokens, d)


def with_first(output: Any, first: Tensor) -> Any:
    """Return what a module returned, with another first entry if it returned several. A named tuple becomes a tuple."""
    if isinstance(output, list):
        return [first, *output[1:]]
    return (first, *output[1:]) if isinstance(output, tuple) else first


class AroundNorm(Part):
    """Return LN(z + a(LN z)): read what a norm returns, and add to what the norm reads, z = x + h."""

    keys = KEYS

    def __init__(self, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.bottleneck = bottleneck

    def after(self, host: nn.Module, args: tuple, kwargs: dict, output: Tensor, base: Tensor) -> Tensor:
        """Run the norm once more, on the sum. This calls `forward`, so that the norm's hooks do not run again."""
        z = first_input(args, kwargs)
        return host.forward((z + self.bottleneck(output)).to(z.dtype))


class BesideResidual(Part):
    """Return LN(h + x + a(x)): add to the residual of BERT's feed-forward.

    The feed-forward ends in a module that is given h and x and adds them. Here it is given h and x + a(x).
    """

    keys = KEYS

    def __init__(self, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.bottleneck = bottleneck

    def before(self, host: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Add the update to the residual, the host's second argument."""
        if len(args) > 1:
            return (args[0], (args[1] + self.bottleneck(args[1])).to(args[1].dtype), *args[2:]), kwargs
        x = kwargs["input_tensor"]
        return args, {**kwargs, "input_tensor": (x + self.bottleneck(x)).to(x.dtype)}


def start(down: nn.Linear, up: nn.Linear, init: str) -> None:
    """Draw the weights of a bottleneck.

    If W_up is zero, the adapter adds nothing, and in the first step only W_up and its bias get gradients.
    """
    if init == "houlsby":
        for layer in (down, up):
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(layer.bias)
    elif init == "identity":
        # W_down ~ U(-1/sqrt(d), 1/sqrt(d)), as LoRA's A
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        for tensor in (down.bias, up.weight, up.bias):
            nn.init.zeros_(tensor)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Targets):
    """Say what bottleneck adapters train, where they stand and how they start.

    Attributes:
        placement: `"pfeiffer"` (one adapter per block), `"houlsby"` (two per block) or `"parallel"` (one per block,
            beside the feed-forward).
        reduction_factor: d / m, the model's width over the bottleneck's. m is rounded down and is at least one.
        width: m itself, instead of `reduction_factor`.
        activation: f: `"relu"`, `"gelu"`, `"silu"`, `"tanh"` or `"linear"` (none).
        scaling: s, the factor in front of what the adapter adds.
        dropout: the probability of dropping an entry of what the adapter adds in training; in [0, 1).
        init: `"identity"` sets W_up and the biases to zero, so the model starts exactly as it was. `"houlsby"` draws
            both weights from a normal distribution with standard deviation 0.01, cut at two of them, so the model
            starts nearly as it was. `"random"` draws everything; it is for tests.
        target_modules: the modules after which an adapter stands (with `"parallel"`: beside which). `None` takes the
            places of the placement in a known architecture.

    Raises:
        PeftLabError: a value is out of range; the message says what was found.

    >>> model = pl.attach(model, pl.AdapterConfig(placement="pfeiffer", reduction_factor=4))
    >>> pl.count_parameters(model).trainable
    296
    """

    placement: str = "pfeiffer"
    reduction_factor: int = 16
    width: int | None = None
    activation: str = "relu"
    scaling: float = 1.0
    dropout: float = 0.0
    init: str = "identity"

    peft_type: ClassVar[str] = "BOTTLENECK"  # Hugging Face peft has no such method; the folder has its form

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, one_of, "placement", known=PLACEMENTS)
        check_fields(self, one_of, "activation", known=ACTIVATIONS)
        check_fields(self, one_of, "init", known=METHODS["pfeiffer"].starts)
        check_fields(self, whole, "reduction_factor", least=1)
        check_fields(self, whole, "width", least=1, optional=True)
        check_fields(self, number, "scaling", above=0, usual="1 to 4")
        check_fields(self, number, "dropout", least=0, below=1)

    @property
    def method(self) -> str:
        """Return the name on the command line, which is that of the placement."""
        return self.placement

    def bottleneck(self, d: int) -> int:
        """Return m, the width of the bottleneck on a stream of width d."""
        return self.width or max(1, d // self.reduction_factor)

    def parts(self, model: nn.Module) -> Iterator[Placement]:
        """Yield a bottleneck for each place, and the trained copies."""
        whole = heads(model, self)

        known = Known(model, self.placement)

        def default(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
            found = known.places(modules)
            for path in found:
                if any(path == copied or path.startswith(copied + ".") for copied in whole):
                    raise PeftLabError(
                        f"modules_to_save trains a copy of {path}, where a {self.placement} adapter stands. "
                        "Leave it out, or use placement='houlsby', which stands on projections."
                    )
            return found

        def check(model: nn.Module, path: str, host: nn.Module) -> None:
            check_called(model, path)
            known.width(path, host)
            if known.part(path) is Beside:
                check_widths(path, host)

        for path, host in find(model, self, default, check).items():
            yield Placement(path, "adapter", known.part(path)(Bottleneck(known.width(path, host), self)))
        yield from trained_copies(model, self)

    def to_peft(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the fields of `adapter_config.json` that only this method has.

        `init` is left out, since the weights are in the file.
        """
        names = ("placement", "reduction_factor", "width", "activation", "scaling", "dropout")
        return {name: getattr(self, name) for name in names}

    @staticmethod
    def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for this class: the reverse of `to_peft`."""
        names = ("placement", "reduction_factor", "width", "activation", "scaling", "dropout")
        return {name: fields[name] for name in names if name in fields}


PARTS: dict[str, type[After | Beside | AroundNorm | BesideResidual]] = {
    "after": After, "beside": Beside, "around a norm": AroundNorm, "beside a residual": BesideResidual
}  # fmt: skip


class Known:
    """The places of a placement in the blocks of a model that `peftlab.default_targets` knows.

    Attributes:
        how: {path: how an adapter stands there}.
        widths: {path: the width of the block's stream}, for the places and for the blocks' other modules that have it.
    """

    def __init__(self, model: nn.Module, placement: str) -> None:
        self.model, self.placement, self.modules = model, placement, base_modules(model)
        self.how: dict[str, str] = {}
        self.widths: dict[str, int] = {}
        for block, row in blocks_in(self.modules).items():
            width = shape_of(self.modules[f"{block}.{row.attention}"])[1]
            self.how.update(places_in(block, row, placement, self.behind(block)))
            wide = ("", row.feed_forward, row.whole or "")
            self.widths.update({f"{block}.{name}".rstrip("."): width for name in wide})
            self.widths.update(dict.fromkeys(self.how.keys() - self.widths.keys(), width))

    def behind(self, block: str) -> bool | None:
        """Say whether a block's norm comes behind the sum, by the config of the innermost model that holds it."""
        while block and not hasattr(self.modules[block], "config"):
            block = block.rpartition(".")[0]
        config = getattr(self.modules[block] if block else self.model, "config", None)
        return norm_behind(lambda name: getattr(config, name, None))

    def places(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Return the modules on which the adapters stand if none are named, by path."""
        name, endings = type(self.model).__name__, linear_endings(modules)
        found = places(modules, self.placement, self.behind, name, "target_modules", endings)
        return {place.path: modules[place.path] for place in found}

    def part(self, path: str) -> type[After | Beside | AroundNorm | BesideResidual]:
        """Return the kind of part for a module: that of a known place, or else the plain one of the placement."""
        return PARTS[self.how.get(path, "beside" if self.placement == "parallel" else "after")]

    def width(self, path: str, host: nn.Module) -> int:
        """Return d, the width of a module's output: the stream's, its last linear layer's, or a norm's own.

        Raises:
            PeftLabError: nothing calls the module, or its width cannot be found.
        """
        inner = [shape for module in base_modules(host).values() if (shape := linear_shape(module))]
        own = getattr(host, "weight", None)
        found = inner[-1][1] if inner else own.numel() if isinstance(own, Tensor) and own.dim() == 1 else None
        width = self.widths.get(path, found)
        if width is None or type(host).forward is nn.Module.forward:
            raise PeftLabError(
                f"{path} is a {type(host).__name__}; an adapter stands after (or beside) a module that is called and "
                "that holds a linear layer, or is a norm."
            )
        return width


def check_widths(path: str, host: nn.Module) -> None:
    """Refuse a layer that does not read what it returns: an adapter beside it reads one and is added to the other."""
    shape = linear_shape(host)
    if shape is not None and (isinstance(host, nn.Embedding) or shape[0] != shape[1]):
        reads = "token ids" if isinstance(host, nn.Embedding) else f"{shape[0]} features"
        raise PeftLabError(
            f"{path} reads {reads} and returns {shape[1]} features. A parallel adapter reads what its module reads and "
            "is added to what it returns, so both must be equally wide. Name a whole feed-forward, or use "
            "placement='houlsby'."
        )
