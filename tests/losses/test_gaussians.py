"""The oracle's own formulas, against numerical integration and differentiation."""

from __future__ import annotations

import pytest
import torch

from .gaussians import example, gaussian, integrate, kl, normal_quadrature, two_modes

X = torch.linspace(-12, 12, 24001, dtype=torch.float64)[:, None]
STEP = float(X[1, 0] - X[0, 0])


@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.95])
def test_posterior_mean_is_the_integral(sigma: float) -> None:
    density = two_modes()
    at = torch.tensor([[-1.0], [0.2], [1.7]], dtype=torch.float64)
    joint = density.log_density(X).exp() * torch.exp(-0.5 * ((at - (1 - sigma) * X.T) / sigma) ** 2)  # [3, N]
    expected = (joint @ X) / joint.sum(1, keepdim=True)
    torch.testing.assert_close(density.clean(at, sigma), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(density.velocity(at, sigma), ((at - (1 - sigma) * expected) / sigma) - expected)


def test_velocity_is_continuous_at_pure_noise() -> None:
    at = torch.tensor([[-1.0], [0.2], [1.7]], dtype=torch.float64)
    torch.testing.assert_close(two_modes().velocity(at, 1 - 1e-6), two_modes().velocity(at, 1), rtol=1e-4, atol=1e-4)


def test_score_is_the_gradient_of_the_log_density() -> None:
    at = torch.randn(7, 1, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(two_modes().log_density(at).sum(), at)
    torch.testing.assert_close(two_modes().score(at), expected)


@pytest.mark.parametrize("sigma", [0.9, 0.75, 0.3, 0.01])
def test_flow_solves_the_ode(sigma: float) -> None:
    noise = torch.randn(5, 3, dtype=torch.float64)
    expected = integrate(example(3).velocity, noise, sigma, 100)
    torch.testing.assert_close(example(3).flow(noise, sigma), expected, rtol=1e-6, atol=1e-6)


def test_kl_is_the_expected_log_ratio() -> None:
    p, q = example(2), gaussian(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64) * 0.5)
    nodes, weights = normal_quadrature(4, 2)
    x = nodes * 0.5**0.5
    expected = weights @ (q.log_density(x) - p.log_density(x))
    actual = kl(q.means[0], q.covariances[0], p.means[0], p.covariances[0])
    torch.testing.assert_close(actual, expected)


def test_noised_density_is_the_convolution() -> None:
    at, sigma = torch.tensor([[0.3]], dtype=torch.float64), 0.6
    density = two_modes()
    kernel = torch.distributions.Normal((1 - sigma) * X[:, 0], sigma).log_prob(at[0]).exp()
    expected = STEP * (density.log_density(X).exp() @ kernel)
    torch.testing.assert_close(density.noised(sigma).log_density(at).exp()[0], expected, rtol=1e-9, atol=0)
