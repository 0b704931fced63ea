"""Two processes under DistributedDataParallel train as one does: every label counts the same, whoever saw it."""

import ddp_run
import pytest
import tiny
import torch
from children import one_worker, together
from torch import distributed

from peftlab.training import train


@one_worker
@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_train_as_one(tmp_path):
    results = together(*((ddp_run.run, rank, tmp_path / "meet", tmp_path / "run") for rank in range(2)))
    first, second = ({name: torch.from_numpy(value) for name, value in result.items()} for result in results)
    for name, value in ddp_run.adalora().items():  # in these steps ranks are pruned
        one, other = (result.pop(f"adalora {name}") for result in (first, second))
        assert torch.equal(one, other) and torch.allclose(one, torch.from_numpy(value), rtol=1e-5, atol=1e-7), name
    alone = tiny.llama().requires_grad_(False)
    alone.model.layers.requires_grad_(True)
    history = train(alone, tiny.examples(ddp_run.EXAMPLES), **ddp_run.SETTINGS)
    for result in (first, second):
        for name in ("losses", "packed losses"):
            assert result.pop(name).tolist() == pytest.approx([row["loss"] for row in history.steps], rel=1e-6)
    for name, parameter in alone.named_parameters():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], parameter, atol=1e-6), name
        assert torch.equal(first[f"packed {name}"], second[f"packed {name}"]), name
        assert torch.allclose(first[f"packed {name}"], parameter, atol=1e-6), name
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["step-00000003"]
