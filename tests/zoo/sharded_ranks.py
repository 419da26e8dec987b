"""One rank of the distributed checks of the zoo: prints a JSON of errors on rank 0.

python -m tests.zoo.sharded_ranks RANK WORLD FILE, from the repository's root
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from twostep.zoo import AdapterBase, Backbone, FakeScore

from .models import CASES, Case, batch_of, fused_backbone, relative_error

SHARDED = ("z-image, odd width, no refiners, nothing to pad", "z-image, even captions", "flux2, masked captions")


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def gradients(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    return {n.removeprefix("module."): whole(p.grad).clone() for n, p in named if p.grad is not None}


def sample(case: Case, rank: int) -> tuple[Any, ...]:
    batch = batch_of(case)
    return batch.x[rank : rank + 1], batch.sigma[rank : rank + 1], batch.context[rank : rank + 1]


def oracle(network: Backbone, case: Case) -> dict[str, Tensor]:
    """The mean of the ranks' losses, in one process."""
    network.zero_grad()
    sum(network.velocity(*sample(case, r)).sin().sum() / 2 for r in (0, 1)).backward()
    return gradients(network.named_parameters())


def largest(found: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """A gradient that is missing is an infinite error."""
    return max(relative_error(found[n], g) if n in found else float("inf") for n, g in true.items())


def shard(backbone: Backbone, reshard_root: bool | None = True, **settings: Any) -> Backbone:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in backbone.blocks():
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(backbone, mesh=mesh, reshard_after_forward=reshard_root, **settings)


def networks(case: Case, rank: int) -> dict[str, float]:
    inputs, true = sample(case, rank), oracle(fused_backbone(case), case)
    parallel, sharded = DistributedDataParallel(fused_backbone(case)), shard(fused_backbone(case))
    sharded.enable_gradient_checkpointing()
    for _ in range(2):  # DDP complains of a parameter without a gradient in the next forward
        parallel.zero_grad(), sharded.zero_grad()
        parallel(*inputs).sin().sum().backward()
        sharded.velocity(*inputs).sin().sum().backward()
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    mixed, rounded, exact = (fused_backbone(case) for _ in range(3))
    shard(mixed, mp_policy=low)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16()
    x, _, context = inputs
    v, stock, best = (network.velocity(x, torch.tensor([0.9545]), context) for network in (mixed, rounded, exact))
    return {
        "DDP": largest(gradients(parallel.named_parameters()), true),
        "FSDP2": largest(gradients(sharded.named_parameters()), true),
        "mixed precision": relative_error(v, best) / relative_error(stock, best),
    }


def one_base(case: Case, rank: int) -> dict[str, float]:
    def build() -> AdapterBase:
        roles = AdapterBase(fused_backbone(case))
        for seed, name in enumerate(("step_1", "fake_score")):
            generator = torch.Generator().manual_seed(seed)
            for parameter in roles.add(name, rank=4).parameters():
                parameter.data.normal_(std=0.2, generator=generator)
        return roles

    inputs, alone, roles = sample(case, rank), build(), build()
    shard(roles.backbone, reshard_root=None)  # FSDP's default: the root stays whole after a forward
    found = {}
    for name, view in roles.adapters.items():
        view.state_dict()  # puts the shards back
        parameters = list(view.named_parameters())
        for _ in range(2):
            for _, parameter in parameters:  # as an optimizer does
                parameter.grad = None
            view.velocity(*inputs).sin().sum().backward()
            roles.base.velocity(*inputs)
        true = oracle(alone.adapters[name], case)
        found[f"gradients of {name}"] = largest(gradients(parameters), true)
        state = alone.adapters[name].state_dict()
        found[f"state of {name}"] = largest({n: whole(t) for n, t in view.state_dict().items()}, state)
        view.load_state_dict({n: t + 1 for n, t in state.items()})
        roles.base.velocity(*inputs)
        moved = {n: whole(t) - 1 for n, t in view.state_dict().items()}
        found[f"loaded into {name}"] = largest(moved, state)
    role = FakeScore(build().adapters["fake_score"])
    DistributedDataParallel(role)  # has parameters to look after
    return found


def main(rank: int, world: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    found = {name: {**networks(CASES[name], rank), **one_base(CASES[name], rank)} for name in SHARDED}
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
