"""Two processes under DistributedDataParallel train as one does: every label counts the same, whoever saw it."""

import os
import subprocess
import sys
from pathlib import Path

import ddp_worker
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import distributed

from peftlab.training import train


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_train_as_one(tmp_path):
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                str(here / "ddp_worker.py"),
                str(rank),
                str(tmp_path / "meet"),
                tmp_path / "run",
                tmp_path / "o",
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
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
