"""`peftlab bench`: points in order, rows with provenance, and a run that was killed goes on where it stopped."""

import copy
import gc
import json
import sys
import weakref
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import tiny
import torch

import peftlab
import peftlab as pl
from peftlab import bench
from peftlab.bench import memory as memory_grid
from peftlab.errors import PeftLabError
from peftlab.kit import measurements
from peftlab.memory import estimate

HERE = {"gpu": None, "cpu": "a processor, 2 cores", "versions": {"python": "3.12.0", "torch": "2.11.0"},
        "date": "2026-11-22", "command": "peftlab bench fake --out out.json"}  # fmt: skip
POINTS = [
    {"section": "first", "n": 1},
    {"section": "first", "n": 2},
    {"section": "second", "n": 3, "timed": True},
    {"section": "second", "n": 4},
]


@pytest.fixture
def topic(monkeypatch, tmp_path):
    """A topic whose points are a number each; `stop` is the point at which it dies."""
    fake = SimpleNamespace(measured=[], stop=None, points=lambda: iter(POINTS), out=tmp_path / "out.json")

    def measure(point):
        if point["n"] == fake.stop:
            raise KeyboardInterrupt
        fake.measured.append(point["n"])
        return [{"n": point["n"], "part": part} for part in ("a", "b")]

    fake.measure, fake.partial = measure, tmp_path / "out.json.partial"
    monkeypatch.setitem(sys.modules, "peftlab.bench.fake", fake)
    monkeypatch.setattr(bench, "TOPICS", ("lora", "fake"))
    monkeypatch.setattr(bench, "provenance", lambda: dict(HERE))
    return fake


def interrupted(topic, at):
    topic.stop = at
    with pytest.raises(KeyboardInterrupt):
        bench.run("fake", topic.out)
    topic.stop, done, topic.measured = None, topic.measured, []
    return done


def test_rows_are_written_in_order_and_with_provenance(topic):
    assert bench.run("fake", topic.out) == topic.out
    found = measurements.results(topic.out)
    assert found.topic == "fake" and found.provenance == HERE
    assert [(row["n"], row["part"]) for row in found] == [(n, part) for n in (1, 2, 3, 4) for part in "ab"]
    assert not topic.partial.exists()


def test_sections_may_come_from_a_generator(topic):
    bench.run("fake", topic.out, only=(name for name in ["second"]))
    assert topic.measured == [3, 4]


def test_a_killed_run_goes_on_where_it_stopped(topic):
    assert interrupted(topic, at=3) == [1, 2]
    assert json.loads(topic.partial.read_text().splitlines()[0]) == {k: HERE[k] for k in ("gpu", "cpu", "versions")}
    bench.run("fake", topic.out)
    assert topic.measured == [3, 4]
    assert measurements.results(topic.out).column("n") == [1, 1, 2, 2, 3, 3, 4, 4]


def test_a_cut_last_line_costs_its_point_and_not_the_next(topic):
    interrupted(topic, at=3)
    topic.partial.write_bytes(topic.partial.read_bytes()[:-9])
    assert interrupted(topic, at=3) == [2]  # kept on a line of its own
    bench.run("fake", topic.out)
    assert topic.measured == [3, 4]
    assert measurements.results(topic.out).column("n") == [1, 1, 2, 2, 3, 3, 4, 4]


def test_a_cut_first_line_is_a_fresh_start(topic):
    interrupted(topic, at=1)
    topic.partial.write_text('{"gpu": nu')
    assert interrupted(topic, at=2) == [1]
    bench.run("fake", topic.out)
    assert topic.measured == [2, 3, 4]


