"""DoRA by hand on one layer, what it refuses, and weights and magnitudes that are not ordinary."""

import copy

import pytest
import torch
from nets import assert_same, snapshot
from tiny import examples, llama, tokenizer
from torch import nn

import peftlab as pl


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def net(bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    return Net(nn.Linear(6, 4, bias=bias)).to(dtype)


def part_of(model, name="default"):
    return model.layer.peftlab[name]["dora"]


def adapted(model=None, **settings):
    model = net() if model is None else model
    pl.attach(model, pl.DoRAConfig(**{"r": 2, "alpha": 3, "init": "random", "target_modules": ["layer"], **settings}))
    with torch.no_grad():
        part_of(model).magnitude.mul_(torch.linspace(0.5, 2, part_of(model).magnitude.numel()).double())
    return model


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_formula_by_hand():
    model = adapted(use_rslora=True)
    part, layer = part_of(model), model.layer
    direction = layer.weight + 3 / 2**0.5 * part.lora_B @ part.lora_A
    rows = torch.stack([m * row / row.square().sum().sqrt() for m, row in zip(part.magnitude, direction, strict=True)])
    expected = X @ rows.T + layer.bias
    assert torch.allclose(model(X), expected, atol=1e-14)
    pl.merge(model)
    assert torch.allclose(layer.weight, rows, atol=1e-14) and torch.allclose(model(X), expected, atol=1e-14)


def test_the_norm_is_a_constant_in_the_backward_pass():
    """Then the gradient of B is that of LoRA, each row times m / c; the magnitude's is along the direction."""
    model = adapted()
    part, layer = part_of(model), model.layer
    layer.weight.requires_grad_(True)  # trained beside it, W gets the same gradient as without the norms
    dy = torch.randn(5, 4, dtype=torch.float64)
    (model(X) * dy).sum().backward()
    direction = (layer.weight + 1.5 * part.lora_B @ part.lora_A).detach()
    ratio = part.magnitude.detach() / direction.norm(dim=1)
    assert torch.allclose(part.lora_B.grad, 1.5 * (dy * ratio).T @ (X @ part.lora_A.detach().T))
    assert torch.allclose(layer.weight.grad, (dy * ratio).T @ X)
    along = (dy * (X @ direction.T)).sum(0) / direction.norm(dim=1)
    assert torch.allclose(part.magnitude.grad, along)


def test_it_starts_as_the_base_and_the_magnitude_is_the_norm():
    model = net()
    before = model(X)
    pl.attach(model, pl.DoRAConfig(r=2, target_modules=["layer"]))
    assert torch.allclose(model(X), before, atol=1e-15)
    assert torch.allclose(part_of(model).magnitude, model.layer.weight.norm(dim=1), atol=1e-15)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_weight_with_zeros_stays_finite_and_zero(kind):
    """A row of zeros has no direction. peft divides 0 by 0 there."""
    torch.manual_seed(0)
    layer = nn.Embedding(7, 4).double() if kind == "embedding" else nn.Linear(6, 4, bias=False).double()
    with torch.no_grad():
        (layer.weight[:, 2] if kind == "embedding" else layer.weight[2]).zero_()
    x = torch.tensor([[1, 2, 6]]) if kind == "embedding" else X
    model = pl.attach(Net(layer), pl.DoRAConfig(r=2, target_modules=["layer"]))
    part = part_of(model)
    optimizer = torch.optim.AdamW(part.parameters(), lr=0.1)
    for _ in range(3):
        model(x).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in part.parameters())
        optimizer.step()
        optimizer.zero_grad()
    expected = model(x)
    assert expected.isfinite().all() and not expected[..., 2].any()
    pl.merge(model)
    assert torch.allclose(model(x), expected, atol=1e-12)


