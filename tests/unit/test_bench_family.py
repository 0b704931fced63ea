"""What the bench of the LoRA family promises: each variant has its own rate, and other seeds are scored at it."""

import copy
import math

import pytest
import tiny
import torch
from torch import nn

import peftlab as pl
from peftlab import bench
from peftlab.bench import family, family_sizes, family_variants, family_why, lora, models

POINTS = family.points()
LEARNED = [point for point in POINTS if point["section"] in family_variants.TASKS]
# The ticket of the tiny model's messages; its tokenizer knows few words
TICKET = '{"intent":"refund","product":"lamp","urgency":"normal"}'


def test_points_differ_and_what_matters_most_comes_first():
    assert len({bench.key(point) for point in POINTS}) == len(POINTS)
    assert [point["section"] for point in POINTS[:3]] == ["base", "base", "desk"]
    sizes = [(point["section"], point.get("r")) for point in LEARNED if point["variant"] == "LoRA"]
    assert list(dict.fromkeys(sizes)) == [("desk", 8), ("reviews", 8), ("desk", 32), ("reviews", 32)]


@pytest.mark.parametrize("name", family_variants.VARIANTS)
def test_each_variant_has_a_prediction_and_its_own_range_of_six_rates(name):
    variant = family_variants.VARIANTS[name]
    source, claim = family_variants.PREDICTIONS[name]
    assert source and len(claim.split()) > 4
    assert len(variant.rates) >= 6 and list(variant.rates) == sorted(variant.rates)
    assert set(variant.rates) <= set(lora.LADDER) and len(variant.sizes) == (1 if name == "full" else 2)
    kind = pl.METHODS.get(variant.method)
    for task in family_variants.TASKS if kind else ():
        point = next(family_variants.run(task, task, name, {**variant.settings, **size}, 1e-3, 0)
                     for size in variant.sizes)  # fmt: skip
        config = family.config_of(point)
        assert type(config) is kind and set(config.target_modules) == {"q_proj", "v_proj"}


def rows_of(points, loss):
    return [{**point, "trainable": 1, "validation_loss": loss(point)} for point in points]


def of(variant, task="desk", size=0):
    return [point for point in family_variants.grids(task, size) if point["variant"] == variant]


def test_nothing_follows_before_all_rates_are_tried():
    rows = rows_of(of("LoRA")[:-1] + of("full")[1:], lambda point: point["learning_rate"])
    assert list(family.follow_up(rows)) == []


@pytest.mark.parametrize(
    ("best", "further"),
    [(1e-2, []), (3e-4, [1e-4]), (1e-1, [3e-1])],
    ids=["inside", "below", "above"],
)
def test_further_rates_are_tried_until_the_best_is_not_at_an_edge(best, further):
    def loss(point):
        return abs(math.log(point["learning_rate"] / best))

    points = of("LoRA") + of("LoRA", size=1)[:2] + of("full", "reviews")[:3]
    new = list(family.follow_up(rows_of(points, loss)))
    if further:
        assert [(point["learning_rate"], point["seed"], point["scored"]) for point in new] == [(further[0], 10, False)]
        new = list(family.follow_up(rows_of(points + new, loss)))
    assert [(point["learning_rate"], point["seed"], point["scored"]) for point in new] == [
        (best, seed, True) for seed in (0, 1, 2)
    ]
    changed = {"learning_rate": best, "seed": 0, "scored": True}
    assert new[0] == points[0] | changed and list(new[0]) == list(points[0])


def test_a_rate_at_which_the_run_diverged_is_never_chosen():
    rows = rows_of(of("LoRA"), lambda point: None if point["learning_rate"] > 5e-3 else 1.0 - point["learning_rate"])
    assert {point["learning_rate"] for point in family.follow_up(rows)} == {3e-3}


def test_each_task_and_size_has_its_own_best_rate():
    points = of("LoRA") + of("LoRA", size=1) + of("LoRA", "reviews")
    best = {("desk", 8): 1e-2, ("desk", 32): 3e-3, ("reviews", 8): 1e-3}
    rows = rows_of(points, lambda point: abs(math.log(point["learning_rate"] / best[point["task"], point["r"]])))
    new = {(point["task"], point["r"]): point["learning_rate"] for point in family.follow_up(rows)}
    assert new == best


