"""The tables and counts against transformers and Hugging Face peft themselves, on the meta device (no weights)."""

import json
import random
import warnings

import pytest
import torch

from peftlab.memory import BUILT_IN, count, load_shape

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
    with torch.device("meta"):
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
        weight = own.pop("weight")
        if isinstance(module, torch.nn.Linear):
            kind, (outputs, inputs) = "linear", weight.shape
        elif isinstance(module, Conv1D):
            kind, (inputs, outputs) = "conv1d", weight.shape
        elif isinstance(module, torch.nn.Embedding):
            kind, (inputs, outputs) = "embedding", weight.shape
        else:
            kind, inputs, outputs = "norm", *weight.shape, *weight.shape
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


def peft_count(model, **options):
    peft = pytest.importorskip("peft")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    return wrapped.get_nb_trainable_parameters()


CASES = [
    {"r": 8},
    {"r": 64},
    {"r": 3, "targets": "all-linear"},
    {"r": 16, "targets": "all-linear", "bias": "all"},
    {"r": 2, "bias": "lora_only"},
]


@pytest.mark.parametrize("name", BUILT_IN)
def test_lora_counts_what_peft_prints_for_every_built_in_shape(name):
    shape = load_shape(name)
    cases = CASES if shape.parameters < 5e8 else [{"r": 8}, {"r": 16, "targets": "all-linear"}]
    for case in cases:
        ours = count(name, "lora", **case)
        options = {"task_type": TASK[shape.kind], "r": case["r"], "bias": case.get("bias", "none")}
        if "targets" in case:
            options["target_modules"] = case["targets"]
        assert (ours.trainable, ours.total) == peft_count(live(BUILT_IN[name]), **options), case
        assert ours.percent == 100 * ours.trainable / ours.total
        assert count(name, "qlora", **case).as_dict() == ours.as_dict()


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
        with torch.device("meta"):
            pl.attach(model, config)
        ours = count(shape, "lora", r=3, **case)
        assert pl.count_parameters(model) == (ours.trainable, ours.total, ours.percent)
