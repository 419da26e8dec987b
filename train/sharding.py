"""Parameters on several ranks: in shards (FSDP2), or whole on each with averaged gradients.

    fsdp    `fully_shard` of every block and of the network: parameters, gradients, optimizer states and averages in
            shards of dimension 0; gathered in the compute dtype, reduced in float32
    ddp     every rank holds everything; gradients are averaged once, at the end of an update, in few large
            all-reduces. Not DistributedDataParallel: it expects one backward for each forward of the module it wraps,
            and an update here has several of both (roll-outs without a graph, two-step and step-wise backwards).
            Averaging at the end is exact for all of them, and reduces once however many batches are accumulated.

Small parameters that are not in a network (a discriminator's heads) are whole in both.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ..zoo import Backbone
from .ranks import Ranks

BUCKET = 1 << 25  # elements of an all-reduce, 128 MiB of float32: large enough for any link, small beside a network


def shard(backbone: Backbone, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """FSDP2 on a network, block by block, in place."""
    # The root too gives its parameters back after a forward: roles that run forward only would leave it whole.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in backbone.blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(backbone, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


@contextmanager
def views_are_meant() -> Iterator[None]:
    """FSDP2 warns of networks whose output is a view. Nobody writes into ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        yield


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_dimension(tensor: DTensor) -> int | None:
    """Which dimension of its mesh a tensor is divided over; None where every rank has all of it."""
    for dimension, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, "FSDP2 divides dimension 0"
            return dimension
    return None


def rows(tensor: Tensor) -> tuple[int, int] | None:
    """The rows of dimension 0 that this rank has of a divided tensor; None for a whole one."""
    if not isinstance(tensor, DTensor) or (dimension := shard_dimension(tensor)) is None:
        return None
    heights = rows_of_parts(tensor.shape[0], tensor.device_mesh.size(dimension))
    rank = tensor.device_mesh.get_local_rank(dimension)
    assert tensor.to_local().shape[0] == heights[rank]
    return sum(heights[:rank]), sum(heights[: rank + 1])


def rows_of_parts(count: int, parts: int) -> list[int]:
    """How many of dimension 0's rows each rank has: torch.chunk's rule, which FSDP2 follows; the last may have less, or
    none."""
    size = math.ceil(count / parts)
    return [min(count, size * (part + 1)) - min(count, size * part) for part in range(parts)]


def is_keeper(tensor: Tensor, ranks: Ranks) -> bool:
    """Whether it is this rank that writes its part of a tensor: one of those that have it."""
    if not isinstance(tensor, DTensor) or shard_dimension(tensor) is None:
        return ranks.first
    mesh, dimension = tensor.device_mesh, shard_dimension(tensor)
    return all(mesh.get_local_rank(other) == 0 for other in range(mesh.ndim) if other != dimension)


def average_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """The mean over ranks of the gradients that FSDP has not reduced already."""
    if ranks.world_size == 1:
        return
    whole = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    for bucket in _buckets(whole):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= ranks.world_size
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    filled = BUCKET
    for tensor in tensors:
        if filled >= BUCKET or tensor.dtype != buckets[-1][-1].dtype:
            buckets.append([])
            filled = 0
        buckets[-1].append(tensor)
        filled += tensor.numel()
    return buckets


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together, of all their shards on all ranks; a number on the device."""
    divided: dict[tuple[DeviceMesh, int], list[Tensor]] = {}
    whole: list[Tensor] = []
    for gradient in gradients:
        dimension = shard_dimension(gradient) if isinstance(gradient, DTensor) else None
        if dimension is None:
            whole.append(local(gradient))
        else:
            divided.setdefault((cast(DTensor, gradient).device_mesh, dimension), []).append(local(gradient))
    total = _squares(whole, gradients[0].device)
    for (mesh, dimension), parts in divided.items():
        part = _squares(parts, parts[0].device)
        dist.all_reduce(part, group=mesh.get_group(dimension))
        total = total + part
    return total.sqrt()


def _squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of squares in float64: a norm that overflows float32 is still a number."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    # Norms are taken in float32 or better, and squared in float64.
    return torch.stack(torch._foreach_norm(list(tensors), dtype=torch.float32)).double().square().sum()


def check_alike(modules: dict[str, nn.Module], ranks: Ranks) -> None:
    """ValueError unless all ranks begin with the same whole parameters: averaged gradients alone keep them alike."""
    if ranks.world_size > 1:  # one would hash all its parameters for nobody
        check_same({role: _digest(module) for role, module in modules.items()}, ranks)


def check_same(found: Mapping[str, str], ranks: Ranks) -> None:
    """ValueError unless all ranks have found the same of each role."""
    for rank, theirs in enumerate(ranks.gathered(dict(found))):
        for role, digest in theirs.items():
            if digest != found[role]:
                raise ValueError(
                    f"rank {rank} begins with another {role} than rank {ranks.rank}: their files differ; give all "
                    f"ranks the same model"
                )


def _digest(module: nn.Module) -> str:
    total = hashlib.sha256()
    for _, parameter in module.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            total.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