def test_rows_come_in_the_order_of_points_not_of_finishing(topic):
    bench.Partial(topic.partial, HERE).add(POINTS[3], [{"n": 4, "part": "kept"}])
    bench.run("fake", topic.out)
    assert topic.measured == [1, 2, 3]
    assert measurements.results(topic.out).column("n") == [1, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize(
    "change",
    [{"gpu": "another GPU"}, {"cpu": "another"}, {"versions": {"python": "3.12.0", "torch": "2.12.0"}}],
    ids=lambda change: next(iter(change)),
)
def test_points_from_elsewhere_are_refused_and_kept(topic, monkeypatch, change):
    interrupted(topic, at=3)
    before = topic.partial.read_bytes()
    monkeypatch.setattr(bench, "provenance", lambda: {**HERE, **change})
    with pytest.raises(PeftLabError, match=f"{next(iter(change))} was .*Delete it to start again, or use another"):
        bench.run("fake", topic.out)
    assert topic.partial.read_bytes() == before and not topic.out.exists()


def test_another_date_or_command_goes_on(topic, monkeypatch):
    interrupted(topic, at=3)
    monkeypatch.setattr(bench, "provenance", lambda: {**HERE, "date": "2026-11-23", "command": "peftlab bench fake"})
    bench.run("fake", topic.out)
    assert topic.measured == [3, 4]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_point_that_fails_does_not_cost_the_others(topic, monkeypatch, jobs):
    if jobs == 2:  # the pool's processes cannot see the fake module: run its points in threads
        from concurrent.futures import ThreadPoolExecutor

        monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda jobs, context, **share: ThreadPoolExecutor(jobs))
    measure = topic.measure

    def fails(point):
        if point["n"] in (2, 3):
            raise RuntimeError(f"out of memory in {point['n']}")
        return measure(point)

    topic.measure = fails
    with pytest.raises(PeftLabError, match="2 of 4 points failed; .*partial keeps the others") as found:
        bench.run("fake", topic.out, jobs=jobs)
    assert "RuntimeError: out of memory in 2" in str(found.value) and "in 3" in str(found.value)
    assert not topic.out.exists() and sorted(topic.measured) == [1, 4]
    topic.measure = measure
    bench.run("fake", topic.out, jobs=jobs)
    assert sorted(topic.measured) == [1, 2, 3, 4]
    assert measurements.results(topic.out).column("n") == [1, 1, 2, 2, 3, 3, 4, 4]


def test_processes_share_cores_and_gpus(monkeypatch):
    import multiprocessing

    given, threads = [], []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", given.append)
    begun = multiprocessing.get_context("spawn").Value("i", 0)
    for _ in range(3):
        bench.take_share(begun, 3)
    assert given == [0, 1, 0] and threads == [2, 2, 2]


def test_a_timeline_keeps_its_highest_points():
    points = [("forward", n) for n in (1, 5, 2, 2, 9)] + [("backward", n) for n in (3, 8, 1)]
    found = list(memory_grid.thinned(points, most=4))
    assert found == [(0, ("forward", 5)), (0.25, ("forward", 2)), (0.5, ("forward", 9)), (0.75, ("backward", 8))]


def test_points_without_provenance_are_refused(topic):
    topic.partial.write_text(json.dumps([bench.key(POINTS[0]), [{"n": 1}]]) + "\n")
    with pytest.raises(PeftLabError, match="measured elsewhere"):
        bench.run("fake", topic.out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fakee", "out.json"), "no bench 'fakee'; there is lora, fake. Did you mean 'fake'"),
        (("fake", "nowhere/out.json"), "folder '.*nowhere' does not exist; make it first"),
        (("fake", "out.json", "secnod"), "no section 'secnod'; it has first, second. Did you mean 'second'"),
    ],
    ids=["topic", "folder", "section"],
)
def test_mistakes_are_told_before_anything_is_measured(topic, tmp_path, arguments, message):
    name, out, *only = arguments
    with pytest.raises(PeftLabError, match=message):
        bench.run(name, tmp_path / out, only=only or None)
    assert not topic.measured and not list(tmp_path.iterdir())


def test_provenance_names_machine_and_versions_also_without_an_installation(monkeypatch):
    def version(name):
        if name == "peftlab":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(bench, "version", version)
    monkeypatch.setattr(sys, "argv", ["/a/path/peftlab", "bench", "lora", "--out", "my file.json"])
    found = bench.provenance()
    assert found["versions"]["peftlab"] == peftlab.__version__ and found["versions"]["torch"] == "1.0"
    assert found["cpu"] and found["command"] == "peftlab bench lora --out 'my file.json'"
    measurements.validate({"topic": "x", "provenance": found, "rows": [{"n": 1}]}, "x")


