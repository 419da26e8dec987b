"""Muon (Jordan et al. 2024): momentum, made orthogonal, for the matrices inside blocks.

    m <- lerp(m, g, 1 - mu)      u = lerp(g, m, mu)      W <- W - lr sqrt(max(1, rows / columns)) (u u^T)^-1/2 u

torch.optim.Muon's update and state. What differs: matrices of one shape go through the Newton-Schulz iteration
together, and on a CPU in float32. torch takes one after the other in bfloat16, which a CPU without units for it
multiplies so slowly that the optimizer of the miniature took five times as long as its forward and backward.

Of matrices in shards (FSDP2) each rank makes its share whole, every n-th of a shape, and gives the rows back: two
all-to-alls of a shape, and no rank repeats another's work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .sharding import local, rows_of_parts, shard_dimension

STEPS = 5
A, B, C = 3.4445, -4.7750, 2.0315  # a quintic that is steep at 0: singular values end in about [.7, 1.2]


class Muon(torch.optim.Muon):
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[Any, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    divided = isinstance(parameter, DTensor) and (parameter.device_mesh, shard_dimension(parameter))
                    alike.setdefault((parameter.shape, divided), []).append(parameter)
            for (shape, _), parameters in alike.items():
                updates = torch.stack([self._momentum(parameter, group["momentum"]) for parameter in parameters])
                size = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for parameter, direction in zip(parameters, _directions(updates, parameters[0]), strict=True):
                    mine = local(parameter)
                    mine.mul_(1 - group["lr"] * group["weight_decay"])
                    mine.add_(direction.to(mine.dtype), alpha=-size)
        return loss

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """The update before it is made orthogonal: of a divided parameter, this rank's rows."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        buffer, gradient = local(state["momentum_buffer"]), local(parameter.grad)
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)


def _directions(updates: Tensor, like: Tensor) -> Tensor:
    """The directions of updates [n, rows, columns], or, in shards like `like`, of [n, this rank's rows, columns]."""
    updates = updates.float() if updates.device.type == "cpu" else updates.bfloat16()
    dimension = shard_dimension(like) if isinstance(like, DTensor) else None
    if dimension is None:
        return orthogonal(updates)
    group = like.device_mesh.get_group(dimension)  # type: ignore[attr-defined]
    rank, heights = dist.get_rank(group), rows_of_parts(like.shape[0], dist.get_world_size(group))
    owned = [len(updates[owner :: len(heights)]) for owner in range(len(heights))]  # of owner: every n-th matrix
    columns = like.shape[1]

    def exchange(parts: Sequence[Tensor], shapes: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """Gives every rank its part, and has one of each, in these shapes."""
        sizes = [n * height * width for n, height, width in shapes]
        received = updates.new_empty(sum(sizes))
        given = torch.cat([part.reshape(-1) for part in parts])
        dist.all_to_all_single(received, given, sizes, [part.numel() for part in parts], group=group)
        return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]

    bands = exchange(
        [updates[owner :: len(heights)] for owner in range(len(heights))],
        [(owned[rank], height, columns) for height in heights],
    )
    whole = torch.cat(bands, dim=1)
    found = orthogonal(whole) if len(whole) else whole
    back = exchange(found.split(heights, dim=1), [(n, heights[rank], columns) for n in owned])
    directions = torch.empty_like(updates)
    for owner, part in enumerate(back):
        directions[owner :: len(heights)] = part
    return directions


def orthogonal(x: Tensor) -> Tensor:
    """x: [n, rows, columns]. About (x x^T)^-1/2 x, by five steps of Newton and Schulz."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7).view(-1, 1, 1)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x
