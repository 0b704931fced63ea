"""Estimates for one of several GPUs."""

from typing import ClassVar

import pytest

from peftlab.errors import PeftLabError
from peftlab.kit import measurements
from peftlab.memory import estimate
from peftlab.memory.replay.sharding import Sharding
from peftlab.memory.replay.tape import Memory, Parameter, Tensor, backward, leaf, record

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


class Blocks:
    """What `Sharding` needs of a net: blocks "a", "b" and "c" of one parameter each, and one outside them."""

    # in KiB, so that each sum of them says what is in it
    SIZES: ClassVar[dict[str, int]] = {"": 1, "a": 10, "b": 100, "c": 1000}

    def __init__(self, gpus, four_bit=()):
        self.memory = Memory()
        self.weights = {
            name: Parameter(self.memory, (1024 * size,), 1, trains=True, shards=gpus)
            for name, size in self.SIZES.items()
        }
        self.quantised = {name: (Tensor(self.memory, (2048,), 1, "weights"),) for name in four_bit}
        self.sharding = Sharding(self, gpus)
        self.kept = self.memory.total

    @property
    def groups(self):
        return {name: [("weight", one)] for name, one in self.weights.items()}

    def block_of(self, path):
        return path

    @property
    def whole(self):
        """KiB that are neither shards of the weights nor of their gradients."""
        return (self.memory.total - self.kept - self.memory.now["gradients"]) / 1024

    def step(self):
        """One step. Returns what is whole while each block runs, forward and backward."""
        found = {}
        x = leaf(Tensor(self.memory, (), 1))
        own = self.memory.now["workspace"] / 1024
        self.sharding.start()
        for name in "abc":
            x = self.sharding.around(name, lambda x, name=name: self.run(name, x, found, own), (x,))
        backward(x.node, [Tensor(self.memory, (), 1)])
        self.sharding.finish()
        return found

    def run(self, name, x, found, own):
        found[name] = self.whole - own

        def gradient(g):
            found[name.upper()] = self.whole - own - g.storage.size / 1024
            return g, Tensor(self.memory, (1024 * self.SIZES[name],), 1)

        return record(x.view(), [x, self.weights[name]], gradient)


def test_what_is_whole_while_a_block_runs():
    """Its copies, the buffer that they came from, and in the backward pass the buffer of the block before it."""
    net = Blocks(gpus=2)
    found = net.step()
    outside = 1
    assert found["a"] == outside + 10 + 10  # the copies and the buffer of this block
    assert found["b"] == outside + 100 + 100
    assert found["c"] == outside + 1000 + 1000
    assert found["C"] == outside + 1000 + 100  # the copies, and block b gathered ahead
    assert found["B"] == outside + 100 + 10 + 1000  # and the gradients of block c, summed last
    assert found["A"] == outside + 10 + 100  # there is none before it


@pytest.mark.parametrize(("size", "gpus", "shard"), [(1024, 2, 512), (1025, 2, 1024), (4097, 8, 1024), (4096, 8, 512)])
def test_a_shard_is_rounded_up(size, gpus, shard):
    """The last shard is padded to the size of the others. (The allocator then rounds up to 512 bytes.)"""
    net = Blocks(gpus=gpus)
    net.weights["a"] = one = Parameter(net.memory, (size,), 1, trains=True, shards=gpus)
    assert one.storage.size == shard
    one.grad = Tensor(net.memory, (size,), 1)
    net.sharding.let_go("a")
    assert one.grad.storage.size == net.memory.now["gradients"] == shard


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"gpus": 0}, "gpus must be a positive whole number, found 0"), ({"gpus": True}, "found True"),
     ({"gpus": 2, "parallel": "fsdb"}, "parallel must be one of 'ddp', 'fsdp'; found 'fsdb'.*'fsdp'")],
)  # fmt: skip
def test_mistakes(wrong, message):
    with pytest.raises(PeftLabError, match=message):
        estimate("gpt2", "lora", **wrong)
