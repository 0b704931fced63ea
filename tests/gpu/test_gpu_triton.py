"""The Triton kernels on a GPU: equal to the reference in every bit."""

import pytest
import torch

import peftlab as pl
from peftlab.optional import available
from peftlab.quantization import Linear4bit
from peftlab.quantization.backends import BACKENDS, choose

CUDA = torch.device("cuda", 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(available("triton") is None, reason="needs Triton"),
]
TRITON, REFERENCE = BACKENDS["triton"], BACKENDS["reference"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def drawn(shape, dtype=torch.bfloat16, seed=0):
    weight = torch.randn(shape, device=CUDA, generator=torch.Generator(CUDA).manual_seed(seed)).mul_(0.02)
    weight.view(-1)[:70], weight.view(-1)[71:72] = 0, -0.0
    return weight.to(dtype)


def same(one, other):
    theirs = other.state.tensors()
    assert torch.equal(one.packed, other.packed)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in one.state.tensors().items())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
def test_every_bit_is_the_references(format, block_size, double_quant):
    for shape in ((96, 192), (7, 33), (1000, 77), (3, 5)):
        for dtype in DTYPES:
            weight = drawn(shape, dtype)
            held = REFERENCE.quantize(weight, format, block_size, double_quant, "w")
            same(TRITON.quantize(weight, format, block_size, double_quant, "w"), held)
            for wanted in (*DTYPES, torch.float64):
                expected = REFERENCE.dequantize(held.packed, held.state, wanted)
                assert torch.equal(TRITON.dequantize(held.packed, held.state, wanted), expected)
                for more in (0, 3, 64):  # rows that are apart
                    out = torch.full((shape[0], shape[1] + more), 7.0, dtype=wanted, device=CUDA)
                    TRITON.dequantize_into(out[:, : shape[1]], held.packed, held.state)
                    assert torch.equal(out[:, : shape[1]], expected) and (out[:, shape[1] :] == 7).all()


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sixteen_million_weights(format, dtype):
    weight = drawn((4096, 4096), dtype)
    same(TRITON.quantize(weight, format, 64, True, "w"), REFERENCE.quantize(weight, format, 64, True, "w"))


def test_a_weight_that_lies_otherwise_in_memory_and_a_wider_one():
    for weight in (drawn((64, 96)).T, drawn((64, 96)).double()):
        same(TRITON.quantize(weight, "nf4", 64, True, "w"), REFERENCE.quantize(weight, "nf4", 64, True, "w"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("double_quant", [False, True])
def test_what_is_not_finite_is_named(value, double_quant):
    weight = drawn((64, 96))
    weight[3, 5] = value
    with pytest.raises(pl.PeftLabError, match="up_proj holds 1 values that are NaN or infinite"):
        TRITON.quantize(weight, "nf4", 64, double_quant, "up_proj")


def test_it_is_the_choice_and_computes_the_layer():
    assert choose("auto", "nf4", 64, CUDA).name == "triton"
    layer = Linear4bit(pl.quantize_nf4(drawn((320, 256), torch.float32)))
    for rows in (1, 3, 600):
        x = torch.randn(rows, 256, device=CUDA, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        exact = layer.dequantize(torch.float64)
        torch.testing.assert_close(y.double(), x.double() @ exact.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.grad.double(), exact.sum(0).expand(rows, -1), rtol=1e-4, atol=1e-4)
