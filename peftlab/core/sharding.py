"""Handle a model that `fully_shard` (FSDP2) has divided: gather its tensors, and let its processes do this together.

Each process then holds a piece of each parameter, a `DTensor`. To gather one is a step that all of them must take. If
one process stays away, the others wait for ever, or take its next step for this one. So they meet first, through the
store by which torch.distributed itself started, and who waits too long learns which process is missing.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from peftlab.core.interface import Placement
from peftlab.errors import PeftLabError, warn

PATIENT_SECONDS = 30.0  # after this, who waits for another process says so


def is_piece(tensor: Tensor) -> bool:
    """Say whether a tensor is one process's piece of a larger one.

    torch's class for it takes a second to import. A piece can only exist where somebody has imported it.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def shards(root: nn.Module) -> list[Any]:
    """Return the modules of a model whose parameters `fully_shard` has divided."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [module for module in root.modules() if isinstance(module, kind)] if kind is not None else []


def is_sharded(root: nn.Module) -> bool:
    """Say whether a model, or a part of it, is divided among processes."""
    return bool(shards(root)) or any(is_piece(parameter) for parameter in root.parameters())


def give_up_gathered(root: nn.Module) -> None:
    """Let every module of a sharded model hold its pieces again.

    After a forward pass without a backward pass, the outermost module still holds its gathered parameters. A value
    written there would be lost.
    """
    for module in shards(root):
        module.reshard()


def refuse_sharded(root: nn.Module, what: str, advice: str) -> None:
    """Refuse what cannot be done to a sharded model."""
    if is_sharded(root):
        raise PeftLabError(f"The model's parameters are divided among processes (fully_shard), and {what}. {advice}")


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return a tensor in one piece. All processes of a sharded model must call this for the same tensors in turn."""
    if not is_piece(tensor):
        return tensor
    piece: Any = tensor.detach()
    mesh = piece.device_mesh
    # parameters that are offloaded to the CPU are gathered by the devices of the mesh
    return piece.to(mesh.device_type).full_tensor()


def piece_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's piece of a whole tensor, divided as another tensor is."""
    if not is_piece(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    other: Any = like
    mesh = other.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type, like.dtype), mesh, other.placements).to(like.device)


def in_one_piece(placements: Iterable[Placement]) -> list[Placement]:
    """Return an adapter's parts with whole parameters in the CPU's memory: copies, where the model is sharded."""
    known: dict[int, Any] = {}  # shared, since several parts may hold one parameter
    result = []
    for path, name, part in placements:
        pieces = [parameter for parameter in part.parameters() if is_piece(parameter)]
        for parameter in pieces:
            if id(parameter) not in known:
                known[id(parameter)] = nn.Parameter(whole(parameter).cpu(), parameter.requires_grad)
        result.append(Placement(path, name, copy.deepcopy(part, known) if pieces else part))
    return result


class Processes:
    """The processes that hold the pieces of one model. One of them, the `first`, writes files.

    Of a model that is not sharded there is this process alone.
    """

    def __init__(self, root: nn.Module) -> None:
        pieces: list[Any] = [parameter for parameter in root.parameters() if is_piece(parameter)]
        # a mesh of several dimensions, such as copies of shards, names every process that takes part
        self.ranks = sorted(pieces[0].device_mesh.mesh.flatten().tolist()) if pieces else [0]
        self.alone = len(self.ranks) == 1
        self.rank = distributed.get_rank() if pieces else 0
        self.first = self.rank == self.ranks[0]
        self.round = 0

    def meet(self, what: str) -> None:
        """Wait until all processes have come to the same call.

        Raises:
            PeftLabError: one has not come within half the time limit of torch.distributed.
        """
        if self.alone:
            return
        store = _store()
        self.round = store.add(_arrivals(what, self.rank), 1)

        def missing() -> list[int]:
            others = (rank for rank in self.ranks if rank != self.rank)
            return [rank for rank in others if store.add(_arrivals(what, rank), 0) < self.round]

        def late(ranks: list[int]) -> str:
            names = ", ".join(map(str, ranks[:8])) + (" and more" if len(ranks) > 8 else "")
            return (
                f"Rank {self.rank} has called {what}, and the model's parameters are divided among processes "
                f"(fully_shard), so every process must call it; rank {names} has not."
            )

        try:
            _wait(missing, late)
        except PeftLabError:
            store.add(_arrivals(what, self.rank), -1)
            raise

    def write(self, what: str, write: Callable[[], None]) -> None:
        """Let the first process write files, and the others wait for it; if it fails, all fail.

        Raises:
            PeftLabError: the files could not be written.
        """
        if self.alone:
            write()
            return
        store, key = _store(), f"peftlab/{what}/result/{self.round}"
        if self.first:
            try:
                write()
            except BaseException as error:
                store.set(key, f"Rank {self.rank}: {error or type(error).__name__}")
                raise
            store.set(key, "")
            return
        _wait(
            lambda: [] if store.check([key]) else self.ranks[:1],
            lambda ranks: f"Rank {ranks[0]} has not finished {what}.",
        )
        fault = store.get(key).decode()
        if fault:
            raise PeftLabError(fault)


def _arrivals(what: str, rank: int) -> str:
    return f"peftlab/{what}/{rank}"


def _store() -> Any:
    """Return the key-value store that all processes of torch.distributed share."""
    return cast(Any, distributed.distributed_c10d)._get_default_store()


def _wait(missing: Callable[[], list[int]], message: Callable[[list[int]], str]) -> None:
    """Wait until nothing is missing. Say so after a while; give up before torch does, which would end the process."""
    limit = _store().timeout.total_seconds() / 2
    start, told = time.monotonic(), False
    while ranks := missing():
        waited = time.monotonic() - start
        if waited > limit:
            raise PeftLabError(f"{message(ranks)} This process waited for {waited:.0f} seconds.")
        if waited > min(PATIENT_SECONDS, limit / 2) and not told:
            told = True
            warn(f"{message(ranks)} This process waits for up to {limit:.0f} seconds.")
        time.sleep(0.002 if waited < 1 else 0.1)
