"""Settings, schedules, precision, evaluation, early stop, and what happens when numbers stop being finite."""

import collections
import math
import random

import numpy
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed, nn

import peftlab as pl
from peftlab.errors import PeftLabError
from peftlab.settings import Settings
from peftlab.training import TrainingError, train
from peftlab.training import run as run_of_training
from peftlab.training import state as state_of_run
from peftlab.training.losses import causal_lm_loss
from peftlab.training.precision import choose_precision
from peftlab.training.ranks import Ranks
from peftlab.training.run import Run
from peftlab.training.schedule import DataOrder, derived_seed, learning_rate_at, warmup_steps


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# -- schedule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_learning_rates_are_those_of_transformers(name, warmup):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    name_there = "constant_with_warmup" if name == "constant" else name
    scheduler = get_scheduler(name_there, optimizer, num_warmup_steps=warmup, num_training_steps=17)
    for step in range(17):
        found = learning_rate_at(step, 17, 0.5, warmup, name)
        assert found == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_warmup_is_a_share_or_a_number():
    assert [warmup_steps(value, 50) for value in (0, 0.0, 0.05, 0.5, 1, 7)] == [0, 0, 3, 25, 1, 7]


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 200), st.integers(0, 9), st.booleans())
def test_every_epoch_shows_every_example_once(examples, batch, total, seed, grouped):
    lengths = [derived_seed(index) % 30 for index in range(examples)] if grouped else None
    order = DataOrder(examples, batch, total, seed, lengths)
    shown = [index for step in range(len(order)) for index in order.at(step)]
    assert len(shown) == total
    for start in range(0, total - examples + 1, examples):
        assert sorted(shown[start : start + examples]) == list(range(examples))
    again = DataOrder(examples, batch, total, seed, lengths)
    assert again.at(len(again) - 1) == order.at(len(order) - 1), "the last step needs none of the others"


def test_epochs_and_seeds_differ_and_grouping_brings_lengths_together():
    order = DataOrder(100, 10, 300, seed=0)
    assert order.at(0) != order.at(10) and order.at(0) != DataOrder(100, 10, 300, seed=1).at(0)
    lengths = [derived_seed(index) % 50 for index in range(640)]
    spread = []
    for chosen in (None, lengths):
        order = DataOrder(640, 8, 640, 0, chosen)
        batches = [[lengths[index] for index in order.at(step)] for step in range(80)]
        spread.append(sum(max(batch) - min(batch) for batch in batches) / 80)
    assert spread[0] > 30 and spread[1] < 5


# -- random numbers ----------------------------------------------------------------------------------------------------


def drawn(steps=4, rank=0, **settings):
    """What a loss draws from torch, Python and numpy in each step of a run, in the process of this number."""
    rows = []

    def loss(model, batch):
        rows.append((torch.rand(()).item(), random.random(), numpy.random.rand()))
        return causal_lm_loss(model, batch)

    model = tiny.llama()
    ranks = Ranks(model)
    ranks.rank = rank
    chosen = Settings(steps=steps, loss=loss, precision="fp32", **settings)
    run = Run(model, tiny.examples(), chosen, device=torch.device("cpu"), ranks=ranks)
    for _ in range(steps):
        run.update()
        run.clear()
    return rows


def test_the_random_numbers_of_a_step_follow_from_the_seed_its_number_and_the_process():
    """Otherwise the same units drop out in each step, or for each process's examples."""
    assert drawn() == drawn(), "the same run draws the same"
    for which in range(3):  # torch, Python, numpy
        runs = [[row[which] for row in drawn(seed=seed, rank=rank)] for seed in (0, 1) for rank in (0, 1, 2)]
        numbers = [number for run in runs for number in run]
        assert len(set(numbers)) == len(numbers) == 24


def test_the_parts_of_an_accumulated_batch_draw_anew():
    numbers = drawn(batch_size=2, accumulation=3)
    assert len(set(numbers)) == len(numbers) == 12


# -- several processes -------------------------------------------------------------------------------------------------


def test_each_process_has_its_share_of_a_batch_and_one_without_any_counts_nothing():
    ranks = Ranks(tiny.llama())
    assert ranks.share([5, 6, 7]) == ([5, 6, 7], True)
    ranks.world, shares = 3, []
    for ranks.rank in range(3):
        shares.append((ranks.share([5, 6, 7, 8]), ranks.share([5, 6])))
    assert shares == [(([5, 8], True), ([5], True)), (([6], True), ([6], True)), (([7], True), ([5], False))]


