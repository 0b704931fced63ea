"""What the controlled comparison promises: only the method varies, and rows can be paired item by item."""

import copy
import math

import pytest
import tiny
import torch
from transformers import BertConfig, BertForSequenceClassification

import peftlab as pl
from peftlab import bench
from peftlab.bench import comparison, comparison_cost, comparison_methods, comparison_tasks, lora, models

POINTS = comparison.points()
LEARNED = [point for point in POINTS if point["section"] in comparison_methods.TASKS]
TIMED = [point for point in POINTS if point.get("timed")]
# What is the same for all runs of a task
SAME = ("model", "steps", "batch_size", "examples", "seed", "scored")
TICKET = '{"intent":"refund","product":"lamp","urgency":"normal"}'


def test_points_differ_and_what_matters_most_comes_first():
    assert len({bench.key(point) for point in POINTS}) == len(POINTS)
    assert [point["section"] for point in POINTS[:4]] == ["base", "base", "base", "reviews"]
    variants = list(dict.fromkeys(point["variant"] for point in LEARNED))
    assert variants[:2] == ["LoRA", "full"] and len(variants) >= 13


@pytest.mark.parametrize("task", comparison_methods.TASKS)
def test_only_the_method_and_its_rate_vary(task):
    runs = [point for point in LEARNED if point["section"] == task]
    assert len({tuple(point[name] for name in SAME) for point in runs}) == 1
    # each example is seen three times
    assert 2.9 < runs[0]["steps"] * runs[0]["batch_size"] / runs[0]["examples"] <= 3
    assert len({point["variant"] for point in runs}) >= 12


@pytest.mark.parametrize("name", comparison_methods.COMPARED)
def test_each_method_has_a_prediction_and_six_rates_around_its_usual_one(name):
    compared = comparison_methods.COMPARED[name]
    source, claim = comparison_methods.PREDICTIONS[name]
    assert source and len(claim.split()) > 3
    assert len(compared.rates) == 6 and list(compared.rates) == sorted(compared.rates)
    assert set(compared.rates) <= set(lora.LADDER)
    if compared.method != "head":
        usual = pl.catalogue.METHODS[compared.method].learning_rate
        assert compared.rates[0] / 2 < usual < compared.rates[-1]
    assert (name in comparison_methods.MERGED) == (
        compared.method not in ("full", "head", "bitfit", "prompt", "prefix", "pfeiffer", "houlsby")
    )


def test_predictions_name_methods_that_run():
    assert set(comparison_methods.PREDICTIONS) == set(comparison_methods.COMPARED)
    assert set(comparison_methods.PREDICTED_COST) <= set(comparison_cost.ON_A_DECODER)
    for task, (best, claim) in comparison_methods.PREDICTED_BEST.items():
        assert task in comparison_methods.COMPARED[best].tasks and claim


@pytest.mark.parametrize(("best", "further"), [(1e-3, []), (1e-4, [3e-5]), (3e-2, [1e-1])])
def test_three_other_seeds_are_scored_at_the_best_rate_once_it_is_not_at_an_edge(best, further):
    def rows_of(points):
        return [{**one, "trainable": 1, "validation_loss": abs(math.log(one["learning_rate"] / best))}
                for one in points]  # fmt: skip

    points = [one for one in LEARNED if one["variant"] == "LoRA" and one["section"] == "news"]
    other = [one for one in LEARNED if one["variant"] == "full" and one["section"] == "news"][:5]
    base = {"section": "base", "task": "news", "test_loss": 1.0}
    new = list(comparison.follow_up([base, *rows_of(points + other)]))
    if further:
        assert [(one["learning_rate"], one["scored"]) for one in new] == [(further[0], False)]
        new = list(comparison.follow_up(rows_of(points + new)))
    assert [(one["learning_rate"], one["seed"], one["scored"]) for one in new] == [
        (best, seed, True) for seed in (0, 1, 2)
    ]


@pytest.fixture
def small(monkeypatch):
    """Models of two layers in the place of both models, and few examples."""
    decoder = tiny.llama(max_position_embeddings=512, vocab_size=32)
    tokenizer = tiny.tokenizer(chat=True)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    encoder = BertForSequenceClassification(BertConfig(vocab_size=32, max_position_embeddings=64, **sizes))
    texts = {"train": "the cat sat", "validation": "a dog ran", "test": "the dog sat"}

    def messages(split):
        return [{"prompt": pl.support_desk.prompt(texts[split]), "message": texts[split], "ticket": TICKET}] * 4

    def load_data(name):
        labels = [0, 1, 1, 1] if name == "reviews" else [0, 1, 2, 0]
        return {split: tiny_rows(["the cat runs", "a dog", "red cat ?", "the green dog sleeps"], labels)
                for split in texts}  # fmt: skip

    def fresh(seed):
        torch.manual_seed(seed)
        return copy.deepcopy(encoder), tokenizer

    cached = (lora.encoded, comparison_tasks.reviews, comparison_tasks.articles, comparison_tasks.continued,
              comparison_tasks.encoder_tokenizer)  # fmt: skip
    for one in cached:
        one.cache_clear()
    monkeypatch.setattr(lora, "base", lambda kind="whole": (decoder, tokenizer))
    monkeypatch.setattr(lora, "messages", messages)
    monkeypatch.setattr(lora, "news", lambda: ["the cat runs"])
    monkeypatch.setattr(pl, "load_data", load_data)
    reviews = comparison_tasks.OF["reviews"]._replace(base=fresh)
    monkeypatch.setitem(comparison_tasks.OF, "reviews", reviews)
    monkeypatch.setattr(comparison_tasks, "encoder", fresh)
    yield
    for one in cached:
        one.cache_clear()


