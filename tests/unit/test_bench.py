"""`peftlab bench`: points in order, rows with provenance, and a run that was killed goes on where it stopped."""

import copy
import functools
import gc
import importlib
import itertools
import json
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import tiny
import torch
from groups import one_process

import peftlab
import peftlab as pl
from peftlab import bench
from peftlab.bench import adapters, circulating, fullsize, models, timing, virtual_tokens
from peftlab.bench import memory as memory_grid
from peftlab.bench.family_runs import RANKS
from peftlab.errors import PeftLabError
from peftlab.kit import measurements
from peftlab.memory import estimate

HERE = {
    "gpu": None, "cpu": "a processor, 2 cores", "host": "90ab34cd", "date": "2026-11-22",
    "versions": {"python": "3.12.0", "torch": "2.11.0"}, "command": "peftlab bench fake --out out.json",
}  # fmt: skip
POINTS = [
    {"section": "first", "n": 1},
    {"section": "first", "n": 2},
    {"section": "second", "n": 3, "timed": True},
    {"section": "second", "n": 4},
]


EVERY = bench.units(POINTS)
TURNS = [3] * bench.KERNELS  # the timed point, once in each process


@pytest.fixture
def topic(monkeypatch, tmp_path):
    """A topic whose points are a number each; `stop` is the point at which it dies. Its processes are threads."""
    fake = SimpleNamespace(measured=[], stop=None, points=lambda: iter(POINTS), out=tmp_path / "out.json", pools=[])

    def measure(point):
        if point["n"] == fake.stop:
            raise KeyboardInterrupt
        fake.measured.append(point["n"])
        spent = {"seconds": 10.0 * point["n"] + len(fake.measured)} if point.get("timed") else {}
        return [{"n": point["n"], "part": part, **spent} for part in ("a", "b")]

    def pool(workers, context, initializer, initargs):
        fake.pools.append((workers, initializer.__name__, *initargs[initializer is bench.take_share :]))
        return ThreadPoolExecutor(workers)

    fake.measure, fake.partial = measure, tmp_path / "out.json.partial"
    monkeypatch.setitem(sys.modules, "peftlab.bench.fake", fake)
    monkeypatch.setattr(bench, "TOPICS", ("lora", "fake"))
    monkeypatch.setattr(bench, "provenance", lambda: dict(HERE))
    monkeypatch.setattr(bench, "ProcessPoolExecutor", pool)
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
    (run,) = found.provenance.pop("runs")
    assert found.topic == "fake" and found.provenance == {n: v for n, v in HERE.items() if n != "host"}
    assert [(row["n"], row["part"]) for row in found] == [(n, part) for n in (1, 2, 3, 4) for part in "ab"]
    assert len(run) == 6 and {row["run"] for row in found} == {run}
    assert not topic.partial.exists()


def test_timed_points_take_turns_in_fresh_processes(topic, monkeypatch):
    points = [{"section": s, "n": n, "timed": True} for s, n in (("one", 1), ("one", 2), ("other", 3))]
    topic.points = lambda: iter([*points, {"section": "one", "n": 4, "alone": True}, {"section": "one", "n": 5}])
    bench.run("fake", topic.out)
    assert topic.measured == [5, 4, *[1, 2, 3, 2, 1, 3] * 2] and timing.PROCESSES + 1 == 4
    begun = [(1, "begin", False)] * timing.PROCESSES + [(1, "begin", True)]
    assert topic.pools == [(1, "take_share", 1), (1, "take_share", 1), *begun]
    row = measurements.results(topic.out).one(n=2, part="b")
    # n = 2 was the 4th, 6th, 10th and 12th thing to be measured: in every second process it comes before n = 1
    each = {f"seconds_{number}": 20.0 + place for number, place in enumerate((4, 6, 10, 12), 1)}
    assert row == {"n": 2, "part": "b", "seconds": 28.0, **each, "seconds_least": 24.0, "seconds_most": 32.0,
                   "processes": 4, "run": row["run"]}  # fmt: skip


def test_sections_may_come_from_a_generator(topic):
    bench.run("fake", topic.out, only=(name for name in ["second"]))
    assert topic.measured == [4, *TURNS]


