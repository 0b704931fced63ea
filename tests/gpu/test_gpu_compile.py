"""torch.compile on a CUDA device, and a training step in which the CPU never waits for the GPU."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import tiny  # noqa: E402

import peftlab as pl  # noqa: E402
from peftlab.quantization import Linear4bit  # noqa: E402
from peftlab.quantization.backends import BACKENDS  # noqa: E402
from peftlab.settings import Settings  # noqa: E402
from peftlab.training.labels import sent  # noqa: E402
from peftlab.training.losses import causal_lm_loss  # noqa: E402
from peftlab.training.ranks import Ranks  # noqa: E402
from peftlab.training.run import Run  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(four_bit: bool = False, adapter_dtype: str | None = None, **settings):
    made = tiny.llama(hidden_size=128, intermediate_size=256, dtype=torch.bfloat16, **settings).cuda()
    if four_bit:
        pl.quantize_model(made)
    torch.manual_seed(7)
    config = pl.LoRAConfig(r=4, target_modules=["q_proj", "down_proj"], init="random")
    return pl.attach(made, config, adapter_dtype=adapter_dtype)


def full(count: int = 16, length: int = 24):
    """Examples of one length."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 32, (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": list(row)} for row in rows]


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_4bit_layer_is_the_uncompiled_one(backend, dtype):
    if BACKENDS[backend].cannot("nf4", 64, torch.device("cuda")) is not None:
        pytest.skip(f"{backend} cannot run here")
    torch.manual_seed(0)
    quantized = pl.quantize_nf4(torch.randn(256, 128, device="cuda"))
    layer = Linear4bit(quantized, nn.Parameter(torch.randn(256, device="cuda")), backend)
    x = torch.randn(40, 128, device="cuda", dtype=dtype, requires_grad=True)
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True)):
        y = call(x)
        y.float().square().sum().backward()
        results.append((y.detach(), x.grad))
        x.grad = layer.bias.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_train_as_the_others(four_bit, checkpointing):
    settings = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "checkpointing": checkpointing, "progress": False}
    plain = pl.train(model(four_bit), tiny.examples(), **settings)
    made = model(four_bit)
    keys = list(made.state_dict())
    compiled = pl.train(made, tiny.examples(), compile="layers", **settings)
    assert compiled.compiled.startswith("2 blocks (LlamaDecoderLayer)")
    losses = [[row["loss"] for row in history.steps] for history in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert list(made.state_dict()) == keys
    assert not any("_compiled_call_impl" in vars(module) for module in made.modules())


@pytest.mark.parametrize("adapter_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_cpu_does_not_wait_within_a_step(chunked, accumulation, adapter_dtype):
    made = model(adapter_dtype=adapter_dtype)
    settings = Settings(
        steps=8, batch_size=4, accumulation=accumulation, precision="bf16", fast=False, chunked_loss=chunked
    )
    run = Run(made, full(), settings, device=torch.device("cuda", 0), ranks=Ranks(made))
    with run.ready():  # without a cache, where transformers looks for packed rows
        run.update()  # the first one makes the optimiser's states
        run.clear()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                run.update()
                run.clear()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(run.history.steps) == 4, "the last one is not read yet"
        run.settle()
    assert [row["step"] for row in run.history.steps] == [1, 2, 3, 4, 5]


def test_places_and_labels_go_to_the_gpu_together():
    places, labels = torch.arange(20_000), torch.randint(0, 32, (20_000,))
    found = sent(torch.device("cuda", 0), places, labels)
    assert all(torch.equal(there.cpu(), here) for there, here in zip(found, (places, labels), strict=True))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_wrong_step_leaves_the_parameters_though_it_is_read_one_step_later(what):
    def trained(steps, wrong):
        made, calls = model(), []

        def loss(model, batch):
            calls.append(1)
            total, count = causal_lm_loss(model, batch)
            if len(calls) == wrong:
                total = total * float("nan") if what == "loss" else total + (total - total.detach()).abs().sqrt()
            return total, count

        error = None
        try:
            pl.train(made, full(), steps=steps, batch_size=4, loss=loss, schedule="constant", progress=False)
        except pl.TrainingError as raised:
            error = str(raised)
        return [p.detach().clone() for p in made.parameters() if p.requires_grad], error, len(calls)

    expected, nothing, _ = trained(3, wrong=None)
    found, error, calls = trained(9, wrong=4)
    assert nothing is None and error.startswith("Step 4 of 9: the")
    assert calls == 5, "one more step had begun"
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
