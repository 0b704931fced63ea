"""The tables and counts against transformers and Hugging Face peft themselves, on the meta device (no weights)."""

import json
import random
import warnings

import pytest
import torch
from encoder_configs import ENCODERS
from encoder_configs import variant as encoder
from family_configs import DECODERS
from family_configs import variant as decoder
from on_meta import on_meta
from releases import older

from peftlab import default_targets
from peftlab.catalogue import METHODS
from peftlab.errors import PeftLabError
from peftlab.memory import BUILT_IN, count, load_shape
from peftlab.memory.counting import families, methods

warnings.filterwarnings("ignore", category=FutureWarning)
transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

AUTO = {
    "decoder": transformers.AutoModelForCausalLM,
    "encoder": transformers.AutoModelForSequenceClassification,
    "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
}
TASK = {"decoder": "CAUSAL_LM", "encoder": "SEQ_CLS", "encoder-decoder": "SEQ_2_SEQ_LM"}


def live(config):
    """The model that transformers builds from a configuration, without weights."""
    shape = load_shape(config)
    config = transformers.AutoConfig.for_model(**config)
    with on_meta():
        model = AUTO[shape.kind].from_config(config)
    model.tie_weights()
    return model


def table_of(model):
    """path -> (kind, inputs, outputs, bias, tied) of every module with parameters of its own."""
    rows, seen = {}, set()
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        if not own:
            continue
        weight = own.pop("weight", None)
        for name, parameter in list(own.items()):
            if parameter.dim() == 3:  # of all experts
                wide = module.__class__.__name__ in ("GptOssExperts", "Llama4TextExperts")  # (experts, inputs, outputs)
                sizes = parameter.shape[1:] if wide else parameter.shape[:0:-1]
                rows[f"{path}.{name}"] = ("experts", *sizes, False, False)
                del own[name]
            elif name == "sinks" or name.endswith("_proj_bias"):
                rows[f"{path}.{name}"] = ("vector", 1, parameter.numel(), False, False)
                del own[name]
        if weight is None:
            assert not own, f"{path} has other parameters: {own}"
            continue
        if isinstance(module, torch.nn.Linear):
            kind, (outputs, inputs) = "linear", weight.shape
        elif isinstance(module, Conv1D):
            kind, (inputs, outputs) = "conv1d", weight.shape
        elif isinstance(module, torch.nn.Embedding):
            kind, (inputs, outputs) = "embedding", weight.shape
        elif module.__class__.__name__.endswith(("TopKRouter", "TopkRouter")):
            kind, (outputs, inputs) = "router", weight.shape
        else:
            kind, inputs, outputs = "norm", weight.numel(), weight.numel()
        bias = own.pop("bias", None) is not None
        assert not own, f"{path} has other parameters: {own}"
        rows[path] = (kind, inputs, outputs, bias, id(weight) in seen)
        seen.add(id(weight))
    return rows


def same_table(config):
    shape, model = load_shape(config), live(config)
    ours = {m.path: (m.kind, m.inputs, m.outputs, m.bias, m.tied) for m in shape.modules}
    assert len(ours) == len(shape.modules)
    assert ours == table_of(model)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    return shape, model


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_shape_is_the_model_transformers_builds(name):
    same_table(BUILT_IN[name])


