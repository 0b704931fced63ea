"""LoRA held to Hugging Face peft in float64: counts, outputs, gradients and three steps of AdamW, option by option."""

import peft
import pytest
import torch
from pairs import batch, give, gradients, live, our_state, pair, relative, same, three_steps
from releases import skip_lost_biases

import peftlab as pl

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "llama default targets": ("llama", {}),
    "llama all layers by name": ("llama", dict(target_modules=ALL)),
    "llama all-linear": ("llama", dict(target_modules="all-linear")),
    "llama regex": ("llama", dict(target_modules=r".*layers\.[02]\..*(q|down)_proj")),
    "llama rslora": ("llama", dict(target_modules=["k_proj", "up_proj"], use_rslora=True)),
    "llama patterns": ("llama", dict(target_modules=ALL, rank_pattern={r"layers\.1\.self_attn.*": 2, "down_proj": 9},
                                     alpha_pattern={"q_proj": 7, r"layers\.2.*v_proj": 1.5})),
    "llama rslora and patterns": ("llama", dict(use_rslora=True, rank_pattern={"v_proj": 3},
                                                alpha_pattern={"v_proj": 4})),
    "llama some layers": ("llama", dict(layers_to_transform=[0, 2])),
    "llama some layers and the head": ("llama", dict(target_modules=["lm_head", "q_proj"], layers_to_transform=[1])),
    "llama one layer": ("llama", dict(target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers")),
    "llama exclude list": ("llama", dict(target_modules="all-linear",
                                             exclude_modules=["down_proj", "layers.1.mlp.up_proj"])),
    "llama exclude regex": ("llama", dict(target_modules=["q_proj"], exclude_modules=r".*layers\.1\..*")),
    "llama head in full": ("llama", dict(modules_to_save=["lm_head"])),
    "llama norm in full": ("llama", dict(modules_to_save=["model.norm"])),
    "llama all norms in full": ("llama", dict(modules_to_save=["norm"])),
    "llama block in full": ("llama", dict(target_modules=["q_proj"], layers_to_transform=[0, 2],
                                          modules_to_save=["layers.1"])),
    "llama attention in full": ("llama", dict(target_modules=["up_proj"], modules_to_save=["layers.1.self_attn"])),
    "llama embedding": ("llama", dict(target_modules=["embed_tokens", "q_proj"])),
    "llama embedding rslora": ("llama", dict(target_modules=["embed_tokens"], use_rslora=True)),
    "llama head": ("llama", dict(target_modules=["lm_head", "v_proj"])),
    "llama tied, head adapted": ("llama-tied", dict(target_modules=["lm_head"])),
    "llama tied, embedding adapted": ("llama-tied", dict(target_modules=["embed_tokens"])),
    "llama lora bias": ("llama", dict(target_modules=["q_proj"], lora_bias=True)),
    "llama classifier": ("llama-classifier", dict(task_type="SEQ_CLS")),
    "llama classifier all-linear": ("llama-classifier", dict(task_type="SEQ_CLS", target_modules="all-linear")),
    "gpt2 default targets": ("gpt2", {}),
    "gpt2 Conv1D": ("gpt2", dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "gpt2 all-linear": ("gpt2", dict(target_modules="all-linear")),
    "gpt2 embeddings": ("gpt2", dict(target_modules=["wte", "wpe"])),
    "gpt2 bias all": ("gpt2", dict(target_modules=["c_attn"], bias="all")),
    "gpt2 bias lora_only": ("gpt2", dict(target_modules=["c_fc"], bias="lora_only")),
    "gpt2 blocks h": ("gpt2", dict(target_modules=["c_attn"], layers_to_transform=[1], layers_pattern="h")),
    "bert default targets": ("bert", {}),
    "bert classifier": ("bert", dict(task_type="SEQ_CLS")),
    "bert bias all": ("bert", dict(bias="all")),
    "bert bias all, classifier": ("bert", dict(bias="all", task_type="SEQ_CLS")),
    "bert bias lora_only": ("bert", dict(bias="lora_only", target_modules=["query", "dense"])),
    "bert lora bias and bias": ("bert", dict(bias="lora_only", lora_bias=True)),
    "bert heads": ("bert", dict(modules_to_save=["classifier", "pooler"])),
    "bert block in full": ("bert", dict(target_modules=["query"], layers_to_transform=[0],
                                        modules_to_save=["layer.1"])),
    "bert all-linear, classifier": ("bert", dict(target_modules="all-linear", task_type="SEQ_CLS")),
    "bert positions": ("bert", dict(target_modules=["position_embeddings", "word_embeddings", "query"])),
    "bert mlm, shared bias": ("bert-mlm", dict(bias="all")),
    "roberta classifier of two layers": ("roberta", dict(task_type="SEQ_CLS")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_same_numbers(case):
    kind, settings = CASES[case]
    skip_lost_biases(settings)
    settings = {"r": 5, "alpha": 12, **settings}
    ours, theirs = pair(kind, **settings)
    assert pl.count_parameters(ours)[:2] == theirs.get_nb_trainable_parameters()

    inputs = batch(kind)
    first = ours(**inputs).logits
    three_steps(ours, theirs, inputs, lambda: (our_state(ours), live(theirs)))
    moved = relative(ours(**inputs).logits, first)
    assert moved > 1e-4  # three steps changed something, or nothing was compared


def test_without_an_adapter_the_base_answers():
    ours, theirs = pair("llama", r=3, alpha=8)
    inputs = batch("llama")
    with pl.disabled(ours), theirs.disable_adapter():
        assert relative(ours(**inputs).logits, theirs(**inputs).logits) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_half_precision_base_has_float32_adapters(kind, dtype):
    ours, theirs = pair(kind, dtype=dtype, r=4, alpha=9, target_modules="all-linear")
    assert {parameter.dtype for parameter in our_state(ours).values()} == {torch.float32}
    inputs = batch(kind)
    found, expected = ours(**inputs), theirs(**inputs)
    assert found.logits.dtype == dtype
    assert torch.equal(found.logits, expected.logits)
    found.loss.backward()
    expected.loss.backward()
    same(gradients(our_state(ours)), gradients(live(theirs)), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    ours, theirs = pair("llama", dtype=dtype, r=4, alpha=9, target_modules="all-linear")
    inputs = batch("llama")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(**inputs), theirs(**inputs)
    assert found.logits.dtype == expected.logits.dtype
    assert relative(found.logits, expected.logits) < 1e-6
    found.loss.backward()
    expected.loss.backward()
    same(gradients(our_state(ours)), gradients(live(theirs)), 1e-2)


def test_dropout_draws_the_same_mask():
    ours, theirs = pair("llama", r=4, alpha=9, dropout=0.4, target_modules=["q_proj", "down_proj"])
    inputs = batch("llama")
    ours.train(), theirs.train()
    torch.manual_seed(3)
    found = ours(**inputs).logits
    torch.manual_seed(3)
    assert relative(found, theirs(**inputs).logits) < 1e-9
    assert relative(ours(**inputs).logits, found) > 1e-6
    ours.eval(), theirs.eval()
    assert relative(ours(**inputs).logits, theirs(**inputs).logits) < 1e-9


def test_mixtures_are_the_sum_that_peft_computes():
    """peft runs several adapters at weight one; ours must agree there."""
    ours, theirs = pair("llama", r=4, alpha=9)
    theirs.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=7, target_modules=["k_proj"], init_lora_weights=False))
    pl.attach(ours, pl.LoRAConfig(r=2, alpha=7, target_modules=["k_proj"]), name="other")
    give(theirs, ours, "other", "other")
    inputs = batch("llama")
    theirs.base_model.set_adapter(["default", "other"])
    pl.activate(ours, {"default": 1.0, "other": 1.0})
    assert relative(ours(**inputs).logits, theirs(**inputs).logits) < 1e-9


def test_a_name_for_each_row_is_what_peft_computes():
    ours, theirs = pair("llama", r=4, alpha=9)
    inputs = batch("llama", rows=3)
    pl.activate(ours, ["default", None, "default"])
    theirs.eval(), ours.eval()
    expected = theirs(**inputs, adapter_names=["default", "__base__", "default"])
    assert relative(ours(**inputs).logits, expected.logits) < 1e-9
