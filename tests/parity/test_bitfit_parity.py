"""BitFit and the baselines held to the plain way, the model's own parameters unfrozen; counts to the estimator's."""

import copy

import pytest
import torch
from pairs import base, batch, relative, three_steps
from test_memory_replay import CONFIGS
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

import peftlab as pl
from peftlab.adapters.key_table import PREFIX, key_table, placed
from peftlab.memory import count, load_shape

AUTO = {
    "decoder": AutoModelForCausalLM,
    "encoder": AutoModelForSequenceClassification,
    "encoder-decoder": AutoModelForSeq2SeqLM,
}
# kind, our config, which of the base's own parameters the plain way unfreezes
CASES = {
    "bert every bias": ("bert", pl.BitFitConfig(), lambda name: name.endswith("bias")),
    "bert every bias, head": ("bert", pl.BitFitConfig(task_type="SEQ_CLS"),
                              lambda name: name.endswith("bias") or name.startswith("classifier")),
    "bert queries": ("bert", pl.BitFitConfig(target_modules=["query"]), lambda name: name.endswith("query.bias")),
    "bert queries and the middle": (
        "bert", pl.BitFitConfig(target_modules=["query", "intermediate.dense"]),
        lambda name: name.endswith(("query.bias", "intermediate.dense.bias"))),
    "bert one block": ("bert", pl.BitFitConfig(layers_to_transform=[1]),
                       lambda name: ".layer.1." in name and name.endswith("bias")),
    "bert without norms": ("bert", pl.BitFitConfig(exclude_modules=["LayerNorm"]),
                           lambda name: name.endswith("bias") and "LayerNorm" not in name),
    "bert mlm, shared bias": ("bert-mlm", pl.BitFitConfig(), lambda name: name.endswith("bias")),
    "roberta head of two layers": ("roberta", pl.BitFitConfig(task_type="SEQ_CLS"),
                                   lambda name: name.endswith("bias") or name.startswith("classifier")),
    "gpt2 every bias": ("gpt2", pl.BitFitConfig(), lambda name: name.endswith("bias")),
    "gpt2 queries, keys, values": ("gpt2", pl.BitFitConfig(target_modules=["c_attn"]),
                                   lambda name: name.endswith("c_attn.bias")),
    "bert head only": ("bert", pl.SelectiveConfig(task_type="SEQ_CLS"), lambda name: name.startswith("classifier")),
    "bert last block": ("bert", pl.SelectiveConfig(last_layers=1, task_type="SEQ_CLS"),
                        lambda name: ".layer.2." in name or name.startswith("classifier")),
    "bert named": ("bert", pl.SelectiveConfig(target_modules=["pooler", "embeddings.LayerNorm"]),
                   lambda name: "pooler" in name or "embeddings.LayerNorm" in name),
    "llama last two blocks": ("llama", pl.SelectiveConfig(last_layers=2),
                              lambda name: ".layers.1." in name or ".layers.2." in name),
    "llama head only": ("llama", pl.SelectiveConfig(modules_to_save=["lm_head"]), lambda name: "lm_head" in name),
    "gpt2 last block": ("gpt2", pl.SelectiveConfig(last_layers=1), lambda name: ".h.2." in name),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_same_numbers(case):
    kind, config, unfrozen = CASES[case]
    ours = base(kind)
    theirs = copy.deepcopy(ours)
    before = {name: parameter.clone() for name, parameter in ours.named_parameters()}
    pl.attach(ours, config)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(unfrozen(name))
    expected = {PREFIX + name: p for name, p in theirs.named_parameters() if p.requires_grad}
    found = {key: p for key, p in key_table(placed(ours, "default")).items() if key in expected}
    # a shared bias has two keys here and one name there
    assert {id(p) for p in found.values()} == {id(p) for p in ours.parameters() if p.requires_grad}
    assert pl.count_parameters(ours).trainable == sum(p.numel() for p in expected.values())

    inputs = batch(kind)
    three_steps(ours, theirs, inputs, lambda: (found, expected))
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters() if name in before)
    assert relative(ours(**inputs).logits, base(kind)(**inputs).logits) > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_saved_loaded_merged(case, tmp_path):
    kind, config, _ = CASES[case]
    ours = base(kind)
    pl.attach(ours, config)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = batch(kind)
    expected = ours(**inputs).logits
    pl.save_adapter(ours, tmp_path)
    loaded = pl.load_adapter(base(kind), tmp_path)
    assert torch.equal(loaded(**inputs).logits, expected)
    if kind != "bert-mlm":  # one bias of two modules, which a merge would change twice
        pl.merge(loaded, unload=True)
        assert relative(loaded(**inputs).logits, expected) < 1e-12


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "bert", "roberta"])
def test_bitfits_counts_are_the_estimators(family):
    same_count(family, "bitfit", lambda task: pl.BitFitConfig(task_type=task))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2", "bert", "roberta", "t5"])
def test_ia3s_counts_are_the_estimators(family):
    same_count(family, "ia3", lambda task: pl.IA3Config(task_type=task))


def test_ia3s_counts_on_mt5():
    CONFIGS["mt5"] = CONFIGS["t5"] | {"model_type": "mt5", "feed_forward_proj": "gated-gelu"}
    same_count("mt5", "ia3", lambda task: pl.IA3Config(task_type=task))
    del CONFIGS["mt5"]


def same_count(family, method, config):
    shape = load_shape(CONFIGS[family])
    with torch.device("meta"):
        model = AUTO[shape.kind].from_config(AutoConfig.for_model(**CONFIGS[family]))
        pl.attach(model, config("SEQ_CLS" if shape.kind == "encoder" else None))
    expected = count(shape, method)
    assert pl.count_parameters(model) == (expected.trainable, expected.total, expected.percent)


@pytest.mark.parametrize("family", ["llama", "gemma", "t5"])
def test_a_model_without_biases_is_told_what_to_use(family):
    shape = load_shape(CONFIGS[family])
    with torch.device("meta"):
        model = AUTO[shape.kind].from_config(AutoConfig.for_model(**CONFIGS[family]))
        with pytest.raises(pl.PeftLabError, match="has no biases, so BitFit .* Use IA3Config, .* or LoRAConfig"):
            pl.attach(model, pl.BitFitConfig())
    assert not pl.attached(model) and all(p.requires_grad for p in model.parameters())


def test_a_trained_block_generates_with_a_cache():
    """The block's modules run twice, the block once: keys and values enter the cache once."""
    ours = base("llama")
    pl.attach(ours, pl.SelectiveConfig(last_layers=2))
    ids = batch("llama", length=5)["input_ids"][1:]
    settings = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(ours.generate(ids, **settings), base("llama").generate(ids, **settings))
