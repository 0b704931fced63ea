"""Estimates for one of several GPUs."""

import pytest

from peftlab.errors import PeftLabError
from peftlab.kit import measurements
from peftlab.memory import estimate

MEASURED = measurements.results("parallel")
SETTINGS = (
    "shape", "method", "r", "targets", "batch", "sequence", "precision", "optimizer", "checkpointing", "attention",
    "gpus", "parallel",
)  # fmt: skip
RUN = {"batch": 2, "sequence": 256, "precision": "bf16"}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_ddp_holds_everything_and_buckets_as_large_as_the_gradients(method):
    one, eight = (estimate("llama-3.2-1b", method, gpus=gpus, **RUN) for gpus in (1, 8))
    buckets = (2 if method == "full" else 4) * one.trainable
    assert eight.peak_bytes - one.peak_bytes == pytest.approx(buckets, abs=512)
    assert (eight.weights, eight.optimizer) == (one.weights, one.optimizer)


def test_shards_divide_what_is_kept():
    one = estimate("llama-3.1-8b", "full", **RUN)
    for gpus in (2, 8):
        found = estimate("llama-3.1-8b", "full", gpus=gpus, parallel="fsdp", **RUN)
        for part in ("weights", "optimizer"):
            assert getattr(found, part) == pytest.approx(getattr(one, part) / gpus, rel=1e-3)
        assert found.flops == one.flops and found.total == one.total
    assert found.peak_bytes < one.peak_bytes / 4


@pytest.mark.parametrize("row", MEASURED.rows, ids=lambda row: "-".join(str(row[name]) for name in (
    "shape", "method", "parallel", "checkpointing")))  # fmt: skip
def test_estimates_are_what_two_gpus_measured(row):
    assert MEASURED.provenance["gpu"].startswith("NVIDIA H") and row["gpus"] == 2
    version = MEASURED.provenance["versions"]["transformers"]
    said = estimate(**{name: row[name] for name in SETTINGS}, transformers=version)
    assert said.peak_bytes == pytest.approx(row["peak_bytes"], rel=0.002)


def test_a_block_and_what_is_in_none_pass_whole():
    """With tiny shards: embedding and head copied out, their buffer, and beside it already both of the first block."""
    found = estimate("llama-3.1-8b", "prompt", gpus=4096, parallel="fsdp", batch=1, sequence=1, virtual_tokens=1)
    outside, block = 2 * 2 * 128256 * 4096, 2 * 218_112_000
    assert 0 < found.peak_bytes - (2 * outside + 2 * block + 2 * 32 * 2**20) < 1e8


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", ["gpt2", "bert-base", "t5-base", "qwen2.5-0.5b"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_architecture_and_nothing_is_left_over(shape, method, checkpointing):
    run = {"batch": 2, "sequence": 64, "checkpointing": checkpointing}
    one, two = (estimate(shape, method, gpus=gpus, parallel="fsdp", **run) for gpus in (1, 2))
    assert one == estimate(shape, method, **run)
    assert two.weights < 0.52 * one.weights and two.optimizer <= 0.52 * one.optimizer
    assert two.history[-1][1] < one.history[-1][1]  # the optimiser's moment: all that is kept, and nothing whole


def test_four_bits_are_sharded_but_for_their_scales():
    one = estimate("llama-2-70b", "qlora", checkpointing=True)
    eight = estimate("llama-2-70b", "qlora", checkpointing=True, gpus=8, parallel="fsdp")
    codes = (one.weights - eight.weights) * 8 / 7
    assert 0.5 * 68_451_041_280 < codes < one.weights  # two codes a byte, and what is not quantised


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"gpus": 0}, "gpus must be a positive whole number, found 0"), ({"gpus": True}, "found True"),
     ({"gpus": 2, "parallel": "fsdb"}, "parallel must be one of 'ddp', 'fsdp'; found 'fsdb'.*'fsdp'")],
)  # fmt: skip
def test_mistakes(wrong, message):
    with pytest.raises(PeftLabError, match=message):
        estimate("gpt2", "lora", **wrong)
