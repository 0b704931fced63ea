"""Code books and block-wise quantisation: equal to bitsandbytes in every bit, and right where it says nothing."""

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes compiles its code for odd sizes, seconds each

import itertools  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import peftlab as pl  # noqa: E402
from peftlab.optional import available  # noqa: E402
from peftlab.quantization import backends, blockwise, codebooks  # noqa: E402
from peftlab.quantization.backends import BACKENDS, code_zeros, from_bitsandbytes  # noqa: E402

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
bnb = available("bitsandbytes") or pytest.importorskip("bitsandbytes")
BOOK = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def theirs(weight, format, block_size, double_quant):
    """bitsandbytes' codes, its record, and the weight it gives back."""
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=format, compress_statistics=double_quant
    )
    scales = state.absmax
    if double_quant:
        scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    # in one row: its AVX-512 code reads the scales of rows that end within a block wrongly
    shape = weight.shape if weight.numel() % 2 else (weight.numel(),)
    back = torch.ops.bitsandbytes.dequantize_4bit.default(packed, scales, block_size, format, shape, weight.dtype)
    return packed, state, back.view(weight.shape)


def assert_equal(weight, format="nf4", block_size=64, double_quant=True):
    found = pl.quantize(weight, format, block_size=block_size, double_quant=double_quant)
    packed, state, back = theirs(weight, format, block_size, double_quant)
    assert torch.equal(found.packed, packed)
    assert torch.equal(found.absmax, state.absmax) and found.absmax.dtype == state.absmax.dtype
    if double_quant:
        assert torch.equal(found.state.nested_absmax, state.state2.absmax)
        assert torch.equal(found.state.offset, state.offset)
    assert torch.equal(found.dequantize(), back)


def test_code_books_are_bitsandbytes_to_the_bit():
    assert codebooks.code_book("nf4").tolist() == BOOK
    for name in ("nf4", "fp4"):
        assert torch.equal(codebooks.code_book(name), bnb.functional.get_4bit_type(name, device="cpu"))
    assert torch.equal(codebooks.dynamic_map(), bnb.functional.create_dynamic_map())


def test_nf4_is_seven_below_zero_and_eight_above():
    book = codebooks.code_book("nf4")
    assert (book < 0).sum() == 7 and (book == 0).sum() == 1 and (book > 0).sum() == 8
    assert torch.isfinite(book).all() and book.min() == -1 and book.max() == 1
    assert not torch.equal(book, -book.flip(0))  # not symmetric


def test_tables_do_not_follow_what_is_set_when_they_are_first_asked_for():
    for table in (codebooks.code_book, codebooks.pairs, codebooks.boundaries):
        table.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode():
            book, (bounds, _) = codebooks.code_book("nf4"), codebooks.boundaries("nf4")
    finally:
        torch.set_default_dtype(torch.float32)
    assert book.tolist() == BOOK and bounds.dtype == torch.float32 and not book.is_inference()


@pytest.mark.parametrize("format, block_size", list(itertools.product(("nf4", "fp4"), BLOCKS)))
def test_every_block_size_dtype_and_length_is_bitsandbytes(format, block_size):
    torch.manual_seed(block_size)
    for dtype, size in itertools.product(DTYPES, (1, 2, 777, 4096, 64 * 257, 20_001)):
        weight = (torch.randn(size) * 0.03).to(dtype)
        for double_quant in (False, True):
            assert_equal(weight, format, block_size, double_quant)


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 70), columns=st.integers(1, 90), dtype=st.sampled_from(DTYPES),
    format=st.sampled_from(("nf4", "fp4")), block_size=st.sampled_from(BLOCKS), double_quant=st.booleans(),
    scale=st.sampled_from((1e-4, 0.02, 1.0, 300.0)), zeros=st.sampled_from((0.0, 0.3, 0.95, 1.0)),
    kind=st.sampled_from(("normal", "cauchy", "few", "rows")),
)  # fmt: skip
def test_any_weight_is_bitsandbytes(seed, rows, columns, dtype, format, block_size, double_quant, scale, zeros, kind):
    """Normal weights, outliers, values that tie, whole rows of one value, and zeros among them."""
    make = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=make)
    if kind == "cauchy":
        weight = weight / torch.randn(rows, columns, generator=make).abs().clamp(min=0.01)
    elif kind == "few":
        weight = torch.randint(-8, 9, (rows, columns), generator=make) / 8
    elif kind == "rows":
        weight = weight[:, :1].expand(rows, columns).contiguous()
    weight = torch.where(torch.rand(rows, columns, generator=make) < zeros, 0.0, weight * scale)
    weight = weight.clamp(-60_000, 60_000)  # float16 ends at 65,504
    assert_equal(weight.to(dtype), format, block_size, double_quant)


