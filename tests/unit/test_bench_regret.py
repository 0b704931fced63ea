"""What `bench regret` promises: predictions before runs, fair grids of rates, and rows that mean what they say."""

import copy
import json
import math

import pytest
import tiny
import torch

import peftlab as pl
from peftlab import bench
from peftlab.bench import family, family_why, lora, regret, regret_first, regret_hard, regret_plan, search

POINTS = regret.points()
SETTINGS = [*regret_plan.long(), *regret_plan.short()]
TICKET = '{"intent":"refund","product":"lamp","urgency":"normal"}'
TEXTS = {"train": "the cat sat", "validation": "a dog ran", "test": "the dog sat"}
NEWS = ["the cat runs . the dog sleeps", "a red dog runs", "the blue cat sleeps . a cat runs", "yes . no"]


def test_points_differ_and_every_section_has_a_prediction():
    assert len({bench.key(point) for point in POINTS}) == len(POINTS)
    assert {point["section"] for point in POINTS} == {*regret_plan.PREDICTIONS, "base"}
    for those in regret_plan.PREDICTIONS.values():
        assert those and all(source and len(claim.split()) > 5 for source, claim in those)
    assert "regret" in bench.TOPICS


def test_every_setting_begins_with_neighbouring_rates_of_its_ladder():
    assert len(regret_plan.SEARCHES) == len(SETTINGS)
    for point in json.loads(json.dumps(POINTS)):  # as a killed run reads them again
        assert point["section"] in ("base", "first") or search.setting_of(point) in regret_plan.SEARCHES
    for one in SETTINGS:
        first = one.search.ladder.index(one.search.rates[0])
        assert one.search.rates == one.search.ladder[first : first + len(one.search.rates)], one.told
        assert 0 < first and first + len(one.search.rates) < len(one.search.ladder)


def test_the_grids_of_the_ranks_hold_what_each_theory_predicts():
    """From the best rate that Chapter 2 found at r = 16: about 1e-2 with alpha = 16, 5e-3 with alpha = 2 r."""
    for one in SETTINGS:
        if one.told["section"] == "rank" and one.told["rule"] == "alpha = 2 r":
            for power in (1, 0.5):
                expected = 5.6e-3 * (16 / one.told["r"]) ** power
                assert min(one.search.rates) <= expected * 1.8 and expected <= 1.8 * max(one.search.rates), one.told


def test_equal_parameters_in_every_place():
    counts = []
    for targets, r in regret_plan.PLACES:
        count = pl.memory.count("smollm2-135m", method="lora", r=r, targets=targets.split(","))
        counts.append(count["trainable"] if isinstance(count, dict) else count.trainable)
    assert max(counts) < 1.04 * min(counts)


def rows_of(one, best):
    """Rows of all runs of a setting, whose loss is lowest at one rate."""
    return [{**point, "validation_loss": abs(math.log(point["learning_rate"] / best))} for point in one.points()]


@pytest.mark.parametrize("section", ["rank", "full", "where", "batch", "capacity", "alphabet"])
def test_other_seeds_follow_at_the_best_rate_of_a_setting(section):
    one = next(one for one in SETTINGS if one.told["section"] == section)
    ladder, rates = one.search.ladder, one.search.rates
    for best in (rates[0], rates[-1]):
        rows = rows_of(one, best)
        assert list(regret.follow_up(rows[:-1])) == []
        next_one = ladder[ladder.index(best) + (1 if best == rates[-1] else -1)]
        new = list(regret.follow_up(rows))
        assert [(point["learning_rate"], point["seed"]) for point in new] == [(next_one, s) for s in one.search.tuning]
        rows += [{**point, "validation_loss": 9.0} for point in new]
        new = list(regret.follow_up(rows))
        assert [point["seed"] for point in new] == list(one.search.seeds)
        assert all(point["scored"] and point["learning_rate"] == best for point in new)
        assert bench.key(new[0]) == bench.key({**one.told, "learning_rate": best, "seed": 0, "scored": True})
    assert set(new[0]) == set(one.told)


def test_the_mean_over_the_tuning_seeds_chooses():
    one = next(one for one in SETTINGS if len(one.search.tuning) == 2)
    low, high = one.search.rates[1], one.search.rates[3]
    losses = {(low, 10): 1.0, (low, 11): 4.0, (high, 10): 2.0, (high, 11): 2.0}
    rows = [{**p, "validation_loss": losses.get((p["learning_rate"], p["seed"]), 5.0)} for p in one.points()]
    assert {point["learning_rate"] for point in regret.follow_up(rows)} == {high}
    rows = [{**row, "validation_loss": None} if row["learning_rate"] == high else row for row in rows]
    assert {point["learning_rate"] for point in regret.follow_up(rows)} == {low}


