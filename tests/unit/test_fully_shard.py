"""Models that torch divides among processes: fully_shard (FSDP2) works, FSDP1 is refused, DDP is unwrapped."""

import functools

import pytest
import sharded_worker
import tiny
import torch
from children import one_worker, together
from groups import one_process
from sharded_worker import CASES, LORA, built, logits, sharded
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import peftlab as pl

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(), reason="torch without gloo"
)


@pytest.fixture(name="one_process")
def of_one_process():
    with one_process():
        yield


def two_processes(task, folder):
    """Run a task of the worker in two processes; return what each saw."""
    return together(*((sharded_worker.run, task, rank, folder) for rank in range(2)))


@pytest.mark.slow
@one_worker
def test_the_folder_is_that_of_one_process(tmp_path):
    first, second = two_processes("save", tmp_path)
    assert list(first) == list(second) == list(CASES)
    for case, seen in first.items():
        assert seen["count"] == seen["count alone"] == second[case]["count"], case
        assert seen["same keys"] and seen["same base"] and seen["same output"], (case, seen)
        files = {path.name: path.read_bytes() for path in (tmp_path / "sharded" / case).iterdir()}
        alone = {path.name: path.read_bytes() for path in (tmp_path / "alone" / case).iterdir()}
        assert files.keys() == alone.keys() and {"README.md", "adapter_config.json"} < files.keys(), case
        assert [name for name in files if files[name] != alone[name]] == [], case


@pytest.mark.slow
@one_worker
def test_what_else_one_does_with_adapters(tmp_path):
    for seen in two_processes("change", tmp_path):
        for call, name in (("attach", "attach"), ("load", "load_adapter")):
            assert f"{name} cannot divide a new adapter" in seen.pop(call), name
        assert "train works in one process" in seen.pop("train")
        assert seen.pop("attached") == ["default"]
        assert seen.pop("gradients") == ["a"]
        assert seen == dict.fromkeys(seen, True) and "merged" in seen and "trained after" in seen


@pytest.mark.slow
@one_worker
def test_the_callback_saves_from_all_processes_and_restores_the_pieces(tmp_path):
    for seen in two_processes("callback", tmp_path):
        for case, results in seen.items():
            assert results == {"moved": True, "same output": True, "same parameters": True}, case
    assert sorted(path.name for path in (tmp_path / "trainer" / "checkpoint-3" / "adapter").iterdir())


@pytest.mark.slow
@one_worker
def test_what_goes_wrong_is_told_in_every_process(tmp_path):
    first, second = two_processes("wrong", tmp_path)
    for seen in (first.pop("alone"), first.pop("merge alone"), *first.pop("told")):
        assert "every process must call it; rank 1 has not" in seen
    assert second.pop("file") == "Rank 0: " + first.pop("file")
    assert first == second
    assert "not finite" in first["nan"] and "'defualt'" in first["name"] and not first["written"]
    for folder in ("together", "late"):
        assert pl.load_adapter(tiny.llama(), tmp_path / folder)


@pytest.mark.parametrize("case", ["lora", "p-tuning", "copies", "adalora"])
def test_in_one_process_a_sharded_model_is_saved_as_a_plain_one(case, one_process, tmp_path):
    pl.save_adapter(built(case), tmp_path / "plain")
    model = sharded(built(case))
    logits(model)  # without a backward pass the outermost module keeps its gathered parameters
    pl.save_adapter(model, tmp_path / "sharded")
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "sharded" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("change, message", [
    (lambda model: pl.attach(model, pl.LoRAConfig(), "b"), "Attach first, then call fully_shard"),
    (lambda model: pl.load_adapter(model, "folder", "b"), "Load first, then call fully_shard"),
    (lambda model: pl.train(model, tiny.examples(4), steps=1), "every process call save_adapter"),
    (lambda model: pl.quantize_model(pl.detach(model)), "Quantise first"),
])  # fmt: skip
def test_only_the_outermost_module_is_sharded(change, message, one_process):
    """After a forward pass such a model holds no pieces at all, until it is asked to."""
    model = torch.distributed.fsdp.fully_shard(built("lora"))
    logits(model)
    with pytest.raises(pl.PeftLabError, match=message):
        change(model)


@pytest.mark.parametrize("call", [pl.added_loss, lambda model: pl.after_step(model, 1)])
def test_adalora_does_not_train_in_pieces(call, one_process):
    with pytest.raises(pl.PeftLabError, match="AdaLoRA cannot train where .* Use DistributedDataParallel"):
        call(torch.distributed.fsdp.fully_shard(built("adalora")))


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_fsdp1_is_refused_in_one_line(nested, original, one_process, tmp_path):
    torch.manual_seed(1)
    model = pl.attach(tiny.llama(), pl.LoRAConfig(**LORA)).requires_grad_(True)  # flat pieces train whole or not at all
    expected = logits(model)
    with pl.disabled(model):
        base = logits(model)
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy if nested else None, use_orig_params=original, device_id=torch.device("cpu")
    )
    assert torch.equal(logits(wrapped), expected)
    with pl.disabled(wrapped):
        assert torch.equal(logits(wrapped), base)
    for call in (
        lambda: pl.save_adapter(wrapped, tmp_path / "a"),
        lambda: pl.save_adapter(model, tmp_path / "a"),
        lambda: pl.count_parameters(wrapped),
        lambda: pl.activate(wrapped, "default"),
        lambda: pl.merge(wrapped),
        lambda: pl.detach(wrapped),
        lambda: pl.attach(wrapped, pl.LoRAConfig(), "b"),
        lambda: pl.train(wrapped, tiny.examples(4), steps=1),
    ):
        with pytest.raises(pl.PeftLabError, match=r"FSDP1.*Use fully_shard \(FSDP2\)"):
            call()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("wrap", [DistributedDataParallel, nn.DataParallel])
def test_a_model_wrapped_for_copies_is_saved_as_the_model(wrap, one_process, tmp_path):
    model = built("copies")
    pl.save_adapter(model, tmp_path / "plain")
    pl.save_adapter(wrap(model), tmp_path / "wrapped")
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "wrapped" / path.name).read_bytes(), path.name


@pytest.mark.slow
@one_worker
def test_under_ddp_one_process_may_save_or_all_may(tmp_path):
    two_processes("copies_of_the_model", tmp_path)
    one, every = (pl.load_adapter(tiny.llama(), tmp_path / name) for name in ("one", "all"))
    assert torch.equal(logits(one), logits(every))
