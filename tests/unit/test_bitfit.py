"""BitFit and whole modules: what they refuse, and that switching leaves the base alone; see tests/parity too."""

import pytest
import torch
from nets import Net, assert_same, snapshot, tokens
from torch import nn

import peftlab as pl


@pytest.mark.parametrize("config", [
    pl.BitFitConfig(), pl.BitFitConfig(target_modules=["up"]), pl.SelectiveConfig(target_modules=["blocks.1", "head"]),
    pl.SelectiveConfig(modules_to_save=["head"]), pl.SelectiveConfig(last_layers=2),
])  # fmt: skip
def test_switched_mixed_by_rows_and_detached(config):
    model = Net()
    was, x = snapshot(model), tokens(3)
    alone = {None: model(x)}
    pl.attach(model, config, name="a")
    assert torch.equal(model(x), alone[None])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.3).add_(0.1)
    alone["a"] = model(x)
    assert not torch.allclose(alone["a"], alone[None], atol=1e-3)
    pl.attach(model, pl.BitFitConfig(), name="b")
    alone["b"] = model(x)
    pl.activate(model, ["a", None, "b"])
    rows = model(x)
    for i, name in enumerate(["a", None, "b"]):
        torch.testing.assert_close(rows[i], alone[name][i])
    pl.activate(model, {"a": 1.0, "b": 1.0})  # b has changed nothing
    torch.testing.assert_close(model(x), alone["a"])
    pl.detach(model, "a")
    pl.detach(model, "b")
    assert_same(was, snapshot(model))


def test_a_bias_is_counted_once_and_a_copy_twice():
    model = Net()
    base = sum(p.numel() for p in model.parameters())
    pl.attach(model, pl.BitFitConfig())
    biases = 2 * (6 + 11 + 6) + 5
    assert pl.count_parameters(model)[:2] == (biases, base)
    pl.detach(model)
    pl.attach(model, pl.SelectiveConfig(target_modules=["head"]))
    assert pl.count_parameters(model)[:2] == (6 * 5 + 5, base + 6 * 5 + 5)


def test_models_that_are_refused():
    without = nn.Sequential(nn.Linear(3, 3, bias=False))
    with pytest.raises(pl.PeftLabError, match="Sequential has no biases, so BitFit .* Use IA3Config"):
        pl.attach(without, pl.BitFitConfig())
    with pytest.raises(pl.PeftLabError, match="0 has no bias, so BitFit has nothing to train there"):
        pl.attach(without, pl.BitFitConfig(target_modules=["0"]))
    with pytest.raises(pl.PeftLabError, match="is not simply added .*exclude_modules"):
        pl.attach(nn.Sequential(nn.MultiheadAttention(4, 2)), pl.BitFitConfig())
    model = Net()
    before = snapshot(model)
    for config, message in [
        (pl.SelectiveConfig(), "Nothing is chosen to train"),
        (pl.SelectiveConfig(last_layers=3), "last_layers is 3, but Net has 2 numbered blocks"),
        (pl.SelectiveConfig(target_modules=["hed"]), "Did you mean 'head'"),
        (pl.SelectiveConfig(task_type="SEQ_CLS"), "Net has no head called classifier or score"),
    ]:
        with pytest.raises(pl.PeftLabError, match=message):
            pl.attach(model, config)
    assert_same(before, snapshot(model))
    for settings, message in [
        (dict(last_layers=-1), "last_layers must be .* found -1"),
        (dict(last_layers=True), "last_layers must be .* found True"),
        (dict(last_layers=1, target_modules=["head"]), "Give last_layers or target_modules, not both"),
    ]:
        with pytest.raises(pl.PeftLabError, match=message):
            pl.SelectiveConfig(**settings)
