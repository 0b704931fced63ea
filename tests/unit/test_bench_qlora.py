"""`peftlab bench qlora`: its points, and that a comparison leaves the one model as it was for the next library."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from peftlab.bench import fourbit, kernels, qlora
from peftlab.errors import PeftLabError
from peftlab.optional import available

TINY = dict(
    model_type="llama", vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    bos_token_id=1, eos_token_id=2, pad_token_id=None,
)  # fmt: skip
RUN = {**fourbit.RUN, "sequence": 8, "r": 4}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch):
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: None)


def test_points_cover_the_chapter():
    points = qlora.points()
    assert len({qlora.__name__ + str(point) for point in points}) == len(points)
    equality = [point for point in points if point["section"] == "equality" and point["block_size"] == 64]
    assert len(equality) == 3 and all(point["values"] >= 1e8 for point in equality)
    timed = {point["section"] for point in points if point.get("timed")}
    assert timed == {"kernels", "seven", "sixteen", "where", "eight", "seventy", "fits", "segments"}
    if not torch.cuda.is_available():
        with pytest.raises(PeftLabError, match="'seventy' measures a GPU"):
            qlora.measure({"section": "seventy", "shape": "llama-2-70b"})


@pytest.mark.skipif(available("bitsandbytes") is None, reason="needs bitsandbytes")
def test_each_library_in_turn_and_the_model_as_it_was():
    pytest.importorskip("peft")
    model = fourbit.random_model(TINY, CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    rows = list(fourbit.beside(model, [RUN, {**RUN, "checkpointing": False}], CPU))
    assert [row["library"] for row in rows] == 2 * ["peftlab", "peft", "peft, prepared"]
    assert [row["ratio"] is None for row in rows] == 2 * [False, True, True]
    assert len({row["trainable"] for row in rows}) == 1 and rows[0]["trainable"] > 0
    assert all(row["fastest"] <= row["seconds"] for row in rows)
    assert {*fourbit.PEAKS, "gpu_seconds", "kernels"} <= set(rows[0])
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(value, after[name]) for name, value in before.items())
    assert dict(model.named_modules()) == modules
    assert not any(p.requires_grad for p in model.parameters())
    assert fourbit.tried(model, {**RUN, "optimizer": "adamw8bit"}, CPU)["fits"]


def test_a_twin_shares_every_weight_and_nothing_else():
    model = fourbit.random_model(TINY, CPU)
    twin = fourbit.twin_of(model)
    assert all(one is other for one, other in zip(model.parameters(), twin.parameters(), strict=True))
    layer, other = (m.model.layers[0].mlp.up_proj for m in (model, twin))
    assert layer is not other and layer.quant_state.absmax is other.quant_state.absmax
    fourbit.replace(twin, "model.layers.0.mlp.up_proj", torch.nn.Identity())
    assert model.model.layers[0].mlp.up_proj is layer


@pytest.mark.skipif(available("bitsandbytes") is None, reason="needs bitsandbytes")
def test_bitsandbytes_layers_over_the_same_codes_compute_the_same():
    model = fourbit.random_model(TINY, CPU)
    layer = model.model.layers[0].mlp.up_proj
    theirs = fourbit.as_bitsandbytes(layer).train()
    assert theirs.weight.data_ptr() == layer.weight.data_ptr()
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    assert torch.equal(layer(x), theirs(x))
    assert sorted(theirs.state_dict()) == sorted(layer.state_dict())


def test_kernels_are_told_apart_by_name():
    for name, kind in (
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "dequantise the weights"),
        ("nvjet_hsh_128x256_64x4", "matrix products"), ("sm90_xmma_gemm_bf16bf16", "matrix products"),
        ("pytorch_flash::flash_fwd_kernel", "attention"), ("FusedAdamMathFunctor", "optimiser"),
        ("Memcpy DtoD", "copies"), ("vectorized_elementwise_kernel", "everything else"),
    ):  # fmt: skip
        assert kernels.kind_of(name) == kind


def test_four_bits_and_sixteen_take_their_steps_in_turn(monkeypatch):
    monkeypatch.setattr(fourbit, "PAIRS", 2)
    monkeypatch.setattr(fourbit, "RUN", RUN)
    rows = list(fourbit.sixteen({"shape": TINY}, CPU))
    assert [row["kind"] for row in rows] == ["weights", *3 * ["step"], *6 * ["beside"]]
    assert [row["format"] for row in rows[4:]] == 3 * ["nf4", "bf16"]
    assert all((row["ratio"] is None) == (row["format"] == "bf16") and row["fastest"] > 0 for row in rows[4:])


def test_no_optimiser_is_left_when_memory_is_given_back(monkeypatch):
    """Of a run that fitted and of one that did not: the next must not find its states."""
    model, made, alive = fourbit.random_model(TINY, CPU), [], []

    def watched(*args):
        made.append(weakref.ref(optimizer := make(*args)))
        return optimizer

    def given_back():
        alive.append(sum(ref() is not None for ref in made))

    make, step_of = fourbit.optimizer_of, fourbit.stepper
    monkeypatch.setattr(fourbit, "optimizer_of", watched)
    monkeypatch.setattr(fourbit, "release", given_back)
    assert fourbit.tried(model, RUN, CPU)["fits"] and alive[-1] == 0

    def full(*args):
        step = step_of(*args)

        def fail():
            step()
            raise torch.OutOfMemoryError

        return fail

    monkeypatch.setattr(fourbit, "stepper", full)
    assert fourbit.tried(model, RUN, CPU) == {"fits": False, **dict.fromkeys(fourbit.PEAKS), "seconds": None}
    assert len(made) == 2 and alive[-1] == 0


def test_the_limit_counts_what_cuda_itself_holds(monkeypatch):
    """A card of 80 with 0.6 outside of torch: 48 of it are left, and the allocator may hold all but the 0.6."""
    held, fractions = [0], []

    def ballast(size, **_):
        held[0] += size
        return torch.empty(1, dtype=torch.uint8)

    cuda = SimpleNamespace(
        mem_get_info=lambda _: (int(79.4e9) - held[0], int(80e9)), memory_reserved=lambda _: held[0],
        set_per_process_memory_fraction=lambda fraction, _: fractions.append(fraction), current_device=lambda: 0,
        is_available=lambda: False, OutOfMemoryError=torch.OutOfMemoryError,
    )  # fmt: skip
    fake = SimpleNamespace(cuda=cuda, zeros=lambda *_, **__: None, empty=ballast, uint8=torch.uint8)
    monkeypatch.setattr(fourbit, "torch", fake)
    with fourbit.only(48e9, CPU):
        assert held == [int(32e9)]
    assert fractions == [pytest.approx(79.4 / 80), 1.0]
