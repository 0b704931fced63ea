"""The third backend: when it is chosen, what it says where it cannot be used, and its kernels in Triton's interpreter.

The interpreter runs where Triton is installed and no GPU is found. The compiled kernels are tested in tests/gpu.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import peftlab as pl
from peftlab.core import triton_check
from peftlab.errors import PeftLabError
from peftlab.quantization import backends, blockwise
from peftlab.quantization.backends import BACKENDS, choose

CUDA = torch.device("cuda", 0)


@pytest.fixture
def a_gpu(monkeypatch):
    """Let `choose` see a GPU of some compute capability, with or without Triton."""

    def set_up(capability=(9, 0), triton=True, fails=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        monkeypatch.setattr(triton_check, "load", lambda name: (object(), "") if triton else (None, "is not installed"))
        monkeypatch.setattr(triton_check, "import_module", lambda name: SimpleNamespace(run_on=first_kernel(fails)))
        triton_check._why_it_fails.cache_clear()
        choose.cache_clear()

    yield set_up
    choose.cache_clear()
    triton_check._why_it_fails.cache_clear()


def first_kernel(fails):
    """Stands in for the kernel that is tried: on a GPU that is not there it could only fail."""

    def run_on(device):
        if fails:
            raise RuntimeError(fails)

    return run_on


def test_auto_takes_it_where_a_gpu_and_triton_are(a_gpu):
    a_gpu()
    assert choose("auto", "nf4", 64, CUDA).name == "triton"
    assert choose("auto", "int4", 4096, CUDA).name == "triton"
    assert choose("auto", "nf4", 16, CUDA).name == "reference"  # no kernel has this block size
    assert choose("auto", "nf4", 64, torch.device("cpu")).name != "triton"


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"triton": False}, "Triton is not installed .pip install triton"),
        ({"capability": (7, 5)}, "Triton needs a GPU of compute capability 8.0, and Tesla T4 has less"),
        (
            {"fails": "no C compiler"},
            "Triton is installed, but its first kernel fails: RuntimeError: no C compiler",
        ),
    ],
)
def test_without_it_the_error_says_so(a_gpu, setting, told):
    a_gpu(**setting)
    assert choose("auto", "nf4", 64, CUDA).name != "triton"
    with pytest.raises(PeftLabError, match=f"backend='triton' cannot be used: {told}"):
        choose("triton", "nf4", 64, CUDA)


def test_on_a_cpu_the_error_says_so():
    weight = torch.nn.Linear(64, 64)
    with pytest.raises(PeftLabError, match="it runs on CUDA GPUs, not on cpu"):
        pl.quantize_model(torch.nn.Sequential(weight), backend="triton")
    with pytest.raises(PeftLabError, match="no block size 16; it has 32, 64"):
        BACKENDS["triton"].cannot("nf4", 16, CUDA) and choose("triton", "nf4", 16, CUDA)


def test_importing_the_package_imports_no_triton():
    package = Path(backends.__file__).parents[1]
    texts = {path.stem: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    asked = {name for name, text in texts.items() if re.search(r"^\s*(import|from) triton", text, re.M)}
    # of `quantization`, `fast`, `training` and `core`; all are imported by name
    assert asked == {"triton_kernels", "kernels", "loss_kernel", "trial_kernel"}
    names = r"\b(triton_kernels|kernels|loss_kernel|trial_kernel)\b"
    assert not any(re.search(rf"^(import|from) .*{names}", text, re.M) for text in texts.values())


def test_every_backend_fills_rows_that_are_apart():
    held = pl.quantize_nf4(torch.randn(6, 20))
    for backend in ("reference", "bitsandbytes", "triton"):
        out = torch.full((6, 24), 7.0)
        BACKENDS[backend].dequantize_into(out[:, :20], held.packed, held.state)
        assert torch.equal(out[:, :20], held.dequantize()) and (out[:, 20:] == 7).all()


@pytest.fixture
def kernels(monkeypatch):
    """The kernels, and the reference with the rules that it follows on CUDA."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("tests/gpu has these")
    monkeypatch.setattr(blockwise, "eight_bit_codes", blockwise.nearest_eight_bit_codes)

    def codes(values, absmax, block_size, format):
        scaled = values * (1 / absmax.clamp(min=blockwise.SMALLEST)).repeat_interleave(block_size)[: len(values)]
        scaled = torch.nn.functional.pad(scaled, (0, len(values) % 2)).clamp_(-1, 1)
        if format == "fp4":
            return blockwise.signed_codes(scaled)
        return torch.bucketize(scaled, blockwise.boundaries(format)[0], out_int32=True).to(torch.uint8)

    monkeypatch.setattr(blockwise, "_codes", codes)
    return backends.kernels()


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("shape, block_size", [((4, 64), 32), ((7, 33), 64)])
def test_the_kernels_in_the_interpreter(kernels, format, shape, block_size):
    weight = torch.randn(shape)
    weight.view(-1)[:40] = 0
    held = blockwise.quantize(weight, format, block_size=block_size)
    packed, absmax = kernels.quantize(weight.reshape(-1), format, block_size)
    codes, nested, offset = kernels.quantize_scales(absmax)
    assert torch.equal(packed, held.packed)
    for mine, theirs in zip((codes, nested, offset), held.state.tensors().values(), strict=True):
        assert torch.equal(mine, theirs)
    out = torch.full((shape[0], shape[1] + 8), 7.0)
    kernels.dequantize(held.packed, held.state, out[:, : shape[1]])
    assert torch.equal(out[:, : shape[1]], held.dequantize()) and (out[:, shape[1] :] == 7).all()


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
def test_a_bin_holds_one_bound_at_most(kernels, format):
    """Every float near a bound gets the code that a search among the bounds gives."""
    bounds = torch.tensor(blockwise.FP4_BOUNDS) if format == "fp4" else blockwise.boundaries(format)[0]
    near = torch.cat([torch.nextafter(bounds, bounds + step) for step in (-1, 0, 1)]).clamp(-1, 1)
    weight = torch.cat([torch.ones(1), near, torch.linspace(-1, 1, 255 - len(near))])
    packed, _ = kernels.quantize(weight, format, 256)
    assert torch.equal(packed, blockwise.quantize(weight, format, block_size=256, double_quant=False).packed)
