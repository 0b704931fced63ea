"""LoHa held to Hugging Face peft: counts, outputs, gradients, three AdamW steps, dropouts, folders, merged weights."""

import peft
import pytest
import torch
import whole_updates
from pairs import batch, relative
from torch import nn

import peftlab as pl

KINDS = pl.LoHaConfig, peft.LoHaConfig
CASES = {
    "llama default targets": ("llama", {}),
    "llama all-linear": ("llama", dict(target_modules="all-linear")),
    "llama patterns": ("llama", dict(target_modules=["q_proj", "down_proj"], rank_pattern={r"layers\.1\..*": 2},
                                     alpha_pattern={"down_proj": 7, r"layers\.2.*q_proj": 1.5})),
    "llama some layers, head in full": ("llama", dict(layers_to_transform=[0, 2], modules_to_save=["lm_head"])),
    "llama the effective form": ("llama", dict(use_effective_conv2d=True, layers_to_transform=[1])),
    "gpt2 head": ("gpt2", dict(target_modules=["lm_head"])),
    "bert classifier": ("bert", dict(task_type="SEQ_CLS", target_modules=r".*(query|dense)")),
}  # fmt: skip
RANK = dict(r=5, alpha=16)  # 16 / 5 is no binary fraction


@pytest.mark.parametrize("case", CASES)
def test_same_numbers(case):
    kind, settings = CASES[case]
    whole_updates.same_numbers(KINDS, kind, **RANK, **settings)


@pytest.mark.parametrize("case", CASES)
def test_folders_both_ways(case, tmp_path):
    kind, settings = CASES[case]
    dropouts = dict(rank_dropout=0.1, module_dropout=0.25)
    whole_updates.folders_both_ways(KINDS, kind, tmp_path, **RANK, **dropouts, **settings)


@pytest.mark.parametrize("dropouts", [(0.4, 0.0), (0.0, 0.4), (0.4, 0.4)])
def test_dropouts_draw_the_same(dropouts):
    rank, module = dropouts
    whole_updates.same_masks(KINDS, "llama", **RANK, rank_dropout=rank, module_dropout=module)


@pytest.mark.parametrize("case", ["llama patterns", "bert classifier"])
def test_merged_weights(case):
    kind, settings = CASES[case]
    whole_updates.merges_alike(KINDS, kind, **RANK, **settings)


def test_rows_and_mixtures():
    whole_updates.rows_and_mixtures(KINDS, "llama", **RANK)
    ours, theirs = whole_updates.pair(KINDS, "llama", **RANK)
    other = dict(r=2, alpha=7, target_modules=["k_proj"], init_weights=False)
    theirs.add_adapter("other", peft.LoHaConfig(**other))
    pl.attach(ours, pl.LoHaConfig(**other), name="other")
    whole_updates.give(theirs, ours, "other", "other")
    theirs.base_model.set_adapter(["default", "other"])
    pl.activate(ours, {"default": 1.0, "other": 1.0})
    inputs = batch("llama")
    assert relative(ours(**inputs).logits, theirs(**inputs).logits) < 1e-9


CONVOLUTIONS = {
    "1 x 1": lambda: nn.Conv2d(6, 8, 1, stride=2),
    "3 x 5": lambda: nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(1, 2), bias=False),
    "groups": lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2),
    "same, dilation": lambda: nn.Conv2d(6, 8, 3, padding="same", dilation=2),
    "reflected": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "1d": lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1),
    "1d, groups": lambda: nn.Conv1d(6, 8, 5, groups=2, bias=False),
    "1d, 1": lambda: nn.Conv1d(6, 8, 1),
}


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case, effective):
    """peft's backward pass of the effective form is wrong (it swaps its two halves), so there only outputs are held."""
    steps = not effective or case in ("1 x 1", "1d, 1")
    settings = dict(r=3, alpha=5, use_effective_conv2d=effective)
    ours = whole_updates.convolution(KINDS, CONVOLUTIONS[case](), steps, **settings)
    if case == "reflected":
        with pytest.raises(pl.PeftLabError, match="padding_mode='reflect'"):
            pl.merge(ours)


def test_gradients_of_the_effective_form_are_those_of_its_output():
    """By torch's numerical check, which peft's own function fails."""
    from peft.tuners.loha.layer import make_weight_cp

    part = pl.attach(
        nn.Sequential(nn.Conv2d(3, 4, 2)).double(),
        pl.LoHaConfig(r=2, target_modules=["0"], use_effective_conv2d=True, init_weights=False),
    )[0].peftlab["default"]["loha"]
    own = dict(part.named_parameters())
    names = ("hada_t1", "hada_w1_a", "hada_w1_b", "hada_t2", "hada_w2_a", "hada_w2_b")
    given = [own[name].detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *v: part.update(dict(zip(names, v, strict=True))), given)
    theirs = make_weight_cp(*given, torch.tensor(part.scaling))
    assert relative(part.update(own), theirs) < 1e-9
    expected = torch.autograd.grad(part.update(dict(zip(names, given, strict=True))).square().sum(), given)
    found = torch.autograd.grad(theirs.square().sum(), given)
    wrong = [name for name, a, b in zip(names, found, expected, strict=True) if relative(a, b) > 1e-6]
    assert wrong == ["hada_w1_a", "hada_w2_a"], "peft has mended its backward pass: hold the steps to it, too"
