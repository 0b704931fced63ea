"""The next batch is made beside the backward pass, in another thread, and clipping calls no more than it needs."""

import threading
from collections.abc import Mapping

import pytest
import tiny
import torch

import peftlab as pl
from peftlab import errors
from peftlab.training import ahead
from peftlab.training.ahead import MOST_MOVED_AHEAD as MOST
from peftlab.training.ahead import Batches
from peftlab.training.encoding import Collator
from peftlab.training.inputs import Examples, Inputs
from peftlab.training.ranks import Ranks
from peftlab.training.run import Run
from peftlab.training.schedule import DataOrder


def noted_threads(monkeypatch):
    """The names of the threads in which batches are made, in order."""
    names, make = [], Batches.make
    monkeypatch.setattr(
        Batches, "make", lambda self, part: names.append(threading.current_thread().name) or make(self, part)
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
    monkeypatch.setattr(Batches, "begin", lambda self, part: None)
    again, expected = trained(**settings)
    assert history == again
    assert all(torch.equal(value, expected[name]) for name, value in values.items())


def test_a_collate_of_ones_own_stays_in_the_main_thread(monkeypatch):
    names = noted_threads(monkeypatch)
    trained(steps=3, batch_size=2, collate=pl.Collator())
    assert names == ["MainThread"] * 3


class Drawn(Mapping):
    """An example that is another one each time it is read."""

    def __getitem__(self, name):
        return torch.randint(1, 20, (6,)).tolist()

    def __iter__(self):
        return iter(("input_ids", "labels"))

    def __len__(self):
        return 2


def test_examples_that_draw_random_numbers_are_read_in_their_turn(monkeypatch):
    names = noted_threads(monkeypatch)
    model = pl.attach(tiny.llama(), pl.LoRAConfig(r=2))
    pl.train(model, [Drawn() for _ in range(4)], batch_size=2, steps=3, progress=False)
    assert names == ["MainThread"] * 3


def test_what_fails_in_the_other_thread_is_done_again_in_its_turn(monkeypatch):
    """There it may have been for want of memory, which a backward pass gives back."""
    expected, failed, own = trained(steps=3, batch_size=2, fast=False), [], Run._moved

    def moved(self, batch):
        if threading.current_thread() is not threading.main_thread():
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        return own(self, batch)

    monkeypatch.setattr(Run, "_moved", moved)
    found = trained(steps=3, batch_size=2, fast=False)
    assert len(failed) == 2 and found[0] == expected[0]
    assert all(torch.equal(value, expected[1][name]) for name, value in found[1].items())


@pytest.mark.parametrize(
    ("device", "most", "fast", "moved"),
    [
        ("cpu", MOST, False, True),
        ("cpu", 100, False, False),
        ("mps", MOST, False, False),
        ("cpu", MOST, True, False),
    ],
)
def test_a_batch_is_moved_there_if_it_is_small_and_the_device_allows_it(device, most, fast, moved, monkeypatch):
    monkeypatch.setattr(ahead, "MOST_MOVED_AHEAD", most)
    # it would start CUDA for a model on the CPU
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: pytest.fail("a stream was asked for"))
    model = tiny.llama()
    inputs = Inputs(model, Collator())
    data = Examples(tiny.examples(4), inputs, "data")
    batches = Batches(data, inputs, dict, torch.device(device), Ranks(model))
    batches.read_fast = (lambda batch: None) if fast else None
    with batches.thread():
        batches.begin([0, 1])
        ahead_of_time = batches.get([0, 1])
        in_turn = batches.get([0, 1])
    assert ahead_of_time.on_device == moved and not in_turn.on_device
    assert torch.equal(ahead_of_time.batch["input_ids"], in_turn.batch["input_ids"])


def test_a_mistake_in_the_other_thread_is_raised(monkeypatch):
    own = Run._moved

    def moved(self, batch):
        if threading.current_thread() is not threading.main_thread():
            raise ZeroDivisionError("a mistake")
        return own(self, batch)

    monkeypatch.setattr(Run, "_moved", moved)
    with pytest.raises(ZeroDivisionError, match="a mistake"):
        trained(steps=3, batch_size=2, fast=False)


@pytest.mark.filterwarnings("ignore:in MainThread")
def test_a_warning_of_the_other_thread_names_the_users_line(monkeypatch):
    # a function that counts as one of the package, for warnings name the last line outside it
    inside = {"__name__": "peftlab.inside", "warn": errors.warn, "make": Batches.make, "threading": threading}
    exec("def noted(self, part): warn(f'in {threading.current_thread().name}'); return make(self, part)", inside)
    monkeypatch.setattr(Batches, "make", inside["noted"])
    with pytest.warns(UserWarning, match="in peftlab-batches") as told:
        trained(steps=2, batch_size=2, fast=False)
    (there,) = [one for one in told if "peftlab-batches" in str(one.message)]
    assert there.filename == __file__


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
