"""Starts of LoRA from the weight: the factors by hand, the base as it was, odd weights, and what is refused."""

import warnings

import pytest
import tiny
import torch
from nets import Net, assert_same, snapshot, tokens
from test_resume import begin, interrupted
from torch import nn

import peftlab as pl
from peftlab.methods import lora_starts
from peftlab.methods.lora_starts import factors
from peftlab.training import train

INITS = ["pissa", "pissa_niter_8", "olora"]


def single(inside=5, outside=3, dtype=torch.float64, **settings):
    model = nn.Sequential(nn.Linear(inside, outside)).to(dtype)
    pl.attach(model, pl.LoRAConfig(target_modules=["0"], **settings))
    return model, model[0].peftlab["default"]["lora"]


def started(init="pissa", seed=0, **settings):
    return pl.attach(tiny.llama(seed), pl.LoRAConfig(r=4, init=init, **settings))


def test_factors_by_hand():
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 3)).Q for n in (7, 4))
    weight = left @ torch.diag(torch.tensor([9.0, 4.0, 1.0])) @ right.T
    for init in ("pissa", "pissa_niter_8"):
        a, b = factors(weight, 2, 0.25, init)
        best = left[:, :2] @ torch.diag(torch.tensor([9.0, 4.0])) @ right[:, :2].T
        torch.testing.assert_close(0.25 * b @ a, best)  # the largest singular values, whatever s
        torch.testing.assert_close(b.T @ b, torch.diag(torch.tensor([36.0, 16.0])), atol=1e-4, rtol=0)  # shared evenly
        torch.testing.assert_close(a @ a.T, torch.diag(torch.tensor([36.0, 16.0])), atol=1e-4, rtol=0)
    a, b = factors(weight, 3, 0.25, "olora")
    torch.testing.assert_close(b.T @ b, torch.eye(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(b @ a, weight)  # rank 3 has all of a weight of rank 3, and s stays outside
    assert not a.tril(-1).any()


def test_the_fast_start_is_the_same_each_time_and_draws_nothing():
    weight = torch.randn(9, 6)
    torch.manual_seed(1)
    first = factors(weight, 2, 1.0, "pissa_niter_1")
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    torch.manual_seed(2)
    assert all(map(torch.equal, first, factors(weight, 2, 1.0, "pissa_niter_1")))


def test_gradients_by_hand():
    """dL/dB = s G (A x)^T and dL/dA = s B^T G x^T: those of LoRA, and nothing of the start."""
    model, part = single(r=2, alpha=7, init="pissa")
    x, weight = torch.randn(4, 5).double(), torch.randn(4, 3).double()
    (model(x) * weight).sum().backward()
    torch.testing.assert_close(part.lora_B.grad, 3.5 * weight.T @ (x @ part.lora_A.T))
    torch.testing.assert_close(part.lora_A.grad, 3.5 * (weight @ part.lora_B).T @ x)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "0.peftlab.default.lora.lora_A", "0.peftlab.default.lora.lora_B",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", INITS)
def test_it_starts_where_the_base_is_and_leaves_it_there(init, dtype):
    model = Net(dtype=dtype).eval()
    before, was = model(tokens()), snapshot(model)
    pl.attach(model, pl.LoRAConfig(r=4, target_modules=["up", "down", "head"], init=init))
    assert torch.equal(model(tokens()), before)
    model(tokens()).float().square().sum().backward()
    part = model.blocks[0].down.peftlab["default"]["lora"]
    assert part.lora_B.grad.any() and part.lora_A.grad.any() and part.lora_A.dtype == part.start_A.dtype
    with torch.no_grad():
        part.lora_A.mul_(2)
    assert not torch.equal(model(tokens()), before)
    pl.detach(model)
    assert torch.equal(model(tokens()), before)
    assert_same(snapshot(model), was)


@pytest.mark.parametrize("init", INITS)
def test_an_adapter_in_sixteen_bits_starts_where_the_base_is(init):
    model = tiny.llama(dtype=torch.bfloat16).eval()
    ids = torch.arange(6)[None]
    before = model(ids).logits
    pl.attach(model, pl.LoRAConfig(r=4, init=init), adapter_dtype="bf16")
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_run_that_resumes_ends_in_the_same_bits(init, tmp_path):
    expected, model = begin(None, model=started(init))
    interrupted(tmp_path, model=started(init))
    found, other = begin(tmp_path, model=started(init))
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("init", INITS)
def test_a_base_in_four_bits_keeps_its_codes(init):
    model = pl.quantize_model(tiny.llama().eval(), block_size=64)
    layer = model.model.layers[0].self_attn.q_proj
    ids, codes = torch.arange(6)[None], layer.weight.clone()
    before = model(ids).logits
    pl.attach(model, pl.LoRAConfig(r=4, alpha=6, init=init))
    assert torch.equal(model(ids).logits, before) and torch.equal(layer.weight, codes)
    part, weight = layer.peftlab["default"]["lora"], pl.quantization.weights.dense(layer.weight, torch.float32)
    a, b = factors(weight, 4, 1.5, init)
    assert torch.equal(part.lora_A, a) and torch.equal(part.lora_B, b)  # of what the codes stand for


def test_dropout_is_for_the_trained_path_alone():
    model, part = single(r=3, alpha=6, dropout=0.5, init="olora")
    x = torch.randn(1, 5).double()
    model.train()
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    start = part.start_B @ part.start_A
    expected = (
        model[0].weight @ x.T + model[0].bias[:, None] + 2 * (part.lora_B @ part.lora_A @ dropped.T - start @ x.T)
    )
    torch.testing.assert_close(model(x), expected.T)


def test_mixtures_and_rows():
    model = started().eval()
    pl.attach(model, pl.LoRAConfig(r=2, init="olora"), name="other")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    ids = torch.arange(12).view(2, 6)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 6, 16)
    whole = {name: layer.peftlab[name]["lora"].delta() for name in ("default", "other")}
    pl.activate(model, {"default": 0.7, "other": 0.2})
    expected = x @ (layer.weight + 0.7 * whole["default"] + 0.2 * whole["other"]).T
    torch.testing.assert_close(layer(x), expected)
    pl.activate(model, ["default", "other"])
    both = model(ids).logits
    for row, name in enumerate(("default", "other")):
        pl.activate(model, name)
        torch.testing.assert_close(both[row], model(ids).logits[row])
    pl.activate(model, "default")
    expected = model(ids).logits
    base = model.lm_head.weight.clone()
    pl.merge(model)
    torch.testing.assert_close(model(ids).logits, expected)
    pl.unmerge(model)
    assert torch.equal(model(ids).logits, expected) and torch.equal(model.lm_head.weight, base)


def test_a_tied_head_leaves_the_embedding_alone():
    model = tiny.llama(tie_word_embeddings=True).eval()
    ids, words = torch.arange(6)[None], model.model.embed_tokens.weight.clone()
    before = model(ids).logits
    pl.attach(model, pl.LoRAConfig(r=4, init="pissa", target_modules=["lm_head"]))
    assert torch.equal(model(ids).logits, before) and torch.equal(model.model.embed_tokens.weight, words)


def test_a_zero_weight_is_told():
    model = nn.Sequential(nn.Linear(5, 3))
    nn.init.zeros_(model[0].weight)
    with pytest.warns(UserWarning, match="is zero, so init='pissa' starts it from nothing"):
        pl.attach(model, pl.LoRAConfig(r=2, init="pissa", target_modules=["0"]))
    assert torch.isfinite(model(torch.randn(2, 5))).all()


def test_a_model_without_numbers():
    with torch.device("meta"):
        model = tiny.llama()
    pl.attach(model, pl.LoRAConfig(r=4, init="pissa"))
    assert model(torch.zeros(1, 3, dtype=torch.long, device="meta")).logits.shape == (1, 3, 32)
    assert pl.count_parameters(model) == pl.count_parameters(pl.attach(tiny.llama(), pl.LoRAConfig(r=4)))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 9, "target_modules": ["v_proj"]}, "r is 9, and a weight of 8 x 16 has no more than 8 directions"),
        ({"target_modules": ["embed_tokens"]}, "Embedding .* is none. Leave it out"),
        ({"init": "pissa_niter_0"}, "init must be one of 'kaiming', .*'pissa'.*'pissa_niter_4'"),
        ({"init": "pissa_niter_99999"}, "init must be one of"),
        ({"init": "Pissa"}, "Did you mean 'pissa'"),
        ({"init": 3}, "init must be one of"),
    ],
)
def test_refused(settings, message):
    model = tiny.llama()
    was = snapshot(model)
    with pytest.raises(pl.PeftLabError, match=message):
        pl.attach(model, pl.LoRAConfig(**{"init": "pissa", "r": 4, **settings}))
    assert_same(snapshot(model), was)


