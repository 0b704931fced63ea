"""LoKr held to Hugging Face peft: counts, outputs, gradients, three AdamW steps, dropouts, folders, merged weights."""

import peft
import pytest
import torch
import whole_updates
from pairs import base, relative
from test_lora_folders import peft_save
from torch import nn

import peftlab as pl
from peftlab.memory import count
from peftlab.methods.lokr import factors

KINDS = pl.LoKrConfig, peft.LoKrConfig
CASES = {
    "llama default targets": ("llama", {}),
    "llama all-linear, thin factors": ("llama", dict(r=1, target_modules="all-linear")),
    "llama both decomposed": ("llama", dict(r=1, target_modules=["q_proj", "up_proj"], decompose_both=True)),
    "llama factor 4": ("llama", dict(r=2, target_modules=["q_proj", "k_proj", "down_proj"], decompose_factor=4)),
    "llama factor 7, both": ("llama", dict(r=1, target_modules=["v_proj"], decompose_factor=7, decompose_both=True)),
    "llama a factor above a side": ("llama", dict(target_modules=["v_proj"], decompose_factor=12)),
    "llama a rank above all sides": ("llama", dict(r=64, alpha=3, decompose_both=True)),
    "llama patterns": ("llama", dict(target_modules=["q_proj", "down_proj"], rank_pattern={r"layers\.1\..*": 1},
                                     alpha_pattern={"down_proj": 7, r"layers\.2.*q_proj": 1.5})),
    "llama some layers, head in full": ("llama", dict(layers_to_transform=[0, 2], modules_to_save=["lm_head"])),
    "gpt2 head": ("gpt2", dict(target_modules=["lm_head"], decompose_factor=3)),
    "bert classifier": ("bert", dict(task_type="SEQ_CLS", target_modules=r".*(query|dense)")),
}  # fmt: skip


def settings_of(case):
    kind, settings = CASES[case]
    return kind, {"r": 2, "alpha": 5, **settings}


@pytest.mark.parametrize("case", CASES)
def test_same_numbers(case):
    kind, settings = settings_of(case)
    whole_updates.same_numbers(KINDS, kind, **settings)


@pytest.mark.parametrize("case", CASES)
def test_folders_both_ways(case, tmp_path):
    kind, settings = settings_of(case)
    dropouts = dict(rank_dropout=0.1, module_dropout=0.25, rank_dropout_scale="both" in case)
    whole_updates.folders_both_ways(KINDS, kind, tmp_path, **dropouts, **settings)


@pytest.mark.parametrize("init", [True, "lycoris"])
def test_how_it_starts(init, tmp_path):
    """The same factor is zero as in peft, and a folder says so."""
    ours, theirs = whole_updates.pair(KINDS, "llama", r=1, init_weights=init, decompose_both=True, scramble=False)
    fresh = pl.attach(base("llama"), pl.LoKrConfig(r=1, init_weights=init, decompose_both=True))
    mine, other = whole_updates.our_state(fresh), whole_updates.live(theirs)
    assert {key for key, value in mine.items() if not value.any()} == {k for k, v in other.items() if not v.any()}
    assert any(not value.any() for value in mine.values())
    peft_save(theirs, tmp_path)
    assert pl.attached(pl.load_adapter(base("llama"), tmp_path))["default"].init_weights == init


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dropouts", [(0.4, 0.0), (0.4, 0.4)])
def test_dropouts_draw_the_same(dropouts, scaled):
    rank, module = dropouts
    more = dict(rank_dropout=rank, module_dropout=module, rank_dropout_scale=scaled)
    whole_updates.same_masks(KINDS, "llama", r=2, alpha=5, **more)


@pytest.mark.parametrize("case", ["llama factor 4", "bert classifier"])
def test_merged_weights(case):
    kind, settings = settings_of(case)
    whole_updates.merges_alike(KINDS, kind, **settings)


def test_rows_and_mixtures():
    whole_updates.rows_and_mixtures(KINDS, "llama", r=2, alpha=5)


CONVOLUTIONS = {
    "1 x 1": lambda: nn.Conv2d(12, 16, 1, stride=2),
    "3 x 5": lambda: nn.Conv2d(12, 16, (3, 5), stride=(2, 1), padding=(1, 2), bias=False),
    "groups": lambda: nn.Conv2d(12, 16, 3, padding=1, groups=2),
    "same, dilation": lambda: nn.Conv2d(12, 16, 3, padding="same", dilation=2),
    "1d": lambda: nn.Conv1d(12, 16, 3, stride=2, padding=1),
    "1d, groups": lambda: nn.Conv1d(12, 16, 5, groups=2, bias=False),
    "1d, 1": lambda: nn.Conv1d(12, 16, 1),
}


@pytest.mark.parametrize("more", [dict(r=1), dict(r=2, decompose_factor=2, use_effective_conv2d=True), dict(r=8),
                                  dict(r=1, decompose_both=True, decompose_factor=4)], ids=str)  # fmt: skip
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case, more):
    """With thin factors, with a kernel between them, and whole (r=8): in peft a whole D of a Conv1d lies otherwise."""
    whole_updates.convolution(KINDS, CONVOLUTIONS[case](), channels=12, alpha=5, **more)


def test_a_kernel_of_rank_one():
    """torch.kron, and with it peft, fails there."""
    model = nn.Sequential(nn.Conv1d(12, 16, 3)).double()
    pl.attach(model, pl.LoKrConfig(r=1, target_modules=["0"], use_effective_conv2d=True, init_weights=False))
    part = model[0].peftlab["default"]["lokr"]
    second = torch.einsum("ijkl,ip,jq->pqkl", part.lokr_t2, part.lokr_w2_a, part.lokr_w2_b)[..., 0]
    each = [torch.kron(part.lokr_w1, second[..., k].contiguous()) for k in range(3)]
    assert relative(part.delta(), torch.stack(each, -1) * part.scaling) < 1e-12


@pytest.mark.parametrize("factor", [0, -3])
def test_a_limit_below_one_in_a_folder_of_peft(factor, tmp_path):
    ours, theirs = whole_updates.pair(KINDS, "llama", r=2, decompose_factor=1)
    theirs.peft_config["default"].decompose_factor = factor
    peft_save(theirs, tmp_path)
    loaded = pl.load_adapter(base("llama"), tmp_path)
    assert torch.equal(whole_updates.output(loaded, "llama"), whole_updates.output(ours, "llama"))


def test_factors_are_those_of_peft():
    from peft.tuners.lokr.layer import factorization

    for size in (1, 2, 7, 12, 36, 64, 97, 128, 192, 300, 768, 4096, 11008):
        for most in (-1, 0, 1, 2, 3, 4, 5, 8, 12, 16, 50, 64, 100, 5000):
            assert factors(size, most) == factorization(size, most), (size, most)


@pytest.mark.parametrize("factor", [-1, 4, 7])
def test_it_is_counted_with_any_factor(factor):
    model = base("llama")
    told = count(model.config.to_dict(), "lokr", r=2, decompose_factor=factor)
    pl.attach(model, pl.LoKrConfig(r=2, decompose_factor=factor))
    assert pl.count_parameters(model).trainable == told.trainable
