"""What a method takes when no targets are named: `attach` on a small random model against `count` on its config.

And where bottleneck adapters stand, in every architecture: each is made to take away what it reads, x -> -x, so that
what a block computes shows whether the adapter stood before the residual was added.
"""

import re
import warnings

import pytest
import torch
from encoder_configs import CLASSES, ENCODERS, usual
from encoder_configs import variant as encoder
from family_configs import DECODERS
from family_configs import variant as decoder
from real_inputs import real_inputs
from releases import skip_before
from torch import nn

import peftlab as pl
from peftlab.catalogue import METHODS
from peftlab.errors import PeftLabError
from peftlab.memory import count, load_shape
from peftlab.methods.adapter import PLACEMENTS, AdapterConfig, Bottleneck

transformers = pytest.importorskip("transformers")
warnings.filterwarnings("ignore", category=FutureWarning)
from test_count_exact import AUTO, FAMILIES, small  # noqa: E402

COUNTED = [name for name, row in METHODS.items() if row.tensors and row.config]
NAMES = [(family, name) for family in ENCODERS for name in CLASSES[family].split()]
FEW = {"virtual_tokens": 4}
# What differs from the first variant, of which transformers cannot run a step
SEEDS = {"stablelm": 1}


def config_of(family, name=None, seed=None):
    seed = SEEDS.get(family, 0) if seed is None else seed
    if family in DECODERS:
        return decoder(family, seed) | {"num_experts_per_tok": 2}
    if family in ENCODERS:
        labels = {"num_labels": 2} if "Answering" in (name or "") else {}
        values = encoder(family, seed) | {"architectures": [name or usual(family)]} | labels
        if (name or "").endswith("ForCausalLM") and "decoder_layers" in values:
            values["encoder_layers"] = values["decoder_layers"]  # transformers' own cache has the encoder's depth
        return values
    return small(family, seed)


def model_of(values):
    if values["model_type"] == "modernbert":
        skip_before("transformers", "5.24", "it refuses the rope_parameters that its own ModernBertConfig makes")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**values)
    if "architectures" in values:
        model = getattr(transformers, values["architectures"][0])(config)
    else:
        model = AUTO[load_shape(values).kind].from_config(config)
    return model.eval()


def outcome(call, *args, **kwargs):
    """What a call returns, or the error that it makes."""
    try:
        return call(*args, **kwargs)
    except PeftLabError as error:
        return error


def attached(model, method, head):
    row = METHODS[method]
    more = {"num_virtual_tokens": FEW["virtual_tokens"]} if row.takes("virtual_tokens") else {}
    return pl.attach(model, row.config_class()(**row.fixed, modules_to_save=head or None, **more))


def agree(values, methods):
    """Each method is refused by both, for one reason; or by none, and then it counts what trains, and it runs."""
    shape, model = load_shape(values), model_of(values)
    inputs = real_inputs(model)
    for method in methods:
        told = outcome(count, shape, method, **(FEW if METHODS[method].takes("virtual_tokens") else {}))
        found = outcome(attached, model, method, [module.path for module in shape.head])
        assert isinstance(told, PeftLabError) == isinstance(found, PeftLabError), (method, told, found)
        if isinstance(told, PeftLabError):
            assert reason(told) & reason(found), (method, told, found)
            continue
        assert told.trainable == pl.count_parameters(model).trainable, method
        with torch.no_grad():
            model(**inputs)
        pl.detach(model)


REASONS = (
    "no query and value projections under a known name", "names of the keys, values and feed-forward",
    "has no biases|leave no target module",
    "is not simply added", "has none of the modules that", "takes no past keys and values", "is no module of its own",
    "has no prompt|has no input embedding", "reads several texts", "of different widths",
    "no prefix|no input embedding",
)  # fmt: skip


def reason(error):
    return {one for one in REASONS if re.search(one, str(error))}


@pytest.mark.parametrize("family", [*FAMILIES, *(family for family in DECODERS if family not in FAMILIES)])
def test_attach_and_count_agree_on_every_default(family):
    agree(config_of(family), COUNTED)


@pytest.mark.parametrize(("family", "name"), NAMES)
def test_attach_and_count_agree_on_every_class(family, name):
    """Most methods differ little between the classes of one family, so they are asked of the usual one."""
    agree(config_of(family, name), COUNTED if name == usual(family) else ("lora", "bitfit", "prompt", "prefix"))


@pytest.mark.parametrize(("family", "name", "depths"), [("bart", "BartForCausalLM", (1, 2)), ("t5", None, (1, 3))])
def test_a_prefix_is_as_deep_as_the_decoder(family, name, depths):
    values = config_of(family, name)
    keys = ("num_layers", "num_decoder_layers") if family == "t5" else ("encoder_layers", "decoder_layers")
    agree(values | dict(zip(keys, depths, strict=True)), ["prefix"])


