"""Encoders, encoder-decoders, and models that read images or sound, against transformers and peft on the meta device.

Every class that a configuration may name is compared parameter by parameter.
"""

import warnings

import pytest
from encoder_configs import CLASSES, ENCODERS, usual, variant
from on_meta import on_meta
from releases import older, skip_before

from peftlab import default_targets
from peftlab.errors import PeftLabError
from peftlab.memory import count, load_shape

transformers = pytest.importorskip("transformers")
warnings.filterwarnings("ignore", category=FutureWarning)

NAMES = [(family, name) for family in ENCODERS for name in CLASSES[family].split()]
TASKS = {
    "classifier": "SEQ_CLS", "image classifier": "SEQ_CLS", "sound classifier": "SEQ_CLS", "multiple choice": "SEQ_CLS",
    "token classifier": "TOKEN_CLS", "question answering": "QUESTION_ANS",
}  # fmt: skip


def live(values, name):
    """The model of a class that transformers builds from a configuration, without weights."""
    if values["model_type"] == "modernbert":
        skip_before("transformers", "5.24", "it refuses the rope_parameters that its own ModernBertConfig makes")
    config = transformers.AutoConfig.for_model(**values)
    with on_meta():
        model = getattr(transformers, name)(config)
    model.tie_weights()
    return model


def named(family, name, seed):
    values = variant(family, seed) | {"architectures": [name]}
    return values | ({"num_labels": 2} if name == "DistilBertForQuestionAnswering" else {})


def parameters(shape):
    """Ours, {name of a parameter: elements}."""
    found = {}
    for m in shape.modules:
        if m.weight:
            end = ".parametrizations.weight.original1" if "pos_conv_embed" in m.path else ".weight"
            found[m.path if m.kind == "vector" else m.path + end] = m.weight
        if m.bias:
            found[f"{m.path}.bias"] = m.outputs
    return found


def same_parameters(values, name):
    shape, model = load_shape(values), live(values, name)
    names = [{k for k, p in model.named_parameters(remove_duplicate=False) if p is one} for one in model.parameters()]
    theirs = [one.numel() for one in model.parameters()]
    ours = parameters(shape)
    assert len(ours) == len(theirs) and shape.parameters == sum(theirs)
    for several, size in zip(names, theirs, strict=True):  # a shared one has several names, of which one is listed
        assert [ours[k] for k in several if k in ours] == [size], several
    frozen = {f"{m.path}.weight" for m in shape.modules if m.frozen}
    assert frozen == {k for k, p in model.named_parameters() if not p.requires_grad}
    assert count(shape, "full").trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    return shape, model


@pytest.mark.parametrize(("family", "name"), NAMES)
def test_every_class_is_counted_parameter_by_parameter(family, name):
    for seed in range(4):
        same_parameters(named(family, name, seed), name)


@pytest.mark.parametrize("family", ENCODERS)
def test_without_architectures_the_usual_class_is_counted(family):
    same_parameters(variant(family, 6), usual(family))


@pytest.mark.parametrize("family", ENCODERS)
def test_what_a_config_leaves_out_has_the_familys_default(family):
    if family in ("bert", "roberta"):
        return  # their sizes must be given
    layers = ("num_hidden_layers", "n_layers", "encoder_layers", "decoder_layers")
    bare = {k: v for k, v in variant(family, 1).items() if k in ("model_type", *layers)}
    same_parameters(bare, usual(family))


@pytest.mark.parametrize(("family", "both"), [
    ("bart", {"hidden_size": 36, "num_hidden_layers": 3}), ("whisper", {"d_model": 12, "hidden_size": 24}),
    ("distilbert", {"hidden_size": 36, "dim": 24, "num_hidden_layers": 3}),
])  # fmt: skip
def test_a_size_under_two_names_is_read_as_transformers_reads_it(family, both):
    values = variant(family, 0)
    same_parameters({k: 2 if "heads" in k else v for k, v in values.items()} | both, usual(family))


def peft_count(values, name, method, task, **options):
    peft = pytest.importorskip("peft")
    config = getattr(peft, f"{method}Config")(task_type=task, **options)
    with on_meta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(live(values, name), config).get_nb_trainable_parameters()