def test_all_processes_take_what_the_first_has(monkeypatch):
    def from_the_first(box, src):
        assert src == 0
        box[0] = {"loss": 2.0}

    monkeypatch.setattr(distributed, "broadcast_object_list", from_the_first)
    ranks = Ranks(tiny.llama())
    assert ranks.agree({"loss": 1.0}) == {"loss": 1.0}, "alone it asks nobody"
    ranks.world = 2
    assert ranks.agree({"loss": 1.0}) == {"loss": 2.0}


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_the_shares_of_two_processes_make_the_gradient_of_one(batch_size):
    """Also where a part is one example, so that the second process repeats it and must not count it."""

    def run(rank, world, total):
        model = tiny.llama()
        ranks, mine = Ranks(model), []
        ranks.rank, ranks.world = rank, world

        def sum_of_all(value):
            mine.append(value.detach().double())
            return total[len(mine) - 1].to(value.dtype) if total else value.detach()

        ranks.sum = sum_of_all
        settings = Settings(steps=2, batch_size=batch_size, accumulation=2, max_grad_norm=None, precision="fp32")
        run = Run(model, tiny.examples(), settings, device=torch.device("cpu"), ranks=ranks)
        row = run.update()
        return row, mine, torch.cat([p.grad.flatten() for p in run.trainable.values()])

    expected, total, gradient = run(0, 1, None)
    (first, one, its), (second, other, others) = (run(rank, 2, total) for rank in (0, 1))
    assert len(one) == len(other) == len(total) == 4
    for a, b, both in zip(one, other, total, strict=True):
        assert float(a + b) == pytest.approx(float(both), rel=1e-6)
    assert first["loss"] == second["loss"] == expected["loss"] and first["tokens"] == expected["tokens"]
    torch.testing.assert_close((its + others) / 2, gradient)  # DistributedDataParallel takes the mean


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "real_bf16", "chosen"), [("cpu", False, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp16")]
)
def test_auto_asks_the_device(monkeypatch, device, real_bf16, chosen):
    def supported(including_emulation=True):
        return real_bf16 or including_emulation  # a T4 says yes unless emulation is left out

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert choose_precision("auto", torch.device(device)) == chosen
    if chosen == "fp16":
        with pytest.raises(PeftLabError, match="Tesla T4 only emulates bf16"):
            choose_precision("bf16", torch.device(device))


def test_precision_refuses():
    with pytest.raises(PeftLabError, match="found 'float16'"):
        choose_precision("float16", torch.device("cpu"))
    with pytest.raises(PeftLabError, match="needs a CUDA GPU"):
        train(tiny.llama(), tiny.examples(), steps=1, precision="fp16")


def test_bf16_autocast_keeps_parameters_in_float32():
    model, dtypes = tiny.llama(), set()
    model.lm_head.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    history = train(model, tiny.examples(), steps=20, learning_rate=0.01, precision="bf16")
    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert history.steps[-1]["loss"] < history.steps[0]["loss"]


def test_half_precision_parameters():
    model = tiny.llama(dtype=torch.float16)
    with pytest.raises(PeftLabError, match=r"trainable parameters are float16 \(first: .*adapter_dtype=torch.float32"):
        train(model, tiny.examples(), steps=1)
    model = tiny.llama(dtype=torch.bfloat16)
    history = train(model, tiny.examples(), steps=20, learning_rate=0.01)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert history.steps[-1]["loss"] < history.steps[0]["loss"]


def fp16_run(loss=None, precision="fp16", **settings):
    """A run under fp16 with a loss scale, on the CPU, which ``train`` itself refuses for its slowness."""
    settings = Settings(steps=40, learning_rate=0.02, precision=precision, loss=loss, **settings)
    model = tiny.llama()
    return Run(model, tiny.examples(), settings, device=torch.device("cpu"), ranks=Ranks(model))


def test_a_float64_model_computes_in_float64(monkeypatch):
    rows = tiny.examples(4)
    with pytest.raises(PeftLabError, match="precision='bf16' computes in 16 bits by autocast.*model.* is float64"):
        train(tiny.llama().double(), rows, steps=1, precision="bf16", progress=False)
    assert len(train(tiny.llama().double(), rows, steps=1, progress=False).steps) == 1
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert choose_precision("auto", torch.device("cuda"), tiny.llama().double()) == "fp32"
    model = tiny.llama()
    model.scale = nn.Parameter(torch.ones((), dtype=torch.float64))  # no product needs it
    assert choose_precision("auto", torch.device("cuda"), model) == "bf16"


@pytest.mark.parametrize("scale", [1.0, 2.0**10, 2.0**16])
@pytest.mark.parametrize("limit", [0.25, None])
def test_fp16_clips_the_gradient_and_not_the_scaled_one(scale, limit):
    """The norm of a step, what is left after clipping, and the update are those of float32, whatever the scale."""
    exact, run = (fp16_run(precision=name, max_grad_norm=limit, schedule="constant", optimizer="sgd") for name in
                  ("fp32", "fp16"))  # fmt: skip
    run.scaler._lazy_init_scale_growth_tracker(run.device)
    run.scaler._scale.fill_(scale)
    expected, found = exact.update(), run.update()
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2) and found["grad_norm"] > 0.3
    left = torch.stack([parameter.grad.norm() for parameter in run.trainable.values()]).norm().item()
    assert left == pytest.approx(found["grad_norm"] if limit is None else limit, rel=1e-3)
    for name, parameter in run.trainable.items():
        torch.testing.assert_close(parameter, exact.trainable[name], rtol=0, atol=2e-4)