def test_what_is_no_linear_layer_or_not_finite_is_refused():
    for model, message in (
        (nn.Sequential(nn.Conv2d(4, 4, 3)), "Conv2d .* is none"),
        (nn.Sequential(nn.Linear(4, 4)), "values that are not finite"),
    ):
        with torch.no_grad():
            model[0].weight.view(-1)[3] = float("nan")
        with pytest.raises(pl.PeftLabError, match=message):
            pl.attach(model, pl.LoRAConfig(r=2, init="olora", target_modules=["0"]))
        assert "peftlab" not in model[0]._modules


def test_a_run_goes_on_with_the_start_that_it_had(tmp_path, monkeypatch):
    """The start lies in the run's folder, also where another machine would find other singular vectors."""
    settings = {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "save_every": 2}
    monkeypatch.setattr("peftlab.training.buffers.SMALL_BUFFER", 3)
    expected = train(started("pissa_niter_1"), tiny.examples(), **settings)

    def stop(model, row):
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(started("pissa_niter_1"), tiny.examples(), folder=tmp_path, callback=stop, **settings)
    monkeypatch.setattr(lora_starts, "SEED", 7)
    assert train(started("pissa_niter_1"), tiny.examples(), folder=tmp_path, **settings) == expected


def test_the_fast_path_says_why_the_plain_one_runs():
    history = train(started(), tiny.examples(), steps=2, batch_size=4)
    assert "LoRAStarted" in history.path


def test_no_warning_when_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        started()