def same_counts(values, name, seed):
    shape = load_shape(values)
    task = TASKS.get(shape.task)
    if shape.task == "language model" and shape.kind == "encoder-decoder":
        task = "SEQ_2_SEQ_LM"
    of_lm = {m.path.rsplit(".", 1)[-1] for m in shape.modules if m.role == "output"}
    ends = sorted({m.path.rsplit(".", 1)[-1] for m in shape.modules if m.kind == "linear" and m.role == "body"} - of_lm)
    cases = [
        ("lora", {"targets": ends[seed % len(ends):][:2], "bias": ("none", "lora_only", "all")[seed % 3]}),
        ("lora", {"targets": list(shape.query_value), "bias": "all"}),
        ("lora", {"targets": "all-linear", "bias": ("none", "lora_only", "all")[seed % 3]}),
        ("ia3", {}),
    ]  # fmt: skip
    for method, options in cases:
        if options.get("targets") == "all-linear" and _peft_takes_the_head_too(shape):
            continue
        if older("peft", "0.21") and shape.family == "mpnet" and options.get("bias") == "all":
            continue  # it trained relative_attention_bias.weight, too, because of its name
        theirs = {"target_modules" if k == "targets" else k: v for k, v in options.items()}
        if method == "lora":
            options, theirs = options | {"r": 3}, theirs | {"r": 3}
        elif shape.family not in ("bart", "bert", "roberta", "deberta-v2"):  # peft has no defaults
            names, inputs = default_targets.ia3(shape.paths, shape.family)
            theirs = {"target_modules": list(names), "feedforward_modules": list(inputs)}
        ours = count(shape, method, **options)
        expected = peft_count(values, name, {"lora": "Lora", "ia3": "IA3"}[method], task, **theirs)
        assert (ours.trainable, ours.total) == expected, (method, options)


def _peft_takes_the_head_too(shape):
    """peft's "all-linear" adapts these heads before it sees that they train as a whole, and fails."""
    several = shape.family == "distilbert" and shape.task in ("classifier", "multiple choice")
    return (shape.task in ("token classifier", "question answering") and bool(shape.head)) or several


@pytest.mark.parametrize(("family", "name"), [pair for pair in NAMES if pair[1] != "Wav2Vec2ForXVector"])
def test_lora_and_ia3_count_what_peft_counts(family, name):
    """`feature_extractor` of the class left out is both a layer and a set of convolutions, which peft cannot adapt."""
    seed = NAMES.index((family, name))
    same_counts(named(family, name, seed), name, seed)


@pytest.mark.parametrize(
    ("family", "name", "targets"),
    [
        ("vit", "ViTModel", ["projection", "q_proj"]), ("clip", "CLIPModel", ["patch_embedding"]),
        ("whisper", "WhisperModel", ["conv1", "conv2", "fc1"]), ("mpnet", "MPNetModel", ["relative_attention_bias"]),
        ("clip", "CLIPModel", ["token_embedding", "position_embedding"]),
    ],
)  # fmt: skip
def test_lora_on_convolutions_and_embeddings_counts_what_peft_counts(family, name, targets):
    for seed in range(2):
        values = named(family, name, seed)
        ours = count(values, "lora", r=3, targets=targets)
        assert (ours.trainable, ours.total) == peft_count(values, name, "Lora", None, r=3, target_modules=targets)
    if family == "vit":
        with pytest.raises(PeftLabError, match="target embeddings.patch_embeddings.projection of vit is a convolution"):
            count(values, "vera", targets=targets)


def test_albert_lists_a_shared_block_once():
    values = named("albert", "AlbertModel", 3) | {"num_hidden_groups": 1, "inner_group_num": 1, "num_hidden_layers": 12}
    adapted = [m.path for m in count(values, "lora", targets=["query"]).adapted]
    assert adapted == ["encoder.albert_layer_groups.0.albert_layers.0.attention.query"]


TAKE_PROMPTS = ["electra", "distilbert", "albert", "deberta-v2", "mpnet", "modernbert", "bart"]


@pytest.mark.parametrize("family", TAKE_PROMPTS)
def test_prompts_count_what_peft_counts(family):
    """peft is told the width of the words where it takes another one."""
    values = variant(family, 4)
    width = load_shape(values).modules[0].outputs
    task = "SEQ_2_SEQ_LM" if family == "bart" else "SEQ_CLS"
    told = {"num_virtual_tokens": 3, "token_dim": width, "num_layers": 2, "num_attention_heads": 1}
    for method, config in (("prompt", "PromptTuning"), ("p-tuning", "PromptEncoder")):
        ours = count(values, method, virtual_tokens=3)
        assert (ours.trainable, ours.total) == peft_count(values, usual(family), config, task, **told)


