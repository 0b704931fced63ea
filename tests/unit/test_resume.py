"""A run killed at any moment goes on to the same result, to the bit; and only as the run that it was."""

import hashlib
import json
import os
import random
import signal
import time

import pytest
import resume_run
import tiny
import torch
from children import Child, one_worker
from safetensors.torch import load_file

from peftlab.errors import PeftLabError
from peftlab.settings import Settings
from peftlab.training import files, state, train
from peftlab.training.buffers import SMALL_BUFFER, Buffers
from peftlab.training.identity import data_digest, frozen_digest
from peftlab.training.ranks import Ranks
from peftlab.training.run import Run

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes, which only POSIX systems have")
TRIALS = [*range(4), *(pytest.param(trial, marks=pytest.mark.kills) for trial in range(4, 20))]


def run(folder, out, kill_after=None, die_in=None):
    """The exit status of one run: 0, or -9 when it was killed; and how long it took, in seconds."""
    began = time.monotonic()
    child = Child(resume_run.run, folder, out, die_in)
    if kill_after is not None:
        time.sleep(kill_after)
        child.kill()
    return child.status(), time.monotonic() - began


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    for name in ("warm", "run"):  # the first run waits for the warm process
        status, seconds = run(folder / name, folder / "result.json")
        assert status == 0
    return json.loads((folder / "result.json").read_text()), seconds


@posix
@one_worker
@pytest.mark.parametrize("trial", TRIALS)
def test_killed_at_a_random_moment(uninterrupted, tmp_path, trial):
    expected, seconds = uninterrupted
    draw = random.Random(trial)
    # A child that ended before the signal came proves nothing: draw again, sooner.
    for attempt in range(20):
        folder, out = tmp_path / f"run-{attempt}", tmp_path / f"result-{attempt}.json"
        status, _ = run(folder, out, kill_after=draw.uniform(0.05, 0.95) * seconds * 0.8**attempt)
        if status == -signal.SIGKILL and not out.exists():
            break
    assert status == -signal.SIGKILL and not out.exists()
    assert run(folder, out)[0] == 0
    assert json.loads(out.read_text()) == expected


@posix
@one_worker
@pytest.mark.parametrize("trial", TRIALS)
def test_killed_while_saving(uninterrupted, tmp_path, trial):
    """Killed before a random call that changes the disk: twice in a row, for a resumed run saves too."""
    expected, _ = uninterrupted
    draw = random.Random(100 + trial)
    folder, out = tmp_path / "run", tmp_path / "result.json"
    for _ in range(2):
        assert run(folder, out, die_in=draw.randrange(1, 45))[0] == -signal.SIGKILL
        assert not out.exists()
    assert run(folder, out)[0] == 0
    assert json.loads(out.read_text()) == expected
    assert [path.name for path in folder.iterdir()] == ["step-00000024"], "nothing half-written stays"


# -- what a folder accepts and refuses ---------------------------------------------------------------------------------


def begin(folder, model=None, data=None, **settings):
    values = {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "save_every": 2, **settings}
    model = tiny.llama() if model is None else model
    return train(model, data or tiny.examples(), folder=folder, **values), model


def interrupted(folder, at=4, **settings):
    """A run whose process ended right after step ``at``."""

    def stop(model, row):
        if row["step"] == at + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin(folder, callback=stop, **settings)


def test_a_finished_run_comes_back_at_once(tmp_path):
    history, model = begin(tmp_path)
    again, other = begin(tmp_path, callback=lambda *_: pytest.fail("it trained"))
    assert again == history
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd"},
        {"group_by_length": True, "epochs": 1, "steps": None},
        {"packing": True},
        {"evaluation_data": tiny.examples(3, seed=2), "evaluate_every": 1, "restore_best": True, "learning_rate": 0.1},
    ],
)
def test_resume_in_one_process(tmp_path, settings):
    expected, model = begin(None, **settings)
    interrupted(tmp_path, **settings)
    found, other = begin(tmp_path, **settings)
    assert found.best is None or found.best["step"] <= 4, "the best values must come from before the interruption"
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_running_statistics_are_part_of_the_state(tmp_path):
    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))

    def loss(model, batch):
        return (model(batch["x"]).squeeze(1) - batch["y"]).square().sum(), len(batch["y"])

    data = [{"x": [float(i), 1.0], "y": float(i % 3)} for i in range(12)]
    _, expected = begin(None, model=model(), data=data, loss=loss)
    interrupted(tmp_path, model=model(), data=data, loss=loss)
    _, found = begin(tmp_path, model=model(), data=data, loss=loss)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


