"""`peftlab bench qlora`: its points, and that a comparison leaves the one model as it was for the next library."""

import math
import weakref
from types import SimpleNamespace

import pytest
import torch

import peftlab as pl
from peftlab.bench import fourbit, lora, models, qlora, timing
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
def no_model_held():
    models.let_go()
    yield
    models.let_go()


def test_points_cover_the_chapter():
    points = qlora.points()
    assert len({qlora.__name__ + str(point) for point in points}) == len(points)
    equality = [point for point in points if point["section"] == "equality" and point["block_size"] == 64]
    assert len(equality) == 3 and all(point["values"] >= 1e8 for point in equality)
    large = {"seven", "where", "eight", "seventy", "fits", "segments"}
    assert {point["section"] for point in points if point.get("timed") or point.get("alone")} == large
    steps = [point for point in points if point.get("kind") == "step"]
    assert all(("timed" in point) != (point["library"] == "peft, prepared") for point in steps)
    if not torch.cuda.is_available():
        with pytest.raises(PeftLabError, match="'seventy' measures a GPU"):
            qlora.measure({"section": "seventy", "shape": "llama-2-70b"})


def small(point):
    """The same point on a model that a processor holds."""
    run = {name: RUN[name] for name in ("sequence", "r") if name in point}
    return {**{name: value for name, value in point.items() if name != "card_bytes"}, "shape": TINY, **run}


@pytest.mark.skipif(available("bitsandbytes") is None, reason="needs bitsandbytes")
def test_every_point_at_full_size_gives_the_model_back_as_it_was(monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", lambda settings: None)
    for where in (timing, fourbit):
        monkeypatch.setattr(where, "timed", lambda step, repeats, warm_up: [step() or 1.0])
    for where in (models, fourbit):
        monkeypatch.setattr(where, "release", lambda: None)  # collecting garbage hundreds of times takes a minute
    made, build, trainable = [], models.random_model, {}
    monkeypatch.setattr(models, "random_model", lambda *given: made.append(build(*given)) or made[-1])
    before = {}
    for point in map(small, fourbit.points()):
        rows = fourbit.measure(point, CPU)
        assert all({"timed", "alone"}.isdisjoint(row) for row in rows)
        assert bool(rows) == (point["kind"] != "profile")  # these rows come from the process that profiles
        if point["kind"] in ("step", "optimizer"):
            (row,) = rows
            assert {*fourbit.PEAKS, "trainable"} <= set(row) and ("seconds" in row) == ("timed" in point)
            trainable[point["library"]] = row["trainable"]
        if point["kind"] == "fits":
            assert [row["tried"] for row in rows] == [True, *[False] * (len(rows) - 1)]
            assert {row["fits"] for row in rows} == {True} and rows[0]["sequence"] == point["sequence"]
        model = made[-1]
        values, modules = before.setdefault(
            len(made), ({n: v.clone() for n, v in model.state_dict().items()}, dict(model.named_modules()))
        )
        after = model.state_dict()
        assert list(after) == list(values) and all(torch.equal(value, after[name]) for name, value in values.items())
        assert dict(model.named_modules()) == modules
        assert not any(p.requires_grad for p in model.parameters())
    assert len(set(trainable.values())) == 1 and trainable["peft"] > 0


def test_where_the_time_goes_is_told_by_the_process_that_profiles(monkeypatch):
    point = next(small(p) for p in fourbit.points() if p["kind"] == "profile")
    kernels = [timing.Kernel(name, start, start + 1) for start, name in enumerate(("gemm_a", "Memcpy", "gemm_b"))]
    monkeypatch.setattr(timing, "_profiles", True)
    monkeypatch.setattr(fourbit, "kernels_of", lambda step: step() or kernels)
    rows = fourbit.measure(point, CPU)
    assert [(row["what"], row["kernels"], row["busy_seconds"]) for row in rows] == [
        ("copies", 1, 1), ("matrix products", 2, 2),
    ]  # fmt: skip


@pytest.mark.skipif(available("bitsandbytes") is None, reason="needs bitsandbytes")
def test_bitsandbytes_layers_over_the_same_codes_compute_the_same():
    model = models.random_model(TINY, CPU, True)
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
        assert fourbit.kind_of(name) == kind


def test_what_is_forgotten_is_measured_by_the_lora_chapters_protocol(monkeypatch):
    """Each method has its own rates and three scored seeds, and its row says what news text cost before."""
    models_of = {"whole": "float32", "qlora": "NF4"}
    monkeypatch.setattr(lora, "base", lambda kind="whole": (models_of[kind], "tokenizer"))
    monkeypatch.setattr(lora, "news", lambda: ["The weather was fine."])
    monkeypatch.setattr(pl, "perplexity", lambda model, *_, **__: {"float32": 32.0, "NF4": 40.0}[model])
    ran = []

    def trained(point):
        ran.append((point["learning_rate"], point["seed"]))
        loss = abs(math.log(point["learning_rate"] / point["best"]))
        return None, {**point, "validation_loss": loss, "news_perplexity": 50.0}

    monkeypatch.setattr(lora, "trained", trained)
    monkeypatch.setattr(lora, "scored", lambda point: (None, {**trained(point)[1], "right": 480, "scored": True}))
    points = list(qlora.forgetting())
    assert [point["method"] for point in points] == ["lora", "qlora", "full"]
    for point in points:
        ran.clear()
        rows = qlora.measure({**point, "best": point["rates"][1]})
        assert len(point["rates"]) >= 4
        assert set(point["rates"]) <= {rate for rate, seed in ran if seed not in lora.SEEDS}
        chosen = [row for row in rows if row["scored"]]
        assert {row["learning_rate"] for row in chosen} == {point["rates"][1]}
        assert {row["seed"] for row in chosen} == set(lora.SEEDS) and len(lora.SEEDS) == 3
        assert {row["news_perplexity_before"] for row in rows} == {40.0 if point["method"] == "qlora" else 32.0}
        assert {row["section"] for row in rows} == {"forgetting"} and not {"rates", "tuning"} & set(rows[0])


def test_no_optimiser_is_left_when_memory_is_given_back(monkeypatch):
    """Of a run that fitted and of one that did not: the next must not find its states."""
    model, made, alive = models.random_model(TINY, CPU, True), [], []

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
    assert fourbit.tried(model, RUN, CPU) == {"fits": False, **dict.fromkeys(fourbit.PEAKS)}
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
