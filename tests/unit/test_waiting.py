"""What lets the CPU run ahead of a GPU: results that are read a step later, and labels that are known on the CPU."""

import pytest
import tiny
import torch

import peftlab as pl
from peftlab.bench.loop import loop_pairs
from peftlab.training import run
from peftlab.training.encoding import Collator
from peftlab.training.inputs import Examples, Inputs
from peftlab.training.labels import NOTE, readable
from peftlab.training.losses import causal_lm_loss
from peftlab.training.optimizers import OPTIMIZERS
from peftlab.training.schedule import seed_everything


@pytest.fixture
def fused(monkeypatch):
    """AdamW in torch's fused form, which also runs on a CPU."""
    monkeypatch.setitem(OPTIMIZERS, "adamw", lambda groups, lr, device: torch.optim.AdamW(groups, lr=lr, fused=True))


@pytest.fixture
def late(fused, monkeypatch):
    """Read the numbers of a step one step later, as on a GPU."""
    monkeypatch.setattr(run, "skips_when_told", lambda optimizer, device: optimizer.defaults["fused"])


def trained(adapter_dtype="fp32", wrong=None, **settings):
    """The history, the trained values, the error and the number of forward passes; step `wrong` has no finite loss."""
    model, calls = tiny.llama(), []
    torch.manual_seed(7)
    pl.attach(model, pl.LoRAConfig(r=2, target_modules=["q_proj"], dropout=0.1), adapter_dtype=adapter_dtype)

    def loss(model, batch):
        calls.append(1)
        total, count = causal_lm_loss(model, batch)
        return total * (float("nan") if len(calls) == wrong else 1), count

    settings = {"steps": 8, "batch_size": 4, "learning_rate": 0.05, "schedule": "constant", "loss": loss} | settings
    history = error = None
    try:
        history = pl.train(model, tiny.examples(), progress=False, **settings)
    except pl.TrainingError as raised:
        error = str(raised)
    return history, [p.detach().clone() for p in model.parameters() if p.requires_grad], error, len(calls)


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- numbers that are read later ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter_dtype", ["fp32", "bf16"])
def test_reading_later_changes_nothing(fused, monkeypatch, tmp_path, adapter_dtype):
    settings = {"adapter_dtype": adapter_dtype, "evaluation_data": tiny.examples(8), "evaluate_every": 3}
    now, expected, *_ = trained(**settings)
    monkeypatch.setattr(run, "skips_when_told", lambda optimizer, device: True)
    later, found, *_ = trained(**settings, folder=tmp_path, save_every=2)
    assert later == now and [row["step"] for row in later.steps] == list(range(1, 9))
    assert same(found, expected)


def test_a_wrong_step_leaves_parameters_and_history_of_the_step_before(late):
    _, expected, _, _ = trained(steps=3)
    history, found, error, calls = trained(wrong=4)
    assert error.startswith("Step 4 of 8: the loss is nan") and "keeps its parameters of step 3" in error
    assert calls == 5, "it was read when the next step had begun"
    assert same(found, expected)


def test_a_wrong_last_step_is_found_too(late):
    assert trained(wrong=8)[2].startswith("Step 8 of 8: the loss is nan")


def test_a_callback_sees_the_numbers_of_its_own_step(late):
    seen = []
    history, *_ = trained(callback=lambda model, row: seen.append(dict(row)))
    assert seen == history.steps


def test_what_is_wrong_first_is_said_first(late):
    """Step 5 cannot be made, and step 4 turns out to have been wrong."""
    calls = []

    def loss(model, batch):
        calls.append(1)
        total, count = causal_lm_loss(model, batch)
        return total.detach() if len(calls) == 5 else total * (float("nan") if len(calls) == 4 else 1), count

    assert trained(loss=loss)[2].startswith("Step 4 of 8")


# -- labels ------------------------------------------------------------------------------------------------------------


def test_labels_are_read_where_they_are_known_unless_written_to():
    here, there = torch.tensor([[1, 2, -100]]), torch.tensor([[1, 2, -100]])
    setattr(there, NOTE, (here, there._version))
    assert readable(there) is here and readable(here) is here
    there[0, 0] = -100
    assert readable(there) is there


# -- the rest of a step ------------------------------------------------------------------------------------------------


def test_seeds_are_those_of_torch_and_leave_nothing_behind():
    torch.manual_seed(5)
    expected, noted = torch.rand(4), len(torch.cuda._queued_calls)
    for _ in range(3):
        seed_everything(5)
    assert torch.equal(torch.rand(4), expected)
    assert len(torch.cuda._queued_calls) == noted


def test_examples_of_a_list_become_tensors_once_and_others_are_read_each_time():
    class Drawn:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {"input_ids": torch.randint(0, 32, (50,)).tolist(), "labels": [1] * 50}

    inputs = Inputs(tiny.llama(), Collator())
    listed, drawn = (
        Examples([{"input_ids": [1, 2], "labels": [1, 2]}], inputs, "data"),
        Examples(Drawn(), inputs, "data"),
    )
    assert listed[0] is listed[0] and torch.equal(listed[0]["input_ids"], torch.tensor([1, 2]))
    assert drawn[0]["input_ids"] != drawn[0]["input_ids"]


def test_both_loops_side_by_side():
    model = pl.attach(tiny.llama(), pl.LoRAConfig(r=2))
    row = loop_pairs(model, 2, 8, steps=1, pairs=3, warm_up=1)
    assert row["pairs"] == 3 and 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert row["plain_seconds"] > 0 and row["train_seconds"] > 0