def small(family, seed):
    """A small random configuration of a family, odd sizes on purpose."""
    pick = random.Random(f"{family}{seed}")
    heads = pick.choice([2, 4, 6])
    values = {"model_type": family, "vocab_size": pick.randint(50, 99)}
    if family == "gpt2":
        values |= {"n_embd": heads * 8, "n_head": heads, "n_layer": pick.randint(1, 3), "n_positions": 40}
        values |= {"n_inner": pick.choice([None, 52]), "tie_word_embeddings": pick.random() < 0.5}
    elif family in ("t5", "mt5"):
        values |= {"d_model": 24, "d_kv": pick.choice([4, 6]), "d_ff": 40, "num_heads": heads, "num_layers": 2}
        values |= {"num_decoder_layers": pick.choice([None, 1, 3]), "relative_attention_num_buckets": 16}
        values |= {"feed_forward_proj": pick.choice(["relu", "gated-gelu"]), "tie_word_embeddings": False}
    else:
        values |= {"hidden_size": heads * 8, "num_attention_heads": heads, "intermediate_size": 44}
        values |= {"num_hidden_layers": pick.randint(1, 3)}
        if "bert" in family:
            values |= {"max_position_embeddings": 37, "type_vocab_size": pick.randint(1, 3)}
            if pick.random() < 0.5:
                values["id2label"] = {i: str(i) for i in range(5)}
        else:
            values |= {"num_key_value_heads": pick.choice([1, 2, heads]), "head_dim": pick.choice([8, 10])}
            values |= {"attention_bias": pick.random() < 0.5, "mlp_bias": pick.random() < 0.5}
            values |= {"tie_word_embeddings": pick.random() < 0.5}
    return values


FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text",
    "gpt2", "bert", "roberta", "xlm-roberta", "camembert", "t5", "mt5",
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_its_variants(family):
    for seed in range(4):
        same_table(small(family, seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_transformers_saved_and_one_that_omits_what_has_a_default(family, tmp_path):
    values = small(family, 9)
    transformers.AutoConfig.for_model(**values).save_pretrained(tmp_path)
    expected = sum(p.numel() for p in live(values).parameters())
    assert load_shape(tmp_path).parameters == load_shape(tmp_path / "config.json").parameters == expected
    # Files on the hub often leave out whatever equals the architecture's default.
    core = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "n_embd", "n_layer"}
    core |= {"n_head", "num_attention_heads", "d_model", "d_ff", "num_layers", "num_heads"}
    bare = {key: value for key, value in values.items() if key in core}
    for key in ("num_attention_heads", "n_head"):
        if key in bare:  # a number of heads that every default of key/value heads divides
            bare[key] = 32
    for key in ("hidden_size", "n_embd"):
        if key in bare:
            bare[key] = 64
    same_table(bare)


def wrap(model, config):
    """The model with Hugging Face peft's adapter on it."""
    peft = pytest.importorskip("peft")
    # VeRA draws its random pair with a generator of the CPU, so that one is really made.
    place = torch.device("cpu") if isinstance(config, peft.VeraConfig) else on_meta()
    with place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def peft_count(model, **options):
    peft = pytest.importorskip("peft")
    return wrap(model, peft.LoraConfig(**options)).get_nb_trainable_parameters()


CASES = [
    {"r": 8},
    {"r": 64},
    {"r": 3, "targets": "all-linear"},
    {"r": 16, "targets": "all-linear", "bias": "all"},
    {"r": 2, "bias": "lora_only"},
]


def two_blocks(name):
    """A built-in shape with two of its blocks: its sizes are real, and building it takes a moment."""
    depth = {"num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"}
    return {field: 2 if field in depth and value else value for field, value in BUILT_IN[name].items()}


@pytest.mark.parametrize("name", BUILT_IN)
def test_lora_counts_what_peft_prints_for_every_built_in_shape(name):
    shape = load_shape(name)
    cases = CASES if shape.parameters < 5e8 else [{"r": 8}, {"r": 16, "targets": "all-linear"}]
    constants = pytest.importorskip("peft.utils.constants")
    chosen_by_peft = set(constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)
    chosen_by_peft -= {"mixtral"}  # peft 0.21.2 names q and v for it, and then finds no module
    for number, case in enumerate(cases):
        config = two_blocks(name) if number else BUILT_IN[name]
        if name == "t5-base" and case.get("bias") == "all" and older("peft", "0.21"):
            continue  # as in the variants
        ours = count(config if number else name, "lora", **case)
        options = {"task_type": TASK[shape.kind], "r": case["r"], "bias": case.get("bias", "none")}
        if "targets" in case:
            options["target_modules"] = case["targets"]
        elif shape.config["model_type"] not in chosen_by_peft:  # peft chooses none for it; ours are q and v
            options["target_modules"] = ["q_proj", "v_proj"]
        assert (ours.trainable, ours.total) == peft_count(live(config), **options), case
        assert ours.percent == 100 * ours.trainable / ours.total
        assert count(config, "qlora", **case).as_dict() == ours.as_dict()


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ["q_proj", "mlp.down_proj", "layers.0.self_attn.k_proj"]),
        ("llama", r".*layers\.[02]\.mlp\.(up|down)_proj"),
        ("llama", ["lm_head", "v_proj"]),
        ("gemma", ["embed_tokens", "q_proj"]),
        ("gpt2", ["c_proj"]),
        ("gpt2", ["mlp.c_proj", "wte"]),
        ("bert", ["dense"]),
        ("bert", ["pooler.dense", "word_embeddings"]),
        ("roberta", ["dense"]),
        ("roberta", ["output.dense", "query"]),
        ("t5", ["EncDecAttention.q", "wo", "relative_attention_bias"]),
        ("t5", ["o"]),  # not wo
        ("t5", r"decoder\..*\.(q|k|v|o)"),
    ],
)
def test_named_and_regular_targets_match_what_they_match_in_peft(family, targets):
    values = small(family, 1)
    kind = load_shape(values).kind
    ours = count(values, "lora", r=4, targets=targets)
    assert (ours.trainable, ours.total) == peft_count(live(values), task_type=TASK[kind], r=4, target_modules=targets)


