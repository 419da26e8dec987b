"""Densities whose noised scores, posterior means and flows are known exactly: the oracle of these tests, in float64.

With x_sigma = (1 - sigma) x + sigma eps, a Gaussian N(m, C) becomes N((1 - sigma) m, (1 - sigma)^2 C + sigma^2 I), and
a mixture the mixture of its noised parts. Tweedie: the posterior mean of x is (x_sigma + sigma^2 score) / (1 - sigma).
test_gaussians.py holds these formulas against numerical integration.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """sum_k weights[k] N(means[k], covariances[k]); one part makes a Gaussian."""

    weights: Tensor  # [K]
    means: Tensor  # [K, D]
    covariances: Tensor  # [K, D, D]

    @property
    def width(self) -> int:
        return self.means.shape[1]

    def noised(self, sigma: float) -> Mixture:
        eye = torch.eye(self.width, dtype=torch.float64)
        return Mixture(self.weights, (1 - sigma) * self.means, (1 - sigma) ** 2 * self.covariances + sigma**2 * eye)

    def log_density(self, x: Tensor) -> Tensor:  # [N, D] -> [N]
        return torch.logsumexp(self._log_parts(x, self._pulls(x)), 1)

    def score(self, x: Tensor) -> Tensor:
        """The gradient of log_density, written out: sum_k p(k | x) C_k^-1 (m_k - x)."""
        pulls = self._pulls(x)
        share = torch.softmax(self._log_parts(x, pulls), 1)
        return (share[..., None] * pulls).sum(1)

    def _pulls(self, x: Tensor) -> Tensor:  # C_k^-1 (m_k - x): [N, K, D]
        return torch.einsum("kde,nke->nkd", torch.linalg.inv(self.covariances), self.means - x[:, None])

    def _log_parts(self, x: Tensor, pulls: Tensor) -> Tensor:  # log (weight_k N(x; m_k, C_k)): [N, K]
        distance = ((self.means - x[:, None]) * pulls).sum(2)
        scale = torch.logdet(self.covariances) + self.width * math.log(2 * math.pi)
        return self.weights.log() - 0.5 * (distance + scale)

    def clean(self, x_sigma: Tensor, sigma: float) -> Tensor:
        """E[x | x_sigma], what a perfect denoiser predicts."""
        return (x_sigma + sigma**2 * self.noised(sigma).score(x_sigma)) / (1 - sigma)

    def velocity(self, x_sigma: Tensor, sigma: float) -> Tensor:
        """E[eps - x | x_sigma]; at sigma 1 that is x_sigma - E[x]."""
        if sigma == 1:
            return x_sigma - self.weights @ self.means
        return (x_sigma - self.clean(x_sigma, sigma)) / sigma

    def flow(self, noise: Tensor, sigma: float) -> Tensor:
        """Where the ODE dx/dsigma = velocity, started at sigma 1 in `noise`, stands at sigma. One Gaussian only.

        In each eigendirection of C the density stays Gaussian and the ODE, being linear, keeps the standard score.
        """
        assert len(self.weights) == 1
        values, vectors = torch.linalg.eigh(self.covariances[0])
        spread = ((1 - sigma) ** 2 * values + sigma**2).sqrt()
        return (1 - sigma) * self.means[0] + (noise @ vectors * spread) @ vectors.T


def gaussian(mean: Tensor, covariance: Tensor) -> Mixture:
    return Mixture(torch.ones(1, dtype=torch.float64), mean[None], covariance[None])


def kl(q_mean: Tensor, q_cov: Tensor, p_mean: Tensor, p_cov: Tensor) -> Tensor:
    """KL(q || p) of two Gaussians."""
    gap = p_mean - q_mean
    return 0.5 * (
        torch.trace(torch.linalg.solve(p_cov, q_cov))
        + gap @ torch.linalg.solve(p_cov, gap)
        - len(gap)
        + torch.logdet(p_cov)
        - torch.logdet(q_cov)
    )


def normal_quadrature(points: int, width: int) -> tuple[Tensor, Tensor]:
    """Nodes [points**width, width] and weights of E f(z), z standard normal; exact for degrees below 2 * points."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    weights = weights / weights.sum()
    grid = np.array(list(itertools.product(nodes, repeat=width)))
    products = np.array([np.prod(w) for w in itertools.product(weights, repeat=width)])
    return torch.from_numpy(grid), torch.from_numpy(products)


def integrate(velocity, noise: Tensor, sigma: float, steps: int) -> Tensor:
    """Runge-Kutta of fourth order from sigma 1, for a velocity(x, sigma) without a closed flow."""
    x, h = noise, (sigma - 1) / steps
    for i in range(steps):
        s = 1 + i * h
        k1 = velocity(x, s)
        k2 = velocity(x + h / 2 * k1, s + h / 2)
        k3 = velocity(x + h / 2 * k2, s + h / 2)
        k4 = velocity(x + h * k3, s + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def example(width: int = 2) -> Mixture:
    """A Gaussian with correlated, unequal directions, off the origin."""
    mix = torch.tensor([[1.2, 0.0, 0.0], [0.5, 0.6, 0.0], [-0.3, 0.2, 0.9]], dtype=torch.float64)[:width, :width]
    return gaussian(torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64)[:width], mix @ mix.T)


def two_modes() -> Mixture:
    return Mixture(
        torch.tensor([0.3, 0.7], dtype=torch.float64),
        torch.tensor([[-1.5], [1.0]], dtype=torch.float64),
        torch.tensor([[[0.2]], [[0.5]]], dtype=torch.float64),
    )