def test_four_million_values_are_bitsandbytes():
    torch.manual_seed(0)
    for dtype in DTYPES:
        assert_equal((torch.randn(4_194_304) * 0.02).to(dtype))


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_ties_go_low_and_neighbours_go_their_own_way(format):
    bounds, _ = codebooks.boundaries(format)
    up, down = bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-2.0))
    weight = torch.cat([torch.ones(1), bounds, up, down, -torch.ones(1), torch.zeros(17)])
    assert weight.numel() == 64
    assert_equal(weight, format, double_quant=False)
    if format == "nf4":
        assert pl.quantize_nf4(weight, double_quant=False).codes[1:16].tolist() == list(range(15))


@pytest.mark.parametrize("size", [64, 128, 200, 97, 30])
def test_blocks_of_zeros_are_coded_as_zeros_whatever_the_kernel_wrote(size):
    """bitsandbytes' CUDA kernel writes 0x00 for them, the code of -1."""
    weight = torch.randn(size).masked_fill(torch.arange(size) // 64 != 0, 0.0)
    expected = pl.quantize_nf4(weight, double_quant=False)
    packed = expected.packed.clone()
    packed[32:] = 0
    code_zeros(packed, weight, 64)
    assert torch.equal(packed, expected.packed)
    code_zeros(packed, torch.zeros(size), 64)
    assert (packed == 0x77).all()


def test_zero_is_exact_and_denormals_are_bitsandbytes():
    for size in (640, 100, 101):
        assert_equal(torch.zeros(size))
        assert not pl.quantize_nf4(torch.zeros(size)).dequantize().any()
    for double_quant in (False, True):
        assert_equal(torch.randn(5000) * 1e-37, double_quant=double_quant)
    assert_equal(torch.randn(5000) * 1e-41, double_quant=False)
    pruned = torch.where(torch.rand(64, 64) < 0.5, 0.0, torch.randn(64, 64))
    assert not pl.quantize_nf4(pruned).dequantize()[pruned == 0].any()


def test_the_largest_of_a_block_is_exact_without_double_quantisation():
    weight = torch.randn(32, 64)
    back = pl.quantize_nf4(weight, double_quant=False).dequantize()
    largest = weight.abs().argmax(1, keepdim=True)
    assert torch.equal(back.gather(1, largest), weight.gather(1, largest))


def test_bits_a_parameter():
    weight = torch.randn(4096, 1024)
    assert pl.quantize_nf4(weight, double_quant=False).bits_per_parameter == 4.5
    doubled = pl.quantize_nf4(weight)
    assert doubled.bits_per_parameter == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert doubled.nbytes == doubled.packed.nbytes + sum(t.nbytes for t in doubled.state.tensors().values())


def test_packing_puts_the_first_into_the_high_half():
    held = pl.quantize_nf4(torch.tensor([1.0, -1.0, 0.0]), double_quant=False)
    assert held.packed.tolist() == [[0xF0], [0x77]] and held.codes.tolist() == [15, 0, 7]
    assert held.shape == (3,) and held.packed.shape == (2, 1)


def test_int4_is_rounding():
    weight = torch.randn(4, 64)
    scale = weight.abs().amax(1, keepdim=True)
    expected = (weight * (1 / scale) * 7).round() / 7 * scale
    torch.testing.assert_close(pl.quantize(weight, "int4", double_quant=False).dequantize(), expected)


def test_errors_are_ordered_as_the_chapter_says():
    """On normal weights NF4 beats FP4 and INT4, and small blocks beat large ones."""
    torch.manual_seed(0)
    weight = torch.randn(512, 512)

    def error(format, block_size=64):
        back = pl.quantize(weight, format, block_size=block_size, double_quant=False).dequantize()
        return ((back - weight).norm() / weight.norm()).item()

    assert error("nf4") < error("int4") and error("nf4") < error("fp4")
    errors = [error("nf4", size) for size in BLOCKS]
    assert errors == sorted(errors)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("size", [64, 65, 10_000])
def test_what_is_not_finite_is_named(value, size):
    weight = torch.randn(size)
    weight[size // 2], weight[-1] = value, value
    with pytest.raises(pl.PeftLabError, match="layers.3.up_proj holds 2 values that are NaN or infinite"):
        pl.quantize_nf4(weight, name="layers.3.up_proj")


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(format="nf5"), "one of 'nf4', 'fp4', 'int4'; found 'nf5'. Did you mean 'nf4'"),
        (dict(block_size=48), "a power of two"), (dict(block_size=True), "a power of two"),
        (dict(weight=torch.arange(8)), "only floating"), (dict(weight=torch.zeros(0)), "only floating"),
        (dict(weight=torch.full((640,), 3e38)), "double_quant=False"),
    ],
)  # fmt: skip
def test_mistakes(settings, said):
    with pytest.raises(pl.PeftLabError, match=said):
        pl.quantize(**{"weight": torch.randn(64), **settings})