@pytest.mark.parametrize("frozen", ["magnitude", "direction"])
def test_each_of_the_two_trains_alone(frozen):
    model = adapted()
    part = part_of(model)
    names = ["magnitude"] if frozen == "magnitude" else ["lora_A", "lora_B"]
    for name in names:
        getattr(part, name).requires_grad_(False)
    before = {name: value.clone() for name, value in part.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    assert {name for name, value in part.state_dict().items() if torch.equal(value, before[name])} == set(names)


def test_a_merged_model_trains_on_and_unmerges_to_the_base():
    model = adapted()
    base, expected = model.layer.weight.clone(), model(X)
    pl.merge(model, unload=True)
    pl.attach(model, pl.DoRAConfig(r=2, target_modules=["layer"]))  # a second one, on what the first one made
    assert torch.allclose(model(X), expected, atol=1e-12)
    assert torch.allclose(part_of(model).magnitude, model.layer.weight.norm(dim=1))
    assert not torch.allclose(model.layer.weight, base)


def test_a_mixture_is_the_sum_of_changes_in_any_order():
    model = adapted()
    pl.attach(model, pl.DoRAConfig(r=3, alpha=5, init="random", target_modules=["layer"]), name="b")
    alone = {}
    for name in ("default", "b"):
        pl.activate(model, name)
        alone[name] = model(X)
    with pl.disabled(model):
        base = model(X)
    expected = base + 0.7 * (alone["default"] - base) - 0.3 * (alone["b"] - base)
    for weights in ({"default": 0.7, "b": -0.3}, {"b": -0.3, "default": 0.7}):
        pl.activate(model, weights)
        assert torch.allclose(model(X), expected, atol=1e-13)
    pl.merge(model)
    assert torch.allclose(model(X), expected, atol=1e-13)
    pl.unmerge(model)
    names = ["b", None, "default", "default", "b"]
    pl.activate(model, names)
    rows = model(X)
    for i, name in enumerate(names):
        assert torch.allclose(rows[i], (base if name is None else alone[name])[i], atol=1e-13)


def test_four_bits_have_the_norms_of_what_the_codes_stand_for(tmp_path):
    """A folder trained on the dense base loads onto the 4-bit one: its magnitudes are kept, and the norms follow."""
    model = pl.attach(llama(), pl.DoRAConfig(r=2, init="random", target_modules=["q_proj"]))
    pl.save_adapter(model, tmp_path)
    narrow = pl.load_adapter(pl.quantize_model(llama(), backend="reference"), tmp_path)
    parts = [one.model.layers[0].self_attn.q_proj.peftlab["default"]["dora"] for one in (model, narrow)]
    assert torch.equal(*(part.magnitude for part in parts))
    ids = torch.tensor([[3, 4, 5]])
    found = narrow(ids).logits
    assert not torch.allclose(found, model(ids).logits, atol=1e-3)
    assert torch.allclose(pl.dequantize_model(narrow)(ids).logits, found, atol=1e-5)


def test_it_survives_a_checkpointed_block_and_a_copy():
    ids = torch.tensor([[3, 4, 5, 6]])
    found = []
    for checkpointed in (False, True):
        model = pl.attach(llama(), pl.DoRAConfig(r=2, init="random", target_modules="all-linear", dropout=0.3)).train()
        torch.manual_seed(0)
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_(std=0.2)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        model(ids).logits.square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *found))
    copied = copy.deepcopy(model.eval())
    assert torch.equal(copied(ids).logits, model(ids).logits)


def test_what_cannot_be_read_is_refused_and_the_model_stays():
    model = Net(nn.Linear(6, 4))
    model.layer.weight = nn.Parameter(model.layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(pl.PeftLabError, match="float8_e4m3fn, of which DoRA can compute no norms"):
        pl.attach(model, pl.DoRAConfig(r=2, target_modules=["layer"]))
    offloaded = Net(nn.Linear(6, 4, device="meta"))
    offloaded.layer._hf_hook = object()
    with pytest.raises(pl.PeftLabError, match="offloaded"):
        pl.attach(offloaded, pl.DoRAConfig(r=2, target_modules=["layer"]))
    for one in (model, offloaded):
        assert not pl.attached(one)
    with pytest.raises(pl.PeftLabError, match="lora_bias cannot be used with DoRA"):
        pl.DoRAConfig(lora_bias=True)
    with pytest.raises(pl.PeftLabError, match="init='olora' cannot be used with DoRA"):
        pl.DoRAConfig(init="olora")
    with pytest.raises(pl.PeftLabError, match="DoRA adapts modules alone.*experts.down_proj"):
        pl.DoRAConfig(target_parameters=["experts.down_proj"])


def test_detached_bit_for_bit():
    model = net()
    before = snapshot(model)
    pl.detach(adapted(model))
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_killed_run_resumes_to_the_bit(tmp_path, dtype):
    """With dropout, and with masters for an adapter of 16 bits."""

    def model():
        torch.manual_seed(3)
        return pl.attach(
            llama(), pl.DoRAConfig(r=2, target_modules=["q_proj", "embed_tokens"], dropout=0.2), adapter_dtype=dtype
        )

    def stop(model, row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    settings = dict(tokenizer=tokenizer(), steps=5, batch_size=4, learning_rate=0.02, progress=False)
    expected = model()
    history = pl.train(expected, examples(), **settings)
    assert "DoRA" in history.path and history.path.startswith("plain")
    with pytest.raises(KeyboardInterrupt):
        pl.train(model(), examples(), **settings, folder=tmp_path, save_every=2, callback=stop)
    resumed = model()
    pl.train(resumed, examples(), **settings, folder=tmp_path, save_every=2)
    trained = {name: p for name, p in resumed.named_parameters() if p.requires_grad}
    assert sum(name.endswith("magnitude") for name in trained) == 3
    assert all(torch.equal(p, expected.get_parameter(name)) for name, p in trained.items())