def test_the_memory_grid_is_wide_and_predictable():
    """At least 40 runs: 0.1B to 70B, lengths 128 to 4096, three precisions, optimisers; each has a prediction."""
    grid = [point for point in memory_grid.points() if point["section"] == "grid"]
    seen = {name: {point[name] for point in grid} for name in ("precision", "sequence", "method", "checkpointing")}
    assert len(grid) >= 40 and len({bench.key(point) for point in grid}) == len(grid)
    assert seen["precision"] == {"bf16", "fp32", "mixed"} and {128, 4096} <= seen["sequence"]
    assert seen["checkpointing"] == {True, False} and {"full", "lora", "qlora", "dora", "ia3"} <= seen["method"]
    assert len({point["optimizer"] for point in grid}) >= 3
    for point in grid:
        assert estimate(**{name: value for name, value in point.items() if name != "section"}).peak_bytes > 1e8
    if not torch.cuda.is_available():
        with pytest.raises(PeftLabError, match="needs a CUDA GPU"):
            memory_grid.measure(grid[0])


def test_the_forms_of_adamw_are_measured_as_torch_makes_them():
    points = [point for point in memory_grid.points() if point["section"] == "optimizers"]
    assert len(points) == 9 and len({bench.key(point) for point in points}) == 9
    found = {name: memory_grid.optimizer_of(name, [torch.nn.Parameter(torch.ones(2))]).defaults
             for name in {point["optimizer"] for point in points}}
    forms = {name: (settings["foreach"], settings["fused"]) for name, settings in found.items()}
    assert forms == {"adamw": (False, False), "adamw-foreach": (None, None), "adamw-fused": (False, True)}
    assert memory_grid.optimizer_of("sgd", [torch.nn.Parameter(torch.ones(2))]).__class__ is torch.optim.SGD