def test_float64_is_rounded_first():
    weight = torch.randn(100, dtype=torch.float64)
    held = pl.quantize_nf4(weight)
    assert torch.equal(held.packed, pl.quantize_nf4(weight.float()).packed)
    assert held.dequantize().dtype == torch.float64
    assert torch.equal(held.dequantize(), held.dequantize(torch.float32).double())


def test_chunks_do_not_show(monkeypatch):
    weight = torch.randn(3, 5001)
    whole = pl.quantize_nf4(weight)
    monkeypatch.setattr(blockwise, "CHUNK", 256)
    pieces = pl.quantize_nf4(weight)
    assert torch.equal(whole.packed, pieces.packed) and torch.equal(whole.absmax, pieces.absmax)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(96, 96), (64, 128), (7, 33), (50, 130), (33, 64)])
def test_backends_dequantise_alike(format, shape):
    """Width 96 with blocks of 64 is where bitsandbytes' own AVX-512 path goes wrong."""
    assert BACKENDS["bitsandbytes"].cannot(format, 64, torch.device("cpu")) is None
    weight = torch.randn(shape)
    for block_size, double_quant, dtype in itertools.product(BLOCKS, (False, True), (*DTYPES, torch.float64)):
        held = pl.quantize(weight, format, block_size=block_size, double_quant=double_quant)
        one, other = (BACKENDS[n].dequantize(held.packed, held.state, dtype) for n in ("reference", "bitsandbytes"))
        assert torch.equal(one, other), (block_size, double_quant, dtype)


def test_fp4_codes_by_magnitude_stand_for_the_same_values():
    """bitsandbytes' CUDA rule: other codes for zero, and the same values but within 4e-7 of a boundary."""
    torch.manual_seed(0)
    scaled = torch.cat([torch.rand(1_000_000) * 2 - 1, torch.tensor([0.0, -0.0, 1.0, -1.0])])
    book = codebooks.code_book("fp4")
    bounds, order = codebooks.boundaries("fp4")
    expected = book[order[torch.bucketize(scaled, bounds, out_int32=True)].int()]
    found = book[blockwise.signed_codes(scaled).int()]
    differ = found != expected
    assert differ.sum() < 10
    distance = (scaled[differ][:, None] - bounds).abs().min(1).values
    assert (distance < 4e-7).all()
    assert blockwise.signed_codes(torch.tensor([0.001, -0.001, 0.5, -0.5])).tolist() == [0, 8, 5, 13]


def test_on_a_gpu_scales_have_the_nearest_code():
    """bitsandbytes' CUDA rule, which the CPU can compute too: of all 256 values none is nearer."""
    torch.manual_seed(0)
    scaled = torch.cat([torch.rand(20_000) * 2 - 1, torch.randn(20_000).mul(1e-3).clamp(-1, 1)])
    book = codebooks.dynamic_map()
    found = blockwise.nearest_eight_bit_codes(scaled)
    distance = (scaled[:, None].double() - book.double()).abs()
    assert found.dtype == torch.uint8
    chosen = distance.gather(1, found.long()[:, None])[:, 0]
    assert (chosen - distance.min(1).values).max() < 1e-7
    assert torch.equal(blockwise.nearest_eight_bit_codes(book), torch.arange(256, dtype=torch.uint8))
    of_bins = distance.gather(1, blockwise.eight_bit_codes(scaled).long()[:, None])[:, 0]  # the CPU's rule
    assert 0 <= (of_bins - chosen).max() < 2 / codebooks.BINS


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_record_of_bitsandbytes_is_read_whole(double_quant):
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )
    found, expected = from_bitsandbytes(state), pl.quantize_nf4(weight, double_quant=double_quant)
    assert found.nested == double_quant and set(found.tensors()) == set(expected.state.tensors())
    for name, tensor in expected.state.tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name
    assert torch.equal(blockwise.dequantize(packed, found), expected.dequantize())


def test_on_a_cpu_the_reference_quantises(monkeypatch):
    """bitsandbytes gives the same bits there, and takes longer."""
    monkeypatch.setattr(backends, "require", lambda name: pytest.fail(f"{name} was asked"))
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64):
        found = BACKENDS["bitsandbytes"].quantize(weight.to(dtype), "nf4", 64, True, "weight")
        assert torch.equal(found.packed, pl.quantize_nf4(weight).packed)
