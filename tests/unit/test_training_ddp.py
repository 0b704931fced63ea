"""Two processes under DistributedDataParallel train as one does: every label counts the same, whoever saw it."""

from pathlib import Path

import ddp_worker
import pytest
import tiny
import together
import torch
from safetensors.torch import load_file
from torch import distributed

from peftlab.training import train


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_train_as_one(tmp_path):
    worker = Path(__file__).with_name("ddp_worker.py")
    together.run(*([worker, rank, tmp_path / "meet", tmp_path / "run", tmp_path / "o"] for rank in range(2)))
    first, second = load_file(tmp_path / "o-0"), load_file(tmp_path / "o-1")
    alone = tiny.llama().requires_grad_(False)
    alone.model.layers.requires_grad_(True)
    history = train(alone, tiny.examples(ddp_worker.EXAMPLES), **ddp_worker.SETTINGS)
    assert [row["loss"] for row in history.steps] == pytest.approx(first.pop("losses").tolist(), rel=1e-6)
    second.pop("losses")
    for name, parameter in alone.named_parameters():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], parameter, atol=1e-6), name
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["step-00000003"]
