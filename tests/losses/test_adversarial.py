"""Adversarial losses at the optimum, where densities say what D and the generator's gradient are; and known traps."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from twostep import losses

from .gaussians import Mixture, gaussian, two_modes

KINDS = ("softplus", "hinge", "bce", "relativistic")
GRID = torch.linspace(-9, 9, 6001, dtype=torch.float64)
REAL = two_modes()
MEAN = torch.tensor(0.3, dtype=torch.float64)
SPREAD = torch.tensor(1.1, dtype=torch.float64)


def normal(mean: Tensor, spread: Tensor) -> Mixture:
    return gaussian(mean.reshape(1), (spread**2).reshape(1, 1))


def density(of: Mixture, x: Tensor = GRID) -> Tensor:
    return of.log_density(x[:, None]).exp()


def log_ratio(x: Tensor, scale: float = 1.0) -> Tensor:
    """The optimal logit, log p_real / p_fake, as a fixed function of x."""
    return scale * (REAL.log_density(x[:, None]) - normal(MEAN, SPREAD).log_density(x[:, None]))


def gradient_of_discriminator(kind: str, logit: Tensor) -> Tensor:
    """The gradient of E_p[...] + E_q[...] with respect to the logit at each x of the grid, as a density."""
    real, fake = logit.clone().requires_grad_(), logit.clone().requires_grad_()
    losses.discriminator_loss(fake, real, kind=kind, reduction="sum").backward()
    return density(normal(MEAN, SPREAD)) * fake.grad + density(REAL) * real.grad


@pytest.mark.parametrize("kind", ["softplus", "bce"])
def test_log_density_ratio_is_the_optimal_logit(kind: str) -> None:
    at_optimum = gradient_of_discriminator(kind, log_ratio(GRID))
    torch.testing.assert_close(at_optimum, torch.zeros_like(GRID), rtol=0, atol=1e-14)
    # convex in the logit, so every other logit is pulled towards it
    for off in (-0.5, 0.5):
        away = gradient_of_discriminator(kind, log_ratio(GRID) + off)
        assert (away * off > 0).all()


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_relativistic_optimum_is_the_log_ratio_up_to_a_constant(offset: float) -> None:
    x = GRID[::100]
    logit = (log_ratio(x) + offset).requires_grad_()
    p, q = density(REAL, x), density(normal(MEAN, SPREAD), x)
    pairs = torch.cartesian_prod(torch.arange(len(x)), torch.arange(len(x)))  # every (real, fake)
    weight = p[pairs[:, 0]] * q[pairs[:, 1]]
    loss = losses.discriminator_loss(
        logit[pairs[:, 1]], logit[pairs[:, 0]], kind="relativistic", weight=weight, reduction="sum"
    )
    (slope,) = torch.autograd.grad(loss, logit)
    torch.testing.assert_close(slope, torch.zeros_like(x), rtol=0, atol=1e-12)


def test_hinge_pulls_by_the_difference_of_densities_inside_its_margin() -> None:
    p, q = density(REAL), density(normal(MEAN, SPREAD))
    torch.testing.assert_close(gradient_of_discriminator("hinge", 0.999 * torch.tanh(GRID)), q - p)
    torch.testing.assert_close(gradient_of_discriminator("hinge", torch.full_like(GRID, 1.001)), q)
    torch.testing.assert_close(gradient_of_discriminator("hinge", torch.full_like(GRID, -1.001)), -p)


def generator_gradient(kind: str) -> tuple[Tensor, ...]:
    """d/d(mean, spread) of E_z[loss(D(mean + spread z))] with the optimal D held fixed, by quadrature over z."""
    mean, spread = MEAN.clone().requires_grad_(), SPREAD.clone().requires_grad_()
    z = torch.linspace(-8, 8, 6001, dtype=torch.float64)
    weight = torch.exp(-0.5 * z**2) / (2 * torch.pi) ** 0.5 * (z[1] - z[0])
    loss = losses.generator_adversarial_loss(log_ratio(mean + spread * z), kind=kind, weight=weight, reduction="sum")
    return torch.autograd.grad(loss, [mean, spread])


def divergence_gradient(kind: str) -> tuple[Tensor, ...]:
    mean, spread = MEAN.clone().requires_grad_(), SPREAD.clone().requires_grad_()
    p, q = density(REAL), density(normal(mean, spread))
    kl = torch.trapezoid(q * (q / p).log(), GRID)
    if kind == "hinge":  # with D = log p/q: -E_q[D] is KL(q || p)
        value = kl
    else:  # Arjovsky and Bottou, arXiv 1701.04862, theorem 2.5: KL(q || p) - 2 JS(q || p)
        middle = (p + q) / 2
        value = kl - torch.trapezoid(q * (q / middle).log() + p * (p / middle).log(), GRID)
    return torch.autograd.grad(value, [mean, spread])


@pytest.mark.parametrize("kind", ["softplus", "bce", "hinge"])
def test_generator_follows_the_divergence_that_theory_names(kind: str) -> None:
    for got, wanted in zip(generator_gradient(kind), divergence_gradient(kind), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_discriminator_and_generator_find_the_target(kind: str) -> None:
    """Real N(1, 1), a generator that shifts N(0, 1), a discriminator of x alone: the signs of both losses at once."""
    generator = torch.Generator().manual_seed(0)
    shift = torch.zeros(1, requires_grad=True)
    discriminator = nn.Linear(1, 1)
    nn.init.zeros_(discriminator.weight)
    of_shift = torch.optim.SGD([shift], 0.05)
    of_discriminator = torch.optim.SGD(discriminator.parameters(), 0.2, weight_decay=0.1)
    for _ in range(400):
        fake, real = torch.randn(2, 256, 1, generator=generator).unbind()
        fake, real = fake + shift, real + 1
        loss = losses.discriminator_loss(discriminator(fake.detach()), discriminator(real), kind=kind)
        of_discriminator.zero_grad()
        loss.backward()
        of_discriminator.step()
        loss = losses.generator_adversarial_loss(
            discriminator(fake), discriminator(real), kind=kind, missing_gradient="error"
        )
        of_shift.zero_grad()
        loss.backward()
        of_shift.step()
    assert abs(shift.item() - 1) < 0.25


class Discriminator(nn.Module):
    """Frozen features and a trainable head, as the discriminators of this field are."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(6, 8).requires_grad_(False)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.features(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_discriminator_still_passes_the_gradient_to_its_input(kind: str) -> None:
    discriminator = Discriminator()
    x, real = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    expected = torch.autograd.grad(
        losses.generator_adversarial_loss(discriminator(x), discriminator(real), kind=kind), x
    )[0]
    assert expected.abs().min() > 0
    discriminator.requires_grad_(False)
    losses.generator_adversarial_loss(discriminator(x), discriminator(real), kind=kind).backward()
    assert torch.equal(x.grad, expected)
    assert all(p.grad is None for p in discriminator.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_discriminator_step_trains_the_head_and_nothing_else(kind: str) -> None:
    discriminator, student = Discriminator(), nn.Linear(6, 6)
    fake, real = student(torch.randn(4, 6)), torch.randn(4, 6)
    losses.discriminator_loss(discriminator(fake.detach()), discriminator(real), kind=kind).backward()
    assert discriminator.head.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in [*student.parameters(), *discriminator.features.parameters()])


