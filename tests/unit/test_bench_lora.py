"""What the bench of the LoRA chapter promises: rates are chosen on validation messages, and other seeds are scored."""

import copy

import pytest
import tiny

import peftlab as pl
from peftlab import bench
from peftlab.bench import fullsize, lora

LEARNED = [point for point in lora.points() if point["section"] not in ("fullsize", "latency")]
# The ticket of the tiny model's test messages; its tokenizer knows few words
TICKET = '{"intent":"refund","product":"lamp","urgency":"normal"}'


def test_points_differ_and_all_that_are_compared_are_tuned():
    assert len({bench.key(point) for point in lora.points()}) == len(LEARNED) + len(list(fullsize.points()))
    untuned = {point["section"] for point in LEARNED if "rates" not in point}
    assert untuned == {"base", "shots", "spectrum"}
    for point in LEARNED:
        if "rates" in point:
            assert set(point["rates"]) <= set(lora.LADDER) and point["rates"] == sorted(point["rates"])
            assert not set(point["tuning"]) & set(lora.SEEDS)


def test_every_rank_and_rule_of_the_comparison_is_there():
    seen = {}
    for point in LEARNED:
        if point["section"] == "rank":
            seen.setdefault(point["rule"], {})[point["r"]] = lora.config_of(point).scaling()
    assert seen == {
        "alpha / r": {1: 16, 4: 4, 6: 16 / 6, 8: 2, 16: 1, 64: 1 / 4, 256: 1 / 16},
        "alpha / sqrt(r)": {4: 8, 16: 4, 64: 2, 256: 1},
        "alpha = 2 r": dict.fromkeys((1, 4, 16, 64, 256), 2),
    }
    grids = {tuple(point["rates"]) for point in LEARNED if point["section"] == "rank"}
    assert len(grids) == 1


def test_the_places_cost_the_same():
    counts = []
    for point in LEARNED:
        if point["section"] == "where":
            targets = point["targets"].split(",")
            whole = pl.memory.count("smollm2-135m", "lora", r=point["r"], targets=targets).trainable
            counts.append(whole if point["layers"] == "all" else whole // 2)
    assert len(counts) == 6 and max(counts) < 1.05 * min(counts)


@pytest.fixture
def curve(monkeypatch):
    """A task whose validation loss is a function of the rate. Returns the points that were trained and scored."""
    runs = {"trained": [], "scored": []}

    def given(loss):
        def run(kind):
            def measured(point):
                runs[kind].append((point["learning_rate"], point["seed"]))
                return None, {**point, "validation_loss": loss(point["learning_rate"], point["seed"])}

            return measured

        monkeypatch.setattr(lora, "trained", run("trained"))
        monkeypatch.setattr(lora, "scored", run("scored"))
        return runs

    return given


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1e-3, [3e-4, 1e-3, 3e-3]),
        (3e-2, [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]),
        (1e-4, [3e-4, 1e-3, 3e-3, 1e-4, 3e-5]),
        (1.0, [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]),
    ],
    ids=["inside", "above", "below", "end of the ladder"],
)
def test_the_best_rate_is_not_at_an_edge_of_what_was_tried(curve, best, tried):
    runs = curve(lambda rate, seed: max(rate / best, best / rate))
    rows = list(lora.tuned(lora.desk("x", (3e-4, 1e-3, 3e-3))))
    assert runs == {"trained": [(rate, 10) for rate in tried], "scored": [(best, seed) for seed in (0, 1, 2)]}
    assert [row.get("scored") for row in rows[: len(tried)]] == [False] * len(tried)
    assert not any({"rates", "tuning"} & row.keys() for row in rows)


def test_a_rate_is_chosen_by_the_mean_over_the_tuning_seeds_and_never_if_one_run_failed(curve):
    losses = {(1e-3, 10): 0.5, (1e-3, 11): 0.9, (3e-3, 10): 0.6, (3e-3, 11): 0.6, (1e-2, 10): None, (1e-2, 11): 0.1}
    runs = curve(lambda rate, seed: losses.get((rate, seed), 0.8))
    list(lora.tuned(lora.desk("x", (1e-3, 3e-3, 1e-2), (10, 11))))
    assert [rate for rate, _ in runs["scored"]] == [3e-3] * 3


@pytest.fixture
def small(monkeypatch):
    """A model of two layers in place of smollm2-135m, and few messages, with whose splits calls are counted."""
    model, tokenizer = tiny.llama(max_position_embeddings=512, vocab_size=32), tiny.tokenizer(chat=True)
    used = []

    def messages(split):
        used.append(split)
        texts = {"train": "the cat sat", "validation": "a dog ran", "test": "the dog sat"}
        return [{"prompt": pl.support_desk.prompt(texts[split]), "message": texts[split], "ticket": TICKET}] * 4

    lora.encoded.cache_clear()
    monkeypatch.setattr(lora, "base", lambda kind="whole": (copy.deepcopy(model), tokenizer))
    monkeypatch.setattr(lora, "messages", messages)
    monkeypatch.setattr(lora, "news", lambda: ["the cat ran"])
    monkeypatch.setattr(lora, "LAYERS", 2)
    yield used
    lora.encoded.cache_clear()


@pytest.mark.parametrize("method", ["lora", "full", "subspace"])
def test_a_run_is_judged_on_validation_and_scored_on_test_messages(small, method):
    point = {"section": "x", **lora.RECIPE, "method": method, "dimension": 10, "steps": 2, "learning_rate": 1e-3,
             "seed": 0}  # fmt: skip
    _, row = lora.trained(point)
    assert set(small) == {"train", "validation"} and row["validation_loss"] > 0 and row["news_perplexity"] > 1
    _, again = lora.scored(point)
    assert again["validation_loss"] == row["validation_loss"]
    assert set(small) == {"train", "validation", "test"}
    assert again["messages"] == 4 and again["right"] == 0 and again["scored"] and again["trainable"] > 0


def test_right_answers_are_counted(small, monkeypatch):
    given = [TICKET, "no", TICKET.replace("lamp", "kettle"), TICKET.replace(",", ", ")]
    monkeypatch.setattr(pl, "generate_text", lambda *_, **__: given)
    assert lora.answered(None, None, []) == {"messages": 4, "right": 2, "valid": 3}


def test_solved_messages_come_before_the_question(small, monkeypatch):
    asked = []
    monkeypatch.setattr(lora, "answered", lambda model, tokenizer, prompts, **_: asked.extend(prompts) or {})
    lora.measure({"section": "shots", "shots": 2, "draw": 0})
    assert len(asked) == 4
    assert [turn["role"] for turn in asked[0]] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert asked[0][1]["content"] == "the cat sat" and asked[0][-1]["content"] == "the dog sat"


def test_a_loss_that_is_too_large_becomes_none():
    assert [lora.finite(value) for value in (1.5, float("inf"), float("nan"))] == [1.5, None, None]