@pytest.mark.parametrize("told", [False, True])  # True: as on a GPU, whose optimiser can skip a step by itself
def test_fp16_scales_the_loss_and_skips_what_overflows(told, monkeypatch):
    monkeypatch.setattr(run_of_training, "skips_when_told", lambda optimizer, device: told)
    run, rows = fp16_run(), []
    assert run.scaler.is_enabled()
    for _ in range(40):
        before = state(run.model)
        rows.append(run.update())
        assert same(before, state(run.model)) == (rows[-1]["grad_norm"] is None or rows[-1]["lr"] == 0)
        run.clear()
        if len(rows) == 20:
            run.scaler._scale.fill_(2.0**26)  # far too much: the gradients overflow until it has come down
    skipped = [row["step"] for row in rows if row["grad_norm"] is None]
    assert 21 in skipped and 40 not in skipped
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}


def test_a_continued_fp16_run_has_its_loss_scale(tmp_path):
    """Else it begins with 65,536 again, and its first steps overflow and are skipped."""
    begun = fp16_run()
    state_of_run.resume_or_start(begun, tmp_path, resume=True)
    begun.scaler._lazy_init_scale_growth_tracker(begun.device)
    for scale in (2.0**26, 2.0**9):  # the first is far too much
        begun.scaler._scale.fill_(scale)
        begun.update()
        begun.clear()
    assert [row["grad_norm"] is None for row in begun.history.steps] == [True, False]
    state_of_run.save(begun, tmp_path)
    continued = fp16_run()
    state_of_run.resume_or_start(continued, tmp_path, resume=True)
    assert continued.scaler.get_scale() == begun.scaler.get_scale() == 2.0**9
    assert continued.update() == begun.update() and same(state(continued.model), state(begun.model))


def test_fp16_gives_up_when_no_scale_is_small_enough():
    def loss(model, batch):
        total, count = causal_lm_loss(model, batch)
        return total + (total - total.detach()).abs().sqrt(), count  # an infinite slope, whatever the scale

    run = fp16_run(loss)
    with pytest.raises(TrainingError, match="Step 18 of 40: the gradient's norm is"):
        for _ in range(40):
            run.update()
            run.clear()


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_evaluations_metrics_and_best():
    model, modes = tiny.llama(), []

    def weight(model):
        modes.append((model.training, torch.is_grad_enabled()))
        return model.lm_head.weight.mean()

    history = train(
        model,
        tiny.examples(),
        steps=7,
        learning_rate=0.02,
        evaluation_data=tiny.examples(5, seed=1),
        evaluate_every=3,
        metrics={"weight": weight},
    )
    assert [row["step"] for row in history.evaluations] == [3, 6, 7]
    assert modes == [(False, False)] * 3 and model.training
    assert history.best == min(history.evaluations, key=lambda row: row["loss"])
    assert set(history.evaluations[0]) == {"step", "loss", "weight"}


