"""Bottleneck adapters, IA3 and BitFit on a CUDA device: the CPU's numbers, training under autocast, 4-bit bases."""

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("unit", "parity")]
import tiny  # noqa: E402
from pairs import base, batch, relative  # noqa: E402

import peftlab as pl  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIGS = {
    **{name: pl.AdapterConfig(placement=name, width=4, init="random") for name in ("houlsby", "pfeiffer", "parallel")},
    "ia3": pl.IA3Config(init="random"),
    "bitfit": pl.BitFitConfig(),
    "selective": pl.SelectiveConfig(last_layers=1),
}


def on_gpu(inputs):
    return {name: value.cuda() for name, value in inputs.items()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_the_cpus_numbers(kind, name):
    if (kind, name) == ("llama", "bitfit"):
        return  # it has no biases
    model = base(kind)
    pl.attach(model, CONFIGS[name])
    there = copy.deepcopy(model).cuda()
    inputs = batch(kind)
    found, expected = there(**on_gpu(inputs)), model(**inputs)
    assert relative(found.logits.cpu(), expected.logits) < 1e-9
    found.loss.backward()
    expected.loss.backward()
    for one, two in zip(there.parameters(), model.parameters(), strict=True):
        if two.requires_grad and two.grad.norm() > 1e-12:
            assert relative(one.grad.cpu(), two.grad) < 1e-8


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "parallel", "ia3", "selective"])
def test_training_in_bf16_with_checkpointing_learns(name):
    model = tiny.llama(dtype=torch.bfloat16, initializer_range=0.2).cuda()
    torch.manual_seed(7)
    starting = {"selective": pl.SelectiveConfig(last_layers=1), "ia3": pl.IA3Config()}
    pl.attach(model, starting.get(name) or pl.AdapterConfig(placement=name, width=8))
    rate = 0.2 if name == "ia3" else 0.02
    history = pl.train(model, tiny.examples(), steps=60, learning_rate=rate, precision="bf16", checkpointing=True)
    losses = [row["loss"] for row in history.steps]
    assert sum(losses[-10:]) < sum(losses[:10]) - 1
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32} and all(p.isfinite().all() for p in trained)


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "parallel", "ia3"])
def test_on_a_base_in_four_bits(name):
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny.llama(dtype=torch.bfloat16, hidden_size=64, intermediate_size=128, initializer_range=0.1)
    for module in list(model.modules()):
        for child, linear in list(module.named_children()):
            if isinstance(linear, torch.nn.Linear) and child != "lm_head":
                four = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                four.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                setattr(module, child, four)
    model = model.cuda()
    ids = torch.arange(3, 15, device="cuda").view(2, 6)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    pl.attach(model, pl.IA3Config() if name == "ia3" else pl.AdapterConfig(placement=name, width=4))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with pytest.raises(pl.PeftLabError, match="quantised" if name == "ia3" else "cannot be merged"):
        pl.merge(model)