def test_a_killed_run_goes_on_where_it_stopped(topic):
    assert interrupted(topic, at=4) == [1, 2]
    first = json.loads(topic.partial.read_text().splitlines()[0])
    assert first == {"gpu": None, "versions": HERE["versions"], "form": bench.FORM}
    bench.run("fake", topic.out)
    assert topic.measured == [4, *TURNS]
    found = measurements.results(topic.out)
    assert found.column("n") == [1, 1, 2, 2, 3, 3, 4, 4] and len(set(found.column("run"))) == 1


def test_a_cut_last_line_costs_its_point_and_not_the_next(topic):
    interrupted(topic, at=4)
    topic.partial.write_bytes(topic.partial.read_bytes()[:-9])
    assert interrupted(topic, at=4) == [2]  # kept on a line of its own
    bench.run("fake", topic.out)
    assert topic.measured == [4, *TURNS]
    assert measurements.results(topic.out).column("n") == [1, 1, 2, 2, 3, 3, 4, 4]


def test_a_cut_first_line_is_a_fresh_start(topic):
    interrupted(topic, at=1)
    topic.partial.write_text('{"gpu": nu')
    assert interrupted(topic, at=2) == [1]
    bench.run("fake", topic.out)
    assert topic.measured == [2, 4, *TURNS]