@pytest.fixture
def small(monkeypatch):
    """A model of two layers in place of smollm2-135m, and few examples."""
    model, tokenizer = tiny.llama(max_position_embeddings=512, vocab_size=32), tiny.tokenizer(chat=True)

    def messages(split):
        return [{"prompt": pl.support_desk.prompt(TEXTS[split]), "message": TEXTS[split], "ticket": TICKET}] * 4

    def encoded(task, split):
        return [pl.encode_completion(tokenizer, TEXTS[split], "runs" if place else "cat") for place in range(4)]

    def clear():
        cached = (lora.encoded, family_why.before, regret.passed, regret_first.gradients, regret_hard.cut,
                  regret_hard.articles)  # fmt: skip
        for each in cached:
            each.cache_clear()

    class Data(dict):
        def select(self, places):
            return [self["rows"][place % 4] for place in places]

        def __len__(self):
            return 4

    def load_data(name):
        rows = [{"text": text, "prompt": text, "ticket": "yes"} for text in NEWS]
        return dict.fromkeys(("train", "validation", "test"), Data(rows=rows))

    clear()
    monkeypatch.setattr(lora, "base", lambda kind="whole": (model, tokenizer))
    monkeypatch.setattr(lora, "messages", messages)
    monkeypatch.setattr(lora, "news", lambda: ["the cat ran"])
    monkeypatch.setattr(lora, "LAYERS", 2)
    monkeypatch.setattr(family, "encoded", encoded)
    monkeypatch.setattr(family, "WORDS", ("cat", "runs"))
    monkeypatch.setattr(pl, "load_data", load_data)
    yield model, tokenizer
    clear()


def shrunk(point):
    """The same point with fewer steps, tokens and layers."""
    changes = {"steps": 3, "r": 2, "layers": "0,1", "choices": 16, "strings": 8, "articles": 4,
               "tokens": 6, "precision": "fp32"}  # fmt: skip
    changed = {name: value for name, value in changes.items() if name in point}
    return {**point, **changed, **({"batch_size": 8} if point.get("section") != "batch" else {})}


@pytest.mark.parametrize("section", ["rank", "full", "where", "batch", "capacity", "alphabet"])
def test_a_run_of_each_section_is_scored(small, section):
    for name in ("LoRA", "full"):
        found = [point for point in POINTS if point["section"] == section and point["variant"] == name]
        if found:
            point = shrunk(found[0])
            (row,) = regret.measure(point)
            assert {**row, **point} == row and row["validation_loss"] > 0 and row["trainable"] > 0
            assert row["path"] == ("fast" if name == "LoRA" else "plain")
            assert all(value is None or isinstance(value, (str, int, float)) for value in row.values())  # a flat row
            (row,) = regret.measure({**point, "scored": True})
            assert search.described(row) == list(point)
            if section == "capacity":
                assert row["trainable"] == 2 * 2 * (16 + 16 + 16 + 8)  # rank 2, queries and values of two layers
            if section not in regret_hard.SECTIONS:
                assert row["tested"] == 4 and row["news_perplexity"] > 1


def test_a_row_can_be_run_again_with_changes(small):
    (row,) = regret.measure(shrunk(next(point for point in POINTS if point["section"] == "rank")))
    same, other = regret.again({**row, "run": "a"}), regret.again(row, learning_rate=1e-2, steps=2)
    assert same["few_loss"] == row["few_loss"] == pytest.approx(row["validation_loss"], rel=1e-5)
    assert other["learning_rate"] == 1e-2 and other["few_loss"] != row["few_loss"] and "validation_loss" not in other


def test_a_reader_adds_a_run_to_a_figure(small):
    row = regret.own_run(r=2, alpha=4, learning_rate=1e-3, steps=2)
    assert (row["r"], row["alpha"], row["steps"], row["learning_rate"]) == (2, 4, 2, 1e-3)
    book = [{"learning_rate": 1e-2, "validation_loss": 1.0}]
    assert pl.figures.sweep([*book, row], "learning_rate", "validation_loss").axes


