"""The losses and the two-step backward in a loop of one's own, with nothing else of this library."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from twostep import losses, ops

from .gaussians import Mixture, example, gaussian


def pushed_forward(image_of_noise) -> Mixture:
    """The density of an affine function of normal noise: its value at 0, and its columns."""
    with torch.no_grad():
        mean = image_of_noise(torch.zeros(1, 2, dtype=torch.float64))[0]
        columns = image_of_noise(torch.eye(2, dtype=torch.float64)) - mean
    return gaussian(mean, columns.T @ columns)


@pytest.mark.parametrize("mode", ["recompute", "retain", "plain"])
def test_two_steps_reach_the_target_by_exact_scores(mode: str) -> None:
    torch.manual_seed(0)
    first, second, real, mid = nn.Linear(2, 2).double(), nn.Linear(2, 2).double(), example(), 0.75
    generator = torch.Generator().manual_seed(0)
    sampled = {
        "x_A": lambda eps: eps - first(eps),
        "x": lambda eps: (z := eps + (mid - 1) * first(eps)) - mid * second(z),
    }

    def by_scores(name: str):
        def loss(x: Tensor) -> Tensor:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            sigma = losses.uniform_sigmas(1, 0.02, 0.98, generator=generator).item()
            noised = ((1 - sigma) * x + sigma * noise).detach()
            fake = pushed_forward(sampled[name])
            return losses.dmd_loss(x, real.clean(noised, sigma), fake.clean(noised, sigma))

        return loss

    optimizer = torch.optim.Adam([*first.parameters(), *second.parameters()], lr=0.05, betas=(0.5, 0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        noise = torch.randn(64, 2, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        ops.two_step_backward(
            first, second, noise, (1, mid, 0), by_scores("x_A"), by_scores("x"), mode=mode, inherit=0.1
        )
        optimizer.step()
        schedule.step()
    for image in sampled.values():
        reached = pushed_forward(image)
        torch.testing.assert_close(reached.means, real.means, rtol=0, atol=2e-3)
        torch.testing.assert_close(reached.covariances, real.covariances, rtol=0, atol=5e-3)