def test_full_counts_every_parameter_of_the_model(tmp_path):
    for family in ("llama", "bert", "roberta", "t5"):
        values = small(family, 2)
        (tmp_path / "config.json").write_text(json.dumps(values))
        ours = count(tmp_path, "full")
        assert ours.trainable == ours.total == sum(p.numel() for p in live(values).parameters())
        assert ours.percent == 100.0


@pytest.mark.parametrize("family", FAMILIES)
def test_this_package_counts_the_same_on_the_live_model(family):
    import peftlab as pl

    values = small(family, 3)
    shape = load_shape(values)
    task = "SEQ_CLS" if shape.kind == "encoder" else None
    for case in ({}, {"targets": "all-linear", "bias": "all"}, {"bias": "lora_only"}):
        model = live(values)
        config = pl.LoRAConfig(r=3, target_modules=case.get("targets"), bias=case.get("bias", "none"), task_type=task)
        with on_meta():
            pl.attach(model, config)
        ours = count(shape, "lora", r=3, **case)
        assert pl.count_parameters(model) == (ours.trainable, ours.total, ours.percent)


# ------------------------------------------------------------------------------------------------------ every method

OF_PEFT = ("lora", "dora", "adalora", "vera", "ia3", "prompt", "p-tuning", "prefix")
WITHOUT_DEFAULTS = {"ia3": ("xlm-roberta", "camembert"), "vera": ("camembert",), "lora": ("camembert",)}


