"""The optimisers by name: 8-bit states, what they hold, how they fall back, and a run that resumes to the bit."""

import warnings

import pytest
import torch
from tiny import examples, llama
from torch import nn

import peftlab as pl
from peftlab import optional
from peftlab.optional import available
from peftlab.training.optimizers import make_optimizer

CPU = torch.device("cpu")
needs_bitsandbytes = pytest.mark.skipif(available("bitsandbytes") is None, reason="needs bitsandbytes")
SETTINGS = dict(steps=6, learning_rate=0.02, progress=False)


def model():
    """Adapters of more than 4,096 elements, so that their states do go into 8 bits, and smaller ones beside them."""
    base = pl.quantize_model(llama(hidden_size=64, intermediate_size=1024))
    torch.manual_seed(7)
    return pl.attach(base, pl.LoRAConfig(r=8, alpha=16, target_modules=["up_proj", "q_proj"]))


def adapter(trained):
    return {name: p.detach().clone() for name, p in trained.named_parameters() if p.requires_grad}


def state_bytes(name, shape):
    parameter = nn.Parameter(torch.randn(shape))
    optimizer = make_optimizer(name, {"w": parameter}, 1e-3, 0.0, CPU)
    parameter.grad = torch.randn(shape)
    optimizer.step()
    counted = [v for k, v in optimizer.state[parameter].items() if isinstance(v, torch.Tensor) and "qmap" not in k]
    return sum(value.nbytes for value in counted if value.numel() > 1)


@needs_bitsandbytes
def test_two_bytes_a_parameter_instead_of_eight():
    assert state_bytes("adamw", (256, 256)) == 8 * 65_536
    assert state_bytes("adamw8bit", (256, 256)) == pytest.approx(2 * 65_536 + 2 * 4 * 256, rel=1e-3)
    assert state_bytes("adamw8bit", (16, 16)) == 8 * 256  # a small tensor stays in 32 bits


@needs_bitsandbytes
def test_it_learns_like_adamw():
    losses = {}
    for name in ("adamw", "adamw8bit"):
        history = pl.train(model(), examples(), **{**SETTINGS, "steps": 12}, optimizer=name)
        losses[name] = [row["loss"] for row in history.steps]
    assert losses["adamw8bit"][-1] < losses["adamw8bit"][0]
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], rel=0.02)
    assert losses["adamw8bit"] != losses["adamw"]


@needs_bitsandbytes
def test_a_killed_run_resumes_to_the_bit(tmp_path):
    expected = model()
    pl.train(expected, examples(), **SETTINGS, optimizer="adamw8bit")

    def stop(model, row):
        if row["step"] == 4:
            raise KeyboardInterrupt

    resumed = dict(**SETTINGS, optimizer="adamw8bit", folder=tmp_path, save_every=3)
    with pytest.raises(KeyboardInterrupt):
        pl.train(model(), examples(), **resumed, callback=stop)
    found = model()
    pl.train(found, examples(), **resumed)
    assert all(torch.equal(value, adapter(expected)[name]) for name, value in adapter(found).items())


@needs_bitsandbytes
def test_paging_without_cuda_says_so_and_goes_on():
    with pytest.warns(UserWarning, match="the model is on cpu: its states stay where they are") as caught:
        paged = model()
        pl.train(paged, examples(), **SETTINGS, optimizer="paged-adamw8bit")
    assert caught[0].filename == __file__
    plain = model()
    pl.train(plain, examples(), **SETTINGS, optimizer="adamw8bit")
    assert all(torch.equal(value, adapter(paged)[name]) for name, value in adapter(plain).items())


@pytest.mark.parametrize("kind", ["missing", "no kernel"])
def test_without_the_kernel_adamw_runs(monkeypatch, kind):
    class Broken:
        __version__ = "0.45"

        class optim:
            @staticmethod
            def AdamW8bit(*arguments, **settings):
                raise NotImplementedError

    monkeypatch.setattr(optional, "available", lambda name: None if kind == "missing" else Broken)
    parameter = {"w": nn.Parameter(torch.randn(8, 8))}
    said = "is not installed" if kind == "missing" else "0.45 has no 8-bit AdamW for cpu"
    with pytest.warns(UserWarning, match=f"{said}.*adamw runs instead, whose states take 8 bytes"):
        assert type(make_optimizer("adamw8bit", parameter, 1e-3, 0.0, CPU)) is torch.optim.AdamW


def test_an_unknown_one_is_named():
    with pytest.raises(pl.PeftLabError, match="Did you mean 'adamw8bit'"):
        make_optimizer("adam8bit", {}, 1e-3, 0.0, CPU)


@needs_bitsandbytes
def test_no_warning_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_optimizer("adamw8bit", {"w": nn.Parameter(torch.randn(8, 8))}, 1e-3, 0.01, CPU)
