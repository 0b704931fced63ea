"""AdaLoRA by hand: the budget, the masks, the loop and its resuming; and what it refuses."""

import json
import warnings
from dataclasses import replace

import pytest
import tiny
import torch
from nets import Net
from safetensors.torch import load_file, save_file

import peftlab as pl
from peftlab.adapters.key_table import placed
from peftlab.settings import Settings
from peftlab.training import run as run_of_training
from peftlab.training.masters import WithMasters
from peftlab.training.ranks import Ranks
from peftlab.training.run import Run

SHORT = dict(init_r=4, target_r=2, target_modules=["q_proj", "up_proj"])
SCALED = dict(batch_size=4, learning_rate=1e-2, max_grad_norm=None)
RUN = dict(steps=10, batch_size=4, learning_rate=1e-2, progress=False)


def model(dtype=torch.float64, adapter_dtype=None, **settings):
    torch.manual_seed(3)
    return pl.attach(
        tiny.llama(seed=0, dtype=dtype), pl.AdaLoRAConfig(**{**SHORT, **settings}), adapter_dtype=adapter_dtype
    )


def train(one, **settings):
    return pl.train(one, tiny.examples(), **{**RUN, **settings})


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def parts(one):
    return [part for _, _, part in placed(one, "default")]


def test_the_formula_by_hand():
    net = pl.attach(Net(), pl.AdaLoRAConfig(init_r=3, alpha=6, target_modules=["head"], init="random"))
    (part,) = parts(net)
    x = torch.randn(5, net.head.in_features, dtype=torch.float64)
    p, e, q = part.lora_B, part.lora_E, part.lora_A
    by_hand = 6 / (3 + 1e-5) * (x @ q.T @ torch.diag(e.flatten()) @ p.T)
    with pl.disabled(net):
        plain = net.head(x)
    assert torch.allclose(net.head(x), plain + by_hand, rtol=1e-12)
    assert torch.allclose(part.delta(), 6 / (3 + 1e-5) * p @ torch.diag(e.flatten()) @ q, rtol=1e-12)


def test_it_starts_as_the_base_and_with_matrices_of_size_two_hundredths():
    one = pl.attach(tiny.llama(hidden_size=64), pl.AdaLoRAConfig())
    assert all(part.lora_E.eq(0).all() and abs(part.lora_A.std() - 0.02) < 0.004 for part in parts(one))
    ids = torch.tensor([[1, 2, 3]])
    with pl.disabled(one):
        plain = one(ids).logits
    assert torch.equal(one(ids).logits, plain)


