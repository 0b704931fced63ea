"""IA3's own mathematics and what it refuses; tests/parity holds it to Hugging Face peft."""

import pytest
import torch
from nets import Net, assert_same, snapshot, tokens
from torch import nn

import peftlab as pl


def test_a_scale_on_the_output_and_one_on_the_input_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    pl.attach(model, pl.IA3Config(target_modules=["0", "1"], feedforward_modules=["1"], init="random"))
    first, second = (model[i].peftlab["default"]["ia3"].ia3_l for i in (0, 1))
    assert first.shape == (4, 1) and second.shape == (1, 4)
    x, weight = torch.randn(6, 5).double(), torch.randn(6, 3).double()
    inner = x @ model[0].weight.T + model[0].bias
    scaled = inner * first.flatten() * second.flatten()
    found = model(x)
    torch.testing.assert_close(found, scaled @ model[1].weight.T + model[1].bias)
    # dL/dl is the gradient of what is scaled times what is scaled, summed over the batch
    (found * weight).sum().backward()
    gradient = weight @ model[1].weight
    torch.testing.assert_close(first.grad.flatten(), (gradient * second.flatten() * inner).sum(0))
    torch.testing.assert_close(second.grad.flatten(), (gradient * first.flatten() * inner).sum(0))


def test_it_starts_where_the_base_is_and_leaves_it_so():
    model = Net()
    before, was = model(tokens()), snapshot(model)
    pl.attach(model, pl.IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]))
    assert torch.equal(model(tokens()), before)
    assert pl.count_parameters(model).trainable == 2 * (11 + 11)
    pl.detach(model)
    assert_same(was, snapshot(model))


def test_inputs_given_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 2).double()

        def forward(self, x):
            return self.inner(input=x)

    model = Named()
    pl.attach(model, pl.IA3Config(target_modules=["inner"], feedforward_modules=["inner"], init="random"))
    x = torch.randn(4, 3).double()
    expected = (x * model.inner.peftlab["default"]["ia3"].ia3_l) @ model.inner.weight.T + model.inner.bias
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_merging_folds_the_scale_into_rows_or_columns(transposed):
    model = Net()
    targets = ["down"] if transposed else ["up"]  # Conv1D stores (in, out), Linear (out, in)
    for inputs in ([], targets):
        pl.attach(model, pl.IA3Config(target_modules=targets, feedforward_modules=inputs, init="random"))
        expected, was = model(tokens()), model.blocks[0].down.weight.clone()
        pl.merge(model)
        torch.testing.assert_close(model(tokens()), expected)
        pl.unmerge(model)
        assert torch.equal(model.blocks[0].down.weight, was)
        pl.detach(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(init="zeros"), "init must be one of 'ones', 'random'; found 'zeros'"),
        (dict(feedforward_modules=3), "feedforward_modules is 3; give a list"),
        (dict(feedforward_modules="("), "is no regular expression"),
        (dict(target_modules=["k_proj"], feedforward_modules=["down_proj"]), "names 'down_proj', which is not in"),
    ],
)
def test_values_that_are_refused(settings, message):
    with pytest.raises(pl.PeftLabError, match=message):
        pl.IA3Config(**settings)


def test_modules_that_are_refused():
    model = Net()
    before = snapshot(model)
    for targets, message in [
        (None, "keys, values and feed-forward of Net are not known. .* end in embed, up, down, head"),
        (["embed"], "embed is an embedding; IA3 scales linear layers"),
        (["norm"], "blocks.0.norm is a LayerNorm"),
        (["upp"], "Did you mean 'up'"),
    ]:
        with pytest.raises(pl.PeftLabError, match=message):
            pl.attach(model, pl.IA3Config(target_modules=targets))
    assert_same(before, snapshot(model))