def tiny_rows(texts, labels):
    import datasets

    return datasets.Dataset.from_list([{"text": text, "label": one} for text, one in zip(texts, labels, strict=True)])


SMALLER = {"r": 2, "num_virtual_tokens": 3, "oft_block_size": 4, "reduction_factor": 4}


def run(task, name, **more):
    point = comparison_methods.run(task, name, 1e-3, 0, steps=2, batch_size=2, examples=4)
    return {**point, **{field: value for field, value in SMALLER.items() if field in point}, **more}


@pytest.mark.parametrize(
    ("task", "name"),
    [(task, name) for name, one in comparison_methods.COMPARED.items() for task in one.tasks],
)
def test_a_run_of_each_method_is_judged_and_scored(small, task, name):
    point = run(task, name, scored=True)
    (row,) = comparison.measure(point)
    assert {**row, **point} == row and row["trainable"] > 0 and row["file_bytes"] > 0
    assert row["validation_loss"] > 0 and row["sample_loss"] > 0 and row["test_loss"] > 0 and row["tested"] == 4
    if task == "news":
        assert len(row["nats"].split()) == len(row["tokens"].split()) == 4 and row["reviews_perplexity"] > 1
    else:
        assert len(row["answers"]) == 4 and row["answers"].count("1") == row["right"]
    assert task != "desk" or row["news_perplexity"] > 1
    assert task != "reviews" or 0 <= row["news_topics_right"] <= row["news_topics_tested"] == 8


def test_a_run_that_chooses_a_rate_is_not_tested(small):
    (row,) = comparison.measure(run("desk", "LoRA"))
    assert "test_loss" not in row and "right" not in row and row["validation_loss"] > 0


@pytest.mark.parametrize("task", comparison_methods.TASKS)
def test_the_base_is_tested_as_the_runs_are(small, task):
    (row,) = comparison.measure({"section": "base", "task": task})
    assert row["tested"] == 4
    assert task != "reviews" or row["answers"] == "0111"  # the more frequent label


def test_the_losses_of_articles_add_up_to_the_mean_loss(small):
    for model in (lora.base()[0], pl.attach(copy.deepcopy(lora.base()[0]), pl.PromptTuningConfig())):
        row = comparison_tasks.read(model)
        examples = comparison_tasks.examples("news", "test")
        assert row["tokens"] == "2 1 2 3" and row["test_tokens"] == 8
        mean = pl.mean_loss(model, examples, pl.Collator(lora.base()[1]))
        assert row["test_loss"] == pytest.approx(mean, rel=1e-5)
        assert sum(map(float, row["nats"].split())) / 8 == pytest.approx(mean, abs=0.01)


def test_an_embedding_is_the_mean_over_a_texts_own_tokens(small):
    rows = comparison_tasks.articles("train")
    model, _ = comparison_tasks.encoder(0)
    together, alone = comparison_tasks.embeddings(model, rows), comparison_tasks.embeddings(model, rows[1:2])
    torch.testing.assert_close(together[1:2], alone)
    assert together.norm(dim=-1).tolist() == pytest.approx([1.0] * 4)
    prompted = pl.attach(copy.deepcopy(model), pl.PromptTuningConfig(num_virtual_tokens=3))
    states = model(input_ids=torch.tensor([rows[1]["input_ids"]]), output_hidden_states=True).hidden_states[-1]
    assert states.shape[1] == len(rows[1]["input_ids"]) and comparison_tasks.embeddings(prompted, rows).shape == (4, 16)


def test_articles_lie_nearest_to_their_own_topic_if_the_embeddings_say_so(small, monkeypatch):
    def embeddings(model, rows):
        return torch.eye(3)[[row["labels"] for row in rows]]

    monkeypatch.setattr(comparison_tasks, "embeddings", embeddings)
    assert comparison_tasks.separated(None) == {"news_topics_tested": 8, "news_topics_right": 8}


SHAPE = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def test_steps_and_decoding_of_each_method_are_timed():
    trainable = {}
    for point in TIMED:
        changed = {**point, "shape": SHAPE, "batch": 1, "sequence": 4, **({"written": 2} if "written" in point else {})}
        changed |= {field: value for field, value in SMALLER.items() if field in point}
        (row,) = comparison_cost.measure(changed, torch.device("cpu"))
        assert row["seconds"] > 0
        if point["section"] == "cost":
            trainable[point["variant"]] = row["trainable"]
            assert comparison_cost.estimate_of(row).trainable == row["trainable"]
        else:
            assert row["token_seconds"] == pytest.approx(row["seconds"] / 2)
    models.let_go()
    assert set(trainable) == set(comparison_cost.ON_A_DECODER)
    assert max(trainable, key=trainable.get) == "full" and min(trainable.values()) > 0
    states = {(point["section"], point["state"]) for point in TIMED if "state" in point}
    assert states == {(part, state) for part in ("latency", "batch") for state in ("base", "attached", "merged")}