def test_the_budget_falls_as_a_cube():
    config = pl.AdaLoRAConfig(init_r=12, target_r=4, total_step=100, tinit=10, tfinal=30)
    found = [config.budget(step, 24, 2) for step in (1, 10, 11, 40, 69, 70, 99)]
    assert found == [24, 24, int(8 + 16 * (59 / 60) ** 3), 8 + 16 // 8, 8, 8, 8]


def test_a_run_chooses_its_schedule_and_says_so():
    one = model()
    history = train(one, steps=20)
    assert "rank of 4 to 2, with total_step=20, tinit=2, tfinal=10" in history.schedule
    assert "AdaLoRALinear" in history.path
    assert pl.attached(one)["default"].total_step == 20
    ranks = pl.adalora_ranks(one)
    assert sum(ranks.values()) == 2 * len(ranks)
    assert not any(part.averages for part in parts(one))  # they are of no use after the last allocation
    assert all("added_loss" in row for row in history.steps)
    assert "schedule" not in train(pl.attach(tiny.llama(), pl.LoRAConfig(r=2))).schedule


def test_ranks_fall_in_the_middle_of_the_run_only():
    sums = []
    train(model(), steps=20, callback=lambda one, row: sums.append(sum(pl.adalora_ranks(one).values())))
    assert sums[:2] == [16, 16] and set(sums[9:]) == {8}
    assert sums == sorted(sums, reverse=True) and len(set(sums)) > 4


@pytest.mark.parametrize("settings", [dict(batch_size=4, accumulation=2), dict(batch_size=8, checkpointing=True),
                                      dict(batch_size=2, accumulation=4, chunked_loss=True)])  # fmt: skip
def test_how_a_batch_is_cut_does_not_matter(settings):
    whole, cut = model(), model()
    one, other = train(whole, batch_size=8), train(cut, **settings)
    assert pl.adalora_ranks(whole) == pl.adalora_ranks(cut)
    for row, same_row in zip(one.steps, other.steps, strict=True):
        assert row["added_loss"] == pytest.approx(same_row["added_loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(same_row["grad_norm"], rel=1e-5)


def test_train_makes_the_steps_of_a_loop_by_hand():
    one, other = model(total_step=6, tinit=1, tfinal=2), model(total_step=6, tinit=1, tfinal=2)
    row = tiny.examples()[0]
    pl.train(one, [row], steps=6, batch_size=1, learning_rate=1e-2, schedule="constant", max_grad_norm=None,
             progress=False)  # fmt: skip
    batch = {name: torch.tensor([value]) for name, value in row.items()}
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for step in range(1, 7):
        (other(**batch).loss + pl.added_loss(other)).backward()
        optimizer.step()
        pl.after_step(other, step)
        optimizer.zero_grad()
    assert pl.adalora_ranks(one) == pl.adalora_ranks(other) and set(pl.adalora_ranks(one).values()) != {4}
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-7)


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [1, 4, 5, 6, 9])
def test_a_killed_run_goes_on_to_the_bit(at, tmp_path):
    """Before, in and after the steps in which ranks are pruned, and where e has come back since."""
    settings = dict(total_step=10, tinit=2, tfinal=3, deltaT=2)
    whole = model(**settings)
    expected = train(whole)

    def stop(one, row):
        if row["step"] == at + 1:
            raise Stop

    with pytest.raises(Stop):
        train(model(**settings), folder=tmp_path, save_every=at, callback=stop)
    again = model(**settings)
    assert train(again, folder=tmp_path, save_every=at) == expected
    assert same(again, whole) and pl.adalora_ranks(again) == pl.adalora_ranks(whole)


def test_a_folder_of_another_schedule_is_refused(tmp_path):
    train(model(tinit=2), folder=tmp_path)
    with pytest.raises(pl.PeftLabError, match="schedule of the adapter was .*tinit=2.* and is .*tinit=3"):
        train(model(tinit=3), folder=tmp_path)


def test_masters_of_an_adapter_in_sixteen_bits_are_pruned_too():
    one = model(torch.float32, adapter_dtype="bf16", total_step=6, tinit=1, tfinal=3)
    train(one)
    for part in parts(one):
        assert part.lora_E.dtype == torch.bfloat16 and part.lora_E.flatten()[~part.kept].eq(0).all()
    assert sum(pl.adalora_ranks(one).values()) == 8


def test_a_master_follows_only_where_its_parameter_was_changed():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16))
    optimizer = WithMasters([{"params": [p]}], lambda groups: torch.optim.SGD(groups, lr=0.25))
    p.grad = torch.tensor([0.001, 0.001, 0.001], dtype=torch.bfloat16)
    optimizer.step()
    before = optimizer.masters[p].clone()
    with torch.no_grad():
        p[1] = 0
    optimizer.follow([p])
    assert optimizer.masters[p][1] == 0 and torch.equal(optimizer.masters[p][::2], before[::2])
    assert not torch.equal(before.bfloat16().float(), before)


def test_an_estimate_of_our_own_training_has_the_averages():
    peft, ours = (
        pl.memory.estimate("smollm2-135m", "adalora", batch=1, sequence=64, precision="fp32", library=library)
        for library in ("peft", "peftlab")
    )
    trained = pl.memory.count("smollm2-135m", "adalora").trainable
    assert ours.optimizer - peft.optimizer == pytest.approx(8 * trained, rel=0.03)


def test_under_a_loss_scale_the_term_is_scaled_too_and_an_overflow_does_not_stop_pruning():
    exact, run = (
        Run(model(torch.float32, total_step=4), tiny.examples(), Settings(steps=4, precision=precision, **SCALED),
            device=torch.device("cpu"), ranks=Ranks(torch.nn.Module()))
        for precision in ("fp32", "fp16")
    )  # fmt: skip
    run.scaler._lazy_init_scale_growth_tracker(run.device)
    expected = exact.update()
    for scale in (2.0**10, 2.0**30, 2.0**10, 2.0**30):
        run.scaler._scale.fill_(scale)
        found = run.update()
        assert (found["grad_norm"] is None) == (scale == 2.0**30)
        if run.step == 1:
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
            assert found["added_loss"] == pytest.approx(expected["added_loss"], rel=1e-6)
        assert all(one.isfinite().all() for part in parts(run.model) for two in part.averages.values() for one in two)
        run.clear()
    assert sum(pl.adalora_ranks(run.model).values()) == 8


