"""What lets the CPU run ahead of a GPU: results that are read a step later, and labels that are known on the CPU."""

import threading
from collections import OrderedDict

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForSequenceClassification, masking_utils

import peftlab as pl
from peftlab.bench.loop import loop_pairs, median_interval, plain_steps, train_steps
from peftlab.core.modes import tensors_in, to_device
from peftlab.settings import Settings
from peftlab.training import chunked, run
from peftlab.training.chunked import ChunkedLoss
from peftlab.training.encoding import Collator
from peftlab.training.inputs import Examples, Inputs
from peftlab.training.labels import NOTE, readable
from peftlab.training.losses import causal_lm_loss, only_needed, without_full_mask
from peftlab.training.optimizers import OPTIMIZERS, note_wrong
from peftlab.training.positions import LOOK, counted, spared
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_that_is_not_finite_is_noted_and_stays_noted(dtype):
    for bad in (float("nan"), float("inf"), -float("inf")):
        wrong, seen = torch.zeros(()), []
        for value in (2.0, bad, 2.0):
            numbers = torch.tensor([1.0, value], dtype=dtype)
            note_wrong(wrong, numbers, torch.ones(()))
            seen.append(wrong.item())
            assert numbers[1].item() == value or value != value, "the numbers are not changed"
        assert seen == [0.0, 1.0, 1.0]


def test_all_tensors_of_a_batch_move_and_nothing_else_changes():
    """To the meta device, so that a tensor that stays behind is seen."""
    meta, one = torch.device("meta"), torch.ones(2)
    packed = torch.nn.utils.rnn.pack_sequence([one])
    batch = {"a": one, "deep": {"b": [one, 3], "c": (one, "x")}, "own": OrderedDict(d=one), "n": 5, "p": packed}
    found = to_device(batch, meta)
    assert {tensor.device for tensor in tensors_in({key: found[key] for key in ("a", "deep", "own")})} == {meta}
    assert found["deep"]["b"][1] == 3 and found["deep"]["c"][1] == "x" and found["n"] == 5
    assert type(found["deep"]["c"]) is tuple and found["own"] == {"d": found["own"]["d"]}
    assert found["p"].data.device == meta and not found["p"].batch_sizes.is_meta
    assert batch["a"] is one and to_device(one, meta).is_meta and len(list(tensors_in(batch))) == 6


# -- labels ------------------------------------------------------------------------------------------------------------


def test_labels_are_read_where_they_are_known_unless_written_to():
    here, there = torch.tensor([[1, 2, -100]]), torch.tensor([[1, 2, -100]])
    setattr(there, NOTE, (here, there._version))
    assert readable(there) is here and readable(here) is here
    there[0, 0] = -100
    assert readable(there) is there


def ids_and_labels(mask=None):
    ids = torch.arange(8).view(2, 4) % 5 + 1
    return {"input_ids": ids, "labels": ids, **({} if mask is None else {"attention_mask": torch.tensor(mask)})}


@pytest.mark.parametrize(
    ("mask", "left"),
    [(None, {"input_ids"}), ([[1] * 4] * 2, {"input_ids"}), ([[1] * 4, [1, 1, 1, 0]], {"input_ids", "attention_mask"})],
)
def test_what_a_loss_reads_on_the_cpu_does_not_go_to_a_gpu(mask, left, monkeypatch):
    seen = []
    monkeypatch.setattr(chunked, "moved", lambda batch, device: seen.append(set(batch)) or dict(batch))
    model, batch = tiny.llama(), ids_and_labels(mask)
    found = ChunkedLoss(model).moved(model, batch, torch.device("cuda"))
    assert seen == [left] and found["labels"] is batch["labels"] and set(found) == left | {"labels"}
    total, count = causal_lm_loss(model, found)
    assert (float(total.detach()), int(count)) == (float(causal_lm_loss(model, batch)[0].detach()), 6)
    ChunkedLoss(model).moved(model, batch, torch.device("cpu"))
    assert seen[1] == set(batch)