# ---------------------------------------------------------------------------------------------------- where they stand

# The norms behind the sums, in the order in which a block calls them. Blocks of other families norm what they read.
BERT = ("attention.output.LayerNorm", "output.LayerNorm")
BART = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
BEHIND = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2"), BERT),
    **dict.fromkeys(("bart", "plbart", "marian", "opt behind"), BART), "mpnet": ("attention.LayerNorm", BERT[1]),
    "distilbert": ("sa_layer_norm", "output_layer_norm"), "albert": ("attention.LayerNorm", "full_layer_layer_norm"),
    "wav2vec2": ("layer_norm", "final_layer_norm"),
}  # fmt: skip
# Norms of what a feed-forward returns, before it is added
AFTER = dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), "post_feedforward_layernorm") | {"glm4": "post_mlp_layernorm"}
MOE = "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "llama4_text"
VARIANTS = {
    "opt": ("opt", {"do_layer_norm_before": True, "layer_norm_elementwise_affine": True}),
    "opt behind": ("opt", {"do_layer_norm_before": False, "layer_norm_elementwise_affine": True}),
    "wav2vec2": ("wav2vec2", {"do_stable_layer_norm": False, "adapter_attn_dim": None}),
    "wav2vec2 before": ("wav2vec2", {"do_stable_layer_norm": True, "adapter_attn_dim": None}),
}
PLACED = [*dict.fromkeys((*FAMILIES, *DECODERS, *ENCODERS)), *VARIANTS]
ALONE = ("opt", "opt behind", "albert", "bart", "plbart", "marian", "mbart", "pegasus", "m2m_100", "whisper")


def placed_model(family):
    """A model with a block or more, whose cross-attentions add nothing, and its blocks by their paths."""
    name, more = VARIANTS.get(family, (family, {}))
    model = model_of(config_of(name) | more)
    for parameter in model.parameters():  # what each layer adds is then far above rounding
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    blocks = {}
    for path, module in model.named_modules():
        inner = {child for child, _ in module.named_children()} | {type(child).__name__ for child in module.children()}
        if path.rpartition(".")[2].isdigit() and any("att" in one.lower() for one in inner):
            blocks[path] = module
        if re.search(r"encoder_attn\.out_proj|EncDecAttention\.o$", path):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    if family in ("t5", "mt5"):
        blocks = {path: m for path, m in model.named_modules() if re.fullmatch(r".*\.block\.\d+", path)}
    return model, blocks


@torch.no_grad()
def negated(model, placement, chosen=lambda number: True):
    """Attach adapters that return -x, and return their paths. Those that are not chosen return zeros."""
    hosts = AdapterConfig(placement=placement, init="identity")
    width = next(part.bottleneck.up.out_features for _, _, part in hosts.parts(model))
    pl.attach(model, AdapterConfig(placement=placement, width=width, activation="linear"))
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, Bottleneck)]
    for number, (_, bottleneck) in enumerate(found):
        nn.init.eye_(bottleneck.down.weight)
        nn.init.eye_(bottleneck.up.weight).mul_(-1.0 if chosen(number) else 0.0)
    return [path.partition(".peftlab")[0] for path, _ in found]


@torch.no_grad()
def passed(model, modules):
    """{path: (what it first read, what it first returned)}, where a module returns several things the first of them."""
    seen, handles = {}, []

    def note(path):
        def hook(_, args, kwargs, output):
            first = args[0] if args else next(iter(kwargs.values()))
            seen.setdefault(path, (first.clone(), (output[0] if isinstance(output, tuple) else output).clone()))

        return hook

    handles = [module.register_forward_hook(note(path), with_kwargs=True) for path, module in modules.items()]
    model(**real_inputs(model))
    for handle in handles:
        handle.remove()
    return seen


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", PLACED)
def test_houlsby_adapters_stand_at_both_places_of_every_block(family):
    """With both, a block returns what it read, or the norm of that. With one of the two it does not."""
    model, blocks = placed_model(family)
    hosts = negated(model, "houlsby")
    assert len(hosts) == 2 * len(blocks)
    assert all(sum(host.startswith(path + ".") for host in hosts) == 2 for path in blocks)
    for path, (read, returned) in passed(model, blocks).items():
        for name in BEHIND.get(family, ()):
            if name in dict(blocks[path].named_modules()):
                with torch.no_grad():
                    read = blocks[path].get_submodule(name)(read)
        near(returned, read)
    for kept in (0, 1):
        model, blocks = placed_model(family)
        negated(model, "houlsby", chosen=lambda number, kept=kept: number % 2 == kept)
        for read, returned in passed(model, blocks).values():
            assert (read - returned).abs().max() > 0.05


