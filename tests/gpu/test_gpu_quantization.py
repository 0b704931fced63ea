"""Four bits on a CUDA device: against bitsandbytes' kernels, the two passes, memory, optimisers, storing."""

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import tiny  # noqa: E402

import peftlab as pl  # noqa: E402
from peftlab.optional import available, require  # noqa: E402
from peftlab.quantization import Linear4bit, blockwise  # noqa: E402
from peftlab.quantization.backends import BACKENDS, choose  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(available("bitsandbytes") is None, reason="needs bitsandbytes"),
]
CUDA = torch.device("cuda", 0)
SHAPE = dict(hidden_size=64, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])
LORA = dict(r=4, alpha=10, target_modules="all-linear", init="random")


def differing(found, expected):
    return int((found.to(CUDA).flatten() != expected.flatten()).sum())


@pytest.mark.parametrize("dtype, allowed", [(torch.bfloat16, 0), (torch.float16, 0), (torch.float32, 16)])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_codes_scales_and_weights_are_bitsandbytes(dtype, allowed, format):
    """16 million values: equal for 16-bit weights, at most one byte in a million for float32.

    FP4's boundaries are simple fractions, on which 16-bit weights over their block's largest often lie, and
    bitsandbytes' kernels write them in decimals: there another code may be chosen, which is as near. On the CPU zero
    has another sign as well.
    """
    functional = require("bitsandbytes").functional
    weight = torch.randn(1 << 24, generator=torch.Generator(CUDA).manual_seed(0), device=CUDA).mul_(0.02).to(dtype)
    packed, state = functional.quantize_4bit(weight, quant_type=format)
    for place in ("cpu", "cuda"):
        held = blockwise.quantize(weight.to(place), format, double_quant=False)
        if format == "fp4":
            ours, theirs = (
                pl.Quantized(codes.to(place), held.state).dequantize(torch.float32) for codes in (held.packed, packed)
            )
            apart = ours.abs() != theirs.abs()
            assert apart.float().mean() < 1e-3
            exact, scales = weight.to(place).float(), held.state.scales().repeat_interleave(64)
            assert (((ours - exact).abs() - (theirs - exact).abs()).abs() <= 1e-6 * scales)[apart].all()
        else:
            assert differing(held.packed, packed) <= allowed
        assert differing(held.absmax, state.absmax) == 0
        back = pl.Quantized(packed.to(place), held.state).dequantize()
        assert differing(back, functional.dequantize_4bit(packed, state)) == 0


