"""Sigma grids, and Euler's method on them.

    sigma = s u / (1 + (s - 1) u),   u = 1, 1 - 1/N, ..., 1/N, and then 0

The shift s moves the steps towards noise; 3 gives Z-Image-Turbo's grids: 1, .75, 0 and 1, .9545, .9, .8333, ... for 2
and 8.

A step from a to b may renew part of the noise e that the state holds, which mends mistakes of earlier steps; DDIM's eta
(arXiv 2010.02502, eq. 16) in the terms of the straight path, whose state at b is (1 - b) x_0 + b e:

    x_b = (1 - b) x_0 + sqrt(b^2 - u^2) e + u z,   z new noise,   u = eta b sqrt(1 - ((1 - a) b / ((1 - b) a))^2)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ROUNDING = 1e-6  # of levels, which come in float32 and as Python's numbers: a bound belongs to the interval


def sigma_grid(steps: int, shift: float = 3.0) -> tuple[float, ...]:
    """The sigmas of `steps` Euler steps: steps + 1 numbers from 1 down to 0, shifted once."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"sigma_grid: steps is {steps!r}, expected a whole number of at least 1")
    if not 0 < shift < float("inf"):
        raise ValueError(f"sigma_grid: shift is {shift}, expected a positive number; 1 is no shift")
    inner = [1 - i / steps for i in range(1, steps)]
    return (1.0, *(shift * u / (1 + (shift - 1) * u) for u in inner), 0.0)  # 1 itself may round to either side


def check_grid(owner: str, sigmas: Sequence[float]) -> tuple[float, ...]:
    """A grid that starts in [0, 1] and falls strictly to 0."""
    grid = tuple(float(sigma) for sigma in sigmas)
    falls = all(a > b for a, b in itertools.pairwise(grid))
    if len(grid) < 2 or not falls or grid[0] > 1 or grid[-1] != 0:
        raise ValueError(
            f"{owner}: sigmas are {list(grid)}, expected at least two numbers that fall strictly from at most 1 to 0"
        )
    return grid


def euler(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    sigmas: Sequence[float],
    *,
    eta: Callable[[float], float] = lambda level: 0.0,
    fresh: Callable[[Tensor], Tensor] = torch.randn_like,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """x_b = x_a + (b - a) v over the grid, in float32 whatever the network computes in; float64 stays.

    Args:
        eta: of a step that begins at this level; 0 renews nothing.
        fresh: new noise for a state.
    """
    x = x if x.dtype == torch.float64 else x.float()
    for step, (a, b) in enumerate(itertools.pairwise(sigmas)):
        v = velocity(x, a).to(x.dtype)
        after = x + (b - a) * v
        if renewed := _renewed(a, b, eta(a)):
            after = after + (math.sqrt(b * b - renewed * renewed) - b) * (x + (1 - a) * v) + renewed * fresh(x)
        x = after
        if on_step is not None:
            on_step(step, x)
    return x


def _renewed(a: float, b: float, eta: float) -> float:
    """u of the formula at the top."""
    return eta * b * math.sqrt(max(0.0, 1 - ((1 - a) * b / ((1 - b) * a)) ** 2))
