"""Memory of one of two GPUs that train together: `peftlab bench parallel`.

Each point is a run of two steps like those of `bench memory`, under DistributedDataParallel or with every block and the
model given to `fully_shard`. The peak is that of the first GPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing, nn

from peftlab.bench import memory
from peftlab.errors import PeftLabError

GPUS = 2


def points() -> Iterator[dict[str, Any]]:
    """Yield full fine-tuning and LoRA under DDP and FSDP, with and without checkpointing."""
    for parallel, method in (("ddp", "full"), ("ddp", "lora"), ("fsdp", "full"), ("fsdp", "lora")):
        yield run("llama-3.2-1b", method, parallel, batch=2)
    for method, checkpointing in (("full", True), ("lora", False), ("lora", True)):
        yield run("llama-3.1-8b", method, "fsdp", checkpointing=checkpointing, sequence=1024)


def run(shape: str, method: str, parallel: str, **changes: Any) -> dict[str, Any]:
    """Describe one run on two GPUs."""
    return {**memory.run(shape, method, **changes), "section": "parallel", "gpus": GPUS, "parallel": parallel}


def measure(point: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure one point in its own processes, and return its row."""
    if torch.cuda.device_count() < GPUS:
        raise PeftLabError(f"bench parallel needs {GPUS} CUDA GPUs; found {torch.cuda.device_count()}.")
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(worker, (point, folder), nprocs=GPUS)
        peak = int(Path(folder, "peak").read_text())
    return [{**point, "peak_bytes": peak}]


def worker(rank: int, point: dict[str, Any], folder: str) -> None:
    """Do one GPU's part of a run. The first one writes its peak into the folder."""
    torch.cuda.set_device(rank)
    distributed.init_process_group("nccl", init_method=f"file://{folder}/meet", rank=rank, world_size=GPUS)
    model, optimizer, batch = prepared(point, torch.device("cuda", rank))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    memory.steps(memory.phases(model, optimizer, batch, memory.autocast(point)), 2)
    if rank == 0:
        Path(folder, "peak").write_text(str(torch.cuda.max_memory_allocated()))
    distributed.barrier()
    distributed.destroy_process_group()


def prepared(point: dict[str, Any], device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    """Return the model as one GPU holds it, its optimiser, and a batch."""
    model, batch = memory.build(point, device)
    if point["parallel"] == "fsdp":
        model = shard(model)
    else:
        model = nn.parallel.DistributedDataParallel(model, None if device.index is None else [device.index])
    # make the optimiser only now: an earlier one would keep the whole parameters alive
    return model, memory.optimizer_of(point["optimizer"], memory.trained(model)), batch


def shard(model: nn.Module) -> nn.Module:
    """Shard each block as one group, and the rest as another."""
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block)
    fully_shard(model)  # in place
    return model