def test_an_overflow_does_not_lose_the_last_allocation():
    one = model(total_step=4)
    for step in (1, 2, 3):
        pl.added_loss(one).backward()
        pl.after_step(one, step)
    for parameter in one.parameters():
        parameter.grad = None
    config = pl.attached(one)["default"]
    config.after_step(placed(one, "default"), 4, usable=False)
    assert sum(pl.adalora_ranks(one).values()) == 8


def test_a_loaded_adapter_trains_on_and_keeps_what_was_pruned(tmp_path):
    one = model()
    train(one)
    pl.save_adapter(one, tmp_path / "one")
    loaded = pl.load_adapter(tiny.llama(seed=0, dtype=torch.float64), tmp_path / "one", trainable=True)
    before = pl.adalora_ranks(loaded)
    assert before == pl.adalora_ranks(one) and all(len(part.lora_A) == rank for part, rank in zip(
        parts(loaded), before.values(), strict=True))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(loaded)
    assert pl.adalora_ranks(loaded) == before and not torch.equal(parts(loaded)[0].lora_A, parts(one)[0].lora_A)
    pl.save_adapter(loaded, tmp_path / "two")
    fields = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("one", "two")]
    assert fields[0]["rank_pattern"] == fields[1]["rank_pattern"]
    ids = torch.tensor([[1, 2, 3]])
    again = pl.load_adapter(tiny.llama(seed=0, dtype=torch.float64), tmp_path / "two")
    assert torch.equal(again(ids).logits, loaded.eval()(ids).logits)


def test_a_second_pruning_is_counted_from_the_first(tmp_path):
    """The masks in a folder have `init_r` entries, of which only those still there can go."""
    one = model(target_r=3)
    train(one)
    pl.save_adapter(one, tmp_path / "one")
    fields = json.loads((tmp_path / "one/adapter_config.json").read_text())
    loaded = pl.load_adapter(tiny.llama(seed=0, dtype=torch.float64), tmp_path / "one", trainable=True)
    config = replace(pl.attached(loaded)["default"], target_r=1)
    loaded._peftlab.configs["default"] = config
    train(loaded)
    assert sum(pl.adalora_ranks(loaded).values()) == 4
    pl.save_adapter(loaded, tmp_path / "two")
    after = json.loads((tmp_path / "two/adapter_config.json").read_text())["rank_pattern"]
    assert sum(map(sum, after.values())) == 4
    for path, mask in fields["rank_pattern"].items():
        assert len(after[path]) == 4 and not any(now and not was for now, was in zip(after[path], mask, strict=True))


def test_a_second_run_does_not_bring_back_what_the_first_pruned():
    one = model()
    train(one)
    first = pl.adalora_ranks(one)
    train(one)
    assert pl.adalora_ranks(one) == first


def test_ranks_are_pruned_where_a_gpu_could_skip_a_step_by_itself(monkeypatch):
    monkeypatch.setattr(run_of_training, "skips_when_told", lambda optimizer, device: True)
    one = model()
    train(one)
    assert sum(pl.adalora_ranks(one).values()) == 8


def test_each_run_chooses_its_own_schedule():
    """A trial of two steps says nothing about the run that follows."""
    one = model(tfinal=1)
    train(one, steps=2)
    train(one, steps=20)
    config = pl.attached(one)["default"]
    assert (config.total_step, config.tinit, config.tfinal) == (20, 2, 1)
    pl.detach(one)
    pl.attach(one, pl.AdaLoRAConfig(**SHORT, total_step=7))
    train(one)
    assert pl.attached(one)["default"].total_step == 7