def test_rows_come_in_the_order_of_points_not_of_finishing(topic):
    last = next(unit for unit in EVERY if unit.points == (POINTS[3],))
    bench.Partial(topic.partial, HERE).add(last, [[{"n": 4, "part": "kept"}]])
    bench.run("fake", topic.out)
    assert topic.measured == [1, 2, *TURNS]
    assert measurements.results(topic.out).column("n") == [1, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize(
    "change",
    [{"gpu": "another GPU"}, {"versions": {"python": "3.12.0", "torch": "2.12.0"}}],
    ids=lambda change: next(iter(change)),
)
def test_points_from_elsewhere_are_refused_and_kept(topic, monkeypatch, change):
    interrupted(topic, at=3)
    before = topic.partial.read_bytes()
    monkeypatch.setattr(bench, "provenance", lambda: {**HERE, **change})
    with pytest.raises(PeftLabError, match=f"{next(iter(change))} was .*Delete it to start again, or use another"):
        bench.run("fake", topic.out)
    assert topic.partial.read_bytes() == before and not topic.out.exists()


def killed_in_its_second_process(topic):
    measure = topic.measure

    def stops(point):
        if point.get("timed") and topic.measured.count(3):
            raise KeyboardInterrupt
        return measure(point)

    topic.measure = stops
    with pytest.raises(KeyboardInterrupt):
        bench.run("fake", topic.out)
    assert topic.measured == [1, 2, 4, 3]
    topic.measure, topic.measured = measure, []


def test_the_same_host_goes_on_with_its_comparison(topic, monkeypatch):
    killed_in_its_second_process(topic)
    monkeypatch.setattr(bench, "provenance", lambda: {**HERE, "command": "peftlab bench fake"})
    bench.run("fake", topic.out)
    assert topic.measured == TURNS[1:]
    found = measurements.results(topic.out)
    assert found.provenance["command"] == "peftlab bench fake"
    assert found.provenance["runs"] == {found.rows[0]["run"]: {n: HERE[n] for n in ("host", "cpu", "date")}}


@pytest.mark.parametrize("change", [{"host": "0f0f0f0f"}, {"cpu": "another"}, {"date": "2026-11-23"}], ids=str)
def test_another_host_or_day_is_another_run_and_begins_a_comparison_anew(topic, monkeypatch, change):
    killed_in_its_second_process(topic)
    monkeypatch.setattr(bench, "provenance", lambda: {**HERE, **change})
    bench.run("fake", topic.out)
    assert topic.measured == TURNS  # not one of these is of the first run
    found = measurements.results(topic.out)
    first, second = found.provenance["runs"]
    assert [row["run"] for row in found] == [first] * 4 + [second] * 2 + [first] * 2
    assert found.provenance["runs"][second] == {n: {**HERE, **change}[n] for n in ("host", "cpu", "date")}
    assert found.provenance["date"] == change.get("date", HERE["date"])
    assert found.provenance["cpu"] == HERE["cpu"] + (" or another" if "cpu" in change else "")
    assert set(found.within_run(n=3).column("run")) == {second}
    with pytest.raises(PeftLabError, match=f"2 runs: {first} .host 90ab34cd, 2026-11-22.*one run only"):
        found.within_run(part="a")


def test_a_whole_comparison_of_another_run_is_kept(topic, monkeypatch):
    topic.points = lambda: iter([POINTS[2], {"section": "third", "n": 5, "timed": True}])
    measure = topic.measure
    topic.measure = lambda point: {}[0] if point["n"] == 5 else measure(point)
    with pytest.raises(PeftLabError, match="1 of 2 points failed"):
        bench.run("fake", topic.out)
    assert topic.measured == TURNS
    topic.measure, topic.measured = measure, []
    monkeypatch.setattr(bench, "provenance", lambda: {**HERE, "host": "0f0f0f0f"})
    bench.run("fake", topic.out)
    assert topic.measured == [5] * bench.KERNELS
    first, second = measurements.results(topic.out).column("run")[::2]
    assert first != second


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_point_that_fails_does_not_cost_the_others(topic, monkeypatch, jobs):
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
    assert sorted(topic.measured) == [1, 2, *TURNS, 4]
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


def test_kernels_that_overlap_count_once():
    kernels = [timing.Kernel("a", *span) for span in ((5, 6), (0, 2), (1, 3), (1.5, 2.5), (3, 4), (10, 12))]
    assert timing.busy(kernels) == 4 + 1 + 2
    assert timing.busy([]) is None


def test_a_process_reads_the_clock_or_the_kernels(monkeypatch):
    calls = []
    row = timing.clock(lambda: calls.append("step"), repeats=3, warm_up=2)
    assert row["seconds"] >= 0 and row["busy_seconds"] is None and row["repeats"] == 3 and len(calls) == 5
    monkeypatch.setattr(timing, "_profiles", True)
    monkeypatch.setattr(timing, "kernels_of", lambda step: step() or [timing.Kernel("k", 1.0, 1.5)])
    row = timing.clock(lambda: calls.append("step"), repeats=3, warm_up=2, prefix="read_")
    assert row == {"read_seconds": None, "read_busy_seconds": 0.5, "read_repeats": 3} and len(calls) == 8


def test_rows_of_several_processes_become_one():
    spent = [{"seconds": s, "busy_seconds": None} for s in (3.0, 1.0, 2.0)] + [{"seconds": None, "busy_seconds": 0.5}]
    rates, peaks = (1.0, 3.0, 2.0, None), (7, 9, 7, 8)
    given = [
        [{"state": "base", **s, "tokens_per_second": r, "peak_bytes": p}, {"state": "merged", "seconds": 4.0}]
        for s, r, p in zip(spent, rates, peaks, strict=True)
    ]
    base, merged = timing.together([*given, []])
    assert base == {
        "state": "base", "seconds": 2.0, "seconds_1": 3.0, "seconds_2": 1.0, "seconds_3": 2.0, "seconds_least": 1.0,
        "seconds_most": 3.0, "processes": 3, "busy_seconds": 0.5, "tokens_per_second": 2.0, "peak_bytes": 9,
    }  # fmt: skip
    assert merged["state"] == "merged" and merged["processes"] == 4
    assert timing.together([[], [], [], [{"what": "copies", "busy_seconds": 0.1}]]) == [
        {"what": "copies", "busy_seconds": 0.1}
    ]
    (pairs,) = timing.together([[{"ratio": ratio, "ratio_low": ratio - 1}] for ratio in (1.5, 1.0, 2.0)])
    assert pairs == {
        "ratio": 1.5, "ratio_1": 1.5, "ratio_2": 1.0, "ratio_3": 2.0, "ratio_least": 1.0, "ratio_most": 2.0,
        "processes": 3, "ratio_low": 0.5,
    }  # fmt: skip
    with pytest.raises(PeftLabError, match="do not agree in 'state': 'base', 'merged'"):
        timing.together([[{"state": "base"}], [{"state": "merged"}]])
    with pytest.raises(PeftLabError, match="measured 1, 2 rows of one point"):
        timing.together([[{}], [{}, {}]])


def test_a_timeline_keeps_its_highest_points():
    points = [("forward", n) for n in (1, 5, 2, 2, 9)] + [("backward", n) for n in (3, 8, 1)]
    found = list(memory_grid.thinned(points, most=4))
    assert found == [(0, ("forward", 5)), (0.25, ("forward", 2)), (0.5, ("forward", 9)), (0.75, ("backward", 8))]


def test_points_without_provenance_are_refused(topic):
    topic.partial.write_text(json.dumps([bench.key(POINTS[0]), [{"n": 1}]]) + "\n")
    with pytest.raises(PeftLabError, match="measured on another GPU or with other versions"):
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
    assert found["cpu"] and len(found["host"]) == 8 and found["command"] == "peftlab bench lora --out 'my file.json'"
    measurements.validate({"topic": "x", "provenance": found, "rows": [{"n": 1}]}, "x")


@functools.cache
def memory_points() -> list[dict]:
    """The points of `peftlab bench memory`; some of them are found with the estimator, which takes seconds."""
    return memory_grid.points()


def test_the_memory_grid_is_wide_and_predictable():
    """At least 40 runs: 0.1B to 70B, lengths 128 to 4096, three precisions, optimisers; each has a prediction."""
    grid = [point for point in memory_points() if point["section"] == "grid"]
    seen = {name: {point[name] for point in grid} for name in ("precision", "sequence", "method", "checkpointing")}
    assert len(grid) >= 40 and len({bench.key(point) for point in grid}) == len(grid)
    assert seen["precision"] == {"bf16", "fp32", "mixed"} and {128, 4096} <= seen["sequence"]
    assert seen["checkpointing"] == {True, False} and {"full", "lora", "qlora", "dora", "ia3"} <= seen["method"]
    assert len({point["optimizer"] for point in grid}) >= 3
    runs = measurements.results("memory").where(section="grid")
    measured = {bench.key({name: run[name] for name in grid[0]}) for run in runs}  # test_estimate predicts these
    assert len(measured) >= 40
    for point in [grid[0], *(point for point in grid if bench.key(point) not in measured)]:
        assert estimate(**{name: value for name, value in point.items() if name != "section"}).peak_bytes > 1e8
    if not torch.cuda.is_available():
        with pytest.raises(PeftLabError, match="needs a CUDA GPU"):
            memory_grid.measure(grid[0])


def test_the_forms_of_adamw_are_measured_as_torch_makes_them():
    points = [point for point in memory_points() if point["section"] == "optimizers"]
    assert len(points) == 9 and len({bench.key(point) for point in points}) == 9
    found = {
        name: memory_grid.optimizer_of(name, [torch.nn.Parameter(torch.ones(2))]).defaults
        for name in {point["optimizer"] for point in points}
    }
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


IN_PEFT = ("full", "lora", "qlora", "dora", "adalora", "vera", "ia3", "prompt", "p-tuning", "prefix")


@pytest.mark.parametrize(
    ("method", "more"),
    [(method, {}) for method in IN_PEFT]
    + [(method, {"library": "peftlab", "four_bit": method != "lora", "autocast": True}) for method in RANKS],
)
def test_a_run_of_the_memory_grid_takes_its_two_steps(method, more, tmp_path):
    """All but reading the GPU's counter, on a small shape: what trains is what the estimator counts, and it moves."""
    write_shape(tmp_path)
    optimizer = "adamw8bit" if method == "lora" else "adamw"
    point = memory_grid.run(str(tmp_path), method, sequence=16, precision="fp32", optimizer=optimizer, **more)
    model, batch = memory_grid.build(point, torch.device("cpu"))
    trained = memory_grid.trained(model)
    optimizer = memory_grid.optimizer_of(point["optimizer"], trained)
    found = estimate(**{name: value for name, value in point.items() if name != "section"})
    assert sum(parameter.numel() for parameter in trained) == found.trainable
    before = [parameter.detach().clone() for parameter in trained]
    memory_grid.steps(memory_grid.phases(model, optimizer, batch, more.get("autocast", False)), 2)
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    assert method == "qlora" or memory_grid.autocast(point) == bool(more)
    assert all(torch.isfinite(parameter).all() for parameter in trained)


def test_each_circulating_figure_is_measured_as_it_counts(tmp_path):
    """All but reading the GPU's counter, on a small shape: weights, gradients and states have the bytes counted."""
    write_shape(tmp_path)
    for point in circulating.points(str(tmp_path)):
        model, batch = memory_grid.build(point, torch.device("cpu"))
        trained = memory_grid.trained(model)
        optimizer = circulating.optimizer_of(point["optimizer"], trained)
        steps = memory_grid.phases(model, optimizer, batch, memory_grid.autocast(point))
        for part in ("forward", "backward"):
            steps[part]()
        held = sum(p.nbytes + p.grad.nbytes for p in trained)
        steps["optimiser"]()
        states = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        held += sum(t.nbytes for t in states if t.numel() > 1)
        assert held == point["bytes_each"] * sum(p.numel() for p in trained), point["held"]
    assert {point["bytes_each"] for point in circulating.points()} == {8, 12, 16}
    if not torch.cuda.is_available():
        with pytest.raises(PeftLabError, match="needs a CUDA GPU"):
            circulating.measure(next(circulating.points()))


def test_wrong_labels_are_a_share_and_stay_the_same():
    rows = [{"input_ids": [i], "labels": i % 2} for i in range(50)]
    wrong = adapters.with_wrong_labels(rows, 0.2)
    assert sum(a["labels"] != b["labels"] for a, b in zip(rows, wrong, strict=True)) == 10
    assert wrong == adapters.with_wrong_labels(rows, 0.2) and adapters.with_wrong_labels(rows, 0) == rows
    assert [row["input_ids"] for row in wrong] == [row["input_ids"] for row in rows]
    sections = [point["section"] for point in adapters.points()]
    assert sections.count("labels") == 9 and sections.count("reviews") == len(adapters.VARIANTS)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_on_several_gpus_keeps_no_whole_parameter(method, parallel, monkeypatch, tmp_path):
    """On one process; what fully sharded data parallelism replaces must be gone before the peak is read."""

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
    with one_process():
        model, optimizer, batch = bench_parallel.prepared(point, torch.device("cpu"))
        gc.collect()
        alive = sum(ref() is not None for ref in whole)
        assert alive == (0 if parallel == "fsdp" else len(whole))
        memory_grid.steps(memory_grid.phases(model, optimizer, batch, autocasts=False), 1)
        assert len(optimizer.state) == len(memory_grid.trained(model)) > 0


def test_every_point_of_the_adapters_bench_has_a_config():
    points = adapters.points()
    assert len({bench.key(point) for point in points}) == len(points)
    sections = dict.fromkeys(point["section"] for point in points)
    assert list(sections) == ["reviews", "news", "labels", "desk", "fullsize", "biases", "latency"]
    for point in points:
        if point["section"] != "latency":
            config = adapters.config_of(point, ["classifier"])
            assert (config is None) == (point["method"] == "full")
            assert config is None or config.method == {"head": "selective", "last block": "selective"}.get(
                point["method"], point["method"]
            )
    assert {point.get("timed", False) for point in points if point["section"] in ("fullsize", "biases")} == {True}
    with pytest.raises(PeftLabError, match="needs a CUDA GPU"):
        adapters.measure({"section": "latency", "shape": "llama-2-7b"})


def test_a_rate_is_chosen_on_the_validation_split(monkeypatch):
    def classify(point, rate, seed):
        return {"validation": -abs(rate - 2), "accuracy": 10 * rate + seed}

    monkeypatch.setattr(adapters, "classify", classify)
    rows = adapters.measure({"section": "reviews", "variant": "x", "rates": [1, 2, 3]})
    assert [(row["learning_rate"], row["seed"], row["chosen"]) for row in rows] == [
        (1, 0, False), (2, 0, True), (3, 0, False), (2, 1, True), (2, 2, True),
    ]  # fmt: skip


def test_the_points_on_virtual_tokens_are_all_different_and_each_has_a_config(monkeypatch):
    from peftlab.bench import prompts

    points = prompts.points()
    assert len({bench.key(point) for point in points}) == len(points)
    base = tiny.llama(max_position_embeddings=4096, use_cache=False).eval()
    kinds = {(point["section"], point.get("method"), point.get("init"), point.get("tokens")): point for point in points}
    for (section, method, init, _), point in kinds.items():
        if method not in (None, "none") and section != "seq2seq" and init != "text":
            model = virtual_tokens.attached(copy.deepcopy(base), {"library": "peftlab", **point})
            assert model(input_ids=torch.ones(1, 5, dtype=torch.long)).logits.isfinite().all()

    monkeypatch.setattr(timing, "timed", lambda step, repeats, warm_up: [step() or 1.0])
    rows = list(virtual_tokens.reading(base, (0, 7)))
    assert [(row["method"], row["tokens"]) for row in rows] == [("base", 0), ("prefix", 7), ("prompt", 7)]
    assert all(row["write_seconds"] == 1 and row["read_seconds"] for row in rows)
    per_token = rows[0]["cache_bytes"] / 512
    assert rows[1]["cache_bytes"] == rows[2]["cache_bytes"] == (512 + 7) * per_token
    assert pl.attached(base) == {}


def test_each_method_has_its_own_rates_with_three_seeds_each():
    from peftlab.bench import prompts

    grid = {}
    for point in prompts.points():
        if "learning_rate" in point and point["section"] != "live":
            of = (point["section"], point["method"], point["init"], point.get("tokens"))
            grid.setdefault(of, {}).setdefault(point["learning_rate"], []).append(point["seed"])
    assert len(grid) == len(prompts.RATES) + len(prompts.LENGTHS) + len(prompts.HEADLINES)
    assert all(len(rates) >= 3 and set(map(tuple, rates.values())) == {(0, 1, 2)} for rates in grid.values())


@pytest.mark.parametrize("method", ["prompt", "prefix", "prefix projected", "lora"])
def test_a_run_on_the_desk_is_scored_and_a_prefix_shows_its_steps(method, monkeypatch):
    from peftlab.bench import prompts

    ticket = pl.support_desk.ticket("repair", "lamp", "normal")
    rows = [{"prompt": "the cat runs", "ticket": ticket}, {"prompt": "a dog", "ticket": ticket}]
    splits = {"train": rows, "validation": rows, "test": rows[:1]}
    model = tiny.llama(layers=3)
    monkeypatch.setattr(prompts, "base", lambda: (model, tiny.tokenizer()))
    monkeypatch.setattr(pl, "load_data", lambda name, sizes: splits)
    prompts.task.cache_clear()
    point = next(p for p in prompts.points() if p["section"] == "rate" and p["method"] == method and p["seed"] == 1)
    point = {**point, "init": "random", "steps": 10, "batch_size": 1}
    first, *steps = prompts.measure(point)
    prompts.task.cache_clear()
    assert pl.attached(model) == {}, "the next run shares the model"
    assert point.items() <= first.items() and (first["messages"], first["correct"]) == (1, 0)
    assert first["finished_steps"] == 10 and 0 < first["validation_loss"] != first["test_loss"]
    assert [row["step"] for row in steps] == ([5, 10] if method.startswith("prefix") else [])
    assert all(row["section"] == "steps" and 0 < row["early_share"] < 1 and row["grad_norm"] > 0 for row in steps)


@pytest.mark.parametrize("projection", [False, True])
def test_the_early_share_is_that_of_the_first_third_of_the_layers(projection):
    from peftlab.bench import prompts

    model = pl.attach(tiny.llama(layers=3), pl.PrefixTuningConfig(num_virtual_tokens=2, projection=projection))
    source = model.peftlab["default"]["prefix"].source
    table = source()
    ways = torch.zeros_like(table)
    each = table.shape[1] // 3  # keys and values of one layer
    for layer, size in enumerate((1.0, 2.0, 3.0)):
        ways[:, each * layer : each * (layer + 1)] = size
    (ways * table).sum().backward()
    assert prompts.early_share(model) == pytest.approx(1 / 14)


def test_a_small_t5_is_trained_and_adapted(monkeypatch):
    """Everything but the sizes; with a tokenizer that needs no download."""
    from peftlab.bench import small_t5

    assert len(small_t5.KNOWN) == 14 and small_t5.JOB not in small_t5.KNOWN
    few = {"train": 40, "validation": 8, "test": 6}
    monkeypatch.setattr(small_t5, "messages", lambda split: pl.support_desk.generate(split, few[split]))
    monkeypatch.setattr(small_t5, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda _: tiny.tokenizer()))
    monkeypatch.setattr(small_t5, "ensure", str)
    small_t5.small_tokenizer.cache_clear()
    (point, *others) = small_t5.points((0, 1))
    assert len(others) == 1
    rows = list(small_t5.measure({**point, "width": 16, "base_steps": 2, "base_batch": 4, "steps": 1, "batch_size": 2}))
    small_t5.small_tokenizer.cache_clear()
    assert [row["method"] for row in rows[:3]] == ["base"] * 3 and rows[2]["job"] == "urgency product intent"
    assert [(row["method"], row["learning_rate"]) for row in rows[3:]] == [
        (method, rate) for method, rates in small_t5.RATES.items() for rate in rates
    ]
    assert all(row["messages"] == 6 and row["validation_loss"] > 0 for row in rows)
    row = {"message": "It is urgent.", "intent": "repair", "product": "lamp", "urgency": "urgent"}
    assert small_t5.text_and_answer(row, ("product", "urgency"), True) == (
        "product urgency: It is urgent.",
        "lamp, urgent",
    )
    assert small_t5.text_and_answer(row, small_t5.JOB, False) == ("It is urgent.", "urgent, lamp, repair")