def peft_config(method, shape, r=None, targets=None, bias="none", virtual_tokens=20, **more):
    """peft's config of a method. What is not named here is left to peft's own defaults."""
    peft = pytest.importorskip("peft")
    options = {"task_type": TASK[shape.kind]}
    if method in ("prompt", "p-tuning", "prefix"):
        options["num_virtual_tokens"] = virtual_tokens
        if "encoder_hidden" in more:
            options["encoder_hidden_size"] = more["encoder_hidden"]
        if method == "prompt":
            return peft.PromptTuningConfig(**options)
        if method == "prefix":
            if shape.family in ("t5", "mt5"):  # peft takes the encoder's depth and d_model, unless it is told others
                inner = next(m.outputs for m in shape.modules if m.path.endswith("SelfAttention.k"))
                depth = len({m.layer for m in shape.modules if m.path.startswith("decoder.block")})
                options |= {"token_dim": inner, "num_layers": depth, "num_attention_heads": 1}
            return peft.PrefixTuningConfig(**options, prefix_projection=more.get("projection", False))
        encoder, layers = more.get("encoder", "mlp").upper(), more.get("encoder_layers", 2)
        return peft.PromptEncoderConfig(**options, encoder_reparameterization_type=encoder, encoder_num_layers=layers)
    if method == "adalora" and targets is None:
        targets = shape.query_value  # peft's table for AdaLoRA names more modules for RoBERTa and T5, and no Mistral
    elif targets is None and method == "ia3":
        targets = default_targets.ia3(shape.paths, shape.family)[0]  # peft's has other keys for Gemma and Qwen
    elif targets is None and shape.family in WITHOUT_DEFAULTS.get("lora" if method == "dora" else method, ()):
        targets = shape.query_value
    if targets is not None:
        options["target_modules"] = targets if isinstance(targets, str) else list(targets)
    if method == "ia3":
        if shape.family in WITHOUT_DEFAULTS["ia3"]:
            options["feedforward_modules"] = ["output.dense"]
        return peft.IA3Config(**options)
    if r is not None:
        options["init_r" if method == "adalora" else "r"] = r
    options["bias"] = bias
    if method == "adalora":
        return peft.AdaLoraConfig(**options, total_step=10)
    if method == "vera":
        return peft.VeraConfig(**options)
    return peft.LoraConfig(**options, use_dora=method == "dora")


def same_count(config, method, **options):
    """Ours equals peft's: both numbers, and every trained tensor by name and size. Returns peft's model."""
    shape = load_shape(config)
    model = wrap(live(config), peft_config(method, shape, **options))
    ours = count(shape, method, **options)
    assert (ours.trainable, ours.total) == model.get_nb_trainable_parameters(), (method, options)

    def plain(name):
        name = name.removesuffix(".default.weight").replace("base_model.model.", "").replace(".base_layer", "")
        return name.replace("prompt_encoder.default.", "").replace(".default", "")

    theirs = [(name, p) for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name]
    if isinstance(options.get("targets"), (list, tuple)):
        options = {**options, "targets": tuple(options["targets"])}
    trained = methods.trained_by(method, shape, methods.Options(**options))
    added = {f"{t.path}.{t.name}".removeprefix("."): t.size for t in trained.added if t.trains and not t.buffer}
    own = {f"{m.path}.{part}": (m.outputs,) for m, part in trained.own}
    assert added | own == {plain(name): tuple(p.shape) for name, p in theirs}
    return model


@pytest.mark.parametrize(
    "name", ["llama-3.1-8b", "qwen2.5-0.5b", "mistral-7b", "gpt2", "bert-base", "roberta-base", "t5-base"]
)
@pytest.mark.parametrize("method", OF_PEFT)
def test_every_method_counts_what_peft_prints_for_real_shapes(name, method):
    same_count(BUILT_IN[name] if method == "lora" else two_blocks(name), method)


