"""One rank of the checks of plan_scale: what updates send and hold on real ranks, as a JSON of rank 0.

python -m tests.zoo.scaled_ranks RANK WORLD FILE, from the repository's root
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.train.method_roles import CASES, Streams, roles_of, training_batch
from twostep.train.methods import TurboPP, TurboPPConfig
from twostep.train.ranks import Ranks
from twostep.train.sharding import average_gradients, shard
from twostep.train.watchdog import Watchdog
from twostep.zoo.plan import Setting, make_roles, run_updates

from .test_plan import CONFIG, WatchMalloc, no_phase

KINDS = {"networks": "decoupled", "one base": "adapters"}
# What FSDP2 and average_gradients call, by torch's version: kind, and the names of what is gathered or summed.
COLLECTIVES = {
    "all_gather_single": ("gather", ("output", "output_tensor")),
    "all_gather_into_tensor": ("gather", ("output_tensor",)),
    "reduce_scatter_single": ("scatter", ("input", "input_tensor")),
    "reduce_scatter_tensor": ("scatter", ("input",)),
    "all_reduce": ("reduce", ("tensor",)),
}
TRAFFIC = (
    "z-image, networks, fsdp",
    "z-image, networks, ddp",
    "z-image, one base, fsdp",
    "z-image, one base, ddp",
    "flux2, networks, fsdp",
    "flux2, one base, ddp",
)
MEMORY = {arrangement: Setting(16, 16, 16, 32, arrangement, rank=8, optimizer=False) for arrangement in KINDS}


@contextlib.contextmanager
def watched() -> Iterator[dict[str, dict[str, int]]]:
    """Counts in the functions that FSDP2 and average_gradients call: nothing of plan_scale takes part."""
    found: dict[str, dict[str, int]] = {}
    depth = [0]  # one may be written with another

    def counting(name: str, kind: str, keywords: tuple[str, ...]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not depth[0]:
                given = [kwargs[keyword] for keyword in keywords if keyword in kwargs]
                whole = given[0] if given else args[1 if kind == "scatter" else 0]
                one = found.setdefault(kind, {"calls": 0, "bytes": 0})
                one["calls"], one["bytes"] = one["calls"] + 1, one["bytes"] + whole.nbytes
            depth[0] += 1
            try:
                return kept[name](*args, **kwargs)
            finally:
                depth[0] -= 1

        return call

    kept = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
    for name in kept:
        setattr(dist, name, counting(name, *COLLECTIVES[name]))
    try:
        yield found
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def traffic(family: str, arrangement: str, parallel: str, ranks: Ranks) -> dict[str, Any]:
    """Of the trainer's own Turbo++: a generator and a guidance update."""
    roles = roles_of(CASES[family], KINDS[arrangement])
    frozen = roles.guidance.teacher.backbone if roles.base is None else roles.base.backbone
    networks = [frozen]
    if roles.base is None:
        networks += [*roles.student.distinct_networks(), roles.guidance.fake.network]
    if parallel == "fsdp":
        for network in networks:
            network.enable_gradient_checkpointing()
            shard(network, ranks.mesh, torch.bfloat16)
    method = TurboPP(roles.student, roles.guidance, TurboPPConfig())
    found: dict[str, Any] = {}
    for update, parameters in method.parameters().items():
        with watched() as found[update]:
            with torch.autocast("cpu", torch.bfloat16):
                method.run(update, training_batch(CASES[family]), Streams(ranks.rank))
            average_gradients(parameters, ranks)
    return found


def memory(arrangement: str, ranks: Ranks) -> int:
    """The most that malloc had handed out to a rank during updates in shards."""
    setting = MEMORY[arrangement]
    with WatchMalloc() as malloc:
        roles = make_roles(CONFIG, setting)
        for network in roles.networks:
            shard(network, ranks.mesh, setting.dtype)
        malloc.peak = 0  # whole networks are there before they are divided; a run divides each as it is loaded
        run_updates(roles, setting, no_phase, lambda parameters: average_gradients(parameters, ranks))
    return malloc.peak


def main(rank: int, world: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    ranks = Ranks(rank, world, torch.device("cpu"), Watchdog(rank, world, 600.0))
    ranks.mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
    found: dict[str, Any] = {"traffic": {}, "memory": {}}
    for name in TRAFFIC:
        found["traffic"][name] = traffic(*name.split(", "), ranks)
    # The first time is not what counts: oneDNN keeps the programs that it makes for each shape, 8 to 31 MB with AMX.
    for arrangement in (*KINDS, *KINDS):
        found["memory"][arrangement] = memory(arrangement, ranks)
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
