"""The decoder families that are described by a `Decoder`, against transformers and peft on the meta device."""

import warnings

import pytest
from family_configs import DECODERS, variant
from on_meta import on_meta
from releases import older
from test_count import PUBLISHED
from test_count_exact import live, peft_count, same_table

from peftlab.errors import PeftLabError
from peftlab.memory import BUILT_IN, count, load_shape

transformers = pytest.importorskip("transformers")
warnings.filterwarnings("ignore", category=FutureWarning)


@pytest.mark.parametrize("family", DECODERS)
def test_a_family_in_its_variants(family):
    """GQA, biases on and off, tied or not, odd sizes, heads of another width, dense and sparse blocks."""
    for seed in range(8):
        same_table(variant(family, seed))


@pytest.mark.parametrize("family", DECODERS)
def test_what_a_config_leaves_out_has_the_familys_default(family):
    """Only sizes are given, and as few as make the model small."""
    values = variant(family, 1)
    kept = ("model_type", "vocab_size", "pad_token_id", "moe_intermediate_size", "kv_lora_rank", "q_lora_rank")
    bare = {key: value for key, value in values.items() if key in kept or "layer" in key or "local_experts" in key}
    bare |= {key: value for key, value in values.items() if key in ("intermediate_size", "ffn_dim", "n_routed_experts")}
    bare |= {key: 64 for key in ("hidden_size", "n_embd") if key in values}
    bare |= {key: 32 for key in ("num_attention_heads", "n_head") if key in values}
    bare |= {key: value for key, value in values.items() if key in ("n_group", "topk_group")}
    same_table(bare)


def names_of(shape):
    return sorted({m.path.rsplit(".", 1)[-1] for m in shape.modules if m.kind == "linear" and m.role == "body"})