def test_what_follows_is_measured_first_and_kept(monkeypatch, tmp_path):
    """A run whose points follow from others: killed in between, it goes on where it stopped."""
    from concurrent.futures import ThreadPoolExecutor
    from types import SimpleNamespace

    done, stop = [], []

    def measure(point):
        if point["n"] in stop:
            raise KeyboardInterrupt
        done.append(point["n"])
        return [{"n": point["n"]}]

    def follow_up(rows):
        found = [row["n"] for row in rows]
        yield from ({"section": "x", "n": 10 * n} for n in found if n in (1, 10, 3))

    topic = SimpleNamespace(points=lambda: [{"section": "x", "n": n} for n in (1, 2, 3)], measure=measure,
                            follow_up=follow_up)  # fmt: skip
    monkeypatch.setitem(bench.sys.modules, "peftlab.bench.fake", topic)
    monkeypatch.setattr(bench, "TOPICS", ("fake",))
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda workers, *_, **__: ThreadPoolExecutor(workers))
    bench.run("fake", tmp_path / "whole.json")
    assert done == [1, 10, 100, 2, 3, 30]
    done.clear()
    stop.append(100)
    with pytest.raises(KeyboardInterrupt):
        bench.run("fake", tmp_path / "out.json")
    assert done == [1, 10]
    stop.clear()
    bench.run("fake", tmp_path / "out.json", jobs=2)
    assert sorted(done) == [1, 2, 3, 10, 30, 100]
    for out in ("whole", "out"):
        assert pl.results(tmp_path / f"{out}.json").column("n") == [1, 2, 3, 10, 30, 100]


@pytest.fixture
def small(monkeypatch):
    """A model of two layers in place of smollm2-135m, and few examples."""
    model, tokenizer = tiny.llama(max_position_embeddings=512, vocab_size=32), tiny.tokenizer(chat=True)
    texts = {"train": "the cat sat", "validation": "a dog ran", "test": "the dog sat"}

    def messages(split):
        return [{"prompt": pl.support_desk.prompt(texts[split]), "message": texts[split], "ticket": TICKET}] * 4

    def encoded(task, split):
        return [pl.encode_completion(tokenizer, texts[split], "runs" if place else "cat") for place in range(4)]

    def clear():
        for cached in (lora.encoded, family_why.before):
            cached.cache_clear()

    clear()
    monkeypatch.setattr(lora, "base", lambda kind="whole": (copy.deepcopy(model), tokenizer))
    monkeypatch.setattr(lora, "messages", messages)
    monkeypatch.setattr(lora, "news", lambda: ["the cat ran"])
    monkeypatch.setattr(lora, "LAYERS", 2)
    monkeypatch.setattr(family, "encoded", encoded)
    monkeypatch.setattr(family, "WORDS", ("cat", "runs"))
    monkeypatch.setattr(family_why, "LOOKED_AT", (1, 2))
    yield model, tokenizer
    clear()


THERE = [name for name, variant in family_variants.VARIANTS.items() if variant.method in ("full", *pl.METHODS)]


@pytest.mark.parametrize("name", THERE)
def test_a_run_of_each_variant_is_judged_and_scored(small, name):
    variant = family_variants.VARIANTS[name]
    size = {field: value if field in ("oft_block_size", "size") else 2 for field, value in variant.sizes[0].items()}
    point = family_variants.run("desk", "desk", name, {**variant.settings, **size}, 1e-3, 0, steps=2)
    (row,) = family.measure({**point, "scored": True})
    assert {**row, **point, "scored": True} == row and row["trainable"] > 0
    assert row["validation_loss"] > 0 and row["news_perplexity"] > 1 and row["tested"] == 4
    assert 0 <= row["intruders"] <= row["looked_at"] and row["path"] in ("fast", "plain")
    (row,) = family.measure(point)
    assert "right" not in row and not row["scored"]


def test_the_more_likely_of_two_words_is_the_answer(small):
    model, tokenizer = small
    examples = family.encoded("reviews", "test")
    with torch.no_grad():
        logits = model(torch.tensor([examples[0]["input_ids"][:-2]])).logits[0, -1]
    cat, runs = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in family.WORDS)
    examples = [{name: ids[:-1] for name, ids in each.items()} for each in examples]
    loss, right = family.chosen(model, tokenizer, examples)
    assert right == (3 if logits[runs] > logits[cat] else 1)
    assert loss == pytest.approx(pl.mean_loss(model, examples, pl.Collator(tokenizer)), rel=1e-5)


