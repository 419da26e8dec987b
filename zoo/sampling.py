"""Sigma grids, and Euler's method on them.

    sigma = s u / (1 + (s - 1) u),   u = 1, 1 - 1/N, ..., 1/N, and then 0

The shift s moves the steps towards noise; 3 gives Z-Image-Turbo's grids: 1, .75, 0 and 1, .9545, .9, .8333, ... for 2
and 8.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def sigma_grid(steps: int, shift: float = 3.0) -> tuple[float, ...]:
    """The sigmas of `steps` Euler steps: steps + 1 numbers from 1 down to 0, shifted once."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"sigma_grid: steps is {steps!r}, expected a whole number of at least 1")
    if not 0 < shift < float("inf"):
        raise ValueError(f"sigma_grid: shift is {shift}, expected a positive number; 1 is no shift")
    linear = [1 - i / steps for i in range(steps)]
    return (*(shift * u / (1 + (shift - 1) * u) for u in linear), 0.0)


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
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """x_b = x_a + (b - a) v over the grid, in float32 whatever the network computes in; float64 stays."""
    x = x if x.dtype == torch.float64 else x.float()
    for step, (a, b) in enumerate(itertools.pairwise(sigmas)):
        x = x + (b - a) * velocity(x, a).to(x.dtype)
        if on_step is not None:
            on_step(step, x)
    return x