def test_a_schedule_with_half_a_step_loads(tmp_path):
    pl.save_adapter(model(), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "total_step": 37.5, "tinit": 2.0}))
    weights = tmp_path / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt"})
    config = pl.attached(pl.load_adapter(tiny.llama(dtype=torch.float64), tmp_path))["default"]
    assert (config.total_step, config.tinit) == (37, 2)


def test_fewer_ranks_than_the_target_stay():
    left = {f"layers.{block}.self_attn.q_proj": [False] * 3 + [block == 1] for block in range(2)}
    one = pl.attach(tiny.llama(), pl.AdaLoRAConfig(init_r=4, target_r=2, target_modules=["q_proj"], rank_pattern=left))
    train(one)
    assert list(pl.adalora_ranks(one).values()) == [0, 1]


def test_equal_ranks_at_start_and_end_prune_nothing():
    one = model(target_r=4)
    train(one)
    assert set(pl.adalora_ranks(one).values()) == {4}


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs(steps):
    one = model()
    train(one, steps=steps)
    assert sum(pl.adalora_ranks(one).values()) == 8


def test_without_the_term_nothing_is_added():
    one = model(orth_reg_weight=0)
    assert pl.added_loss(one) == 0 and train(one, steps=2).steps[0]["added_loss"] == 0
    frozen = pl.attach(tiny.llama(), pl.LoRAConfig(r=2))
    assert pl.added_loss(frozen) == 0 and pl.after_step(frozen, 1) is None


def test_only_adapters_that_run_and_train_take_part():
    one = model()
    assert pl.added_loss(one) > 0
    pl.activate(one, "default", trainable=False)
    assert pl.added_loss(one) == 0
    pl.activate(one, "default", trainable=True)
    pl.attach(one, pl.LoRAConfig(r=2), name="other")
    assert pl.added_loss(one) == 0
    pl.activate(one, "default")
    with pl.disabled(one):
        assert pl.added_loss(one) == 0


@pytest.mark.parametrize(("settings", "message"), [
    (dict(total_step=10, tinit=5, tfinal=5), "leave no step of total_step"),
    (dict(total_step=0), "total_step must be"), (dict(beta1=1), "beta1"), (dict(beta2=0), "beta2"),
    (dict(deltaT=0), "deltaT"), (dict(orth_reg_weight=-1), "orth_reg_weight"), (dict(init_r=0), "init_r"),
    (dict(rank_pattern={"q_proj": [True]}), "for each of the 4 triplets"),
    (dict(rank_pattern={"q_proj": "TTTT"}), "each a list, each True or False"), (dict(tinit=1.5), "tinit"),
])  # fmt: skip
def test_wrong_settings(settings, message):
    with pytest.raises(pl.PeftLabError, match=message):
        pl.AdaLoRAConfig(**{**SHORT, **settings})


@pytest.mark.parametrize(("settings", "message"), [
    (dict(target_r=5), "target_r is 5 and init_r is 4"),
    (dict(tinit=6, tfinal=4), "The run has 10 steps, and tinit .6. and tfinal .4. leave none"),
])  # fmt: skip
def test_a_run_that_cannot_prune_is_refused(settings, message):
    with pytest.raises(pl.PeftLabError, match=message):
        train(model(**settings))


def test_a_run_that_ends_too_early_is_told():
    with pytest.warns(UserWarning, match="The run has 10 steps, and AdaLoRA would prune until step 30"):
        train(model(total_step=40, tfinal=10))


def test_a_loop_without_a_schedule_or_without_gradients_is_told():
    with pytest.raises(pl.PeftLabError, match="needs total_step"):
        pl.after_step(model(), 1)
    with pytest.raises(pl.PeftLabError, match="before zero_grad"):
        pl.after_step(model(total_step=3), 1)


@pytest.mark.parametrize(("target", "kind"), [("embed_tokens", "Embedding"), ("mlp", "MLP")])
def test_other_layers_are_refused(target, kind):
    with pytest.raises(pl.PeftLabError, match=f"{target} is a .*{kind}; AdaLoRA stands on Linear, Conv1D and Conv2d"):
        pl.attach(tiny.llama(), pl.AdaLoRAConfig(target_modules=[target]))


def test_ranks_of_another_method():
    with pytest.raises(pl.PeftLabError, match="is of the method lora"):
        pl.adalora_ranks(pl.attach(tiny.llama(), pl.LoRAConfig(r=2)))
