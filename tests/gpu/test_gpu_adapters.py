"""Bottleneck adapters, IA3 and BitFit on a CUDA device: parity, training under autocast, 4-bit bases."""

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("unit", "parity")]
import tiny  # noqa: E402
from pairs import base, batch, our_state, relative, same  # noqa: E402
from test_adapter_parity import pair as adapter_pair  # noqa: E402
from test_ia3_parity import pair as ia3_pair  # noqa: E402
from test_lora_parity import gradients, live  # noqa: E402

import peftlab as pl  # noqa: E402
from peftlab.methods.adapter import PLACEMENTS  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

def on_gpu(inputs):
    return {name: value.cuda() for name, value in inputs.items()}


# Both sides run on the GPU: transformers computes norms and rotary tables in float32 whatever the model's dtype, so
# between a CPU and a GPU even the base alone differs by 1e-7.
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_adapters_are_those_written_out_by_hand(kind, placement):
    ours, theirs, adapters = adapter_pair(kind, placement, activation="gelu", scaling=1.7)
    ours.cuda(), theirs.cuda()
    found, expected = ours(**on_gpu(batch(kind))), theirs(**on_gpu(batch(kind)))
    assert relative(found.logits, expected.logits) < 1e-9
    found.loss.backward()
    expected.loss.backward()
    for mine, other in adapters.values():
        for one, two in zip(mine.parameters(), other.parameters(), strict=True):
            assert relative(one.grad, two.grad) < 1e-9


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_ia3_is_pefts(kind):
    ours, theirs = ia3_pair(kind)
    ours.cuda(), theirs.cuda()
    found, expected = ours(**on_gpu(batch(kind))), theirs(**on_gpu(batch(kind)))
    assert relative(found.logits, expected.logits) < 1e-9
    found.loss.backward()
    expected.loss.backward()
    same(gradients(our_state(ours)), gradients(live(theirs)))


@pytest.mark.parametrize(("kind", "config"), [
    ("gpt2", pl.BitFitConfig()), ("bert", pl.BitFitConfig()), ("llama", pl.SelectiveConfig(last_layers=1)),
    ("llama", pl.IA3Config(init="random")),
])  # fmt: skip
def test_merged_it_is_the_same_model(kind, config):
    model = base(kind).cuda()
    pl.attach(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1).add_(0.05)
    expected = model(**on_gpu(batch(kind))).logits
    pl.merge(model, unload=True)
    assert relative(model(**on_gpu(batch(kind))).logits, expected) < 1e-9


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
    with pytest.raises(pl.PeftLabError, match="four bits" if name == "ia3" else "cannot be merged"):
        pl.merge(model)