@pytest.mark.parametrize("family", PLACED)
def test_a_pfeiffer_adapter_reads_what_leaves_the_block(family):
    """A block returns nothing: y - y. One with a norm behind the sum z returns LN(z - LN(z))."""
    model, blocks = placed_model(family)
    hosts = negated(model, "pfeiffer")
    assert len(hosts) == len(blocks)
    assert all(any(f"{host}.".startswith(f"{path}.") for host in hosts) for path in blocks)
    last = {path: block.get_submodule(BEHIND[family][-1]) for path, block in blocks.items() if family in BEHIND}
    sums = passed(model, last)
    for path, (_, returned) in passed(model, blocks).items():
        if path in last:
            z, norm = sums[path][0], last[path].forward  # the adapter's own calls of `forward` are the norm's alone
            near(returned, norm(z - norm(z)))
        else:
            near(returned, torch.zeros_like(returned))


@pytest.mark.parametrize("family", [family for family in PLACED if family not in ALONE])
def test_a_parallel_adapter_reads_what_the_feed_forward_reads(family):
    """The sum in the first block of a stack, or what the norm behind the feed-forward reads, is less by just that."""
    model, blocks = placed_model(family)
    first = {path: block for path, block in blocks.items() if re.match(r"(.*?)\.\d+", path)[0].endswith(".0")}
    norm = AFTER.get(family) or BEHIND.get(family, ("",))[-1]
    ends = {path: block.get_submodule(norm) for path, block in first.items()}
    feeds = {path: feed_forward(block) for path, block in first.items()}
    side = 0 if norm else 1  # what the norm reads; what the block returns
    before, read = passed(model, ends), passed(model, feeds)
    assert len(negated(model, "parallel")) == len(blocks)
    for path, value in passed(model, ends).items():
        near(value[side] - before[path][side], -read[path][0])


def feed_forward(block):
    """The first layer of a feed-forward, or the whole, which reads the same."""
    names = ("mlp", "feed_forward", "ffn", "intermediate", "layer.1.DenseReluDense", "layer.2.DenseReluDense")
    found = dict(block.named_modules())
    return next(found[name] for name in names if name in found)


@pytest.mark.parametrize("family", ALONE)
def test_a_feed_forward_that_is_no_module_has_no_place_for_a_parallel_adapter(family):
    model, _ = placed_model(family)
    with pytest.raises(PeftLabError, match=r"feed-forward of .*\.0 in .* is no module.* houlsby or pfeiffer"):
        pl.attach(model, AdapterConfig(placement="parallel"))


class Block(nn.Module):
    """A block of Llama's names; of its feed-forward, or of another mixer of tokens than attention, as one says."""

    def __init__(self, last="down_proj", mixer="self_attn"):
        super().__init__()
        setattr(self, mixer, nn.ModuleDict({"o_proj": nn.Linear(8, 8)}))
        self.mlp = nn.ModuleDict({last: nn.Linear(16, 8)})


def stack(*blocks):
    return nn.ModuleDict({"layers": nn.ModuleList(blocks)})


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("odd", [Block(last="other"), Block(mixer="mamba")], ids=["feed-forward", "mixer"])
def test_a_model_of_which_some_blocks_are_not_known_is_refused(placement, odd):
    with pytest.raises(PeftLabError, match="in some blocks of ModuleDict, such as layers.0, but not in layers.1"):
        pl.attach(stack(Block(), odd), AdapterConfig(placement=placement))
    with pytest.raises(PeftLabError, match="which holds (self_attn|mamba), mlp. Name the modules after which"):
        pl.attach(stack(Block(), odd), AdapterConfig(placement=placement))


def test_a_stack_beside_a_known_one_is_refused_too():
    model = nn.ModuleDict({"text": stack(Block()), "sound": stack(Block(last="other"))})
    with pytest.raises(PeftLabError, match="such as text.layers.0, but not in sound.layers.0"):
        pl.attach(model, AdapterConfig(placement="houlsby"))


def test_a_norm_of_which_the_config_says_nothing_has_no_place_for_a_pfeiffer_adapter():
    block = nn.ModuleDict({"self_attn": nn.ModuleDict({"out_proj": nn.Linear(8, 8)}), "fc2": nn.Linear(16, 8)})
    block["final_layer_norm"] = nn.LayerNorm(8)
    with pytest.raises(PeftLabError, match="config does not say whether this norms the sum or what the feed-forward"):
        pl.attach(stack(block), AdapterConfig())
