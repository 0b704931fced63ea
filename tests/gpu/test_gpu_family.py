"""LoRA's family on a CUDA device: the steps of the CPU, autocast, 4-bit bases and merging."""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("unit", "parity")]
import tiny  # noqa: E402

import peftlab as pl  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WHERE = {"target_modules": ["q_proj", "v_proj"]}
CONFIGS = {
    "dora": pl.DoRAConfig(r=4, alpha=6, **WHERE),
    "adalora": pl.AdaLoRAConfig(init_r=4, target_r=2, tinit=2, tfinal=2, deltaT=1, **WHERE),
    "vera": pl.VeRAConfig(r=8, **WHERE),
    "pissa": pl.LoRAConfig(r=4, alpha=6, init="pissa", **WHERE),
    "olora": pl.LoRAConfig(r=4, alpha=6, init="olora", **WHERE),
    "rslora": pl.LoRAConfig(r=4, alpha=6, use_rslora=True, **WHERE),
    "loha": pl.LoHaConfig(r=4, alpha=6, **WHERE),
    "lokr": pl.LoKrConfig(r=4, alpha=6, **WHERE),
    "oft": pl.OFTConfig(oft_block_size=8, **WHERE),
}


def trained(name, device, *, steps=6, quantised=False, **settings):
    """Train a tiny Llama on 8 texts; return the model and its losses."""
    torch.manual_seed(0)
    model = tiny.llama()
    if quantised:
        pl.quantize_model(model)
    torch.manual_seed(1)
    pl.attach(model, CONFIGS[name])
    model.to(device)
    draw = torch.Generator().manual_seed(2)
    rows = [
        {"input_ids": (ids := torch.randint(5, 30, (12,), generator=draw).tolist()), "labels": ids} for _ in range(8)
    ]
    history = pl.train(model, rows, steps=steps, batch_size=4, learning_rate=1e-2, progress=False, **settings)
    return model, [step["loss"] for step in history.steps]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_steps_are_those_of_the_cpu(name):
    _, here = trained(name, "cuda", precision="fp32")
    _, there = trained(name, "cpu", precision="fp32")
    assert here == pytest.approx(there, rel=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_learns_under_autocast_and_merges(name):
    model, losses = trained(name, "cuda", steps=30, precision="bf16")
    assert losses[-1] < losses[0]
    ids = torch.arange(5, 17, device="cuda")[None]
    model.eval()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        pl.merge(model)
        assert (model(input_ids=ids).logits - before).abs().max() < 1e-3 * before.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_it_learns_on_a_base_in_four_bits(name):
    _, losses = trained(name, "cuda", steps=30, quantised=True, precision="bf16")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("start", ["eva", "loftq"])
def test_a_start_from_data_is_that_of_the_cpu(start):
    torch.manual_seed(0)
    model = tiny.llama()
    ids = torch.randint(5, 30, (4, 12), generator=torch.Generator().manual_seed(2))
    data = model if start == "loftq" else [{"input_ids": ids}]
    found = []
    for device in ("cuda", "cpu"):
        one = copy.deepcopy(model).to(device)
        given = copy.deepcopy(data).to(device) if start == "loftq" else [{"input_ids": ids.to(device)}]
        if start == "loftq":
            pl.quantize_model(one)
        torch.manual_seed(1)
        pl.attach(one, pl.LoRAConfig(r=4, init=start, **WHERE), data=given)
        found.append(one(input_ids=ids.to(device)).logits.detach().cpu())
    assert torch.allclose(*found, atol=2e-4)