@pytest.mark.parametrize("cut", ["no_grad", "detached sample"])
def test_a_cut_graph_is_noticed(cut: str) -> None:
    discriminator = Discriminator().requires_grad_(False)
    x = torch.randn(4, 6, requires_grad=True)
    if cut == "no_grad":
        with torch.no_grad():
            logits = discriminator(x)
    else:
        logits = discriminator(x.detach())
    with pytest.warns(UserWarning, match="fake_logits carries no gradient"):
        losses.generator_adversarial_loss(logits)
    with pytest.raises(ValueError, match=r"outside torch.no_grad\(\).*requires_grad_\(False\) on its parameters"):
        losses.generator_adversarial_loss(logits, missing_gradient="error")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        losses.generator_adversarial_loss(logits, missing_gradient="error")  # nobody asked for gradients
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses.generator_adversarial_loss(logits, missing_gradient="ignore")


@pytest.mark.parametrize("leaf", [True, False])
def test_a_sample_that_is_cut_off_from_a_trainable_discriminator_is_noticed(leaf: bool) -> None:
    """Its parameters carry a gradient, so that the logits alone do not tell."""
    discriminator, x = Discriminator(), torch.randn(4, 6, requires_grad=True)
    x = x if leaf else x * 2
    losses.generator_adversarial_loss(discriminator(x), sample=x, missing_gradient="error")
    with pytest.raises(ValueError, match="fake_logits carries no gradient of sample"):
        losses.generator_adversarial_loss(discriminator(x.detach()), sample=x, missing_gradient="error")
    with pytest.warns(UserWarning, match="fake_logits carries no gradient of sample"):
        losses.generator_adversarial_loss(discriminator(x), sample=x.detach())
    with pytest.raises(TypeError, match="sample is"):
        losses.generator_adversarial_loss(discriminator(x), sample=3)  # type: ignore[arg-type]