VARIANTS = {
    "lora": [{"r": 3, "targets": "all-linear", "bias": "all"}],
    "dora": [{}, {"r": 3, "targets": "all-linear"}, {"r": 2, "bias": "lora_only"}, {"r": 5, "bias": "all"}],
    "adalora": [{}, {"r": 3, "targets": "all-linear"}, {"r": 2, "bias": "lora_only"}, {"r": 5, "bias": "all"}],
    "vera": [{"r": 4}, {"r": 3, "targets": "all-linear"}, {"r": 2, "bias": "lora_only"}, {"r": 5, "bias": "all"}],
    "ia3": [{}, {"targets": "all-linear"}],
    "prompt": [{}, {"virtual_tokens": 1}],
    "p-tuning": [
        {},
        {"virtual_tokens": 3, "encoder_hidden": 10},
        {"virtual_tokens": 4, "encoder": "lstm"},
        {"encoder": "lstm", "encoder_hidden": 7, "encoder_layers": 3},
    ],
    "prefix": [{}, {"virtual_tokens": 7}, {"projection": True}, {"projection": True, "encoder_hidden": 9}],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", OF_PEFT)
def test_every_method_on_every_family_in_its_variants(family, method):
    for seed, options in enumerate(VARIANTS[method]):
        if family in ("t5", "mt5") and options.get("bias") == "all" and older("peft", "0.21"):
            continue  # peft 0.20 takes T5's relative_attention_bias for a bias
        same_count(small(family, seed), method, **options)


@pytest.mark.parametrize(
    ("family", "method", "targets"),
    [
        ("llama", "ia3", ["k_proj", "v_proj", "down_proj"]),
        ("qwen2", "ia3", ["q_proj", "v_proj", "down_proj"]),  # peft's default
        ("gemma", "ia3", ["q_proj", "v_proj", "down_proj"]),  # peft's default
        ("bert", "ia3", r".*(key|value|layer\.\d+\.output\.dense)"),  # without the attention's output.dense
        ("roberta", "ia3", ["query", "intermediate.dense"]),
        ("t5", "ia3", ["k", "o", "wi"]),
        ("gpt2", "ia3", ["c_proj"]),
        ("gemma", "dora", ["embed_tokens", "q_proj"]),
        ("gpt2", "dora", ["mlp.c_proj", "wpe"]),
        ("bert", "vera", ["key", "intermediate.dense"]),
        ("gpt2", "vera", ["c_fc", "c_attn"]),
        ("t5", "vera", r"decoder\..*\.(q|wo)"),
        ("llama", "adalora", ["lm_head", "gate_proj"]),
        ("t5", "adalora", ["q", "k", "v", "o", "wi", "wo"]),
    ],
)
def test_every_method_matches_named_targets_as_peft_does(family, method, targets):
    same_count(small(family, 2 if family == "t5" else 1), method, targets=targets)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "bert", "t5", "mixtral", "qwen3_moe"])
