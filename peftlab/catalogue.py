"""The catalogue of methods: one row per method, with everything that the rest of the package must know about it.

The command line, `train`, `count`, `memory`, saving and loading, and the public names all read `METHODS`. A row names
classes and functions by their path ("peftlab.methods.lora:LoRAConfig"), so reading it loads no torch. `resolve` follows
a path. This file imports nothing of the package; CONTRIBUTING.md says how a method is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

LEARNING_RATE = 2e-4  # the usual one, unless a row says otherwise


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of the command line that describes a method.

    Attributes:
        name: as Python writes it: `virtual_tokens` is `--virtual-tokens`.
        help: what `--help` says. A default that is not None is added to it.
        fills: the field of the method's config that takes the value; by default the one of the same name.
        kind: `int`, `float`, `str`, or `bool` for a pair such as `--projection` and `--no-projection`.
        default: the value where the option is not given. None leaves the choice to the config.
        chosen: for a default of None, what the config then chooses, in the words of `--help`. Rows may differ in
            `default`, `chosen` and `fills` (`replace(TARGETS, chosen="...")`), and in nothing else.
        metavar: what stands for the value in `--help`.
        choices: the values allowed, where they are few.
        counted: whether `peftlab count` and `peftlab memory` take it too, beside `peftlab train`. It is then one of
            their `Options` (`peftlab/memory/counting/options.py`).
    """

    name: str
    help: str
    fills: str = ""
    kind: type = str
    default: Any = None
    chosen: str = ""
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    counted: bool = False

    @property
    def config_field(self) -> str:
        """The field of the config that takes the value."""
        return self.fills or self.name


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row. A path is "module:name"; the module may be of another package.

    Attributes:
        config: path of the config class, whose name is public (`peftlab.LoRAConfig`). None where nothing is attached:
            for full fine-tuning, and for a method that is only counted so far.
        fixed: fields of the config that the method's name settles.
        options: the options that the method takes on the command line, with their defaults.
        starts: the values of `init` where the method has it. In `"pissa_niter_4"` the number may be another.
        learning_rate: the usual one, which `peftlab train` takes without `--lr`.
        tensors: path of the function (shape, options) -> `Trained` that lists the method's tensors, for counting. None
            leaves the method out of `count` and `memory`.
        replay: path of the function (net, path, tensors by name) that puts the method's layer into the replay of a
            training step, for `memory`. None where the method adds no tensors.
        in_peft: whether Hugging Face peft has the method, under the config's `peft_type`. The card of an adapter folder
            says how peft opens it, or that peft cannot.
        four_bit: whether the base is held in four bits.
        whole: whether the model's own weights all train, and there is no adapter.
    """

    config: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[Option, ...] = ()
    starts: tuple[str, ...] = ()
    learning_rate: float = LEARNING_RATE
    tensors: str | None = None
    replay: str | None = None
    in_peft: bool = False
    four_bit: bool = False
    whole: bool = False

    @property
    def config_name(self) -> str | None:
        """The public name of the config class."""
        return self.config and self.config.partition(":")[2]

    def config_class(self) -> Any:
        """Load the config class of a row that has one."""
        assert self.config is not None
        return resolve(self.config)

    @property
    def trains(self) -> bool:
        """Whether `peftlab train` knows the method."""
        return self.whole or self.config is not None

    def takes(self, name: str) -> bool:
        """Whether the method has this option."""
        return any(option.name == name for option in self.options)

    def default(self, name: str) -> Any:
        """The default of an option; None if the method does not take it."""
        return next((option.default for option in self.options if option.name == name), None)

    def chosen(self, name: str) -> str:
        """What the config chooses where an option has no default, in words; empty if the option does not say."""
        return next((option.chosen for option in self.options if option.name == name), "")


def resolve(path: str) -> Any:
    """Load what a path names: `resolve("peftlab.methods.lora:LoRAConfig")` is the class."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


