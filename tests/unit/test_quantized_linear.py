"""The frozen 4-bit layer: its two passes, what it keeps between them, and how it moves, copies and counts."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftlab as pl
from peftlab.optional import available
from peftlab.quantization import Linear4bit
from peftlab.quantization.backends import choose

needs_bitsandbytes = pytest.mark.skipif(available("bitsandbytes") is None, reason="needs bitsandbytes")
BACKENDS_HERE = ["reference", pytest.param("bitsandbytes", marks=needs_bitsandbytes)]


def layer(outside=50, inside=96, bias=True, dtype=torch.float32, backend="reference", seed=0, **settings):
    torch.manual_seed(seed)
    weight = torch.randn(outside, inside, dtype=dtype)
    parameter = nn.Parameter(torch.randn(outside, dtype=dtype)) if bias else None
    return Linear4bit(pl.quantize(weight, **settings), parameter, backend)


def dense(quantised, dtype):
    """The dense layer that it stands for."""
    twin = nn.Linear(quantised.in_features, quantised.out_features, bias=quantised.bias is not None, dtype=dtype)
    with torch.no_grad():
        twin.weight.copy_(quantised.dequantize(dtype))
        if quantised.bias is not None:
            twin.bias.copy_(quantised.bias)
    return twin


def close(found, expected, tolerance):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < tolerance, error


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 3, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_both_passes_are_the_dense_layers(backend, dtype, tolerance, shape, bias):
    found = layer(bias=bias, backend=backend, dtype=dtype)
    expected = dense(found, dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    y, z = found(x), expected(twin)
    close(y, z, tolerance)
    gradient = torch.randn_like(y)
    y.backward(gradient), z.backward(gradient)
    close(x.grad, twin.grad, tolerance)
    if bias:
        close(found.bias.grad, expected.bias.grad, tolerance)
    assert found.weight.grad is None


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_gradients_by_differences(format, double_quant):
    found = layer(7, 9, dtype=torch.float64, format=format, double_quant=double_quant)
    x = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: found(x), (x, found.bias))
    assert torch.autograd.gradgradcheck(lambda x, b: found(x).square(), (x, found.bias))


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(50, 96), (33, 64), (64, 7)])
def test_backends_agree(dtype, shape):
    results = []
    for backend in ("reference", "bitsandbytes"):
        found = layer(*shape, dtype=dtype, backend=backend)
        x = torch.randn(4, shape[1], dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = found(x)
        y.sum().backward()
        results.append((y.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # the same weight, the same product


def test_autograd_saves_nothing_of_the_weight():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(512, 256)(torch.randn(3, 256, requires_grad=True))
    assert saved == []


def test_the_weight_lives_for_one_product_only():
    """Two layers in a row under bf16 autocast: after the forward pass nothing of a weight's size is left but codes."""
    import gc

    model = nn.Sequential(layer(128, 128, seed=1), layer(128, 128, seed=2))
    x = torch.randn(2, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.is_floating_point()]
    assert [t for t in tensors if t.numel() == 128 * 128] == []
    y.sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.abs().sum() > 0