def test_a_run_killed_before_its_first_save_starts_from_the_same_values(tmp_path):
    """What was drawn for a new adapter is on disk from the start, so nobody has to draw it the same again."""
    expected, model = begin(None)
    interrupted(tmp_path, at=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000"]
    found, other = begin(tmp_path, model=tiny.llama(seed=99), save_every=5)
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def other_model():
    model = tiny.llama()
    model.model.embed_tokens.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.02}, r"learning_rate was 0.01 and is 0.02"),
        ({"steps": 8}, "steps was 6 and is 8"),
        ({"seed": 1, "batch_size": 2}, "batch_size was 4 and is 2; seed was 0 and is 1"),
        ({"metrics": {"a": len}}, r"metrics was \[\] and is \['a'\]"),
        ({"data": tiny.examples(25)}, r"the training data is different \(24 examples then, 25 now\)"),
        ({"data": tiny.examples(seed=5)}, r"the training data is different\. Make"),
        ({"evaluation_data": tiny.examples(2)}, r"the evaluation data is different \(0 examples then, 2 now\)"),
        ({"model": other_model()}, r"1 trainable parameters differ, the first being model.embed_tokens.weight \(float"),
    ],
)
def test_another_run_is_refused_by_name(tmp_path, change, message):
    interrupted(tmp_path)
    model = change.pop("model", None) or tiny.llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PeftLabError, match=f"holds another run: .*{message}"):
        begin(tmp_path, model=model, **change)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_base_is_refused(tmp_path):
    def model(seed):
        model = tiny.llama(seed=seed).requires_grad_(False)
        model.lm_head.weight.requires_grad_(True)
        return model

    interrupted(tmp_path, model=model(0))
    with pytest.raises(PeftLabError, match="the frozen base model is a different one"):
        begin(tmp_path, model=model(1))


def test_a_run_is_not_overwritten(tmp_path):
    interrupted(tmp_path)
    with pytest.raises(PeftLabError, match=r"holds a run \(step-00000004\).*resume=True"):
        begin(tmp_path, resume=False)
    begin(tmp_path / "new", resume=False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / files.TENSORS).write_bytes(b"x" * 50), "damaged: its SHA-256"),
        (lambda folder: (folder / files.TENSORS).unlink(), "cannot be read"),
        (lambda folder: (folder / files.RECORD).write_text('{"format": 1'), "cannot be read"),
        (lambda folder: (folder / files.RECORD).write_text('{"format": 99}'), "not of format 1"),
        (lambda folder: (folder / files.RECORD).write_text("[]"), "not of format 1"),
    ],
)
def test_damaged_checkpoints_are_named(tmp_path, damage, message):
    interrupted(tmp_path)
    damage(tmp_path / "step-00000004")
    with pytest.raises(PeftLabError, match=f"step-00000004.*{message}|{message}.*step-00000004"):
        begin(tmp_path)


def test_a_failed_save_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    real = files.save_file

    def full_disk(tensors, path):
        if (tmp_path / "run" / "step-00000002").exists():
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(PeftLabError, match="step 4 cannot be written into .*No space left"):
        begin(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000002"]


def test_a_checkpoint_holds_trained_values_alone(tmp_path):
    model = tiny.llama().requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    begin(tmp_path, model=model)
    assert sorted(load_file(tmp_path / "step-00000006" / files.TENSORS)) == [
        "optimizer/lm_head.weight/exp_avg",
        "optimizer/lm_head.weight/exp_avg_sq",
        "optimizer/lm_head.weight/step",
        "trainable/lm_head.weight",
    ]


# -- how a checkpoint is written ---------------------------------------------------------------------------------------


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_forced_to_the_disk_before_and_after_it_takes_its_name(tmp_path, monkeypatch):
    folder, seen = tmp_path / "a" / "run", []  # neither folder exists yet
    monkeypatch.setattr(files, "sync", lambda place: seen.append((place.name.rstrip("0123456789"), names(place))))
    files.write(folder, 3, {}, {})
    assert seen == [(".writing-", [files.RECORD, files.TENSORS]), ("run", ["step-00000003"])]


def test_two_processes_may_write_the_same_step(tmp_path):
    files.write(tmp_path, 3, {"x": torch.ones(2)}, {"by": 1})
    files.write(tmp_path, 3, {"x": torch.ones(2)}, {"by": 2})
    record, tensors = files.read(files.newest(tmp_path))
    assert names(tmp_path) == ["step-00000003"] and record["by"] == 1 and tensors["x"].tolist() == [1, 1]


def test_another_folder_of_that_name_keeps_its_files_and_holds_the_checkpoint(tmp_path):
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000003" / "mine").write_text("mine")
    files.write(tmp_path, 3, {"x": torch.ones(2)}, {})
    assert names(tmp_path) == ["step-00000003"], "the draft is gone"
    assert names(tmp_path / "step-00000003") == sorted(["mine", files.RECORD, files.TENSORS])
    assert files.read(tmp_path / "step-00000003")[1]["x"].tolist() == [1, 1]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PeftLabError, match="step 3 cannot be written into .*file"):
        files.write(tmp_path / "file", 3, {}, {})


