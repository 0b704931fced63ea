"""Unsloth's own step on a tiny model, where it is installed: a first look before `peftlab bench speed` measures it."""

import sys
from importlib.util import find_spec

import pytest
import torch

from peftlab.bench import models, speed, timing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("unsloth") is None, reason="Unsloth is not installed"),
]
SHAPE = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip


def rows_of(method="lora", checkpointing=True):
    point = {"section": "s", "timed": True, "group": "unsloth", "shape": SHAPE, "method": method, "batch": 4,
             "sequence": 512, "checkpointing": checkpointing, "r": 16}  # fmt: skip
    try:
        return speed.measure(point)
    finally:
        models.let_go()


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_unsloths_own_kernels_make_the_step(method, checkpointing):
    """Unsloth says how many layers got its kernels. Its warnings and a failure's traceback stand on stderr."""
    for row in rows_of(method, checkpointing):
        assert row["skipped"] is None and row["seconds"] > 0, row["skipped"]
        assert "patched 2 layers with 2 QKV layers, 2 O layers and 2 MLP layers" in row["notes"]
        assert row["trainable"] == 2 * 16 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 512))
        assert row["peak_bytes"] > row["weight_bytes"] > 0
    assert "unsloth" not in sys.modules


def test_the_kernels_of_its_step_are_counted(monkeypatch):
    monkeypatch.setattr(timing, "_profiles", True)
    for row in rows_of():
        assert row["skipped"] is None and row["seconds"] is None, row["skipped"]
        assert row["busy_seconds"] > 0 and row["kernels"] > 50