CPU = torch.device("cpu")
SHAPES = {
    "llama-2-7b": dict(
        model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=4096,
    ),
    "t5-base": dict(
        model_type="t5", vocab_size=64, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, tie_word_embeddings=True
    ),
    "roberta-large": dict(
        model_type="roberta", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, type_vocab_size=1, pad_token_id=1,
    ),
}  # fmt: skip


def small(point):
    """The same point on a model that a processor holds."""
    changes = {name: value for name, value in (("sequence", 16), ("r", 4), ("reduction_factor", 8)) if name in point}
    return {**point, "shape": SHAPES[point["shape"]], "batch": 2, **changes}


@pytest.fixture
def no_model_held():
    models.let_go()
    yield
    models.let_go()


@pytest.mark.parametrize("name", ["lora", "prompts", "adapters"])
def test_timed_points_lend_one_model_and_give_it_back_as_it_was(name, monkeypatch, no_model_held):
    """Every training step of a topic, in its order, on small shapes: a point must not leave anything to the next."""
    pytest.importorskip("peft")
    module = importlib.import_module(f"peftlab.bench.{name}")
    for where in (fullsize, adapters, virtual_tokens):
        monkeypatch.setattr(where, "gpu_for", lambda *_: CPU)
    monkeypatch.setattr(timing, "timed", lambda step, repeats, warm_up: [step() or 1.0])
    monkeypatch.setattr(models, "release", lambda: None)  # collecting garbage hundreds of times takes a minute
    made, build = [], models.random_model
    monkeypatch.setattr(models, "random_model", lambda *given: made.append(build(*given)) or made[-1])
    points = [small(p) for p in module.points() if p.get("timed") and "method" in p]
    seen, trainable = {}, {}
    for point in points:
        (row,) = module.measure(point)
        assert {"timed", "alone"}.isdisjoint(row) and row["seconds"] > 0 and row["busy_seconds"] is None
        assert row["section"] == point["section"] and row["repeats"] >= 5
        model = made[-1]
        names = {path: type(m) for path, m in model.named_modules()}
        assert seen.setdefault(id(model), names) == names, f"{point} left its modules behind"
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        trainable[point["section"], point["method"], point.get("library")] = row["trainable"]
    assert len(made) == {"lora": 1, "prompts": 2, "adapters": 2}[name]
    for (section, method, library), count in trainable.items():
        assert count == trainable.get((section, method, "peft"), count), f"{method} of {library} trains other weights"
    if name == "lora":
        assert trainable["fullsize", "full", "transformers"] == sum(p.numel() for p in made[0].parameters())


