"""The measurements of the chapter on training recipes, on small models, and the optimisers that they need."""

import copy

import pytest
import torch

import peftlab as pl
from peftlab import bench
from peftlab.bench import memory as grid
from peftlab.bench import models, pretraining, recipes, reward
from peftlab.memory import estimate
from peftlab.training.low_rank import GaLore, directions

# What of a point is not an argument of the estimator
TOLD = ("section", "timed", "trick", "rows", "parts")
SMALL = {
    "model_type": "llama", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip


def arguments(point):
    return {name: value for name, value in point.items() if name not in TOLD}


def test_each_trick_is_one_change_and_has_a_prediction():
    points = {point["trick"]: point for point in recipes.tricks()}
    assert list(points) == list(recipes.TRICKS)
    peaks = {name: estimate(**arguments(point)).peak_bytes for name, point in points.items()}
    for saves in ("checkpointing", "accumulation", "8-bit states", "bf16 adapters"):
        assert peaks[saves] < peaks["plain"], saves
    for costs in ("eager attention", "float32 weights", "float32", "padded"):
        assert peaks[costs] > peaks["plain"], costs
    assert max(peaks.values()) < 70e9  # one card holds each
    if not torch.cuda.is_available():
        with pytest.raises(pl.PeftLabError, match="needs a CUDA GPU"):
            recipes.measure(points["plain"])


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Measure a small shape and short rows here."""
    monkeypatch.setattr(recipes, "gpu_for", lambda point, what: torch.device("cpu"))
    monkeypatch.setattr(recipes, "LENGTHS", tuple(length // 16 for length in recipes.LENGTHS))
    yield
    models.let_go()


@pytest.mark.parametrize("trick", recipes.TRICKS)
def test_each_trick_takes_its_step(trick, on_the_cpu, monkeypatch):
    point = next(point for point in recipes.tricks() if point["trick"] == trick)
    point |= {"shape": SMALL, "sequence": point["sequence"] // 16}
    made = []
    make = grid.optimizer_of
    monkeypatch.setattr(grid, "optimizer_of", lambda *given: made.append(make(*given)) or made[-1])
    (row,) = recipes.measure(point)
    parts = point["parts"] if point["rows"] == "whole" else 1
    whole = point["batch"] * point["sequence"] * parts
    assert row["tokens"] == (whole if point["rows"] == "whole" else sum(recipes.LENGTHS)) and row["seconds"] > 0
    weights = [p for group in made[0].param_groups for p in group["params"]]
    expected = torch.bfloat16 if trick in ("bf16 adapters", "full", "full, 8-bit states") else torch.float32
    assert {p.dtype for p in weights} == {expected} and all(made[0].state[p] for p in weights)
    with models.held(SMALL, torch.device("cpu"), dtype=next(iter(models._held.values())).dtype) as model:
        assert not pl.attached(model) and not any(p.requires_grad for p in model.parameters())
        assert model.config._attn_implementation == "sdpa"


def test_packed_and_padded_rows_hold_the_same_tokens():
    points = {point["trick"]: point for point in recipes.tricks()}
    found = {}
    for rows in ("padded", "packed"):
        torch.manual_seed(0)
        (batch,) = recipes.batches(points[rows], 100, torch.device("cpu"))
        found[rows] = batch
        assert batch["input_ids"].shape == (points[rows]["batch"], points[rows]["sequence"])
    model = models.random_model(SMALL, torch.device("cpu"), dtype=torch.float32)
    padded, packed = (model(**found[rows]).loss.item() for rows in ("padded", "packed"))
    assert padded == pytest.approx(packed, rel=1e-5)


def test_the_parts_of_a_batch_are_as_many_and_as_large_as_they_say():
    point = next(point for point in recipes.tricks() if point["trick"] == "accumulation")
    parts = recipes.batches(point, 100, torch.device("cpu"))
    assert [part["input_ids"].shape for part in parts] == [(1, 512)] * 4


def test_galore_projects_onto_the_largest_directions():
    torch.manual_seed(0)
    left, right = torch.randn(6, 2), torch.randn(2, 9)
    gradient = left @ right  # of rank two
    for given in (gradient, gradient.T):
        columns = directions(given, 2)
        wide = given if len(given) <= given.shape[1] else given.T
        assert columns.shape == (6, 2)
        torch.testing.assert_close(columns.T @ columns, torch.eye(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(columns @ columns.T @ wide, wide, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_galore_makes_the_update_of_its_formula(shape):
    """Three steps by hand in float64; the directions are taken anew at the third."""
    torch.manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(*shape, dtype=torch.float64))
    expected = weight.detach().clone()
    optimizer = GaLore([weight], lr=0.1, r=2, every=2, scale=0.5)
    mean = square = projection = None
    for step in range(1, 4):
        gradient = torch.randn(*shape, dtype=torch.float64)
        weight.grad = gradient.clone()
        optimizer.step()
        wide = gradient if shape[0] <= shape[1] else gradient.T
        if step in (1, 3):
            projection = torch.linalg.svd(wide.float()).U[:, :2].double()
        low = projection.T @ wide
        mean = 0.1 * low if mean is None else 0.9 * mean + 0.1 * low
        square = 0.001 * low**2 if square is None else 0.999 * square + 0.001 * low**2
        update = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        change = 0.5 * projection @ update
        expected -= 0.1 * (change if shape[0] <= shape[1] else change.T)
        torch.testing.assert_close(weight.detach(), expected, atol=1e-9, rtol=1e-9)
    assert sum(v.numel() for v in optimizer.state[weight].values() if torch.is_tensor(v)) == 2 * (2 * 5) + 3 * 2


def test_galore_without_directions_is_adam():
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    theirs = copy.deepcopy(ours)
    one, other = GaLore([ours], lr=0.01, r=None), torch.optim.Adam([theirs], lr=0.01)
    for _ in range(5):
        ours.grad = torch.randn(4, 4, dtype=torch.float64)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def small_point(**changes):
    """A way to pre-train a model of a few thousand weights."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2}  # fmt: skip
    small = {"steps": 8, "batch": 4, "letters": 16, "every": 4, **sizes}
    return {"section": "pretrain", **pretraining.RUN, "restarts": 0, **small, **changes}


def test_a_restart_keeps_what_the_model_computes_and_the_other_states():
    point = small_point(way="relora", r=2)
    model = pretraining.small_llama(point, 0).double()
    optimizer = pretraining.begin(model, point, 0)
    ids = torch.randint(100, (2, 12))
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    embedding = model.get_input_embeddings().weight
    before, states = model(input_ids=ids).logits, optimizer.state[embedding]
    old = {name: p.detach().clone() for name, p in model.named_parameters() if "lora" in name}
    fresh = pretraining.restart(model, optimizer, point, 1)
    torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-10, rtol=1e-10)
    new = {name: p for name, p in model.named_parameters() if "lora" in name}
    assert old.keys() == new.keys() and all(p.requires_grad for p in new.values())
    assert all(not p.any() for name, p in new.items() if "lora_B" in name) and any(p.any() for p in old.values())
    assert fresh.state[embedding] is states and not any(fresh.state.get(p) for p in new.values())


