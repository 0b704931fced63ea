"""What `bench regret` promises: predictions before runs, fair grids of rates, and rows that mean what they say."""

import copy
import json
import math

import pytest
import tiny
import torch

import peftlab as pl
from peftlab import bench
from peftlab.bench import (
    family,
    family_why,
    lora,
    regret,
    regret_first,
    regret_hard,
    regret_plan,
    regret_strings,
    search,
)

POINTS = regret.points()
SETTINGS = [*regret_plan.long(), *regret_plan.short()]
TICKET = '{"intent":"refund","product":"lamp","urgency":"normal"}'
TEXTS = {"train": "the cat sat", "validation": "a dog ran", "test": "the dog sat"}
NEWS = ["the cat runs . the dog sleeps", "a red dog runs", "the blue cat sleeps . a cat runs", "yes . no"]


def test_points_differ_and_every_section_has_a_prediction():
    assert len({bench.key(point) for point in POINTS}) == len(POINTS)
    assert {point["section"] for point in POINTS} == {*regret_plan.PREDICTIONS, "base", "live"}
    for those in regret_plan.PREDICTIONS.values():
        assert those and all(source and len(claim.split()) > 5 for source, claim in those)
    assert "regret" in bench.TOPICS


def test_every_setting_begins_with_neighbouring_rates_of_its_ladder():
    assert len(regret_plan.SEARCHES) == len(SETTINGS)
    for point in json.loads(json.dumps(POINTS)):  # as a killed run reads them again
        assert point["section"] in ("base", "first", "live") or search.setting_of(point) in regret_plan.SEARCHES
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


@pytest.mark.parametrize("section", ["rank", "full", "where", "batch", "capacity", "alphabet", "rewiring"])
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
        cached = (lora.encoded, family_why.before, regret.passed, regret_first.gradients, regret_hard.articles,
                  regret_hard.frozen, regret_hard.encoded, regret_hard.swap, regret_hard.texts)  # fmt: skip
        for each in cached:
            each.cache_clear()

    class Data(dict):
        def select(self, places):
            return [self["rows"][place % 4] for place in places]

        def __len__(self):
            return 4

        def __iter__(self):
            return iter(self["rows"])

    def load_data(name):
        rows = [{"text": text, "prompt": text, "ticket": "yes"} for text in NEWS]
        return dict.fromkeys(("train", "validation", "test"), Data(rows=rows))

    clear()
    monkeypatch.setattr(lora, "base", lambda kind="whole": (model, tokenizer))
    monkeypatch.setattr(lora, "messages", messages)
    monkeypatch.setattr(lora, "news", lambda: ["the cat ran"])
    monkeypatch.setattr(lora, "LAYERS", 2)
    monkeypatch.setattr(regret_strings, "tokens", lambda: torch.arange(10, 20))
    monkeypatch.setattr(regret_strings, "WINDOW", 2)
    monkeypatch.setattr(family, "encoded", encoded)
    monkeypatch.setattr(family, "WORDS", ("cat", "runs"))
    monkeypatch.setattr(pl, "load_data", load_data)
    yield model, tokenizer
    clear()


def shrunk(point):
    """The same point with fewer steps, tokens and layers."""
    changes = {"steps": 3, "r": 2, "last": 1, "strings": 8, "articles": 4, "precision": "fp32",
               "tokens": 3 if point["section"] == "rewiring" else 6}  # fmt: skip
    if point["section"] != "batch":
        changes["batch_size"] = 8
    return {**point, **{name: value for name, value in changes.items() if name in point}}


@pytest.mark.parametrize("section", ["rank", "full", "where", "batch", "capacity", "alphabet", "rewiring"])
def test_a_run_of_each_section_is_scored(small, section):
    for name in ("LoRA", "full"):
        found = [point for point in POINTS if point["section"] == section and point["variant"] == name]
        if found:
            point = shrunk(found[0])
            (row,) = regret.measure(point)
            assert {**row, **point} == row and row["validation_loss"] > 0 and row["trainable"] > 0
            if section != "capacity":
                assert row["path"] == ("fast" if name == "LoRA" else "plain")
            assert all(value is None or isinstance(value, (str, int, float)) for value in row.values())  # a flat row
            (row,) = regret.measure({**point, "scored": True})
            assert search.described(row) == list(point)
            if section == "capacity":
                assert row["trainable"] == 2 * (2 * 32 + 2 * 24 + 3 * 48)  # rank 2, all projections of one block
            elif section not in regret_hard.SECTIONS:
                assert row["tested"] == 4 and row["news_perplexity"] > 1