def test_a_layer_acts_with_the_weight_that_merging_gives(small):
    model, _ = small
    model = copy.deepcopy(model)
    pl.attach(model, pl.LoRAConfig(r=2, alpha=7, target_modules=["q_proj"], init="random"))
    layer = model.model.layers[0].self_attn.q_proj
    acts = family_why.weight_of(layer)
    pl.merge(model)
    torch.testing.assert_close(acts, layer.weight.detach())


def test_a_new_first_direction_is_an_intruder(small, monkeypatch):
    model, _ = small
    assert family_why.intruders(model)["intruders"] == 0
    with torch.no_grad():
        for _, _, path in family_why.looked_at(every=6):
            weight = model.get_submodule(path).weight
            u = torch.linalg.svd(weight, full_matrices=False)[0]
            mixed = u[:, :16].sum(1) / 4  # its cosine with each of 16 vectors is a quarter
            weight += 100 * torch.outer(mixed, torch.ones(weight.shape[1]))
    assert family_why.intruders(model)["intruders"] >= 2
    nn.init.constant_(model.get_submodule(path).weight, math.nan)
    assert family_why.intruders(model) == {"intruders": None, "looked_at": None}


def test_intruders_are_those_that_the_package_finds(small):
    model = copy.deepcopy(small[0])
    pl.attach(model, pl.LoRAConfig(r=2, alpha=64, target_modules=["q_proj", "v_proj"], layers_to_transform=[0],
                                   init="random"))  # fmt: skip
    report = pl.find_intruders(model, top_k=10)
    found = family_why.intruders(model)
    assert found["intruders"] == report.count > 0
    assert found["looked_at"] == sum(len(one.similarity) for one in report.by_module.values())


@pytest.mark.parametrize("section", family_why.SECTIONS)
def test_a_row_for_each_matrix_says_how_it_changed(small, section):
    point = next(point for point in family_why.points() if point["section"] == section and point["variant"] != "full")
    rows = family.measure({**point, "steps": 4, **({"r": 2} if section == "principal" else {})})
    assert len(rows) == {"direction": 4, "principal": 2, "allocation": 14, "vectors": 4, "trim": 3}[section]
    assert all(row["task"] == point["task"] for row in rows)
    assert section == "trim" or all({"layer", "module"} <= row.keys() for row in rows)
    for row in rows:
        if section == "direction":
            assert row["direction"] > -1e-12 and row["magnitude"] >= 0 and row["step"] in (1, 2)
        elif section == "principal":
            assert 0 <= row["of_update_left"] <= 1.0001 and row["update_norm"] > 0
        elif section == "vectors":
            assert row["d_least"] < 0.1 < row["d_most"] and 0 < row["b_size"] <= row["b_most"]
    if section == "trim":
        assert [row["left"] for row in rows] == [1.0, 0.5, 0.0] and all(row["tested"] == 4 for row in rows)
    if section == "allocation":
        assert {row["r_start"] for row in rows} == {6} and sum(row["r"] for row in rows) == 4 * len(rows)


SHAPE = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
TIMED = [point for point in family_sizes.points() if point["section"] == "fullsize"]


def test_a_step_of_each_method_is_measured_here_and_in_peft():
    counts = {}
    for point in TIMED:
        changed = {**point, "shape": SHAPE, "batch": 1, "sequence": 8}
        (row,) = family_sizes.measure(changed, torch.device("cpu"))
        assert row["seconds"] > 0 and row["tokens_per_second"] > 0
        # peft's AdaLoRA counts one number per module that never gets a gradient
        counts.setdefault(point["method"], set()).add(row["trainable"] // 100)
    models.let_go()
    assert all(len(each) == 1 and min(each) > 0 for each in counts.values()), counts


@pytest.mark.parametrize("init", family_sizes.STARTS)
def test_a_start_is_timed_on_few_layers(init):
    point = next(point for point in family_sizes.points() if point.get("init") == init)
    (row,) = family_sizes.measure({**point, "shape": SHAPE, "r": 4}, torch.device("cpu"))
    models.let_go()
    assert row["start_seconds"] > 0 and row["layers"] == 2