def test_evaluating_more_often_changes_nothing_in_the_training():
    runs = []
    for every in (1, None):
        model = tiny.llama(attention_dropout=0.3)
        train(model, tiny.examples(), steps=4, evaluation_data=tiny.examples(3), evaluate_every=every)
        runs.append(state(model))
    assert same(*runs)


def test_patience_stops_and_the_best_is_restored():
    scores, seen = iter([1, 3, 2, 2, 9]), []
    model = tiny.llama()

    def score(model):
        seen.append(state(model))
        return next(scores)

    history = train(
        model,
        tiny.examples(),
        steps=50,
        learning_rate=0.01,
        metrics={"score": score},
        evaluate_every=2,
        patience=2,
        monitor="score",
        restore_best=True,
    )
    assert history.stopped_early and len(history.steps) == 8
    assert history.best == {"step": 4, "score": 3.0}
    assert same(state(model), seen[1]) and not same(state(model), seen[3])
    assert repr(history).endswith("; best of 4 evaluations after step 4: score 3.000; stopped early>")
    assert repr(history).startswith("<History: 8 steps, loss 3.") and "\n" not in repr(history)


# -- numbers that are not finite ---------------------------------------------------------------------------------------


def poisoned(at, kind):
    """A loss that goes wrong in its call number ``at``, in its value or only in its gradient."""
    calls = []

    def loss(model, batch):
        total, count = causal_lm_loss(model, batch)
        calls.append(1)
        if len(calls) != at:
            return total, count
        if kind == "loss":
            return total * math.nan, count
        zero = (total - total.detach()).abs()
        return total + zero.sqrt(), count  # the value is fine, the slope of the root at zero is infinite

    return loss


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_the_last_good_state_is_kept(kind, tmp_path):
    good, bad = tiny.llama(), tiny.llama()
    data, settings = (
        tiny.examples(),
        {"batch_size": 2, "accumulation": 2, "learning_rate": 0.01, "schedule": "constant"},
    )
    train(good, data, steps=3, **settings)
    order = DataOrder(len(data), 4, 40, 0).at(3)
    culprits = order[2:] if kind == "loss" else order
    words = "the loss is nan" if kind == "loss" else "the gradient's norm is (nan|inf)"
    with pytest.raises(
        TrainingError, match=rf"Step 4 of 10: {words}, with examples {', '.join(map(str, culprits))} of"
    ):
        train(bad, data, steps=10, loss=poisoned(8, kind), folder=tmp_path, save_every=1, **settings)
    assert same(state(good), state(bad)), "the parameters are those after step 3"
    assert all(parameter.grad is None for parameter in bad.parameters()) and bad.training
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"], "no bad state was written"


def test_running_statistics_are_put_back_too():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    data = [{"x": [1.0, 2.0, float(i)]} for i in range(6)] + [{"x": [math.nan] * 3}]
    before = state(model)

    def loss(model, batch):
        return model(batch["x"]).sum(), len(batch["x"])

    with pytest.raises(TrainingError, match="Step 1"):
        train(model, data, steps=1, batch_size=7, loss=loss)
    assert same(state(model), before)


def test_too_high_a_learning_rate_stops_with_finite_parameters():
    model = tiny.llama()
    with pytest.raises(TrainingError, match="lower the learning rate"):
        train(model, tiny.examples(), steps=200, learning_rate=900.0, optimizer="sgd", max_grad_norm=None)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be a positive whole number, found 0"),
        ({"steps": 2.5}, "steps must be a positive whole number"),
        ({"steps": 1, "epochs": 1}, "not both"),
        ({"batch_size": True}, "batch_size must be a positive whole number, found True"),
        ({"accumulation": None}, "accumulation must be a positive whole number"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number of at most 1,000, found nan"),
        ({"learning_rate": 1e30}, "learning_rate must be .* of at most 1,000"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0"),
        ({"max_grad_norm": 0}, "max_grad_norm must be a positive finite number"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"optimizer": "adamW8"}, "optimizer must be one of .*Did you mean 'adamw'"),
        ({"checkpointing": "yes"}, "checkpointing must be one of True, False, 'fit', 'reentrant'"),
        ({"seed": "a"}, "seed must be a whole number"),
        ({"seed": 10**30}, "seed must be a whole number of at least .* and of at most"),
        ({"weight_decay": 1e300}, r"weight_decay must be .* of at most 1,000, found 1e\+300"),
        ({"evaluate_every": 5}, "needs something to evaluate"),
        ({"patience": 2, "metrics": {"a": len}}, "say how often with evaluate_every"),
        ({"metrics": {"loss": len}}, "cannot be called 'loss'"),
        ({"metrics": {"accuracy": len}, "monitor": "acuracy"}, "Did you mean 'accuracy'"),
        ({"restore_best": True, "metrics": {"a": len}}, "monitor='loss' needs evaluation_data"),
        ({"evaluation_data": []}, "evaluation data holds no example"),
        ({"save_every": 0}, "save_every must be a positive whole number"),
    ],
)
def test_wrong_settings_are_named_before_anything_happens(settings, message):
    model = tiny.llama()
    before = state(model)
    with pytest.raises(PeftLabError, match=message):
        train(model, tiny.examples(), **settings)
    assert same(before, state(model))


