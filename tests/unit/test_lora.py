"""LoRA's own mathematics: start, scaling, gradients by hand, values that are refused."""

import math

import pytest
import torch
from nets import Net, assert_same, snapshot, tokens
from torch import nn

import peftlab as pl


def single(inside=5, outside=3, **settings):
    model = nn.Sequential(nn.Linear(inside, outside)).double()
    pl.attach(model, pl.LoRAConfig(target_modules=["0"], **settings))
    return model, model[0].peftlab["default"]["lora"]


def test_gradients_by_hand():
    """dL/dB = s G (A x)^T and dL/dA = s B^T G x^T, summed over the batch; G = dL/dy."""
    model, part = single(r=2, alpha=7, init="random")
    x, weight = torch.randn(4, 5).double(), torch.randn(4, 3).double()
    (model(x) * weight).sum().backward()
    s = 7 / 2
    torch.testing.assert_close(part.lora_B.grad, s * weight.T @ (x @ part.lora_A.T))
    torch.testing.assert_close(part.lora_A.grad, s * (weight @ part.lora_B).T @ x)
    assert model[0].weight.grad is None and model[0].bias.grad is None


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_it_starts_where_the_base_is(init):
    torch.manual_seed(0)
    model = Net()
    before = model(tokens())
    pl.attach(model, pl.LoRAConfig(r=4, target_modules=["up", "down", "head", "embed"], init=init))
    drawn = init == "orthogonal"  # there B A is zero, up to rounding, and B is not
    torch.testing.assert_close(model(tokens()), before, rtol=0, atol=1e-6 if drawn else 0)
    model(tokens()).square().sum().backward()
    parts = [host.peftlab["default"]["lora"] for host in (model.head, model.blocks[0].down)]
    assert all(part.lora_B.grad.any() and part.lora_A.grad.any() == drawn for part in parts)