def test_a_row_can_be_run_again_with_changes(small):
    (row,) = regret.measure(shrunk(next(point for point in POINTS if point["section"] == "rank")))
    same, other = regret.again({**row, "run": "a"}), regret.again(row, learning_rate=1e-2, steps=2)
    assert same["few_loss"] == row["few_loss"] == pytest.approx(row["validation_loss"], rel=1e-5)
    assert other["learning_rate"] == 1e-2 and other["few_loss"] != row["few_loss"] and "validation_loss" not in other


LIVE = [point for point in POINTS if point["section"] == "live"]


@pytest.mark.parametrize("point", LIVE, ids=lambda point: f"{point['of']}-{point['targets']}-{point['variant']}")
def test_the_first_steps_are_those_of_the_whole_run(small, monkeypatch, point):
    """The rates of a run of 12 steps rise in the first two, so a run of four steps would begin in another way."""
    usual, seen = pl.train, []

    def train(*arguments, **settings):
        seen.append(settings)
        history = usual(*arguments, **settings)
        seen.append([step["loss"] for step in history.steps])
        return history

    monkeypatch.setattr(pl, "train", train)
    whole = shrunk(point) | {"section": point["of"], "steps": 12, "batch_size": 2, "learning_rate": 3e-2}
    regret.again(whole)
    (row,) = regret.measure({**whole, "section": "live", "stop": 4})
    (asked, losses, begun), few = seen, [float(loss) for loss in row["curve"].split(",")]
    assert len(losses) == 12 and few == pytest.approx(losses[:4], abs=6e-6) and len(set(few)) == 4
    assert {name for name in begun if begun[name] != asked.get(name)} == {"callback"}
    assert {**row, **whole, "section": "live", "stop": 4} == row and "few_loss" not in row
    assert regret.again(row, stop=2)["curve"] == row["curve"].rsplit(",", 2)[0]
    assert len(regret.again(row, stop=20)["curve"].split(",")) == 12  # it has no more
    shorter = regret.again({**row, "steps": 4}, stop=4)
    assert shorter["curve"] != row["curve"]


def test_live_points_are_runs_that_were_scored():
    """The best rate of each, as the package's results have it, and the first of the seeds that were scored."""
    rows = pl.results("regret").rows
    for point in LIVE:
        stored = {**point, "section": point["of"], "scored": True}
        del stored["of"], stored["stop"]
        found = [row for row in rows if {**row, **stored} == row]
        assert len(found) == 1, point
        assert list(stored) == search.described(found[0])
        assert point["stop"] <= point["steps"]
    assert len(LIVE) == 6


def test_the_first_losses_of_the_package_are_those_of_the_stored_runs():
    """Each stored run has the mean of its losses 6 to 10, measured when it was run as a whole."""
    found = pl.results("regret_live").rows
    assert [{name: row[name] for name in search.described(row)} for row in found] == LIVE
    stored = pl.results("regret")
    for row in found:
        losses = [float(loss) for loss in row["curve"].split(",")]
        assert len(losses) == row["stop"] == regret_plan.STOP
        names = ("variant", "task", "targets", "steps", "batch_size", "learning_rate", "seed")
        whole = stored.one(section=row["of"], scored=True, **{name: row[name] for name in names})
        assert sum(losses[5:10]) / 5 == pytest.approx(whole["loss_10"], rel=0.01), whole
        if row["steps"] == row["stop"]:
            assert sum(losses[-10:]) / 10 == pytest.approx(whole["train_loss"], rel=0.01), whole


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


def test_strings_are_random_and_each_has_a_key_of_its_own(small):
    (keys, digits), again, others = (regret_strings.strings(8, 5, seed) for seed in (3, 3, 4))
    assert torch.equal(keys, again[0]) and torch.equal(digits, again[1]) and not torch.equal(digits, others[1])
    assert len(set(keys.tolist())) == 8 and digits.shape == (8, 5) and 0 <= digits.min() and digits.max() < 10


def test_stored_bits_are_what_known_probabilities_say(small):
    """A body without blocks, whose logits are log probabilities that the test chooses."""
    body = copy.deepcopy(small[0].model)
    body.layers, body.norm, body.embed_tokens = torch.nn.ModuleList(), torch.nn.Identity(), torch.nn.Identity()
    digits = torch.tensor([[3, 7], [0, 3]])
    for right in (0.1, 0.5, 0.999999, 0.01):  # the probability of each right digit; the others share the rest
        known = torch.full((2, 2, 16), math.log((1 - right) / 9))
        known.scatter_(-1, digits[..., None], math.log(right))
        expected = 4 * (math.log2(10) + math.log2(right))
        assert float(regret_strings.bits(body, known, digits, torch.eye(10, 16))) == pytest.approx(expected, abs=1e-5)