def test_a_large_batch_is_the_sum_of_small_ones(small, monkeypatch):
    point = shrunk(next(point for point in POINTS if point["section"] == "batch" and point["variant"] == "LoRA"))
    losses = []
    for at_once in (2, 8):
        monkeypatch.setattr(regret, "AT_ONCE", at_once)
        losses.append(regret.measure({**point, "scored": False})[0]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    sizes = {(p["batch_size"], p["steps"]) for p in POINTS if p["section"] == "batch"}
    assert sizes == {(8, 256), (32, 64), (128, 16), (512, 4)}  # each shows every message once
    assert len(regret.passed()) == regret_plan.PASS


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_first_step_is_what_the_derivation_says(small, method):
    points = [point for point in regret_first.points() if point["method"] == method and point["seed"] == 0]
    found = {}
    for point in points[:4] if method == "lora" else points:
        point = {**point, "r": {1: 4, 4: 64}[point["r"]]} if method == "lora" else point
        for row in regret.measure(point):
            found[row.get("rule"), row.get("r"), row["module"]] = row
            # few entries, and gradients of 16 numbers: the means are met within a third
            assert row["rms"] == pytest.approx(row["rms_predicted"], rel=0.35)
            assert row["fall"] == pytest.approx(row["fall_predicted"], rel=0.35) and row["fall"] > 0
            assert 0 < row["cosine"] <= 1
    assert len(found) == (8 if method == "lora" else 2)


def test_the_fall_of_the_loss_is_the_one_that_a_small_step_makes(small):
    model, tokenizer = small
    point = {**next(regret_first.points()), "r": 4, "learning_rate": 3e-4}
    falls = sum(row["fall"] for row in regret_first.measure(point))
    examples = family.encoded("desk", "train")[: regret_first.MESSAGES]
    trained, _ = family.trained(point, examples, warmup=0.0, schedule="constant", max_grad_norm=None)
    with torch.no_grad():
        losses = [copy.deepcopy(net).double()(**pl.Collator(tokenizer)(examples)).loss for net in (model, trained)]
    assert float(losses[0] - losses[1]) == pytest.approx(falls, rel=0.02)


def test_strings_are_random_and_a_cut_model_predicts_only_their_tokens(small):
    rows = regret_hard.strings(8, 5, 16, seed=3)
    assert rows == regret_hard.strings(8, 5, 16, seed=3) != regret_hard.strings(8, 5, 16, seed=4)
    assert len({row["input_ids"][0] for row in rows}) == 8 and all(row["labels"][0] == -100 for row in rows)
    assert all(len(row["input_ids"]) == 6 and max(row["input_ids"]) < 16 for row in rows)
    model = regret_hard.cut(16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rows_there = model.lm_head.weight.unsqueeze(1) == small[0].model.embed_tokens.weight
    assert rows_there.all(-1).any(1).all()  # each is a row of the whole embedding
    assert model(torch.tensor([[1, 2]])).logits.shape[-1] == 16


def test_stored_bits_are_all_bits_where_nothing_is_left_of_the_loss(small, monkeypatch):
    point = {"strings": 8, "length": 5, "choices": 16, "steps": 3, "batch_size": 4}
    model = pl.attach(copy.deepcopy(regret_hard.cut(16)), pl.LoRAConfig(r=2, target_modules=["q_proj"]))
    for loss, bits in ((0.0, 160.0), (math.log(16), 0.0), (math.log(4), 80.0)):
        monkeypatch.setattr(pl, "mean_loss", lambda *_, loss=loss, **__: loss)
        found = regret_hard.stored(point, model, [])
        assert found["stored"] == pytest.approx(bits) and found["bits"] == 160 and found["shown"] == 1.5
        assert found["per_parameter"] == pytest.approx(bits / pl.count_parameters(model).trainable)


def test_greek_letters_stand_for_latin_ones_one_to_one():
    assert len(set(regret_hard.GREEK.values())) == 52 and not set(regret_hard.GREEK) & set(regret_hard.LATIN)
    text = "Oil at $50, says Zoe Quay-Fox (BBC)!"
    assert regret_hard.written(regret_hard.written(text, regret_hard.GREEK), regret_hard.LATIN) == text
    assert regret_hard.written("Ray 3.5", regret_hard.GREEK) == "Ραύ 3.5"


def test_bits_per_character_count_what_is_predicted(small, monkeypatch):
    monkeypatch.setattr(pl, "mean_loss", lambda *_, **__: math.log(2))
    examples = [{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2, 3, 4]}]
    assert regret_hard.bits_per_character(small[0], examples, 10) == (pytest.approx(math.log(2)), pytest.approx(0.5))
    monkeypatch.setattr(pl, "mean_loss", lambda *_, **__: math.nan)
    assert regret_hard.bits_per_character(small[0], examples, 10) == (None, None)


def test_the_base_reads_both_alphabets(small):
    (row,) = regret.measure(next(point for point in POINTS if point["section"] == "base") | {"tokens": 6})
    assert row["validation_bits"] > 0 and row["test_bits"] > 0 and row["latin_bits"] > 0 and row["news_perplexity"] > 1