def test_it_computes_in_the_dtype_of_its_input_or_in_autocasts():
    found = layer()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert found(torch.randn(2, 96, dtype=dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert found(torch.randn(2, 96)).dtype == torch.bfloat16
        assert found(torch.randn(2, 96, dtype=torch.float64)).dtype == torch.float64
        expected = dense(found, torch.float32)(torch.ones(2, 96))
        assert torch.equal(found(torch.ones(2, 96)), expected)


def test_writing_to_the_weight_between_the_passes_is_noticed():
    found = layer()
    for tensor in (found.weight, found.quant_state.nested_absmax):
        y = found(torch.randn(2, 96, requires_grad=True))
        with torch.no_grad():
            tensor.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_other_codes_loaded_between_the_passes_are_noticed_under_checkpointing_too():
    found, other = layer(seed=1), layer(seed=2)
    y = checkpoint(found, torch.randn(2, 96, requires_grad=True), use_reentrant=False)
    found.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_state_cannot_be_changed_behind_the_layer():
    state = layer().quant_state
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.absmax = state.absmax.clone()


def test_a_layer_made_in_inference_mode_passes_gradients_on():
    with torch.inference_mode():
        found = layer(bias=False)
    x = torch.randn(2, 96, requires_grad=True)
    found(x).sum().backward()
    expected = found.dequantize(torch.float32).sum(0).expand(2, 96)
    assert torch.allclose(x.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_a_cast_does_not_reach_codes_or_scales(cast):
    found = layer()
    before = found.dequantize(torch.float32)
    getattr(nn.Sequential(found), cast)()
    assert torch.equal(found.dequantize(torch.float32), before)
    assert {t.dtype for t in found.quant_state.tensors().values()} == {torch.uint8, torch.float32}
    assert found.weight.dtype == torch.uint8 and found.weight.quant_state is found.quant_state
    assert found.bias.dtype == getattr(torch, cast if cast != "half" else "float16")


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_whole_and_its_own(again):
    found = nn.Sequential(layer())
    twin = again(found)
    assert pl.count_parameters(twin) == pl.count_parameters(found)
    assert pl.count_parameters(found).total == 50 * 96 + 50
    x = torch.randn(2, 96)
    expected = found(x)
    with torch.no_grad():
        twin[0].weight.zero_(), twin[0].quant_state.absmax.zero_()
    assert torch.equal(found(x), expected) and twin[0].weight.quant_state is twin[0].quant_state


@pytest.mark.parametrize(
    "settings", [{}, dict(double_quant=False), dict(format="fp4", block_size=32), dict(format="int4")]
)
def test_state_dict_both_ways(settings):
    found, other = layer(seed=1, **settings), layer(seed=2)
    state = found.state_dict()
    owner = "peftlab__int4" if settings.get("format") == "int4" else f"bitsandbytes__{settings.get('format', 'nf4')}"
    assert f"weight.quant_state.{owner}" in state and "weight.absmax" in state
    assert ("weight.nested_absmax" in state) == settings.get("double_quant", True)
    missing = other.load_state_dict(state)
    assert not missing.missing_keys and not missing.unexpected_keys
    assert torch.equal(other.dequantize(), found.dequantize())
    assert other.weight.quant_state is other.quant_state and settings.get("format", "nf4") in str(other)


def test_a_damaged_state_is_refused():
    state = layer().state_dict()
    for key, said in (("weight.absmax", "absmax and one quant_state"), ("weight.quant_map", "another code book")):
        broken = dict(state)
        broken[key] = broken[key].float() + 0.1
        if key == "weight.absmax":
            del broken[key]
        with pytest.raises(pl.PeftLabError, match=said):
            layer().load_state_dict(broken)


@needs_bitsandbytes
def test_the_stored_form_is_bitsandbytes_byte_for_byte():
    import bitsandbytes as bnb

    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    theirs = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    theirs.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    theirs = theirs.to("cpu")
    ours, other = Linear4bit(pl.quantize_nf4(weight)).state_dict(), theirs.state_dict()
    assert ours.keys() == other.keys()
    assert all(torch.equal(ours[key], value) for key, value in other.items())


def test_auto_chooses_by_device_and_format():
    cpu = torch.device("cpu")
    assert choose("auto", "int4", 64, cpu).name == "reference"
    assert choose("auto", "nf4", 16, cpu).name == "reference"
    assert choose("auto", "nf4", 64, torch.device("mps")).name == "reference"
    assert choose("auto", "nf4", 64, cpu).name == ("reference" if available("bitsandbytes") is None else "bitsandbytes")


def test_without_bitsandbytes_the_reference_computes(monkeypatch):
    from peftlab.quantization import backends

    monkeypatch.setattr(backends, "available", lambda name: None)
    backends.choose.cache_clear()
    try:
        assert layer(backend="auto")(torch.randn(2, 96)).shape == (2, 50)
        with pytest.raises(pl.PeftLabError, match="cannot be used: it is not installed.*backend='auto'"):
            pl.quantize_model(nn.Sequential(nn.Linear(64, 64)), backend="bitsandbytes")
    finally:
        backends.choose.cache_clear()


@needs_bitsandbytes
def test_importing_bitsandbytes_is_quiet():
    import subprocess
    import sys

    code = "from peftlab.optional import require; print(require('bitsandbytes').__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "bitsandbytes\n" and done.stderr == ""