def test_the_last_blocks_read_what_the_whole_model_would(small):
    keys, digits = regret_strings.strings(6, 4, seed=0)
    point = {"method": "lora", "r": 2, "alpha": 4, "targets": "q_proj", "last": 1}
    body, hidden = regret_strings.upper(point), regret_strings.before(keys, digits, 1)
    assert len(body.layers) == 1 and hidden.shape == (6, 4, 16)
    ids = torch.cat([keys[:, None], digits + 10], 1)
    with torch.no_grad():
        log = small[0](ids).logits[:, :-1, 10:20].log_softmax(-1)
        expected = (math.log2(10) + log.gather(-1, digits[..., None]) / math.log(2)).sum()
        found = regret_strings.bits(body, hidden, digits, regret_strings.head_rows())
    assert float(found) == pytest.approx(float(expected), abs=1e-4)


def test_a_run_ends_where_the_training_loss_stops_falling():
    rule = regret_strings.Plateau(9e-2)
    assert all(rule.goes_on(value) for value in (-3.0, 0.1, 0.2, 0.206)) and rule.rate == 9e-2
    assert rule.goes_on(0.209) and rule.rate == pytest.approx(3e-2)  # a gain, but too small a one
    assert rule.goes_on(0.3) and rule.rate == pytest.approx(3e-2)
    assert rule.goes_on(0.1) and rule.goes_on(0.304)  # worse than the best window, and hardly better than it
    assert not rule.goes_on(math.nan) and rule.cuts == 4


def test_an_adapter_learns_by_heart_until_it_is_full(small, monkeypatch):
    """Two strings fit into it, and the loss goes to zero. Thirty are too many for so few parameters."""
    monkeypatch.setattr(regret_strings, "WINDOW", 20)
    with torch.no_grad():
        small[0].lm_head.weight *= 100  # so that it can be sure of a digit
    first = next(point for point in POINTS if point["section"] == "capacity") | {"precision": "fp32", "last": 1}
    few, many = (
        regret.measure(first | {"strings": n, "r": 2, "learning_rate": 3e-3, "steps": 4000})[0] for n in (2, 30)
    )
    for row in (few, many):
        assert row["bits"] == pytest.approx(row["strings"] * 8 * math.log2(10)) and row["base_stored"] < 0
        assert row["ended"] == "floor" and row["taken"] < 4000
        curve = [float(value) for value in row["curve"].split(",")]
        assert len(curve) * 20 == row["taken"] and max(curve) == pytest.approx(row["per_parameter"], abs=0.02)
        assert row["per_parameter"] == row["stored"] / row["trainable"]
    assert few["stored"] > 0.95 * few["bits"] and many["stored"] < 0.5 * many["bits"]
    short = regret.measure({**first, "r": 1, "strings": 8, "learning_rate": 3e-2, "steps": 100})[0]
    assert short["ended"] == "steps" and short["taken"] == 100


def test_frequent_words_change_places_and_none_stays(small):
    places = regret_hard.swap()
    assert set(places) == set(places.values()) == {token for text in regret_hard.encoded("train") for token in text}
    token, seen = next(iter(places)), []
    while token not in seen:
        seen.append(token)
        token = places[token]
    assert len(seen) == len(places)  # one cycle
    swapped, plain = regret_hard.texts("train", 3), regret_hard.texts("train", 3, False)
    assert len(plain) == sum(len(text) // 3 for text in regret_hard.encoded("train"))
    for one, other in zip(swapped, plain, strict=True):
        assert one["input_ids"] == [places[token] for token in other["input_ids"]] == one["labels"]


def test_rewiring_leaves_the_embeddings_and_shows_nothing_twice(small, monkeypatch):
    seen = []
    usual = family.trained

    def trained(point, examples, base, **settings):
        model, row = usual(point, examples, base, **settings)
        seen.append(model)
        assert len(examples) <= point["steps"] * point["batch_size"]
        return model, row

    monkeypatch.setattr(family, "trained", trained)
    point = next(p for p in POINTS if p["section"] == "rewiring" and p["variant"] == "full")
    (row,) = regret.measure(shrunk(point) | {"scored": True, "learning_rate": 1e-2})
    assert torch.equal(seen[0].model.embed_tokens.weight, small[0].model.embed_tokens.weight)
    assert not torch.equal(seen[0].model.layers[0].mlp.up_proj.weight, small[0].model.layers[0].mlp.up_proj.weight)
    assert row["base_loss"] != row["original_loss"] and row["validation_loss"] < row["base_loss"]
    assert row["test_loss"] > 0 and row["news_perplexity"] > 1
    for steps in regret_plan.LENGTHS:  # of 128 tokens there are 6,263 pieces
        assert steps * point["batch_size"] <= 6263


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