@pytest.mark.parametrize("family", DECODERS)
def test_lora_counts_what_peft_counts(family):
    """`"all-linear"` with each kind of bias, and named targets. In some mixtures peft turns them into parameters."""
    some = (variant(family, seed) for seed in range(9))
    values = next(
        one for one in some if any(m.kind == "experts" for m in load_shape(one).modules) or "moe" not in family
    )
    shape = load_shape(values)
    named = names_of(shape)
    cases = [{"targets": "all-linear", "bias": bias} for bias in ("none", "all", "lora_only")]
    if shape.layout.experts:  # peft turns these names into parameters, and only both of the first two
        named = [name for name in named if name not in ("gate_proj", "up_proj", "down_proj")]
    cases += [{"targets": named}, {"targets": named[:1]}]
    if shape.layout.experts:
        cases += [{"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}]
        cases += [{"targets": ["o_proj"], "target_parameters": ["experts.down_proj"], "bias": "all"}]
    for case in cases:
        if older("peft", "0.21") and family == "gpt_oss" and case.get("bias") == "all":
            continue  # it trained gate_up_proj_bias and down_proj_bias, too, which are no biases of layers
        options = {"target_modules" if key == "targets" else key: value for key, value in case.items()}
        theirs = peft_count(live(values), task_type="CAUSAL_LM", r=3, **options)
        ours = count(values, "lora", r=3, **case)
        assert (ours.trainable, ours.total) == theirs, case


def test_the_names_of_layers_that_were_fused_are_read_as_in_peft():
    values = variant("qwen3_moe", 3)
    both = ["gate_proj", "up_proj", "down_proj", "q_proj"]
    ours = count(values, "lora", r=2, targets=both)
    assert (ours.trainable, ours.total) == peft_count(live(values), r=2, target_modules=both, task_type="CAUSAL_LM")
    assert {m.ranks for m in ours.adapted if m.path.endswith("gate_up_proj")} == {2}
    with pytest.raises(PeftLabError, match="gate_proj and up_proj of all experts in one parameter.* Name up_proj too"):
        count(values, "lora", targets=["gate_proj"])


def test_experts_are_no_modules_and_the_error_says_how_lora_adapts_them():
    values = variant("gpt_oss", 0)
    with pytest.raises(PeftLabError, match=r"holds all experts.*target_parameters=\['experts.down_proj'\]"):
        count(values, "lora", targets=["down_proj"])
    with pytest.raises(PeftLabError, match=r"is a router.*target_parameters=\['router.weight'\]"):
        count(values, "lora", targets=["router"])
    with pytest.raises(PeftLabError, match=r"experts.gate_up_proj, experts.down_proj"):
        count(values, "lora", target_parameters=["experts.gate"])
    with pytest.raises(PeftLabError, match="target_parameters=.* is no option of dora"):
        count(values, "dora", target_parameters=["experts.down_proj"])


CLASSES = [
    ("llama", "LlamaModel"), ("llama", "LlamaForSequenceClassification"), ("llama", "LlamaForTokenClassification"),
    ("gpt2", "GPT2Model"), ("gpt2", "GPT2ForSequenceClassification"), ("opt", "OPTModel"), ("opt", "OPTForCausalLM"),
    ("falcon", "FalconModel"), ("gpt_neox", "GPTNeoXForSequenceClassification"), ("mixtral", "MixtralModel"),
    ("bert", "BertModel"), ("bert", "BertForMaskedLM"), ("bert", "BertForSequenceClassification"),
    ("roberta", "RobertaModel"), ("roberta", "RobertaForMaskedLM"), ("t5", "T5Model"), ("qwen3", "Qwen3Model"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "name"), CLASSES)
def test_architectures_decides_what_is_counted(family, name):
    from test_count_exact import small

    values = variant(family, 2) if family in DECODERS else small(family, 2)
    values |= {"architectures": [name], "num_labels": 3}
    config = transformers.AutoConfig.for_model(**values)
    with on_meta():
        model = getattr(transformers, name)(config)
    model.tie_weights()
    shape = load_shape(values)
    theirs = {name: p.numel() for name, p in model.named_parameters()}
    ours = {f"{m.path}.weight" if m.kind != "experts" else m.path: m.weight for m in shape.modules if m.weight}
    ours |= {f"{m.path}.bias": m.outputs for m in shape.modules if m.bias}
    if family == "t5" or name.endswith("MaskedLM"):  # shared parameters have two names
        assert sum(ours.values()) == sum(theirs.values())
    else:
        assert ours == theirs


def test_a_number_of_labels_asks_for_a_classifier():
    values = {**variant("qwen3", 0), "architectures": ["Qwen3Model"]}
    assert load_shape(values).task == "body" and not load_shape(values).head
    (head,) = load_shape(values, labels=4).head
    assert (head.path, head.outputs) == ("score", 4)


def test_a_class_with_another_head_is_refused_by_name():
    values = {**variant("qwen3", 0), "architectures": ["Qwen3ForQuestionAnswering"]}
    with pytest.raises(PeftLabError, match="'Qwen3ForQuestionAnswering', whose head is not counted.*ForCausalLM"):
        load_shape(values)


def test_of_a_model_with_images_the_text_part_is_counted():
    text = variant("gemma3_text", 1)
    both = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    shape = load_shape({**both, "vision_config": {"hidden_size": 4}, "_name_or_path": "g"})
    assert shape.name == "g (its text part)" and shape.modules == load_shape(text).modules
    wide = transformers.AutoConfig.for_model("gemma3", text_config=text)
    with on_meta():
        model = transformers.AutoModelForCausalLM.from_config(wide.text_config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "near"),
    [
        ("mamba", None), ("mamba2", None), ("falcon_mamba", None), ("hubert", None), ("gpt_neo", None), ("rwkv", None),
        ("llama3", "llama, llama4_text"), ("gemma4", "gemma, gemma2, gemma3_text"), ("phi4", "phi3, phi"),
        ("qwen3_5_moe", "qwen2_moe, qwen3_moe"), ("Mixtral", "mixtral"), ("deberta", "deberta-v2"),
        ("vit_mae", None), ("clap", None), ("wav2vec2-bert", None), ("rembert", None), ("siglip", None),
    ],
)  # fmt: skip
def test_an_unknown_model_type_is_told_what_is_known_of_its_name(family, near):
    with pytest.raises(PeftLabError) as error:
        load_shape({"model_type": family})
    assert "Did you mean" not in str(error.value)
    told = str(error.value).partition("Known of this name: ")[2].partition(". Known")[0]
    assert told == (near or "")


@pytest.mark.parametrize(
    ("name", "near"),
    [("mamba-2.8b", None), ("bart-base", None), ("llama-3-8b", "llama-3.1-8b"), ("qwen3-7b", "qwen3-8b"),
     ("lama-2-7b", "llama-2-7b")],
)  # fmt: skip
def test_an_unknown_shape_is_told_near_matches_of_its_family(name, near):
    with pytest.raises(PeftLabError) as error:
        load_shape(name)
    if near is None:
        assert "Did you mean" not in str(error.value) and "Known: " in str(error.value)
    else:
        assert near in str(error.value).partition("Did you mean")[2]


def test_the_new_named_shapes_have_the_published_sizes():
    """Billions of parameters, as the model cards give them."""
    published = {"qwen3-4b": 4.0, "qwen3-8b": 8.2, "qwen3-30b-a3b": 30.5, "mixtral-8x7b": 46.7, "gpt-oss-20b": 20.9,
                 "gemma-3-4b": 3.9, "smollm3-3b": 3.1}  # fmt: skip
    assert {name: round(load_shape(name).parameters / 1e9, 1) for name in published} == published
    assert published.keys() | PUBLISHED.keys() == BUILT_IN.keys()


def test_a_bottleneck_adapter_behind_experts_stands_behind_all_of_them():
    places = [module.path for module in count("mixtral-8x7b", "houlsby").adapted]
    assert places[:2] == ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp"] and len(places) == 2 * 32
    one = count("mixtral-8x7b", "houlsby", targets=["o_proj"]).trainable
    assert count("mixtral-8x7b", "houlsby").trainable == 2 * one == 2 * count("mixtral-8x7b", "parallel").trainable