R = Option(name="r", kind=int, default=8, metavar="N", help="rank of a low-rank update", counted=True)
ALPHA = Option(name="alpha", kind=float, default=16.0, metavar="A", help="the update is scaled by alpha / r")
TARGET_R = Option(
    name="target_r", kind=int, metavar="N", help="mean rank after pruning", chosen="two thirds of r"
)
TINIT = Option(name="tinit", kind=int, metavar="N", help="steps before ranks are pruned", chosen="a tenth of the run")
TFINAL = Option(name="tfinal", kind=int, metavar="N", help="steps after ranks were pruned", chosen="half of the run")
DELTA_T = Option(
    name="delta_t", fills="deltaT", kind=int, default=1, metavar="N", help="steps from one pruning to the next"
)
DROPOUT = Option(name="dropout", kind=float, default=0.0, metavar="P", help="within the adapter")
TARGETS = Option(
    name="targets",
    fills="target_modules",
    metavar="T",
    help="modules to adapt: a comma-separated list of names, a regular expression for whole paths, or all-linear",
    chosen="the query and value projections",
    counted=True,
)
TARGET_PARAMETERS = Option(
    name="target_parameters",
    metavar="P",
    help="parameters to adapt as such, comma-separated: mlp.experts.gate_up_proj,mlp.experts.down_proj",
)
BIAS = Option(
    name="bias", default="none", choices=("none", "all", "lora_only"), help="biases to train as well", counted=True
)
INIT = Option(
    name="init",
    metavar="I",
    help="where the adapter starts: for lora kaiming, gaussian, orthogonal, pissa, pissa_niter_4, olora or eva; "
    "for a prompt or prefix vocabulary, text or random",
    counted=True,
)
INIT_TEXT = Option(
    name="init_text", metavar="TEXT", help="the words that a prompt or prefix starts from, for --init text"
)
VIRTUAL_TOKENS = Option(
    name="virtual_tokens",
    fills="num_virtual_tokens",
    kind=int,
    default=20,
    metavar="N",
    help="length of a prompt or prefix",
    counted=True,
)
PROJECTION = Option(name="projection", kind=bool, default=False, help="an MLP makes the prefix while it trains")
ENCODER = Option(name="encoder", default="mlp", metavar="E", help="what makes the prompt of p-tuning: mlp or lstm")
REDUCTION_FACTOR = Option(
    name="reduction_factor",
    kind=int,
    default=16,
    metavar="N",
    help="hidden width / bottleneck of an adapter: houlsby, pfeiffer, parallel",
    counted=True,
)
DECOMPOSE_FACTOR = Option(
    name="decompose_factor",
    kind=int,
    default=-1,
    metavar="N",
    help="sides of lokr's first factor where they divide the layer's; -1 makes both factors alike",
    counted=True,
)
OFT_BLOCK_SIZE = Option(
    name="oft_block_size",
    kind=int,
    metavar="N",
    help="side of oft's rotations, or the nearest number that divides a layer's input",
    chosen="32",
    counted=True,
)
LAST_LAYERS = Option(
    name="last_layers", kind=int, default=0, metavar="N", help="of selective: how many last blocks train"
)

D_INITIAL = Option(name="d_initial", kind=float, default=0.1, metavar="D", help="where the vector d of vera starts")
PROJECTION_PRNG_KEY = Option(
    name="projection_prng_key", kind=int, default=0, metavar="KEY", help="the seed of vera's random matrices"
)
SAVE_PROJECTION = Option(
    name="save_projection", kind=bool, default=True, help="the adapter's file holds vera's random matrices"
)