def test_a_draft_that_cannot_be_removed_stops_no_run(tmp_path, monkeypatch):
    (tmp_path / ".writing-7").mkdir()

    def refuse(*args, **kwargs):
        raise PermissionError("not yours")

    with monkeypatch.context() as locked:
        locked.setattr(os, "rmdir", refuse)
        files.clean(tmp_path)
    assert names(tmp_path) == [".writing-7"]
    files.clean(tmp_path)
    assert names(tmp_path) == []


def run_of(rank, steps=6):
    """A run as the process of this number has it, and what its folder holds each time that it waits for the others."""
    model = tiny.llama()
    ranks, waits = Ranks(model), []
    ranks.rank, ranks.first = rank, rank == 0
    ranks.wait = lambda: waits.append(names(ranks.folder) if ranks.folder.exists() else None)
    run = Run(model, tiny.examples(), Settings(steps=steps, precision="fp32"), device=torch.device("cpu"), ranks=ranks)
    return run, waits


def test_the_first_process_writes_and_the_others_wait(tmp_path):
    """Nobody writes before all have looked, and nobody goes on before the checkpoint is there and read."""
    for rank, after in ((1, None), (0, ["step-00000000"])):
        run, waits = run_of(rank)
        run.ranks.folder = tmp_path / "run"
        state.resume_or_start(run, run.ranks.folder, resume=False)
        assert waits == [None, after], "once when all have looked, once when the first has written"
    for rank in (0, 1):
        run, waits = run_of(rank)
        run.ranks.folder = tmp_path / "run"
        state.resume_or_start(run, run.ranks.folder, resume=True)
        assert waits == [["step-00000000"]] * 2, "once when all have looked, once when all have read"


# -- what is part of the state, and what a run is known by -------------------------------------------------------------


def test_small_buffers_are_stored_and_large_ones_once_they_are_written_to():
    model = torch.nn.Module()
    for name, size in (("small", SMALL_BUFFER), ("large", SMALL_BUFFER + 1), ("written", SMALL_BUFFER + 1)):
        model.register_buffer(name, torch.zeros(size))
    with torch.inference_mode():
        model.register_buffer("counts_no_writes", torch.zeros(SMALL_BUFFER + 1))
    buffers = Buffers(model)
    assert set(buffers.hold()) == {"small"}
    assert set(buffers.to_store()) == {"small"}
    model.written[3] = 5.0
    assert set(buffers.to_store()) == {"small", "written"}


def test_a_frozen_base_is_known_by_sixteen_elements_of_each_parameter():
    """By these very elements: else a folder that an earlier release wrote would hold another run."""
    model = torch.nn.Linear(8, 8, bias=False).requires_grad_(False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(64.0).view(8, 8))
    text = f"weight (8, 8) torch.float32 {[4.0 * i for i in range(16)]}"
    assert frozen_digest(model) == hashlib.sha256(text.encode()).hexdigest()


def test_examples_are_the_same_whatever_the_order_of_their_columns():
    one, other = [{"input_ids": [1, 2], "labels": [1, 2]}], [{"labels": [1, 2], "input_ids": [1, 2]}]
    assert data_digest(one) == data_digest(other) != data_digest([{"input_ids": [1, 2], "labels": [2, 1]}])