def test_inits_draw_what_they_say():
    torch.manual_seed(0)
    _, part = single(400, 3, r=50)
    assert part.lora_A.abs().max() <= 1 / math.sqrt(400)
    assert abs(part.lora_A.std() * math.sqrt(3 * 400) - 1) < 0.02  # a uniform of half-width 1/sqrt(in)
    _, part = single(400, 3, r=50, init="gaussian")
    assert abs(part.lora_A.std() * 50 - 1) < 0.02
    for r in (8, 5, 1):
        _, part = single(400, 300, r=r, init="orthogonal")
        torch.testing.assert_close(part.lora_B @ part.lora_A, torch.zeros(300, 400).double(), atol=1e-6, rtol=0)
        assert part.lora_A.any() and part.lora_B.any() == (r > 1)
        ranks = [torch.linalg.matrix_rank(factor, atol=1e-4) for factor in (part.lora_A, part.lora_B)]
        assert ranks == [r - r // 2, r // 2]
    _, part = single(40, 3, r=8, init="random")
    assert part.lora_B.any()


def test_dropout_only_while_training_and_on_average_nothing():
    torch.manual_seed(0)
    model, part = single(r=3, alpha=6, dropout=0.5, init="random")
    x = torch.randn(1, 5).double()
    model.eval()
    exact = model(x)
    assert torch.equal(exact, model(x))
    model.train()
    draws = model(x.expand(20_000, 5))
    assert draws.std() > 0.01
    torch.testing.assert_close(draws.mean(0, keepdim=True), exact, atol=0.05, rtol=0)


def test_an_adapter_takes_the_mode_of_its_layer():
    model = Net().eval()
    pl.attach(model, pl.LoRAConfig(target_modules=["up"], dropout=0.9, init="random"))
    assert torch.equal(model(tokens()), model(tokens()))


def test_count_and_shapes():
    model = Net()
    base = sum(parameter.numel() for parameter in model.parameters())
    pl.attach(model, pl.LoRAConfig(r=3, target_modules=["up", "down", "embed"], rank_pattern={"blocks.1.up": 2}))
    expected = 3 * (6 + 11) * 3 + 2 * (6 + 11) + 3 * (13 + 6)
    assert pl.count_parameters(model) == (expected, base + expected, 100 * expected / (base + expected))
    assert f"{expected:,} of" in str(pl.count_parameters(model))


@pytest.mark.parametrize("settings, said", [
    (dict(r=0), "positive whole number"), (dict(r=-4), "r must be .* found -4"),
    (dict(r=2.0), "r must be .* found 2.0"),
    (dict(r=True), "r must be .* found True"),
    (dict(r="8"), "r must be .* found '8'"), (dict(rank_pattern={"up": 0}), "rank_pattern"),
    (dict(alpha=0), "alpha must be .* found 0"),
    (dict(alpha=math.inf), "alpha must be .* found inf"), (dict(alpha=math.nan), "alpha must be .* found nan"),
    (dict(alpha="16"), "alpha must be .* found '16'"),
    (dict(alpha_pattern={"up": -1}), "alpha_pattern"), (dict(dropout=1.0), "dropout must be .* found 1.0"),
    (dict(dropout=-0.1), "dropout"),
    (dict(init="kaming"), "Did you mean 'kaiming'"), (dict(bias="some"), "bias must be .* found 'some'"),
    (dict(bias=None), "bias must be .* found None"),
])  # fmt: skip
def test_values_out_of_range(settings, said):
    with pytest.raises(pl.PeftLabError, match=said):
        pl.LoRAConfig(**settings)


def test_a_layer_of_ones_own_that_stores_its_weight_transposed():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 5, 3
            self.weight = nn.Parameter(torch.randn(5, 3).double())

        def forward(self, x):
            return x @ self.weight

    model = nn.Sequential(Transposed())
    x = torch.randn(2, 5).double()
    pl.attach(model, pl.LoRAConfig(target_modules=["0"], fan_in_fan_out=True, init="random"))
    expected = model(x)
    pl.merge(model)
    torch.testing.assert_close(model(x), expected)
    # said of a Linear, it changes nothing
    model, _ = single(fan_in_fan_out=True, init="random")
    expected = model(x)
    pl.merge(model)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("layer, x", [
    (nn.Conv2d(2, 3, 3), torch.randn(2, 2, 5, 5)), (nn.Conv1d(2, 5, 3), torch.randn(2, 2, 7)),
    (nn.ConvTranspose2d(2, 3, 2), torch.randn(1, 2, 3, 3)), (nn.BatchNorm2d(2), torch.randn(3, 2, 4, 4)),
    (nn.BatchNorm1d(4), torch.randn(3, 4)), (nn.GroupNorm(2, 4), torch.randn(3, 4, 4)),
    (nn.LayerNorm(4), torch.randn(3, 4)),
    (nn.Conv2d(2, 3, 3), torch.randn(2, 5, 5)),
])  # fmt: skip
def test_trained_biases_stand_on_the_channels(layer, x):
    """A trained copy of a bias must act as the bias itself would, wherever the layer has its channels."""
    layer.double().eval()
    x = x.double()
    model = nn.ModuleDict({"layer": layer, "linear": nn.Linear(2, 2).double()})
    pl.attach(model, pl.LoRAConfig(target_modules=["linear"], bias="all"))
    change = torch.randn(layer.bias.shape).double()
    with torch.no_grad():
        layer.peftlab["default"]["bias"].bias.add_(change)
    found = layer(x)
    found.square().sum().backward()
    assert layer.peftlab["default"]["bias"].bias.grad.any()
    pl.detach(model)
    with torch.no_grad():
        layer.bias.add_(change)
    torch.testing.assert_close(found, layer(x))


def test_a_module_trained_in_full_leaves_the_base_alone():
    model = Net()
    before = snapshot(model)
    pl.attach(model, pl.LoRAConfig(target_modules=["up"], modules_to_save=["head", "blocks.1.norm"], bias="all"))
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pl.disabled(model):
        start = model(tokens())
    for _ in range(2):
        model(tokens()).square().sum().backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing  # a copied head's bias is not trained a second time, beside the copy
        optimiser.step()
        optimiser.zero_grad()
    assert not torch.allclose(model(tokens()), start)
    with pl.disabled(model):
        assert torch.equal(model(tokens()), start)
    pl.detach(model)
    assert_same(before, snapshot(model))
