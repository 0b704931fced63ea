"""Adapters in bfloat16 with float32 masters: small updates are kept, a run resumes to the bit, the file is exact."""

import pytest
import tiny
import torch

import peftlab as pl
from peftlab.errors import PeftLabError
from peftlab.training.masters import WithMasters
from peftlab.training.optimizers import make_optimizer

RATE = 1e-5  # small next to A's entries, which are about 0.1


def model(adapter_dtype="bf16", **config):
    made = tiny.llama(hidden_size=32)
    torch.manual_seed(7)
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init": "random"} | config
    return pl.attach(made, pl.LoRAConfig(**config), adapter_dtype=adapter_dtype)


def adapter(made):
    return {name: p.detach().clone() for name, p in made.named_parameters() if p.requires_grad}


def trained(made, **settings):
    settings = {"steps": 30, "learning_rate": RATE, "schedule": "constant", "progress": False} | settings
    return pl.train(made, tiny.examples(), **settings)


def test_small_updates_vanish_without_masters_and_follow_float32_with_them():
    exact = model("fp32")
    start = {name: value.bfloat16().float() for name, value in adapter(exact).items()}
    with torch.no_grad():
        for name, p in exact.named_parameters():
            if name in start:
                p.copy_(start[name])  # the same start as in 16 bits
    trained(exact)
    rounded = model("bf16")
    trained(rounded)
    without = model("bf16")
    parameters = [p for p in without.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    batch = pl.Collator()(tiny.examples())
    for _ in range(30):
        without(**batch).loss.backward()
        plain.step()
        plain.zero_grad()
    still = moved = 0
    for name, value in adapter(exact).items():
        large = start[name].abs() > 0.02  # a step of 1e-5 is less than half the distance of two numbers in 16 bits
        moved += int((value - start[name])[large].abs().gt(1e-4).sum())
        still += int((adapter(without)[name].float() - start[name])[large].eq(0).sum())
        assert torch.equal(adapter(without)[name][large].float(), start[name][large]), "without masters nothing moves"
        torch.testing.assert_close(adapter(rounded)[name].float(), value, rtol=2**-8, atol=2e-5)
    assert moved > 50 and still > 50


def test_the_masters_move_by_the_optimisers_own_rule():
    """Given the same gradients, they are what the optimiser makes of float32 parameters, to the bit."""
    torch.manual_seed(0)
    values = torch.randn(8, 4).bfloat16()
    name = "q_proj.peftlab.default.lora.lora_A"
    narrow, wide = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.float())
    ours = make_optimizer("adamw", {name: narrow}, 1e-3, 0.1, torch.device("cpu"))
    theirs = make_optimizer("adamw", {name: wide}, 1e-3, 0.1, torch.device("cpu"))
    assert isinstance(ours, WithMasters) and not isinstance(theirs, WithMasters)
    for step in range(5):
        narrow.grad = torch.randn(8, 4).bfloat16()
        wide.grad = narrow.grad.float()
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
            optimizer.step()
        assert torch.equal(ours.state[narrow]["master"], wide)
        assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
def test_a_run_resumes_to_the_bit(tmp_path, optimizer):
    def stop(model, row):
        if row["step"] == 5:
            raise KeyboardInterrupt

    settings = {"steps": 8, "optimizer": optimizer, "save_every": 2, "learning_rate": 1e-4}
    expected = model()
    trained(expected, **settings)
    with pytest.raises(KeyboardInterrupt):
        trained(model(), folder=tmp_path, callback=stop, **settings)
    found = model()
    trained(found, folder=tmp_path, **settings)
    assert all(torch.equal(adapter(found)[name], value) for name, value in adapter(expected).items())


def test_the_saved_adapter_holds_what_the_model_computes_with(tmp_path):
    made = model()
    trained(made, learning_rate=1e-2)
    folder = pl.save_adapter(made, tmp_path / "adapter")
    again = pl.load_adapter(tiny.llama(hidden_size=32), folder, trainable=True, adapter_dtype="bf16")
    for name, value in adapter(made).items():
        assert value.dtype == torch.bfloat16 and torch.equal(adapter(again)[name], value)


def test_a_base_in_bfloat16_trains_as_it_is():
    base = tiny.llama(dtype=torch.bfloat16)
    named = dict(base.named_parameters())
    assert not isinstance(make_optimizer("sgd", named, 1e-3, 0.0, torch.device("cpu")), WithMasters)


def test_a_name_that_is_no_dtype_is_refused():
    with pytest.raises(PeftLabError, match="adapter_dtype must be"):
        model("half")