def test_forward_passes_give_the_model_back(monkeypatch, no_model_held):
    monkeypatch.setattr(timing, "timed", lambda step, repeats, warm_up: [step() and 1.0])
    with models.held(SHAPES["llama-2-7b"], CPU) as model:
        before = {key: value.clone() for key, value in model.state_dict().items()}
        rows = list(fullsize.forward_passes(model, (1, 3)))
        assert [(row["state"], row["tokens"]) for row in rows] == list(
            itertools.product(("base", "attached", "merged"), (1, 3)))  # fmt: skip
        rows = list(adapters.forward_passes(model, ((2, 3),)))
        assert [row["state"] for row in rows] == [
            "base", "houlsby", "pfeiffer", "parallel", "ia3", "ia3 merged", "lora", "lora merged",
        ]  # fmt: skip
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_model_is_made_once_and_not_kept_after_a_failure(no_model_held):
    with models.held(SHAPES["t5-base"], CPU) as first:
        pass
    with models.held(SHAPES["t5-base"], CPU) as again:
        assert again is first
        assert again.get_input_embeddings().weight is again.lm_head.weight  # tied
        assert all(p.dtype == torch.float32 and not p.is_meta for p in again.parameters())
    with pytest.raises(ZeroDivisionError), models.held(SHAPES["llama-2-7b"], CPU) as broken:
        assert {p.dtype for p in broken.parameters()} == {torch.bfloat16}
        1 / 0  # noqa: B018
    with models.held(SHAPES["llama-2-7b"], CPU) as other:
        assert other is not broken
