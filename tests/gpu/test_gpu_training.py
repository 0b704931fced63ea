"""Training on a CUDA device: precision, the loss scale, fused AdamW's state, resume."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import tiny  # noqa: E402

from peftlab.adapters.injection import attach  # noqa: E402
from peftlab.methods.lora import LoRAConfig  # noqa: E402
from peftlab.training import train, varlen  # noqa: E402
from peftlab.training.encoding import Collator  # noqa: E402
from peftlab.training.model_facts import facts_of  # noqa: E402
from peftlab.training.precision import choose_precision  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def model(dtype=torch.float32, **settings):
    model = tiny.llama(dtype=dtype, **settings).cuda()
    torch.manual_seed(7)
    attach(model, LoRAConfig(r=4, alpha=16, dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"]))
    return model


def adapter(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "auto"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_learns_on_every_base(precision, base):
    if precision == "bf16" and choose_precision("auto", torch.device("cuda")) == "fp16":
        pytest.skip("this device has no real bf16")
    trained = model(base, initializer_range=0.2)
    dtypes = set()
    trained.lm_head.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    history = train(trained, tiny.examples(), steps=60, learning_rate=0.05, precision=precision)
    chosen = choose_precision(precision, torch.device("cuda"))
    assert dtypes == {{"bf16": torch.bfloat16, "fp16": torch.float16}.get(chosen, base)}
    assert {value.dtype for value in adapter(trained).values()} == {torch.float32}
    losses = [row["loss"] for row in history.steps]
    assert sum(losses[-10:]) < sum(losses[:10]) - 1


def test_a_run_in_a_stream_of_the_callers():
    """Another thread copies the batches. It has to do so in this stream, or a step would read what is not there yet."""
    settings = {"steps": 20, "learning_rate": 0.02, "fast": False, "precision": "fp32"}
    expected = train(model(), tiny.examples(), **settings)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # this stream is behind, and the default one is idle
        found = train(model(), tiny.examples(), **settings)
    torch.cuda.synchronize()
    assert [row["loss"] for row in found.steps] == pytest.approx([row["loss"] for row in expected.steps], rel=1e-4)


def test_resume_on_the_gpu(tmp_path):
    """Dropout's random numbers and the fused optimiser's state come back; kernels may differ in the last bits."""
    settings = {"steps": 8, "learning_rate": 0.02, "precision": "fp16", "save_every": 2, "accumulation": 2}
    expected = model()
    train(expected, tiny.examples(), **settings)

    def stop(model, row):
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model(), tiny.examples(), folder=tmp_path, callback=stop, **settings)
    found = model()
    history = train(found, tiny.examples(), folder=tmp_path, **settings)
    assert [row["step"] for row in history.steps] == list(range(1, 9))
    for name, value in adapter(expected).items():
        assert torch.allclose(adapter(found)[name], value, rtol=1e-3, atol=1e-5), name


IDS = torch.arange(16).view(2, 8) % 7 + 1
FULL = torch.ones(2, 8, dtype=torch.long)
BATCHES = {
    "no mask": {},
    "a full mask": {"attention_mask": FULL},
    "a full mask and positions that restart": {
        "attention_mask": FULL, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2),
    },
    "all tokens see all": {"attention_mask": torch.ones(2, 1, 8, 8, dtype=torch.bool)},
    "packed rows": {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)},
}  # fmt: skip


@pytest.mark.parametrize("in_chunks", [True, False])
@pytest.mark.parametrize("more", BATCHES.values(), ids=BATCHES)
def test_a_batch_has_the_loss_that_a_cpu_gives(more, in_chunks):
    """What stays on the CPU, and what transformers is spared, changes no loss. Of two parts one has no label."""
    losses = []
    for device in ("cpu", "cuda"):
        labels = iter((IDS, torch.full_like(IDS, -100)))
        history = train(
            model(initializer_range=0.2).to(device), tiny.examples(4), steps=1, batch_size=2, accumulation=2,
            collate=lambda _, labels=labels: {"input_ids": IDS, "labels": next(labels), **more}, fast=False,
            precision="fp32", chunked_loss=in_chunks, progress=False,
        )  # fmt: skip
        losses.append(history.steps[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("checkpointing", [True, "reentrant"])
def test_checkpointing_reaches_every_adapter(checkpointing):
    trained = model(torch.bfloat16)
    before = adapter(trained)
    train(trained, tiny.examples(), steps=3, learning_rate=0.05, checkpointing=checkpointing)
    assert all(not torch.equal(value, before[name]) for name, value in adapter(trained).items())


def test_generators_of_the_gpu_are_put_back():
    trained = model()
    torch.cuda.manual_seed(3)
    expected = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(3)
    train(trained, tiny.examples(), steps=2)
    assert torch.equal(torch.rand(4, device="cuda"), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_packed_rows_train_as_padded_ones(attention):
    from transformers.utils import is_flash_attn_2_available

    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    dtype = torch.float32 if attention != "flash_attention_2" else torch.bfloat16
    losses = []
    for packing in (False, True):
        model = tiny.llama(hidden_size=64, dtype=dtype).cuda()
        model.set_attn_implementation(attention)
        attach(model, LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
        history = train(model, tiny.examples(24), packing=packing, steps=4, batch_size=8, learning_rate=1e-2,
                        precision="bf16" if dtype == torch.bfloat16 else "fp32", progress=False)  # fmt: skip
        losses.append([row["loss"] for row in history.steps])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 64), (3, 1, 80), (2, 2, 128)])
def test_the_varlen_kernel_is_as_near_to_float64_as_the_mask_is(dtype, heads, kv_heads, head_dim):
    """Loss and gradients of packed rows of one batch, beside those of the same weights in float64."""
    if varlen.kernel() is None:
        pytest.skip("this torch has no varlen_attn with windows")
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "hidden_size": 48}
    batch = Collator(packing=True)(tiny.examples(12))
    found = {}
    for name in ("float64", "mask", "kernel"):
        trained = tiny.llama(**sizes, dtype=dtype).cuda()
        if name == "float64":
            trained.double()
        attach(trained, LoRAConfig(r=4, alpha=9, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
               adapter_dtype=torch.float64 if name == "float64" else torch.float32)  # fmt: skip
        for index, parameter in enumerate(p for p in trained.parameters() if p.requires_grad):
            draw = torch.Generator().manual_seed(index)
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
        device = torch.device("cuda")
        autocast = torch.autocast("cuda", dtype, enabled=name != "float64")
        how = varlen.used(trained) if name == "kernel" else contextlib.nullcontext()
        with how, autocast, varlen.in_rows_from(1):
            if name == "mask":
                assert varlen.why_not(trained, facts_of(trained), device, dtype) == ""
            loss = trained(**{key: each.cuda() if hasattr(each, "cuda") else each for key, each in batch.items()}).loss
        loss.backward()
        gradients = [p.grad.double().flatten() for p in trained.parameters() if p.requires_grad]
        found[name] = loss.double().reshape(1), torch.cat(gradients)
    for exact, mask, kernel in zip(found["float64"], found["mask"], found["kernel"], strict=True):
        error = (kernel - exact).norm() / exact.norm()
        assert error <= max(2 * (mask - exact).norm() / exact.norm(), 1e-4), error


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_go_to_the_varlen_kernel_by_themselves(checkpointing, monkeypatch):
    monkeypatch.setattr(varlen, "LONG", 1)
    if varlen.kernel() is None:
        pytest.skip("this torch has no varlen_attn with windows")
    losses = []
    for packing in (False, True):
        trained = tiny.llama(hidden_size=64, dtype=torch.bfloat16).cuda()
        attach(trained, LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]))
        history = train(trained, tiny.examples(24), packing=packing, steps=4, batch_size=8, learning_rate=1e-2,
                        precision="bf16", fast=False, checkpointing=checkpointing, progress=False)  # fmt: skip
        assert history.packing == ("by torch's varlen kernel in rows from 1 tokens on" if packing else "")
        losses.append([row["loss"] for row in history.steps])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
