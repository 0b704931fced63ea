"""The fast path on a GPU: compiled pieces, graphs, bfloat16, pinned memory; held to the plain path there."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import test_fast as on_cpu  # noqa: E402
import tiny  # noqa: E402

import peftlab as pl  # noqa: E402
import peftlab.fast.step  # noqa: E402
from peftlab.fast.step import Graphs, Step, read_batch  # noqa: E402
from peftlab.training.eligible import decoder_of  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 512}
KINDS = ["grouped", "mistral, short window", "qwen2", "qwen3"]


@pytest.fixture
def eager(monkeypatch):
    """Without torch.compile, which takes longer than all the rest. `test_in_bfloat16` and the runs compile."""
    pieces = peftlab.fast.pieces.pieces_for(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(peftlab.fast.step, "pieces_for", lambda device, dtype: pieces)


def make(kind, dtype=torch.bfloat16, **lora):
    sizes = SIZES if kind != "qwen3" else {**SIZES, "head_dim": 64}
    model = on_cpu.make(kind, torch.float32, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.15 if parameter.ndim > 1 else 1)
    return on_cpu.adapt(model.to(dtype).cuda(), dtype=lora.pop("adapter_dtype", None), **{"r": 8, **lora})


def batch(packed=False):
    one = on_cpu.in_rows() if packed else on_cpu.padded(b=4, s=100)
    return {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in one.items()}


def on_cpu_again(one):
    return {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in one.items()}


def fast_gradients(model, one, dtype, recompute=False, pinned=False, graph=False):
    step = Step(decoder_of(model), dtype, 99 * recompute, pinned)
    compute = Graphs(step) if graph else step
    try:
        read = read_batch(on_cpu_again(one), rounded=True)
        read = read if graph else read.to(torch.device("cuda"))
        scale = 1 / read.learned.to("cuda", on_cpu.total_dtype(dtype))
        for _ in range(4 if graph else 1):  # as it is, recorded, replayed
            step.flat.begin()
            total = compute.gradients(read, step.rows(read), scale)
        assert not graph or len(compute.recorded) == 1
        return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    finally:
        step.give_back()


def worst(found, exact):
    return max(float((found[name] - g).norm() / g.norm()) for name, g in exact.items())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_float64(kind, packed, eager):
    model, one = make(kind, torch.float64), batch(packed)
    total, exact = on_cpu.plain_gradients(model, one)
    for how in ({}, {"recompute": True, "graph": True}):
        found_total, found = fast_gradients(model, one, torch.float64, **how)
        assert float(found_total) == pytest.approx(float(total), rel=1e-6)
        assert worst(found, exact) < 1e-6


@pytest.mark.parametrize(("kind", "four_bit"), [("grouped", False), ("grouped", True), ("qwen3", False)])
def test_in_bfloat16_it_is_as_near_to_float32_as_autocast(kind, four_bit):
    model = make(kind, adapter_dtype=torch.float32)
    if four_bit:
        pl.detach(model)
        pl.quantize_model(model)
        on_cpu.adapt(model, r=8)
    one = batch()
    with torch.autocast("cuda", torch.bfloat16):
        _, autocast = on_cpu.plain_gradients(model, one)
    found = [fast_gradients(model, one, torch.bfloat16, **how)[1] for how in ({}, {"recompute": True, "graph": True})]
    _, exact = on_cpu.plain_gradients(model.float(), one)

    def error(one):
        return float(torch.stack([(one[name] - g).norm() / g.norm() for name, g in exact.items()]).median())

    assert all(0 < error(one) < 1.1 * error(autocast) for one in found), [*map(error, [*found, autocast])]


def test_pinned_inputs_change_nothing(eager):
    model, one = make("grouped"), batch()
    _, plain = fast_gradients(model, one, torch.bfloat16, recompute=True)
    for graph in (False, True):
        _, pinned = fast_gradients(model, one, torch.bfloat16, recompute=True, pinned=True, graph=graph)
        assert worst(pinned, plain) < 1e-3


def test_where_nothing_compiles_the_reason_is_told(monkeypatch):
    def missing():
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(peftlab.fast.pieces, "_compiled", missing)
    history, _ = run(True, steps=3)
    assert "its pieces are not compiled: RuntimeError: no C compiler" in history.path


@pytest.mark.parametrize("heads", [1, 9, 40])
@pytest.mark.parametrize("d", [64, 80, 128])
def test_heads_are_turned_in_one_kernel(heads, d):
    from peftlab.fast import kernels, pieces

    whole = torch.randn(2, 7, heads + 3, d + 8, device="cuda").bfloat16()
    x, angles = whole[:, :, 1 : heads + 1, :d], torch.randn(2, 7, 1, d // 2, device="cuda").bfloat16()
    for cos, sin in ((angles, angles.flip(1)), (angles[:1], angles[1:])):
        wanted, found, place = torch.empty_like(x), torch.empty_like(x), whole.clone()[:, :, 1 : heads + 1, :d]
        pieces.rotate_into(wanted, x, cos, sin)
        kernels.rotate_into(found, x, cos, sin)
        kernels.rotate_into(place, place, cos, sin)
        assert torch.allclose(found.float(), wanted.float(), rtol=0.01, atol=1e-6) and torch.equal(found, place)


def run(fast, steps=12, **settings):
    model = tiny.llama(initializer_range=0.2).cuda()
    torch.manual_seed(7)
    pl.attach(model, pl.LoRAConfig(r=4, alpha=16, target_modules="all-linear"))
    given = {"batch_size": 4, "learning_rate": 0.02, "steps": steps, "progress": False, "fast": fast, **settings}
    return pl.train(model, tiny.examples(), **given), model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run(precision):
    (fast, model), (again, same), (plain, other) = (run(fast, precision=precision) for fast in (True, True, False))
    assert fast.path.startswith("fast") and "CUDA graph" in fast.path
    share = 1e-3 if precision == "fp32" else 0.03
    for row, want in zip(fast.steps, plain.steps, strict=True):
        assert row["loss"] == pytest.approx(want["loss"], rel=share)
    assert fast.steps == again.steps
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize("first", [True, False])
def test_a_run_goes_on_with_the_other_path(tmp_path, first, eager):
    class Killed(Exception):
        pass

    def callback(model, row):
        if row["step"] == 5:
            raise Killed

    given = {"folder": tmp_path, "save_every": 1, "precision": "fp32"}
    with pytest.raises(Killed):
        run(first, callback=callback, **given)
    resumed, _ = run(not first, **given)
    wanted, _ = run(False, precision="fp32")
    for row, want in zip(resumed.steps, wanted.steps, strict=True):
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-3)