@pytest.mark.parametrize(
    ("family", "task"), [("electra", "SEQ_CLS"), ("bart", "SEQ_2_SEQ_LM"), ("whisper", "SEQ_2_SEQ_LM")]
)
def test_prefixes_count_what_peft_counts(family, task):
    values = variant(family, 4)
    if family == "electra":
        values["embedding_size"] = 7  # narrower than keys and values
    for projection in (False, True):
        ours = count(values, "prefix", virtual_tokens=3, projection=projection)
        told = {"num_virtual_tokens": 3, "prefix_projection": projection}
        if family != "electra":  # peft takes the encoder's depth, unless it is told the decoder's
            told["num_layers"] = values["decoder_layers"]
        assert (ours.trainable, ours.total) == peft_count(values, usual(family), "PrefixTuning", task, **told)


@pytest.mark.parametrize(
    ("family", "method", "told"),
    [
        ("vit", "prompt", "takes no vectors in the place of words, so it has no prompt. Use lora or ia3"),
        ("wav2vec2", "p-tuning", "takes no vectors in the place of words"), ("clip", "prefix", "has no prefix"),
        ("whisper", "prompt", "takes no vectors in the place of words"),
        ("albert", "prefix", "takes no past keys and values, so it has no prefix. Use a prompt, or lora"),
        ("modernbert", "prefix", "takes no past keys and values"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_have_a_prompt_or_a_prefix_says_so(family, method, told):
    with pytest.raises(PeftLabError, match=told):
        count(variant(family, 0), method)


@pytest.mark.parametrize("family", ENCODERS)
def test_bitfit_is_every_bias_outside_the_head(family):
    values = variant(family, 2)
    if family == "modernbert":
        values["attention_bias"] = True
    head = tuple(m.path for m in load_shape(values).head)
    named = live(values, usual(family)).named_parameters()
    biases = {n: p.numel() for n, p in named if n.endswith(".bias") and not n.startswith(head or ("-",))}
    ours = count(values, "bitfit")
    assert ours.trainable - ours.head == sum(biases.values())


@pytest.mark.parametrize("family", ENCODERS)
def test_bottlenecks_stand_twice_in_every_block(family):
    shape = load_shape(variant(family, 3))
    blocks = {m.path[: m.path.index(f".{m.layer}.")] + f".{m.layer}" for m in shape.modules if m.layer is not None}
    inner = shape.config["inner_group_num"] if family == "albert" else 1
    assert len(count(shape, "houlsby").adapted) == 2 * len(blocks) * inner
    assert len(count(shape, "pfeiffer").adapted) == len(blocks) * inner


@pytest.mark.parametrize(
    ("family", "name", "classes"),
    [
        ("vit", "ViTModel", "image classifier"), ("whisper", "WhisperModel", "sound classifier"),
        ("electra", "ElectraForTokenClassification", "token classifier"), ("wav2vec2", "Wav2Vec2ForCTC", "classifier"),
    ],
)  # fmt: skip
def test_labels_ask_for_the_families_own_classifier(family, name, classes):
    shape = load_shape(named(family, name, 1), labels=7)
    assert shape.task == classes and shape.head[-1].outputs == 7


@pytest.mark.parametrize(
    ("family", "changed", "told"),
    [
        ("vit", {"image_size": [32, 32, 3]}, "image_size must be one number or a height and a width"),
        ("wav2vec2", {"conv_kernel": [3]}, "conv_kernel has 1 entries, but conv_dim has 3"),
        ("wav2vec2", {"feat_extract_norm": "batch"}, "feat_extract_norm must be 'group' or 'layer'"),
        ("clip", {"text_config": [1]}, "text_config must be an object"),
        ("deberta-v2", {"pos_att_type": 3, "relative_attention": True, "share_att_key": False}, "must be a list"),
        ("mpnet", {"hidden_size": 17}, "the width 17 is no multiple"),
        ("vit", {"architectures": ["ViTForMaskedLM"]}, "'ViTForMaskedLM', whose head is not counted.*ForImageClass"),
        ("clip", {"architectures": ["CLIPSegModelX"]}, "whose head is not counted"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_is_refused_by_name(family, changed, told):
    with pytest.raises(PeftLabError, match=told):
        load_shape(variant(family, 0) | changed)
