"""Training on a CUDA device: precision, the loss scale, fused AdamW's state, resume."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import tiny  # noqa: E402

from peftlab.adapters.injection import attach  # noqa: E402
from peftlab.methods.lora import LoRAConfig  # noqa: E402
from peftlab.training import train  # noqa: E402
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
