"""Flow matching's minimiser is the velocity of the density, which for Gaussians is an affine function of x_sigma."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from twostep import losses

from .gaussians import example, normal_quadrature

EACH = pytest.mark.parametrize("loss", [losses.flow_matching_loss, losses.fake_score_loss])


@EACH
@pytest.mark.parametrize("sigma", [0.2, 0.5, 0.9])
def test_exact_velocity_is_the_minimiser(loss: Callable[..., Tensor], sigma: float) -> None:
    """By exact quadrature, the gradient by an affine velocity vanishes at the exact one, and only there."""
    density = example()
    nodes, probability = normal_quadrature(3, 4)
    z, noise = nodes.chunk(2, 1)
    x = density.means[0] + z @ torch.linalg.cholesky(density.covariances[0]).T
    x_sigma = (1 - sigma) * x + sigma * noise
    origin = density.velocity(torch.zeros(1, 2, dtype=torch.float64), sigma)[0]
    slope = density.velocity(torch.eye(2, dtype=torch.float64), sigma) - origin  # rows: images of the axes
    affine = [slope.requires_grad_(), origin.requires_grad_()]
    value = loss(x_sigma @ affine[0] + affine[1], x, noise, weight=probability, reduction="sum")
    for gradient in torch.autograd.grad(value, affine):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    for moved in ([affine[0] + 0.1, affine[1]], [affine[0], affine[1] - 0.1]):
        assert loss(x_sigma @ moved[0] + moved[1], x, noise, weight=probability, reduction="sum") > value + 1e-3


@EACH
def test_sigma_squared_makes_it_the_loss_of_clean_predictions(loss: Callable[..., Tensor]) -> None:
    v, x, noise = torch.randn(3, 4, 5, dtype=torch.float64).unbind()
    sigma = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    clean = (1 - sigma[:, None]) * x + sigma[:, None] * noise - sigma[:, None] * v
    torch.testing.assert_close(loss(v, x, noise, weight=sigma**2), (clean - x).square().mean())


def test_fake_score_step_leaves_the_student_alone() -> None:
    student, fake = nn.Linear(4, 4), nn.Linear(4, 4)
    x, noise = student(torch.randn(3, 4)), torch.randn(3, 4)
    v = fake(0.5 * x.detach() + 0.5 * noise)
    losses.fake_score_loss(v, x, noise).backward()
    assert all(p.grad is None for p in student.parameters())
    assert all(p.grad is not None for p in fake.parameters())
