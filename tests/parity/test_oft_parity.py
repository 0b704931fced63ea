"""OFT held to Hugging Face peft: counts, outputs, gradients, three AdamW steps, options, folders, merged weights."""

import copy
import json
import warnings

import peft
import pytest
import torch
import whole_updates
from pairs import LLAMA, base, batch, relative
from releases import skip_lost_biases
from test_lora_folders import output, peft_save
from torch import nn

import peftlab as pl
from peftlab.memory import count
from peftlab.methods.oft import nearest_divisor

KINDS = pl.OFTConfig, peft.OFTConfig
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES = {
    "llama default targets, a block too large": ("llama", dict(oft_block_size=32)),
    "llama attention": ("llama", dict(oft_block_size=4, target_modules=ATTENTION)),
    "llama number of blocks": ("llama", dict(r=5, oft_block_size=0)),
    "llama numbers that do not divide": ("llama", dict(oft_block_size=6, target_modules=["q_proj", "o_proj"])),
    "llama Cayley": ("llama", dict(oft_block_size=5, use_cayley_neumann=False)),
    "llama 2 terms": ("llama", dict(oft_block_size=4, num_cayley_neumann_terms=2)),
    "llama 3 terms": ("llama", dict(oft_block_size=4, num_cayley_neumann_terms=3)),
    "llama 4 terms": ("llama", dict(oft_block_size=4, num_cayley_neumann_terms=4)),
    "llama 7 terms": ("llama", dict(oft_block_size=4, num_cayley_neumann_terms=7)),
    "llama constrained": ("llama", dict(oft_block_size=4, coft=True, eps=0.3)),
    "llama constrained, Cayley, shared": ("llama", dict(oft_block_size=4, coft=True, eps=0.01, block_share=True,
                                                        use_cayley_neumann=False)),
    "llama shared": ("llama", dict(r=2, oft_block_size=0, block_share=True, target_modules=ATTENTION)),
    "llama many shared blocks": ("llama", dict(r=10, oft_block_size=0, block_share=True)),
    "llama a dropout that peft does not run": ("llama", dict(oft_block_size=4, module_dropout=0.5)),
    "llama embedding and head": ("llama", dict(oft_block_size=5, target_modules=["embed_tokens", "lm_head"])),
    "llama some layers, head in full": ("llama", dict(oft_block_size=4, layers_to_transform=[0, 2],
                                                      modules_to_save=["lm_head"])),
    "gpt2 embeddings": ("gpt2", dict(oft_block_size=11, target_modules=["wte", "wpe"])),
    "bert classifier": ("bert", dict(task_type="SEQ_CLS", oft_block_size=6)),
    "bert biases of the targets": ("bert", dict(oft_block_size=6, bias="oft_only", target_modules=["query", "key"])),
    "bert all biases": ("bert", dict(oft_block_size=6, bias="all")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_same_numbers(case):
    kind, settings = CASES[case]
    skip_lost_biases(settings, kept=())
    whole_updates.same_numbers(KINDS, kind, **settings)


# the number of terms is one field of a folder: 7 stands for 2, 3 and 4
@pytest.mark.parametrize("case", [case for case in CASES if case not in [f"llama {n} terms" for n in (2, 3, 4)]])
def test_folders_both_ways(case, tmp_path):
    kind, settings = CASES[case]
    skip_lost_biases(settings, kept=())
    whole_updates.folders_both_ways(KINDS, kind, tmp_path, **settings)


@pytest.mark.parametrize("case", ["llama attention", "llama shared", "llama Cayley", "llama constrained",
                                  "llama embedding and head", "bert classifier"])  # fmt: skip
def test_merged_weights(case):
    kind, settings = CASES[case]
    whole_updates.merges_alike(KINDS, kind, **settings)


def test_rows_and_mixtures():
    """(With two adapters, peft rotates what the first has rotated. Here each rotates the layer's own input.)"""
    whole_updates.rows_and_mixtures(KINDS, "llama", oft_block_size=4)


@pytest.mark.parametrize("conv", [nn.Conv2d(6, 8, 1, stride=2, bias=False), nn.Conv2d(6, 8, 1, padding=2)], ids=str)
def test_convolutions_of_one_place(conv):
    whole_updates.convolution(KINDS, conv, oft_block_size=2)


def test_a_grouped_convolution_is_not_merged():
    model = pl.attach(nn.Sequential(nn.Conv2d(6, 8, 1, groups=2)), pl.OFTConfig(oft_block_size=2, target_modules=["0"]))
    with pytest.raises(pl.PeftLabError, match="groups=2"):
        pl.merge(model)


def test_why_a_kernel_is_refused():
    """peft adds overlapping patches up: the model that has not trained yet is another one already."""
    conv = nn.Conv2d(6, 8, 3)
    with pytest.raises(pl.PeftLabError, match="adds up patches"):
        pl.attach(nn.Sequential(conv), pl.OFTConfig(target_modules=["0"]))
    x = torch.randn(2, 6, 8, 8)
    before = conv(x)
    theirs = whole_updates.theirs_of(nn.Sequential(conv), peft.OFTConfig(oft_block_size=6, target_modules=["0"]))
    assert relative(theirs(x), before) > 0.1


def test_a_base_in_sixteen_and_in_four_bits():
    ours, theirs = whole_updates.pair(KINDS, "llama", torch.bfloat16, oft_block_size=4)
    inputs = batch("llama")
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
    model = base("llama", torch.float32)
    pl.quantize_model(model, backend="reference")
    twin = copy.deepcopy(model)
    pl.dequantize_model(twin)
    config = pl.OFTConfig(oft_block_size=4, init_weights=False, target_modules=ATTENTION)
    pl.attach(model, config)
    rotated = whole_updates.theirs_of(
        twin, peft.OFTConfig(oft_block_size=4, init_weights=False, target_modules=ATTENTION)
    )
    whole_updates.give(rotated, model)
    assert relative(model(**inputs).logits, rotated(**inputs).logits) < 1e-5


@pytest.mark.parametrize("field, value, match", [
    ("peft_version", "0.17.1", "before 0.18"), ("peft_version", None, "before 0.18"), ("r", 4, "give one of them"),
    ("num_cayley_neumann_terms", 1, "num_cayley_neumann_terms"), ("bias", "lora_only", "bias"),
])  # fmt: skip
def test_a_folder_that_means_something_else_is_refused(field, value, match, tmp_path):
    _, theirs = whole_updates.pair(KINDS, "llama", oft_block_size=4)
    peft_save(theirs, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(pl.PeftLabError, match=match):
        pl.load_adapter(base("llama"), tmp_path)


def test_a_development_release_of_peft_and_the_exact_form_of_an_old_one(tmp_path):
    _, theirs = whole_updates.pair(KINDS, "llama", oft_block_size=4, use_cayley_neumann=False)
    peft_save(theirs, tmp_path)
    file = tmp_path / "adapter_config.json"
    for more in ({"peft_version": "0.17.0"}, {"peft_version": "0.21.1.dev0@abc"}, {"num_cayley_neumann_terms": 1}):
        file.write_text(json.dumps(json.loads(file.read_text()) | more))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = pl.load_adapter(base("llama"), tmp_path)
        assert relative(output(loaded, "llama"), output(theirs, "llama")) < 1e-12


def test_the_nearest_divisor_is_that_of_peft():
    adjust = peft.tuners.oft.layer.OFTLayer.adjust_oft_parameters
    for width in (1, 2, 7, 12, 20, 37, 64, 100, 576, 768):
        for wanted in (1, 2, 3, 4, 5, 8, 13, 32, 50, 64, 767, 4096):
            taken = wanted if width % wanted == 0 and wanted <= width else adjust(None, width, wanted)
            assert nearest_divisor(width, wanted) == taken, (width, wanted)


@pytest.mark.parametrize("size", [4, 6, 32])
def test_it_is_counted_with_any_size(size):
    model = base("llama")
    told = count({**LLAMA, "model_type": "llama"}, "oft", oft_block_size=size, targets="all-linear")
    pl.attach(model, pl.OFTConfig(oft_block_size=size, target_modules="all-linear"))
    assert pl.count_parameters(model).trainable == told.trainable
