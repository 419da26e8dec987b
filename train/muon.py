"""Muon (Jordan et al. 2024): momentum, made orthogonal, for the matrices inside blocks.

    m <- lerp(m, g, 1 - mu)      u = lerp(g, m, mu)      W <- W - lr sqrt(max(1, rows / columns)) (u u^T)^-1/2 u

torch.optim.Muon's update and state. What differs: matrices of one shape go through the Newton-Schulz iteration
together, and on a CPU in float32. torch takes one after the other in bfloat16, which a CPU without units for it
multiplies so slowly that the optimizer of the miniature took five times as long as its forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
            alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._momentum(parameter, group["momentum"])
                    alike.setdefault((min(update.shape), max(update.shape)), []).append((parameter, update))
            for pairs in alike.values():
                wide = [update.T if update.shape[0] > update.shape[1] else update for _, update in pairs]
                for (parameter, update), direction in zip(pairs, orthogonal(torch.stack(wide)), strict=True):
                    rows, columns = parameter.shape
                    turned = direction.T if update.shape[0] > update.shape[1] else direction
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(turned.to(parameter.dtype), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)
        return loss

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum_buffer"], momentum)


def orthogonal(x: Tensor) -> Tensor:
    """x: [n, rows, columns], rows at most columns. About (x x^T)^-1/2 x, by five steps of Newton and Schulz."""
    x = x.float() if x.device.type == "cpu" else x.bfloat16()
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7).view(-1, 1, 1)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x
