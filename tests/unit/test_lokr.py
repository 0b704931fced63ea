"""LoKr's own mathematics: which factors are whole, and the update by hand. `test_loha.py` holds what both share."""

import pytest
import torch
from torch import nn

import peftlab as pl


def part_of(inside, outside, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inside, outside)).double()
    pl.attach(model, pl.LoKrConfig(target_modules=["0"], init_weights=False, **settings))
    return model, model[0].peftlab["default"]["lokr"]


def test_the_update_by_hand():
    model, part = part_of(6, 8, r=9, alpha=3)
    c, d = part.lokr_w1, part.lokr_w2
    assert c.shape == (2, 2) and d.shape == (4, 3)
    delta = torch.cat([torch.cat([c[i, j] * d for j in range(2)], 1) for i in range(2)]) / 3
    torch.testing.assert_close(part.delta(), delta)
    x = torch.randn(5, 6).double()
    torch.testing.assert_close(model(x), x @ (model[0].weight + delta).T + model[0].bias)


@pytest.mark.parametrize("settings, names", [
    (dict(r=1), {"lokr_w1": (4, 4), "lokr_w2_a": (16, 1), "lokr_w2_b": (1, 8)}),
    (dict(r=8), {"lokr_w1": (4, 4), "lokr_w2": (16, 8)}),
    (dict(r=7), {"lokr_w1": (4, 4), "lokr_w2_a": (16, 7), "lokr_w2_b": (7, 8)}),
    (dict(r=1, decompose_both=True), {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2_a": (16, 1),
                                      "lokr_w2_b": (1, 8)}),
    (dict(r=2, decompose_both=True), {"lokr_w1": (4, 4), "lokr_w2_a": (16, 2), "lokr_w2_b": (2, 8)}),
    (dict(r=1, decompose_factor=-1), {"lokr_w1": (8, 4), "lokr_w2_a": (8, 1), "lokr_w2_b": (1, 8)}),
    (dict(r=1, decompose_factor=1), {"lokr_w1": (1, 1), "lokr_w2_a": (64, 1), "lokr_w2_b": (1, 32)}),
], ids=str)  # fmt: skip
def test_which_factors_are_whole(settings, names):
    _, part = part_of(32, 64, **{"decompose_factor": 4, **settings})
    assert {name: tuple(parameter.shape) for name, parameter in part.named_parameters()} == names


@pytest.mark.parametrize("init, zero", [(True, "lokr_w1"), ("lycoris", "lokr_w2_b"), (False, None)])
def test_which_factor_starts_at_zero(init, zero):
    torch.manual_seed(0)
    model = pl.attach(nn.Sequential(nn.Linear(32, 64)), pl.LoKrConfig(r=2, target_modules=["0"], init_weights=init))
    own = dict(model[0].peftlab["default"]["lokr"].named_parameters())
    assert [name for name, parameter in own.items() if not parameter.any()] == ([zero] if zero else [])


@pytest.mark.parametrize("field, value", [
    ("decompose_factor", -2), ("decompose_factor", 1.5), ("decompose_both", 2), ("rank_dropout_scale", "yes"),
    ("init_weights", "gaussian"), ("init_weights", None),
])  # fmt: skip
def test_a_value_out_of_range(field, value):
    with pytest.raises(pl.PeftLabError, match=field):
        pl.LoKrConfig(**{field: value})
