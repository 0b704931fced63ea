"""LoHa's own mathematics, what it keeps for the backward pass, and what it refuses; LoKr shares the part under it."""

import warnings

import pytest
import tiny
import torch
from test_resume import begin, interrupted
from torch import nn

import peftlab as pl


def layers(config, *sizes):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))).double()
    return pl.attach(model, config)


def test_the_update_by_hand():
    model = layers(pl.LoHaConfig(r=2, alpha=3, target_modules=["0"], init_weights=False), 5, 4)
    part = model[0].peftlab["default"]["loha"]
    a1, b1, a2, b2 = part.hada_w1_a, part.hada_w1_b, part.hada_w2_a, part.hada_w2_b
    assert a1.shape == a2.shape == (4, 2) and b1.shape == b2.shape == (2, 5)
    delta = torch.zeros(4, 5).double()
    for i in range(4):
        for j in range(5):
            delta[i, j] = 1.5 * (a1[i] @ b1[:, j]) * (a2[i] @ b2[:, j])
    x = torch.randn(6, 5).double()
    torch.testing.assert_close(model(x), x @ (model[0].weight + delta).T + model[0].bias)
    torch.testing.assert_close(part.delta(), delta)


def test_its_rank_may_be_the_square_of_r():
    model = layers(pl.LoHaConfig(r=2, target_modules=["0"], init_weights=False), 9, 9)
    assert torch.linalg.matrix_rank(model[0].peftlab["default"]["loha"].delta()) == 4


@pytest.mark.parametrize("config", [
    pl.LoHaConfig(r=2, target_modules=["0", "1"], init_weights=False),
    pl.LoKrConfig(r=2, target_modules=["0", "1"], init_weights=False),
], ids=lambda config: config.method)  # fmt: skip
def test_nothing_as_large_as_a_weight_is_kept_for_the_backward_pass(config):
    """Autograd's hooks see the factors and the inputs, and no whole update."""
    model, kept = layers(config, 40, 44, 48), []
    x = torch.randn(3, 40).double()

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    frozen = {layer.weight.data_ptr() for layer in model}
    assert all(tensor.numel() < 40 * 44 for tensor in kept if tensor.data_ptr() not in frozen)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_with_no_row_left_nothing_is_added():
    """There peft divides zero by zero."""
    model = layers(pl.LoHaConfig(r=2, rank_dropout=0.99, target_modules=["0"], init_weights=False), 5, 1).train()
    x = torch.randn(6, 5).double()
    with pl.disabled(model):
        base = model(x)
    torch.manual_seed(0)
    results = [model(x) for _ in range(5)]
    assert all(torch.isfinite(y).all() for y in results) and any(torch.equal(y, base) for y in results)


def test_rows_that_stay_are_divided_by_their_share():
    model = layers(pl.LoHaConfig(r=2, rank_dropout=0.5, target_modules=["0"], init_weights=False), 5, 400).train()
    rows = model[0].peftlab["default"]["loha"].kept_rows(torch.float64)
    assert rows.mean() == pytest.approx(1) and 0 < (rows == 0).sum() < 400
    assert rows.shape == (400, 1) and len(rows.unique()) == 2


@pytest.mark.parametrize("config", [
    pl.LoHaConfig(r=2, rank_dropout=0.3, module_dropout=0.2), pl.LoKrConfig(r=1, rank_dropout=0.3, module_dropout=0.2),
    pl.OFTConfig(oft_block_size=4, coft=True, eps=0.1),
], ids=lambda config: config.method)  # fmt: skip
def test_a_run_that_resumes_ends_in_the_same_bits(config, tmp_path):
    def fresh():
        torch.manual_seed(7)
        return pl.attach(tiny.llama(), config)

    expected, model = begin(None, model=fresh())
    interrupted(tmp_path, model=fresh())
    found, other = begin(tmp_path, model=fresh())
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("config, named", [
    (dict(target_modules=["0"]), "0 is a Conv3d, for which LoHa has no form"),
    (dict(target_modules=["1"]), "1 is an embedding, for which LoHa has no form"),
    (dict(target_modules=["2"], rank_pattern={"7": 2}), "'7' matches none of the 1 target modules"),
    (dict(target_modules=["2"], alpha_pattern={"9": 2}), "'9' matches none of the 1 target modules"),
])  # fmt: skip
def test_what_it_refuses(config, named):
    model = nn.Sequential(nn.Conv3d(2, 2, 1), nn.Embedding(3, 4), nn.Linear(4, 5))
    for kind, name in ((pl.LoHaConfig, "LoHa"), (pl.LoKrConfig, "LoKr")):
        with pytest.raises(pl.PeftLabError, match=named.replace("LoHa", name)):
            pl.attach(model, kind(**config))


@pytest.mark.parametrize("field, value", [
    ("r", 0), ("alpha", 0), ("rank_dropout", 1.0), ("module_dropout", -0.1), ("init_weights", "lycoris"),
    ("use_effective_conv2d", None), ("rank_pattern", {"q_proj": 0}), ("alpha_pattern", {"q_proj": -1}),
])  # fmt: skip
def test_a_value_out_of_range(field, value):
    with pytest.raises(pl.PeftLabError, match=field):
        pl.LoHaConfig(**{field: value})


@pytest.mark.parametrize("config", [
    pl.LoHaConfig(r=2, module_dropout=0.6, target_modules=["o_proj"], layers_to_transform=[0]),
    pl.LoKrConfig(r=2, module_dropout=0.6, target_modules=["o_proj"], layers_to_transform=[0]),
], ids=["loha", "lokr"])  # fmt: skip
def test_a_step_that_leaves_every_update_out_is_no_error(config):
    """Of twelve steps with one adapted layer, some have no gradient at all; the others train."""
    model = pl.attach(tiny.llama(), config)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = pl.train(model, tiny.examples(), steps=12, batch_size=4, learning_rate=1e-2, progress=False)
    norms = [row["grad_norm"] for row in history.steps]
    assert 0 in norms and any(norms)


@pytest.mark.parametrize("config", [pl.LoHaConfig(), pl.LoKrConfig(), pl.OFTConfig(coft=True)], ids=str)
def test_a_model_without_numbers_may_have_it(config):
    with torch.device("meta"):
        model = pl.attach(tiny.llama(), config)
        assert model(torch.zeros(1, 3, dtype=torch.long)).logits.is_meta