def test_the_whole_updates_are_counted_as_in_peft(family):
    """LoHa's and LoKr's factors, on attention and on all linear layers; fused experts are none, for any of these."""
    peft = pytest.importorskip("peft")
    values = small(family, 1)
    shape = load_shape(values)
    kinds = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig, "adalora": peft.AdaLoraConfig}
    if family == "gpt2":  # the two have no form for its Conv1D
        kinds = {"adalora": peft.AdaLoraConfig}
    for method, kind in kinds.items():
        for targets in (None, "all-linear"):
            named = targets or list(shape.query_value)
            more = {"init_r": 3, "total_step": 9} if method == "adalora" else {"r": 3}
            theirs = wrap(live(values), kind(target_modules=named, task_type=TASK[shape.kind], **more))
            ours = count(shape, method, r=3, targets=targets)
            assert (ours.trainable, ours.total) == theirs.get_nb_trainable_parameters(), (method, targets)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_dora_on_fused_experts_is_refused_as_peft_refuses_it(family):
    values = small(family, 1)
    with pytest.raises(ValueError, match="ParamWrapper does not work with use_dora"):
        wrap(live(values), peft_config("dora", load_shape(values), r=3, targets="all-linear"))
    with pytest.raises(PeftLabError, match="experts, routers.* dora adapts modules alone"):
        count(values, "dora", targets="all-linear")
    same_count(values, "dora", r=3, targets=["q_proj", "k_proj"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_veras_random_pair_is_as_large_as_peft_makes_it(family):
    values = small(family, 1)
    model = same_count(values, "vera", r=6, targets="all-linear")
    pair = {
        t.name: t.size for t in methods.vera(load_shape(values), methods.Options(6, "all-linear")).added if t.buffer
    }
    assert pair == {n: tuple(getattr(model.base_model, n)["default"].shape) for n in ("vera_A", "vera_B")}


def test_the_defaults_are_those_of_peft():
    peft = pytest.importorskip("peft")
    from peft.utils import constants

    rank = {name: row.default("r") for name, row in METHODS.items()}
    assert rank["lora"] == rank["dora"] == rank["qlora"] == peft.LoraConfig().r
    assert rank["adalora"] == peft.AdaLoraConfig(total_step=1).init_r
    assert rank["vera"] == peft.VeraConfig().r
    for name in families.FAMILIES:
        values = encoder(name, 0) if name in ENCODERS else decoder(name, 0) if name in DECODERS else small(name, 1)
        shape = load_shape(values)
        known = "roberta" if name in ("xlm-roberta", "camembert") else name
        if known not in constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING or known == "mixtral":
            continue  # peft has no defaults, or those of layers that Mixtral no longer has
        # peft scales the queries of Gemma, Qwen and others, where the paper, and this package, scale the keys
        theirs = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[known]
        # and where it scales queries and keys, in OPT, keys and values
        theirs = ["k_proj" if target == "q_proj" else "v_proj" if target == "k_proj" and known == "opt" else target
                  for target in theirs]  # fmt: skip
        theirs = theirs, constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[known]
        for mine, one in zip(default_targets.ia3(shape.paths, name), theirs, strict=True):
            adapted = [shape.match(list(names)) if names else () for names in (mine, one)]  # BLOOM has a longer name
            assert adapted[0] == adapted[1], name


@pytest.mark.parametrize("method", ["adalora", "vera", "ia3"])
def test_what_peft_refuses_to_adapt_is_refused(method):
    values = small("llama", 1)
    with pytest.raises((ValueError, TypeError), match="not supported|No layers types compatible"):
        wrap(live(values), peft_config(method, load_shape(values), targets=["embed_tokens"]))
    with pytest.raises(PeftLabError, match="target model.embed_tokens of llama is an embedding"):
        count(values, method, targets=["embed_tokens"])


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "bert", "roberta"])
def test_bitfit_is_every_bias_of_the_live_models_body(family):
    values = small(family, 1)
    head = {module.path for module in load_shape(values).head}
    named = live(values).named_parameters()
    biases = {name: p.numel() for name, p in named if name.endswith(".bias") and name[: -len(".bias")] not in head}
    ours = count(values, "bitfit")
    assert ours.trainable - ours.head == sum(biases.values())
    assert {module.path + ".bias" for module in ours.adapted} == biases.keys()
    assert ours.total == load_shape(values).parameters + ours.head


@pytest.mark.parametrize("family", FAMILIES)
def test_bottleneck_adapters_follow_the_last_projections_of_every_block(family):
    """The places are found in the live model, and the adapter that stands there is built from torch's own layers."""
    values = small(family, 1)
    model = live(values)
    attention = ("self_attn.o_proj", "attn.c_proj", "attention.output.dense", "SelfAttention.o")
    forward = ("mlp.down_proj", "mlp.c_proj", "DenseReluDense.wo", "output.dense")
    after = [path for path, _ in model.named_modules() if path.endswith(attention)]
    last = [path for path, _ in model.named_modules() if path.endswith(forward) and path not in after]
    stacks = model.config.num_hidden_layers, model.config.num_decoder_layers if model.config.is_encoder_decoder else 0
    assert len(after) == len(last) == sum(stacks)
    d = model.get_input_embeddings().embedding_dim
    with on_meta():
        adapter = torch.nn.Sequential(torch.nn.Linear(d, d // 5), torch.nn.ReLU(), torch.nn.Linear(d // 5, d))
    one = sum(p.numel() for p in adapter.parameters())
    for method, places in (("houlsby", after + last), ("pfeiffer", last), ("parallel", last)):
        ours = count(values, method, reduction_factor=5)
        assert {module.path for module in ours.adapted} == set(places)
        assert ours.added == one * len(places)
        assert ours.trainable == ours.added + ours.head