@pytest.mark.parametrize(("way", "r", "restarts"), [("full", None, 0), ("none", None, 0), ("lora", 2, 0),
                                                    ("relora", 2, 1), ("galore", 2, 0)])  # fmt: skip
def test_each_way_to_pre_train_runs_and_says_what_moved(way, r, restarts, monkeypatch):
    monkeypatch.setattr(pretraining, "letters", lambda split: [i * i % 97 for i in range(400)])
    (row, *curve), again = (pretraining.run(small_point(way=way, r=r, restarts=restarts), 1e-2, 0) for _ in range(2))
    assert [row, *curve] == again  # the same seed, the same run
    assert [each["step"] for each in curve] == [4, 8] and {each["section"] for each in curve} == {"curve"}
    assert row["validation_loss"] > 0 and row["test_loss"] > 0
    assert (row["directions_90"] is None) == (way == "none")
    if way == "lora":
        assert row["directions_90"] <= r and row["top16_share"] == pytest.approx(1, abs=1e-5)
    if way == "full":
        assert row["directions_90"] > 2
    whole = sum(p.numel() for p in pretraining.small_llama(small_point(), 0).parameters())
    assert (row["trainable"] == whole) == (way in ("full", "galore"))


def test_a_rate_is_chosen_on_the_validation_text(monkeypatch):
    def run(point, rate, seed):
        return [{"learning_rate": rate, "seed": seed, "validation_loss": abs(rate - 2)},
                {"section": "curve", "learning_rate": rate, "seed": seed}]  # fmt: skip

    monkeypatch.setattr(pretraining, "run", run)
    rows = pretraining.measure({"rates": [1, 2, 3]})
    assert [(row["learning_rate"], row["seed"], row["chosen"]) for row in rows[::2]] == [
        (1, 0, False), (2, 0, True), (3, 0, False), (2, 1, True), (2, 2, True),
    ]  # fmt: skip


def test_every_point_is_its_own():
    points = recipes.points()
    assert len({bench.key(point) for point in points}) == len(points)


def test_a_policy_starts_from_the_same_writer_and_the_best_rate_gets_more_seeds(monkeypatch):
    reward.writer.cache_clear()
    monkeypatch.setattr(reward, "WAYS", ({"method": "lora", "r": 2, "alpha": 2, "rates": [1e-3, 1e-2]},))
    monkeypatch.setattr(reward, "RUN", {"steps": 2, "samples": 4, "answers": 20})
    writer = reward.writer(steps=5)
    monkeypatch.setattr(reward, "writer", lambda: writer)
    before = {name: value.clone() for name, value in writer.state_dict().items()}
    rows = reward.measure(next(reward.points()))
    assert [(row["learning_rate"], row["seed"]) for row in rows[:2]] == [(1e-3, 0), (1e-2, 0)] and len(rows) == 4
    assert {row["seed"] for row in rows if row["chosen"]} == {0, 1, 2}
    assert len({row["valid_before"] for row in rows}) == 1 and all(row["different"] <= 20 for row in rows)
    assert all(torch.equal(value, before[name]) for name, value in writer.state_dict().items())
    assert not pl.attached(writer)


def test_an_answer_is_rewarded_if_it_parses():
    from peftlab.assets import sloppy

    assert reward.reward(sloppy.encode('{"a":1}')) == 1.0 and reward.reward(sloppy.encode("{'a':1}")) == 0.0
