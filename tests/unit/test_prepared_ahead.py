"""The next batch is made beside the backward pass, in another thread, and clipping calls no more than it needs."""

import threading

import pytest
import tiny
import torch

import peftlab as pl
from peftlab.training.run import Run
from peftlab.training.schedule import DataOrder


def noted_threads(monkeypatch):
    """The names of the threads in which batches are made, in order."""
    names, prepare = [], Run._prepare
    monkeypatch.setattr(
        Run, "_prepare", lambda self, part: names.append(threading.current_thread().name) or prepare(self, part)
    )
    return names


def trained(**settings):
    torch.manual_seed(0)
    model = pl.attach(tiny.llama(), pl.LoRAConfig(r=2))
    history = pl.train(model, tiny.examples(), learning_rate=0.01, progress=False, **settings)
    return history, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("more", [{"fast": False}, {"fast": True}, {"accumulation": 2, "fast": False}])
def test_the_next_batch_is_made_in_another_thread_and_is_the_same(more, monkeypatch):
    settings = {"steps": 4, "batch_size": 2, **more}
    names = noted_threads(monkeypatch)
    history, values = trained(**settings)
    parts = settings.get("accumulation", 1)
    assert len(names) == 4 * parts and names[0] == "MainThread"
    assert all(name.startswith("peftlab-batches") for name in names[1:])
    assert not any(thread.name.startswith("peftlab-batches") for thread in threading.enumerate())
    monkeypatch.setattr(Run, "_prepare_ahead", lambda self, rest: None)
    again, expected = trained(**settings)
    assert history == again
    assert all(torch.equal(value, expected[name]) for name, value in values.items())


def test_a_collate_of_ones_own_stays_in_the_main_thread(monkeypatch):
    names = noted_threads(monkeypatch)
    trained(steps=3, batch_size=2, collate=pl.Collator())
    assert names == ["MainThread"] * 3


def test_a_batch_with_a_fault_says_so_in_its_own_step():
    model, done = pl.attach(tiny.llama(), pl.LoRAConfig(r=2)), []
    rows = tiny.examples(3)
    rows[2] = {"input_ids": [1, 99], "labels": [1, 2]}
    order = DataOrder(3, 1, 3, 0).at
    place = next(step for step in range(3) if order(step) == [2])
    with pytest.raises(pl.PeftLabError, match="99"):
        pl.train(model, rows, epochs=1, batch_size=1, progress=False, callback=lambda step, *_: done.append(step))
    assert len(done) == place


def test_clipping_gives_torchs_bits(monkeypatch):
    found = []
    for alike in (True, False):
        if not alike:  # then torch's own function runs
            monkeypatch.setattr(Run, "alike", property(lambda self: False, lambda self, value: None), raising=False)
        found.append(trained(steps=3, batch_size=2, max_grad_norm=0.05, fast=False))
    (history, values), (again, expected) = found
    assert history == again and min(row["grad_norm"] for row in history.steps) > 0.05
    assert all(torch.equal(value, expected[name]) for name, value in values.items())