def test_a_whole_graph_is_not_complained_about() -> None:
    x = torch.randn(4, requires_grad=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*carries no gradient")
        losses.generator_adversarial_loss(x, missing_gradient="error")
        torch.func.grad(lambda d: losses.generator_adversarial_loss(d, missing_gradient="error"))(x.detach())
        torch.func.jvp(losses.generator_adversarial_loss, (x.detach(),), (torch.ones(4),))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_losing_side_never_loses_its_gradient(kind: str, dtype: torch.dtype) -> None:
    """At logits of 100 a sigmoid is 0 or 1 to the last bit; a loss through log(sigmoid) would be inf or dead."""
    low = torch.full((2,), -100.0, dtype=dtype)
    fake = low.clone().requires_grad_()
    loss = losses.generator_adversarial_loss(fake, -low, kind=kind, reduction="sum")
    loss.backward()
    assert loss.isfinite()
    assert torch.equal(fake.grad, -torch.ones_like(low))

    fake, real = (-low).clone().requires_grad_(), low.clone().requires_grad_()
    loss = losses.discriminator_loss(fake, real, kind=kind, reduction="sum")
    loss.backward()
    assert loss.isfinite()
    assert torch.equal(fake.grad, torch.ones_like(low))
    assert torch.equal(real.grad, -torch.ones_like(low))


@pytest.mark.parametrize("kind", KINDS)
def test_the_winning_side_is_at_rest(kind: str) -> None:
    fake, real = torch.full((2,), -100.0, requires_grad=True), torch.full((2,), 100.0, requires_grad=True)
    losses.discriminator_loss(fake, real, kind=kind).backward()
    assert fake.grad.abs().max() < 1e-40
    assert real.grad.abs().max() < 1e-40


def test_bce_is_softplus() -> None:
    fake, real = torch.randn(2, 50, dtype=torch.float64).mul(30).unbind()
    fake.requires_grad_()
    for loss in (losses.discriminator_loss, losses.generator_adversarial_loss):
        torch.testing.assert_close(loss(fake, real, kind="bce"), loss(fake, real, kind="softplus"), rtol=1e-14, atol=0)


def test_softplus_keeps_float64_where_torchs_own_switches_to_a_line() -> None:
    d = torch.tensor([21.0], dtype=torch.float64)
    exact = 21 + torch.log1p(torch.exp(-d)).item()
    assert losses.generator_adversarial_loss(-d, missing_gradient="ignore").item() == pytest.approx(exact, rel=1e-15)


def test_relativistic_real_logits_are_data_for_the_generator() -> None:
    fake, real = torch.randn(2, 4).unbind()
    real.requires_grad_()
    losses.generator_adversarial_loss(fake.requires_grad_(), real, kind="relativistic").backward()
    assert real.grad is None


@pytest.mark.parametrize("scale", [0.01, 0.1])
def test_approximate_r1_is_r1_for_a_linear_discriminator(scale: float) -> None:
    slope = torch.tensor([[0.5, -2.0, 1.0]], dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    # noise whose mean and covariance are exactly those of the standard normal: +-sqrt(3) along each axis
    noise = 3**0.5 * torch.cat([torch.eye(3), -torch.eye(3)]).double()
    penalties = [losses.approximate_r1(x @ slope.T, (x + scale * n) @ slope.T) for n in noise]
    torch.testing.assert_close(sum(penalties) / 6, scale**2 * slope.square().sum())


def test_approximate_r1_reaches_the_discriminator_through_both_logits() -> None:
    discriminator = Discriminator()
    x, near = torch.randn(4, 6), torch.randn(4, 6)
    losses.approximate_r1(discriminator(x), discriminator(near)).backward()
    whole = discriminator.head.weight.grad.clone()
    parts = torch.zeros_like(whole)
    for cut_first in (True, False):
        twin = copy.deepcopy(discriminator)
        twin.zero_grad()
        a, b = twin(x), twin(near)
        losses.approximate_r1(a.detach() if cut_first else a, b if cut_first else b.detach()).backward()
        parts += twin.head.weight.grad
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda d: losses.generator_adversarial_loss(d, kind="wasserstein"),
            "generator_adversarial_loss: kind is 'wasserstein', expected one of 'softplus', 'hinge', 'bce', 'relat",
        ),
        (lambda d: losses.discriminator_loss(d, d, kind="lsgan"), "discriminator_loss: kind is 'lsgan', expected one"),
        (
            lambda d: losses.generator_adversarial_loss(d, kind="relativistic"),
            "kind 'relativistic' compares pairs: pass real_logits",
        ),
        (
            lambda d: losses.generator_adversarial_loss(d, missing_gradient="raise"),
            "missing_gradient is 'raise', expected one of 'warn', 'error', 'ignore'",
        ),
        (lambda d: losses.discriminator_loss(d, d[:, None]), r"real_logits has shape \[3, 1\], expected \[3\]"),
    ],
)
def test_says_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, requires_grad=True))