@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("shape", [(96, 96), (7, 33), (1000, 77), (64, 4096)])
def test_backends_agree_in_every_shape(block_size, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(CUDA, torch.bfloat16)
    for double_quant in (False, True):
        settings = ("nf4", block_size, double_quant, "w")
        ours, theirs = (BACKENDS[name].quantize(weight, *settings) for name in ("reference", "bitsandbytes"))
        assert torch.equal(ours.packed, theirs.packed)
        torch.testing.assert_close(ours.state.scales(), theirs.state.scales(), rtol=1e-6, atol=1e-7)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            one, *others = (BACKENDS[n].dequantize(theirs.packed, theirs.state, dtype) for n in BACKENDS)
            assert all(torch.equal(one, other) for other in others), (double_quant, dtype)


def test_zeros_come_back_as_zeros():
    weight = torch.randn(64, 256, device=CUDA)
    weight[:8] = 0
    weight[8:, ::3] = 0
    for name in BACKENDS:
        held = BACKENDS[name].quantize(weight, "nf4", 64, True, "w")
        back = BACKENDS[name].dequantize(held.packed, held.state, torch.float32)
        # after double quantisation an all-zero block has a small scale, and its codes still mean zero
        assert not back[weight == 0].any(), name


def test_what_is_not_finite_is_named():
    weight = torch.randn(1000, device=CUDA)
    weight[3] = float("nan")
    for name in BACKENDS:
        with pytest.raises(pl.PeftLabError, match="up_proj holds 1 values that are NaN"):
            BACKENDS[name].quantize(weight, "nf4", 64, True, "up_proj")


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("rows", [1, 3, 8, 70, 600])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_both_passes_are_the_dense_layers(backend, rows, dtype, tolerance):
    torch.manual_seed(0)
    weight = torch.randn(320, 256, device=CUDA).to(dtype)
    layer = Linear4bit(BACKENDS[backend].quantize(weight, "nf4", 64, True, "w"), None, backend)
    x = torch.randn(rows, 256, device=CUDA, dtype=dtype, requires_grad=True)
    y = layer(x)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    exact = layer.dequantize(torch.float64)
    for found, expected in ((y, x.double() @ exact.T), (x.grad, gradient.double() @ exact)):
        assert ((found.double() - expected).norm() / expected.norm()).item() < tolerance
    with torch.no_grad():  # the fused kernel of a few tokens
        assert ((layer(x).double() - x.double() @ exact.T).norm() / y.double().norm()).item() < tolerance


def test_no_16_bit_copy_is_kept_between_the_passes():
    """Eight layers of 4096 x 4096 in bf16 would be 268 MB; between the passes there is less than one of them."""
    weight = torch.randn(4096, 4096, device=CUDA, dtype=torch.bfloat16)
    held = pl.quantize_nf4(weight)
    model = nn.Sequential(*(Linear4bit(copy.deepcopy(held)) for _ in range(8)))
    x = torch.randn(16, 4096, device=CUDA, requires_grad=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        y = model(x)
    assert torch.cuda.memory_allocated() - before < weight.nbytes
    y.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1.6 * weight.nbytes


def test_quantising_onto_the_gpu_layer_by_layer():
    model = tiny.llama(dtype=torch.bfloat16, layers=6, hidden_size=1024, intermediate_size=4096)
    twin = copy.deepcopy(model)
    whole = sum(p.nbytes for p in model.parameters())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pl.quantize_model(model, device="cuda")
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 0.5 * whole, peak / whole
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    twin = pl.quantize_model(twin).cuda()
    for (path, one), (_, other) in zip(model.named_modules(), twin.named_modules(), strict=True):
        if isinstance(one, Linear4bit):
            assert torch.equal(one.weight, other.weight), path


def test_moving_between_devices_keeps_every_bit():
    model = pl.quantize_model(tiny.llama(**SHAPE))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(IDS).logits
    model.cuda()
    assert choose("auto", "nf4", 64, CUDA).name == ("bitsandbytes" if available("triton") is None else "triton")
    torch.testing.assert_close(model(IDS.cuda()).logits.cpu(), expected, rtol=1e-4, atol=1e-5)
    model.cpu()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged-adamw8bit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains(optimizer, checkpointing):
    model = tiny.llama(initializer_range=0.2, dtype=torch.bfloat16, **{**SHAPE, "intermediate_size": 2048}).cuda()
    torch.manual_seed(7)
    pl.attach(pl.quantize_model(model), pl.LoRAConfig(r=4, alpha=16, target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        history = pl.train(
            model, tiny.examples(), steps=40, learning_rate=0.02, optimizer=optimizer, checkpointing=checkpointing,
            progress=False,
        )  # fmt: skip
    losses = [row["loss"] for row in history.steps]
    assert sum(losses[-10:]) < sum(losses[:10]) - 1


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged-adamw8bit"])
def test_a_run_with_8_bit_states_resumes(optimizer, tmp_path):
    def model():
        base = pl.quantize_model(tiny.llama(hidden_size=64, intermediate_size=1024).cuda())
        torch.manual_seed(7)
        return pl.attach(base, pl.LoRAConfig(r=8, target_modules=["up_proj"]))

    settings = dict(steps=6, learning_rate=0.02, optimizer=optimizer, precision="fp32", save_every=2, progress=False)

    def stop(model, row):
        if row["step"] == 4:
            raise KeyboardInterrupt

    expected, found = model(), model()
    pl.train(expected, tiny.examples(), **settings)
    with pytest.raises(KeyboardInterrupt):
        pl.train(model(), tiny.examples(), folder=tmp_path, callback=stop, **settings)
    pl.train(found, tiny.examples(), folder=tmp_path, **settings)
    for one, other in zip(expected.parameters(), found.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_merging_and_dequantising():
    model = pl.attach(pl.quantize_model(tiny.llama(**SHAPE).cuda()), pl.LoRAConfig(**LORA))
    expected = model(IDS.cuda()).logits
    assert pl.merge(model, requantize=True).relative_error > 0.01
    pl.unmerge(model)
    assert torch.equal(model(IDS.cuda()).logits, expected)
    pl.merge(pl.dequantize_model(model), unload=True)
    torch.testing.assert_close(model(IDS.cuda()).logits, expected, rtol=1e-4, atol=1e-5)


def test_transformers_bitsandbytes_model_and_ours_answer_alike(tmp_path):
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    tiny.llama(**SHAPE, dtype=torch.bfloat16).save_pretrained(tmp_path / "whole")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    theirs = LlamaForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=config, device_map="cuda", dtype=torch.bfloat16
    )
    torch.manual_seed(0)
    pl.attach(theirs, pl.LoRAConfig(**LORA))
    pl.save_adapter(theirs, tmp_path / "adapter")
    expected = theirs(IDS.cuda()).logits
    pl.save_quantized(theirs, tmp_path / "base")
    again = pl.load_quantized(tmp_path / "base", device="cuda")
    pl.load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(IDS.cuda()).logits, expected, rtol=2e-2, atol=2e-2)
    theirs(IDS.cuda(), labels=IDS.cuda()).loss.backward()
    assert all(p.grad is not None for p in theirs.parameters() if p.requires_grad)
    pl.dequantize_model(theirs)
    torch.testing.assert_close(theirs(IDS.cuda()).logits, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_transformers_opens_what_we_saved(tmp_path, dtype, tokens):
    from transformers import AutoModelForCausalLM

    ours = pl.quantize_model(tiny.llama(**SHAPE, dtype=dtype).cuda())
    folder = pl.save_quantized(ours, tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(folder, device_map="cuda")
    ids = torch.randint(1, 30, (2, tokens), device="cuda")
    with torch.no_grad():
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=tolerance, atol=tolerance)
    pl.attach(theirs, pl.LoRAConfig(**LORA))
    theirs(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in theirs.parameters() if p.requires_grad)