def write_shape(folder, **changes):
    """The config.json of a small model."""
    values = {
        "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values | changes))


@pytest.mark.parametrize(
    "method", ["full", "lora", "qlora", "dora", "adalora", "vera", "ia3", "prompt", "p-tuning", "prefix"]
)
def test_a_run_of_the_memory_grid_takes_its_two_steps(method, tmp_path):
    """All but reading the GPU's counter, on a small shape: what trains is what the estimator counts, and it moves."""
    write_shape(tmp_path)
    optimizer = "adamw8bit" if method == "lora" else "adamw"
    point = memory_grid.run(str(tmp_path), method, sequence=16, precision="fp32", optimizer=optimizer)
    model, batch = memory_grid.build(point, torch.device("cpu"))
    trained = memory_grid.trained(model)
    optimizer = memory_grid.optimizer_of(point["optimizer"], trained)
    found = estimate(**{name: value for name, value in point.items() if name != "section"})
    assert sum(parameter.numel() for parameter in trained) == found.trainable
    before = [parameter.detach().clone() for parameter in trained]
    memory_grid.steps(memory_grid.phases(model, optimizer, batch, autocasts=False), 2)
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    assert all(torch.isfinite(parameter).all() for parameter in trained)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_on_several_gpus_keeps_no_whole_parameter(method, parallel, monkeypatch, tmp_path):
    """On one process; what fully sharded data parallelism replaces must be gone before the peak is read."""
    from torch import distributed

    from peftlab.bench import parallel as bench_parallel

    whole = []
    build = memory_grid.build

    def watched(point, device):
        model, batch = build(point, device)
        whole.extend(weakref.ref(parameter) for parameter in model.parameters())
        return model, batch

    monkeypatch.setattr(memory_grid, "build", watched)
    write_shape(tmp_path, num_hidden_layers=4, tie_word_embeddings=True)
    point = {**bench_parallel.run(str(tmp_path), method, parallel, batch=1, sequence=8), "r": 4}
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model, optimizer, batch = bench_parallel.prepared(point, torch.device("cpu"))
        gc.collect()
        alive = sum(ref() is not None for ref in whole)
        assert alive == (0 if parallel == "fsdp" else len(whole))
        memory_grid.steps(memory_grid.phases(model, optimizer, batch, autocasts=False), 1)
        assert len(optimizer.state) == len(memory_grid.trained(model)) > 0
    finally:
        distributed.destroy_process_group()


def test_every_point_of_the_adapters_bench_has_a_config():
    from peftlab.bench import adapters

    points = adapters.points()
    assert len({bench.key(point) for point in points}) == len(points)
    sections = dict.fromkeys(point["section"] for point in points)
    assert list(sections) == ["reviews", "news", "desk", "fullsize", "biases", "latency"]
    for point in points:
        if point["section"] != "latency":
            config = adapters.config_of(point, ["classifier"])
            assert (config is None) == (point["method"] == "full")
            assert config is None or config.method == {"head": "selective", "last block": "selective"}.get(
                point["method"], point["method"]
            )
    assert {point.get("timed", False) for point in points if point["section"] in ("fullsize", "biases")} == {True}
    with pytest.raises(PeftLabError, match="needs a CUDA GPU"):
        adapters.measure({"section": "latency"})


def test_a_rate_is_chosen_on_the_validation_split(monkeypatch):
    from peftlab.bench import adapters

    def classify(point, rate, seed):
        return {"validation": -abs(rate - 2), "accuracy": 10 * rate + seed}

    monkeypatch.setattr(adapters, "classify", classify)
    rows = adapters.measure({"section": "reviews", "variant": "x", "rates": [1, 2, 3]})
    assert [(row["learning_rate"], row["seed"], row["chosen"]) for row in rows] == [
        (1, 0, False), (2, 0, True), (3, 0, False), (2, 1, True), (2, 2, True),
    ]  # fmt: skip


def test_the_points_on_virtual_tokens_are_all_different_and_each_has_a_config(monkeypatch):
    from peftlab.bench import fullsize, prompts, virtual_tokens

    points = prompts.points()
    assert len({bench.key(point) for point in points}) == len(points)
    base = tiny.llama(max_position_embeddings=4096, use_cache=False).eval()
    apart = ("reviews", "headlines", "reading", "seq2seq")
    for point in points:
        if point["section"] not in apart and point.get("init") != "text":
            model = virtual_tokens.attached(copy.deepcopy(base), {"library": "peftlab", **point})
            assert model(input_ids=torch.ones(1, 5, dtype=torch.long)).logits.isfinite().all()

    monkeypatch.setattr(fullsize, "timed", lambda step, repeats, warm_up: [step() or 1.0])
    rows = list(virtual_tokens.reading(base, (0, 7)))
    assert [(row["method"], row["tokens"]) for row in rows] == [("base", 0), ("prefix", 7), ("prompt", 7)]
    per_token = rows[0]["cache_bytes"] / 512
    assert rows[1]["cache_bytes"] == rows[2]["cache_bytes"] == (512 + 7) * per_token
    assert pl.attached(base) == {}


@pytest.mark.parametrize("library", ["peft", "peftlab"])
def test_a_step_of_an_encoder_decoder_is_measured(library, monkeypatch):
    from transformers import T5Config, T5ForConditionalGeneration

    from peftlab.bench import fullsize, prompts, virtual_tokens

    monkeypatch.setattr(fullsize, "timed", lambda step, repeats, warm_up: [step() or 1.0])
    for point in prompts.points():
        if point["section"] == "seq2seq" and point["library"] == library:
            config = T5Config(d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, vocab_size=64,
                              decoder_start_token_id=0, use_cache=False)  # fmt: skip
            (row,) = virtual_tokens.seq2seq_step(T5ForConditionalGeneration(config), {**point, "sequence": 80})
            assert row["trainable"] == 20 * {"prompt": 2 * 16, "prefix": 2 * 2 * 16}[point["method"]]
