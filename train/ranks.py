"""The processes of a run: who I am among them, what we agree on, and who of us hangs.

torchrun (or anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, such as SLURM's srun with
them exported) starts several; without these variables there is one. Control messages go over gloo on the CPU, so that
agreeing never waits for a GPU's queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from ..arguments import usable_device
from .torchrun import place
from .watchdog import Watchdog

PATIENCE = 6.0  # times the time-out, for what takes long by nature: loading, saving, sampling, the first update


@dataclass
class Ranks:
    rank: int
    world_size: int
    device: torch.device
    watchdog: Watchdog
    mesh: DeviceMesh | None = None  # of the shards; ("replicate", "shard") where there are replicas

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self, doing: str) -> None:
        """Waits for the others, as patiently as for whatever takes long."""
        if self.world_size > 1:
            self.watchdog.beat(f"waiting for the others {doing}", patience=PATIENCE)
            self.highest([0.0])

    def from_first(self, ask: Callable[[], Any]) -> Any:
        """What rank 0 answers, on every rank; the others do not ask."""
        told = [ask() if self.first else None]
        if self.world_size > 1:
            dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        return told[0]

    def highest(self, values: Sequence[float]) -> list[float]:
        """The largest of each number over all ranks."""
        if self.world_size == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return told.tolist()

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean of each number over all ranks, which have the same ones."""
        if self.world_size == 1:
            return dict(values)
        told = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(told)
        return dict(zip(values, (told / self.world_size).tolist(), strict=True))

    def gathered(self, value: Any) -> list[Any]:
        """What every rank has to say, in their order."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found


@contextmanager
def join(*, device: str | None, timeout: float, sharded: bool, replicas: int = 1) -> Iterator[Ranks]:
    """This process's place among the ranks, its device, and the mesh of shards if there are to be any."""
    here = place()
    rank, world_size = here.rank, here.world_size
    where = usable_device(device, "compute.device", here.local)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    store = None
    if world_size > 1 or sharded:
        # The watchdog is to speak first: it knows who hangs.
        limit = timedelta(seconds=2 * PATIENCE * timeout)
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        if world_size > 1:
            store, _, _ = next(iter(rendezvous("env://", rank, world_size, timeout=limit)))
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    watchdog = Watchdog(rank, world_size, timeout, store)
    try:
        ranks = Ranks(rank, world_size, where, watchdog)
        if sharded:
            ranks.mesh = _mesh(where, world_size, replicas)
        watchdog.start()
        yield ranks
    finally:
        watchdog.stop()
        if dist.is_initialized():
            dist.destroy_process_group()


def _mesh(device: torch.device, world_size: int, replicas: int) -> DeviceMesh:
    if world_size % replicas:
        raise ValueError(f"parallel.replicas is {replicas}, expected a divisor of the number of ranks, {world_size}")
    if replicas == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, world_size // replicas), mesh_dim_names=("replicate", "shard"))