LORA = Method(
    config="peftlab.methods.lora:LoRAConfig",
    options=(R, ALPHA, DROPOUT, TARGETS, TARGET_PARAMETERS, BIAS, INIT),
    starts=("kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "eva", "loftq", "random"),
    tensors="peftlab.memory.counting.methods:lora",
    replay="peftlab.memory.replay.layers:lora",
    in_peft=True,
)
PFEIFFER = Method(
    config="peftlab.methods.adapter:AdapterConfig",
    fixed={"placement": "pfeiffer"},
    options=(DROPOUT, replace(TARGETS, chosen="the places that the method has"), INIT, REDUCTION_FACTOR),
    starts=("identity", "houlsby", "random"),
    tensors="peftlab.memory.counting.methods:pfeiffer",
    replay="peftlab.memory.replay.layers:bottleneck",
)

# The methods by their names on the command line, in the order in which help lists them. The ranks are peft's defaults;
# AdaLoRA's is the one it starts with (init_r), before it prunes. IA3's learning rate is that of Liu et al. 2022,
# appendix D. LoKr's and OFT's are those of peft's benchmark (MetaMathQA, 2026), with which they came close to LoRA or
# passed it. Where another is given, the usual one would hardly move what trains.
METHODS: dict[str, Method] = {
    "full": Method(whole=True, learning_rate=2e-5, tensors="peftlab.memory.counting.methods:full"),
    "lora": LORA,
    "qlora": replace(LORA, four_bit=True),  # what LoRA trains, on a base in four bits
    "dora": Method(
        config="peftlab.methods.dora:DoRAConfig",
        options=(R, ALPHA, DROPOUT, TARGETS, BIAS, INIT),
        starts=("kaiming", "gaussian", "orthogonal", "eva", "loftq", "random"),
        tensors="peftlab.memory.counting.methods:dora",
        replay="peftlab.memory.replay.layers:dora",
        in_peft=True,
    ),
    "adalora": Method(
        config="peftlab.methods.adalora:AdaLoRAConfig",
        options=(
            replace(R, default=12, fills="init_r"), TARGET_R, replace(ALPHA, default=8.0), DROPOUT, TARGETS, BIAS,
            TINIT, TFINAL, DELTA_T,
        ),
        learning_rate=1e-3,
        tensors="peftlab.memory.counting.methods:adalora",
        replay="peftlab.memory.replay.layers:adalora",
        in_peft=True,
    ),
    "vera": Method(
        config="peftlab.methods.vera:VeRAConfig",
        options=(replace(R, default=256), DROPOUT, TARGETS, BIAS, D_INITIAL, PROJECTION_PRNG_KEY, SAVE_PROJECTION),
        learning_rate=4e-3,
        tensors="peftlab.memory.counting.methods:vera",
        replay="peftlab.memory.replay.layers:vera",
        in_peft=True,
    ),
    "loha": Method(
        config="peftlab.methods.loha:LoHaConfig",
        options=(R, replace(ALPHA, default=8.0), TARGETS),
        tensors="peftlab.memory.counting.methods:loha",
        replay="peftlab.memory.replay.layers:loha",
        in_peft=True,
    ),
    "lokr": Method(
        config="peftlab.methods.lokr:LoKrConfig",
        options=(R, replace(ALPHA, default=8.0), TARGETS, DECOMPOSE_FACTOR),
        learning_rate=3e-3,
        tensors="peftlab.memory.counting.methods:lokr",
        replay="peftlab.memory.replay.layers:lokr",
        in_peft=True,
    ),
    "oft": Method(
        config="peftlab.methods.oft:OFTConfig",
        options=(OFT_BLOCK_SIZE, TARGETS),
        learning_rate=1e-4,
        tensors="peftlab.memory.counting.methods:oft",
        replay="peftlab.memory.replay.layers:oft",
        in_peft=True,
    ),
    "ia3": Method(
        config="peftlab.methods.ia3:IA3Config",
        options=(replace(TARGETS, chosen="keys, values and the last of the MLP"), INIT),
        starts=("ones", "random"),
        learning_rate=3e-3,
        tensors="peftlab.memory.counting.methods:ia3",
        replay="peftlab.memory.replay.layers:ia3",
        in_peft=True,
    ),
    "bitfit": Method(
        config="peftlab.methods.bitfit:BitFitConfig",
        options=(replace(TARGETS, chosen="every module with a bias"),),
        learning_rate=1e-3,
        tensors="peftlab.memory.counting.methods:bitfit",
    ),
    "selective": Method(
        config="peftlab.methods.bitfit:SelectiveConfig",
        options=(replace(TARGETS, chosen="none"), LAST_LAYERS),
    ),
    "prompt": Method(
        config="peftlab.methods.prompt_tuning:PromptTuningConfig",
        options=(VIRTUAL_TOKENS, INIT, INIT_TEXT),
        starts=("vocabulary", "text", "random"),
        learning_rate=1e-1,
        tensors="peftlab.memory.counting.methods:prompt",
        replay="peftlab.memory.replay.layers:prompt",
        in_peft=True,
    ),
    "p-tuning": Method(
        config="peftlab.methods.p_tuning:PTuningConfig",
        options=(VIRTUAL_TOKENS, ENCODER),
        learning_rate=1e-3,
        tensors="peftlab.memory.counting.methods:p_tuning",
        replay="peftlab.memory.replay.layers:p_tuning",
        in_peft=True,
    ),
    "prefix": Method(
        config="peftlab.methods.prefix_tuning:PrefixTuningConfig",
        options=(VIRTUAL_TOKENS, INIT, INIT_TEXT, PROJECTION),
        starts=("vocabulary", "text", "random", "zero"),
        learning_rate=1e-2,
        tensors="peftlab.memory.counting.methods:prefix",
        replay="peftlab.memory.replay.layers:prefix",
        in_peft=True,
    ),
    "houlsby": replace(PFEIFFER, fixed={"placement": "houlsby"}, tensors="peftlab.memory.counting.methods:houlsby"),
    "pfeiffer": PFEIFFER,
    "parallel": replace(
        PFEIFFER,
        fixed={"placement": "parallel"},
        tensors="peftlab.memory.counting.methods:parallel",
        replay="peftlab.memory.replay.layers:parallel",
    ),
}
