"""The weights against f itself, and DMD with them against the gradient of the divergence they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from twostep import losses

from .gaussians import gaussian, normal_quadrature, two_modes

F = {
    "reverse_kl": lambda r: -r.log(),
    "softened_reverse_kl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "squared_hellinger": lambda r: 1 - r.sqrt(),
    "forward_kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
}
EACH = pytest.mark.parametrize("divergence", F)


@EACH
def test_weight_is_r_squared_times_f_twice_differentiated(divergence: str) -> None:
    logit = torch.linspace(-6, 6, 25, dtype=torch.float64)
    r = logit.exp()
    second = torch.func.vmap(torch.func.grad(torch.func.grad(F[divergence])))(r)
    torch.testing.assert_close(losses.f_divergence_weight(logit, divergence), r**2 * second, rtol=1e-9, atol=1e-12)


TEACHERS = {
    "N(.4, .8)": gaussian(torch.tensor([0.4], dtype=torch.float64), torch.tensor([[0.8]], dtype=torch.float64)),
    "two modes": two_modes(),
}


@EACH
@pytest.mark.parametrize("teacher", TEACHERS)
def test_weighted_dmd_descends_the_divergence(divergence: str, teacher: str) -> None:
    """Of a student N(m, s^2): the gradient of D_f(p_sigma || q_sigma) by quadrature over x_sigma."""
    sigma = 0.5
    mean = torch.tensor(-0.1, dtype=torch.float64, requires_grad=True)
    spread = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    real = TEACHERS[teacher]

    def student(m: Tensor, s: Tensor):
        return gaussian(m[None], (s**2)[None, None])

    nodes, probability = normal_quadrature(80, 2)
    z, noise = nodes.chunk(2, 1)
    x = mean + spread * z
    x_sigma = ((1 - sigma) * x + sigma * noise).detach()
    fake = student(mean.detach(), spread.detach())
    real_clean, fake_clean = real.clean(x_sigma, sigma), fake.clean(x_sigma, sigma)
    logit = real.noised(sigma).log_density(x_sigma) - fake.noised(sigma).log_density(x_sigma)  # the optimal D's
    weight = losses.f_divergence_weight(logit, divergence)
    given_back = (x - real_clean).abs().mean(1).detach() * (1 - sigma) ** 2 / sigma**2
    loss = losses.dmd_loss(x, real_clean, fake_clean, weight=weight * probability * given_back, reduction="sum")
    actual = torch.autograd.grad(loss, [mean, spread])

    grid = torch.linspace(-9, 9, 20001, dtype=torch.float64)[:, None]
    p = real.noised(sigma).log_density(grid).exp()
    var = (1 - sigma) ** 2 * spread**2 + sigma**2
    q = torch.exp(-0.5 * (grid[:, 0] - (1 - sigma) * mean) ** 2 / var) / (2 * torch.pi * var).sqrt()
    value = torch.trapezoid(q * F[divergence](p / q), grid[:, 0])
    for got, wanted in zip(actual, torch.autograd.grad(value, [mean, spread]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


@EACH
def test_normalized_weights_average_one_and_never_overflow(divergence: str) -> None:
    logit = torch.tensor([-200.0, -3.0, 0.5, 200.0])
    weight = losses.f_divergence_weight(logit, divergence, normalize=True)
    assert weight.isfinite().all()
    torch.testing.assert_close(weight.mean(), torch.tensor(1.0))
    mild = torch.randn(5, dtype=torch.float64)
    plain = losses.f_divergence_weight(mild, divergence)
    torch.testing.assert_close(losses.f_divergence_weight(mild, divergence, normalize=True), plain / plain.mean())


def test_logits_are_averaged_bounded_and_data() -> None:
    logit = torch.randn(3, 4, 2, requires_grad=True)
    weight = losses.f_divergence_weight(logit, "forward_kl")
    assert not weight.requires_grad
    torch.testing.assert_close(weight, logit.detach().mean((1, 2)).exp())
    several = losses.f_divergence_weight(torch.tensor([[100.0, -2.0]]), "forward_kl", max_logit=3.0)
    assert several.log().item() == pytest.approx(0.5)  # of each logit, and not of their mean
    bounded = losses.f_divergence_weight(torch.tensor([-9.0, 0.0, 9.0]), "forward_kl", max_logit=2.0)
    torch.testing.assert_close(bounded, torch.tensor([-2.0, 0.0, 2.0]).exp())
    assert losses.f_divergence_weight(torch.ones(2, dtype=torch.bfloat16), "jeffreys").dtype == torch.float32


@pytest.mark.parametrize(
    ("logit", "options", "error", "message"),
    [
        (torch.ones(2), {"divergence": "kl"}, ValueError, "divergence is 'kl', expected one of 'reverse_kl', "),
        (torch.ones(()), {}, ValueError, r"logit has shape \[\], expected \[batch, ...\]"),
        (torch.ones(2), {"max_logit": 0}, ValueError, "max_logit is 0, expected a number above 0"),
        (1.0, {}, TypeError, "logit is float, expected a torch.Tensor"),
    ],
)
def test_says_what_is_wrong(logit: object, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        losses.f_divergence_weight(logit, **{"divergence": "forward_kl", **options})