class OnGPU(torch.Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    is_cuda = True


WITH_FULL_MASK = {
    "padding alone": ({"attention_mask": torch.ones(2, 4)}, True),
    "positions, which may restart": (
        {"attention_mask": torch.ones(2, 4), "position_ids": torch.tensor([[0, 1, 0, 1]] * 2)}, False,
    ),
    "all tokens see all": ({"attention_mask": torch.ones(2, 1, 4, 4, dtype=torch.bool)}, False),
}  # fmt: skip


@pytest.mark.parametrize(("more", "left_out"), WITH_FULL_MASK.values(), ids=WITH_FULL_MASK)
def test_a_full_mask_that_says_more_than_what_is_padding_stays(more, left_out, monkeypatch):
    """Without it transformers would separate packed rows, or hide the tokens that follow: another loss on a GPU."""
    monkeypatch.setattr(chunked, "moved", lambda batch, device: dict(batch))
    model, batch = tiny.llama(), {**ids_and_labels(), **more}
    expected = causal_lm_loss(model, batch)[0]
    there = batch["attention_mask"].as_subclass(OnGPU)
    setattr(there, NOTE, (batch["attention_mask"], there._version))
    assert ("attention_mask" not in without_full_mask({**batch, "attention_mask": there})) == left_out
    found = ChunkedLoss(model).moved(model, batch, torch.device("cuda"))
    assert ("attention_mask" not in found) == left_out
    assert torch.equal(causal_lm_loss(model, found)[0], expected)


def test_other_losses_get_their_labels_and_masks(monkeypatch):
    monkeypatch.setattr(chunked, "moved", lambda batch, device: dict(batch))
    model = LlamaForSequenceClassification(tiny.llama(num_labels=2, pad_token_id=0).config)
    batch = {**ids_and_labels([[1] * 4] * 2), "labels": torch.tensor([0, 1])}
    assert set(ChunkedLoss(model).moved(model, batch, torch.device("cuda"))) == set(batch)


@pytest.mark.parametrize(("labels", "kept"), [([1, 2, 3, 4], None), ([-100, 2, 3, 4], 4), ([-100] * 4, None)])
def test_logits_before_the_first_learned_token_are_left_out(labels, kept):
    learned = torch.tensor([labels, [-100] * 4]) != -100
    assert only_needed(tiny.llama(), learned) == ({} if kept is None else {"logits_to_keep": kept})


# -- what transformers would look for on the GPU -----------------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch):
    """The positions in which transformers has looked for packed rows."""
    seen, own = [], getattr(masking_utils, LOOK)
    monkeypatch.setattr(masking_utils, LOOK, lambda positions: seen.append(positions) or own(positions))
    return seen


def test_transformers_does_not_look_for_packed_rows_where_a_model_counts_its_positions(looks):
    model, before = tiny.llama(), getattr(masking_utils, LOOK)
    model.config.use_cache = False
    expected = causal_lm_loss(model, ids_and_labels())[0]
    assert len(looks) == 1, "outside a run it looks"
    with spared():
        with spared():
            pass
        assert torch.equal(causal_lm_loss(model, ids_and_labels())[0], expected) and len(looks) == 1
        model(**ids_and_labels())
        assert len(looks) == 2, "a call of somebody else's"
        packed = torch.tensor([[0, 1, 0, 1]] * 2)
        apart = causal_lm_loss(model, {**ids_and_labels(), "position_ids": packed})[0]
        assert len(looks) == 3 and not torch.equal(apart, expected)

        def elsewhere():
            model(**ids_and_labels())

        with counted(ids_and_labels()):
            other = threading.Thread(target=elsewhere)
            other.start()
            other.join()
        assert len(looks) == 4, "what this thread knows is said of its own batch"
    assert getattr(masking_utils, LOOK) is before


def test_what_others_put_around_it_meanwhile_stays(looks):
    before = getattr(masking_utils, LOOK)
    with spared():
        ours = getattr(masking_utils, LOOK)
        masking_utils.find_packed_sequence_indices = theirs = lambda positions: ours(positions)
    assert getattr(masking_utils, LOOK) is theirs and theirs(torch.tensor([[0, 1, 0]])).tolist() == [[0, 0, 1]]
    masking_utils.find_packed_sequence_indices = before


def test_a_run_is_spared_the_look(looks):
    model = pl.attach(tiny.llama(), pl.LoRAConfig(r=2))

    def collate(examples):
        rows = torch.tensor([row["input_ids"][:6] for row in examples])
        return {"input_ids": rows, "labels": rows}

    data = [{"input_ids": list(range(1, 9))}] * 4
    history = pl.train(model, data, collate=collate, steps=2, batch_size=2, fast=False, progress=False)
    assert history.path.startswith("plain") and not looks


# -- the rest of a step ------------------------------------------------------------------------------------------------


class Counted(TorchDispatchMode):
    """Count the operations of torch."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_step_makes_few_operations_more_than_a_plain_loop():
    """It also computes the loss in chunks, notes whether it is finite and keeps it. What the other thread does, which
    reads and pads a batch, is not counted.
    """
    model = pl.attach(tiny.llama(), pl.LoRAConfig(r=2))
    given = Settings(steps=10, batch_size=4, schedule="constant", fast=False, precision="fp32", chunked_loss=True)
    rows = torch.randint(1, 32, (16, 12))
    counts = {}
    with (
        plain_steps(model, rows[:4], given) as plain,
        train_steps(model, [{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows], given) as train,
    ):
        for name, step in (("plain", plain), ("train", train)):
            step()
            with Counted() as found:
                step()
            counts[name] = found.count
    assert 0 < counts["train"] - counts["plain"] < 16, counts


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
    assert row["ratio_from"] <= row["ratio"] <= row["ratio_to"]


def test_the_interval_of_a_median_holds_it_19_times_in_20():
    assert median_interval(range(1, 101)) == (40, 61) and median_interval([2.0, 1.0]) == (1.0, 2.0)
    torch.manual_seed(0)
    drawn = [median_interval(row.tolist()) for row in torch.randn(1000, 60)]
    assert 930 <= sum(low <= 0 <= high for low, high in drawn) <= 980
