"""Euler's method with renewed noise: its formula, and the distribution that it must not change."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from twostep.zoo import sigma_grid
from twostep.zoo.sampling import euler


def test_a_step_is_ddims_with_eta() -> None:
    """Against DDIM's own terms (its eq. 12 and 16): alpha = (1 - s)^2 / ((1 - s)^2 + s^2), on states scaled to them."""
    x, z, v = torch.randn(3, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b, eta = 0.7, 0.4, 0.6
    levels: list[float] = []

    def eta_of(level: float) -> float:
        levels.append(level)
        return eta if level == a else 0.0

    found: list[Tensor] = []
    euler(lambda *_: v, x, (a, b, 0), eta=eta_of, fresh=lambda _: z, on_step=lambda _, state: found.append(state))
    assert levels == [a, b]
    norm = {s: math.hypot(1 - s, s) for s in (a, b)}
    alpha = {s: ((1 - s) / norm[s]) ** 2 for s in (a, b)}
    clean, noise = x - a * v, x + (1 - a) * v
    new = eta * math.sqrt((1 - alpha[b]) / (1 - alpha[a])) * math.sqrt(1 - alpha[a] / alpha[b])
    expected = math.sqrt(alpha[b]) * clean + math.sqrt(1 - alpha[b] - new**2) * noise + new * z
    assert torch.allclose(found[0], expected * norm[b], rtol=1e-12, atol=1e-12)
    assert torch.allclose(found[1], found[0] - b * v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_distribution_stays_and_the_noise_does_not(eta: float) -> None:
    """Clean samples are Gaussian, so that their velocity is known: whatever is renewed, the same ones come out."""
    mean, std, count = 1.5, 0.4, 20_000
    generator = torch.Generator().manual_seed(0)

    def velocity(x: Tensor, sigma: float) -> Tensor:
        off = x - (1 - sigma) * mean
        variance = ((1 - sigma) * std) ** 2 + sigma**2
        return sigma / variance * off - mean - (1 - sigma) * std**2 / variance * off

    noise = torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=generator)
    found = euler(
        velocity,
        noise,
        sigma_grid(400, 1.0),
        eta=lambda level: eta,
        fresh=lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator),
    )
    assert abs(found.mean() - mean) < 0.02 and abs(found.std() / std - 1) < 0.02
    kept = torch.corrcoef(torch.stack([noise.flatten(), found.flatten()]))[0, 1]
    assert kept > 0.999 if eta == 0 else 0.02 < kept < 0.98 if eta == 0.5 else abs(kept) < 0.02


def test_nothing_is_drawn_where_nothing_is_renewed() -> None:
    def refuse(x: Tensor) -> Tensor:
        raise AssertionError

    x, grid = torch.randn(2, 3), sigma_grid(3)
    expected = x
    for a, b in itertools.pairwise(grid):
        expected = expected + (b - a) * (expected * a)
    assert torch.equal(euler(lambda state, a: state * a, x, grid, fresh=refuse), expected)


@pytest.mark.parametrize("shift", [0.01228, 0.2, 0.38242, 0.5, 3.0])
def test_a_grid_begins_at_one_exactly(shift: float) -> None:
    assert sigma_grid(6, shift)[0] == 1.0