@pytest.mark.parametrize("loss", [
    lambda model, batch: 3, lambda model, batch: model(**batch).loss, lambda model, batch: (3.0, 1),
    lambda model, batch: (model(**batch).logits, 1), lambda model, batch: (model(**batch).loss, "5"),
    lambda model, batch: (model(**batch).loss, [1, 2]), lambda model, batch: (model(**batch).loss, None),
], ids=["number", "tensor", "numbers", "many", "a text", "two counts", "no count"])  # fmt: skip
def test_a_loss_that_gives_something_else_is_told_what_to_give(loss):
    told = "loss must return .*the number of labels.*, found"
    with pytest.raises(PeftLabError, match=told):
        train(tiny.llama(), tiny.examples(4), tokenizer=tiny.tokenizer(), steps=1, loss=loss, progress=False)
    with pytest.raises(PeftLabError, match=told):
        pl.mean_loss(tiny.llama(), tiny.examples(4), pl.Collator(tiny.tokenizer()), loss=loss)


def test_a_sum_may_have_a_dimension_and_a_batch_of_ones_own_any_form():
    """A batch is what the collate gives, and only the loss has to understand it."""
    found = []
    pair = collections.namedtuple("Pair", "ids labels")
    for one, form in ((False, dict), (True, tuple), (True, list), (True, pair), (True, torch.Tensor)):

        def collate(rows, form=form):
            ids = torch.tensor([row["input_ids"][:4] for row in rows])
            both = torch.stack((ids, ids))
            forms = {dict: {"input_ids": ids, "labels": ids}, pair: pair(ids, ids), torch.Tensor: both}
            return forms[form] if form in forms else form((ids, ids))

        def loss(model, batch, one=one, form=form):
            ids, labels = batch.values() if form is dict else batch
            assert type(batch) is form
            total = model(input_ids=ids, labels=labels).loss * 3 * len(ids)
            return (total[None], torch.tensor([3 * len(ids)])) if one else (total, 3 * len(ids))

        rows = [row for row in tiny.examples(12) if len(row["input_ids"]) >= 4]
        told = {"steps": 2, "batch_size": 2, "collate": collate, "loss": loss, "progress": False}
        history = train(tiny.llama(), rows, **told)
        if form is tuple:
            assert len(train(tiny.llama(), rows, compile="layers", **told).steps) == 2
        found.append([*history.steps, pl.mean_loss(tiny.llama(), rows[:4], collate, loss=loss)])
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize("value", ["good", None, torch.ones(2), [1]])
def test_a_metric_that_gives_no_number(value):
    with pytest.raises(PeftLabError, match="The metric 'mine' must return a number, found"):
        train(tiny.llama(), tiny.examples(4), tokenizer=tiny.tokenizer(), steps=1, progress=False,
              metrics={"mine": lambda model: value})  # fmt: skip


def test_a_function_that_gives_no_folder():
    with pytest.raises(PeftLabError, match="what folder returns must be the path of a file or a folder, found 3"):
        train(tiny.llama(), tiny.examples(4), tokenizer=tiny.tokenizer(), steps=1, folder=lambda: 3, progress=False)


def test_a_model_without_values_does_not_train():
    with pytest.raises(PeftLabError, match="on the meta device and have no values"):
        train(tiny.llama().to("meta"), tiny.examples(4), tokenizer=tiny.tokenizer(), steps=1, progress=False)


def test_no_data():
    with pytest.raises(PeftLabError, match="training data holds no example"):
        train(tiny.llama(), [], steps=1)
