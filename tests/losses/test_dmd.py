"""DMD against the KL divergences it descends, with scores that are known exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from twostep import losses, ops
from twostep.ops import reference

from .gaussians import Mixture, example, gaussian, kl, normal_quadrature, two_modes


class Student:
    """x = mean + z mix^T, a one-step generator of N(mean, mix mix^T)."""

    def __init__(self, width: int = 2) -> None:
        self.mean = torch.linspace(-0.5, 0.8, width, dtype=torch.float64).requires_grad_()
        self.mix = (0.7 * torch.eye(width, dtype=torch.float64) + 0.1).requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        return [self.mean, self.mix]

    def __call__(self, z: Tensor) -> Tensor:
        return self.mean + z @ self.mix.T

    def density(self) -> Mixture:
        return gaussian(self.mean.detach(), (self.mix @ self.mix.T).detach())


def predictions(student: Student, real: Mixture, sigma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, its two exact clean predictions, and quadrature weights over (z, eps), all exact for Gaussians."""
    nodes, probability = normal_quadrature(3, 2 * len(student.mean))
    z, noise = nodes.chunk(2, 1)
    x = student(z)
    x_sigma = ((1 - sigma) * x + sigma * noise).detach()
    return x, real.clean(x_sigma, sigma), student.density().clean(x_sigma, sigma), probability


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_gradient_is_that_of_the_kl(sigma: float) -> None:
    student, real = Student(), example()
    x, real_clean, fake_clean, probability = predictions(student, real, sigma)
    # What DMD divides by, and Tweedie's factor between clean predictions and scores, given back as weights:
    # d KL(q_sigma || p_sigma) = E[(s_fake - s_real) d x_sigma],
    # fake_clean - real_clean = sigma^2 / (1 - sigma) (s_fake - s_real)
    normalizer = (x - real_clean).abs().mean(1).detach()
    weight = probability * normalizer * (1 - sigma) ** 2 / sigma**2 * x.shape[1]
    actual = torch.autograd.grad(
        losses.dmd_loss(x, real_clean, fake_clean, weight=weight, reduction="sum"), student.parameters
    )

    noised = real.noised(sigma)
    q_mean = (1 - sigma) * student.mean
    q_cov = (1 - sigma) ** 2 * student.mix @ student.mix.T + sigma**2 * torch.eye(2, dtype=torch.float64)
    divergence = kl(q_mean, q_cov, noised.means[0], noised.covariances[0])
    for got, wanted in zip(actual, torch.autograd.grad(divergence, student.parameters), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("normalizer", ["dmd", "guided", "separate", "none"])
def test_a_student_reaches_the_target(normalizer: str) -> None:
    student, real = Student(), example()
    generator = torch.Generator().manual_seed(0)
    steps = 300
    optimizer = torch.optim.Adam(student.parameters, lr=0.1, betas=(0.5, 0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        z, noise = torch.randn(2, 64, 2, generator=generator, dtype=torch.float64)
        sigma = losses.uniform_sigmas(1, 0.02, 0.98, generator=generator, dtype=torch.float64).item()
        x = student(z)
        x_sigma = ((1 - sigma) * x + sigma * noise).detach()
        real_clean, fake_clean = real.clean(x_sigma, sigma), student.density().clean(x_sigma, sigma)
        if normalizer == "dmd":
            loss = losses.dmd_loss(x, real_clean, fake_clean)
        else:
            loss = losses.decoupled_dmd_loss(
                x,
                dm_real_clean=real_clean,
                dm_fake_clean=fake_clean,
                ca_cond_clean=real_clean,
                ca_uncond_clean=real_clean,
                guidance=1.0,
                normalizer=normalizer,
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    # At the target both scores agree for every sample: the gradient has no noise left, and the end is nearly exact.
    torch.testing.assert_close(student.density().means, real.means, rtol=0, atol=1e-3)
    torch.testing.assert_close(student.density().covariances, real.covariances, rtol=0, atol=2e-3)


def test_guidance_moves_the_student_beyond_its_target() -> None:
    """Augmentation pushes from the unconditional towards the conditional prediction, not the other way."""
    x = torch.zeros(1, 4, requires_grad=True)
    cond, uncond = torch.full((1, 4), 1.0), torch.full((1, 4), 0.5)
    loss = losses.decoupled_dmd_loss(
        x, dm_real_clean=cond, dm_fake_clean=cond, ca_cond_clean=cond, ca_uncond_clean=uncond, guidance=3.0
    )
    loss.backward()
    assert (x.grad < 0).all()  # descent raises x, towards cond and past it


GUIDANCE = 4.5


def guided_parts(sigma_dm: float, sigma_ca: float, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """A conditional and an unconditional real density, and a student, at two re-noise levels."""
    generator = torch.Generator().manual_seed(1)
    cond, student = two_modes(), Student(1)
    uncond = gaussian(torch.zeros(1, dtype=torch.float64), torch.full((1, 1), 2.0, dtype=torch.float64))
    z, noise = torch.randn(2, 16, 1, generator=generator, dtype=torch.float64)
    x = student(z).detach()
    at_dm, at_ca = ((1 - s) * x + s * noise for s in (sigma_dm, sigma_ca))
    clean = {
        "dm_real_clean": cond.clean(at_dm, sigma_dm),
        "dm_fake_clean": student.density().clean(at_dm, sigma_dm),
        "ca_cond_clean": cond.clean(at_ca, sigma_ca),
        "ca_uncond_clean": uncond.clean(at_ca, sigma_ca),
    }
    # four samples of four values: the normalisers then average
    return x.reshape(4, 4).to(dtype).requires_grad_(), {k: t.reshape(4, 4).to(dtype) for k, t in clean.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_at_a_shared_level_decoupled_is_guided_dmd(dtype: torch.dtype) -> None:
    x, clean = guided_parts(0.6, 0.6, dtype)
    guided = clean["ca_uncond_clean"] + GUIDANCE * (clean["ca_cond_clean"] - clean["ca_uncond_clean"])
    decoupled = losses.decoupled_dmd_loss(x, **clean, guidance=GUIDANCE)
    whole = losses.dmd_loss(x, guided, clean["dm_fake_clean"])
    near = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    torch.testing.assert_close(decoupled, whole, **near)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (decoupled, whole)), **near)
    del clean["ca_cond_clean"]  # at a shared level it is dm_real_clean
    assert torch.equal(losses.decoupled_dmd_loss(x, **clean, guidance=GUIDANCE), decoupled)


def test_without_a_normalizer_it_is_the_published_score_difference() -> None:
    """Z-Image Turbo++: alpha (s_real_cond - s_real_uncond) + (s_real_cond - s_fake_cond), here from scores."""
    sigma, alpha = 0.6, GUIDANCE - 1
    cond, student = two_modes(), Student(1)
    uncond = gaussian(torch.zeros(1, dtype=torch.float64), torch.full((1, 1), 2.0, dtype=torch.float64))
    x = torch.randn(16, 1, dtype=torch.float64, requires_grad=True)
    at = (1 - sigma) * x.detach() + sigma * torch.randn(16, 1, dtype=torch.float64)
    real, bare, fake = (density.noised(sigma).score(at) for density in (cond, uncond, student.density()))
    ascent = alpha * (real - bare) + (real - fake)
    loss = losses.decoupled_dmd_loss(
        x,
        dm_real_clean=cond.clean(at, sigma),
        dm_fake_clean=student.density().clean(at, sigma),
        ca_cond_clean=cond.clean(at, sigma),
        ca_uncond_clean=uncond.clean(at, sigma),
        guidance=GUIDANCE,
        normalizer="none",
        reduction="sum",
    )
    loss.backward()
    torch.testing.assert_close(x.grad, -(sigma**2) / (1 - sigma) * ascent)


@pytest.mark.parametrize("normalizer", ["guided", "separate", "none"])
@pytest.mark.parametrize("levels", [(0.6, 0.6), (0.8, 0.3)], ids=["shared", "hybrid"])
def test_decoupled_is_the_sum_of_its_parts(normalizer: str, levels: tuple[float, float]) -> None:
    x, clean = guided_parts(*levels, torch.float64)
    matching, augmentation = losses.decoupled_dmd_terms(x, **clean, guidance=GUIDANCE, normalizer=normalizer)
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=torch.float64)
    for dm_weight in (1.0, 0.0, weights):
        loss = losses.decoupled_dmd_loss(
            x, **clean, guidance=GUIDANCE, normalizer=normalizer, dm_weight=dm_weight, reduction="sum"
        )
        factor = dm_weight[:, None] if isinstance(dm_weight, Tensor) else dm_weight
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0] * 4, factor * matching + augmentation)


def test_each_term_reads_its_own_level() -> None:
    x, clean = guided_parts(0.8, 0.3, torch.float64)
    dm_only = losses.decoupled_dmd_terms(x, **clean, guidance=GUIDANCE, normalizer="separate")[0]
    expected = losses.dmd_gradient(x, clean["dm_real_clean"], clean["dm_fake_clean"])
    torch.testing.assert_close(dm_only, expected)
    ca_only = losses.decoupled_dmd_terms(x, **clean, guidance=GUIDANCE, normalizer="separate")[1]
    expected = (GUIDANCE - 1) * losses.dmd_gradient(x, clean["ca_cond_clean"], clean["ca_uncond_clean"])
    torch.testing.assert_close(ca_only, expected)


@pytest.mark.parametrize("normalizer", ["guided", "separate", "none"])
def test_without_guidance_the_unconditional_prediction_is_not_heard(normalizer: str) -> None:
    x, clean = guided_parts(0.8, 0.3, torch.float64)
    loss = losses.decoupled_dmd_loss(x, **clean, guidance=1.0, normalizer=normalizer)
    other = losses.decoupled_dmd_loss(
        x, **{**clean, "ca_uncond_clean": torch.randn_like(x)}, guidance=1.0, normalizer=normalizer
    )
    assert torch.equal(loss, other)


@pytest.mark.parametrize("shape", [(3, 6), (3, 2, 5, 7), (3,)])
def test_normalizer_is_per_sample(shape: tuple[int, ...]) -> None:
    """A sample's gradient does not change with the others' distances, nor with the scale of its own error."""
    x, real, fake = torch.randn(3, *shape, dtype=torch.float64).unbind()
    grad = losses.dmd_gradient(x, real, fake)
    expected = torch.stack([(f - r) / (s - r).abs().mean() for s, r, f in zip(x, real, fake, strict=True)])
    torch.testing.assert_close(grad, expected)
    far = torch.cat([real[:1] - 100, real[1:]])
    torch.testing.assert_close(losses.dmd_gradient(x, far, fake)[1:], grad[1:])
    torch.testing.assert_close(losses.dmd_gradient(7 * x, 7 * real, 7 * fake), grad)


def test_gradient_is_not_rounded_to_the_spacing_of_x() -> None:
    """x - stopgrad(x - grad), taken literally in float32, keeps nothing of a gradient below 6e-5 at x = 1000."""
    x = torch.full((2, 8), 1000.0, requires_grad=True)
    real = torch.zeros(2, 8)
    fake = torch.linspace(0.001, 0.01, 16).reshape(2, 8)
    losses.dmd_loss(x, real, fake, reduction="sum").backward()
    torch.testing.assert_close(x.grad, fake / 1000 / 8, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_sample_equal_to_its_real_prediction_gives_no_nan(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, dtype=dtype).requires_grad_()
    real = x.detach().clone()
    at_rest = losses.dmd_loss(x, real, real)
    assert at_rest == 0
    assert torch.equal(torch.autograd.grad(at_rest, x)[0], torch.zeros_like(x))
    fake = real + 0.5
    loss = losses.dmd_loss(x, real, fake, eps=0.25)
    expected = (fake - real).double() / 0.25 / 10
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0].double(), expected, rtol=1e-2, atol=0)
    assert losses.dmd_loss(x, real, fake).isfinite()
    assert torch.autograd.grad(losses.dmd_loss(x, real, fake), x)[0].isfinite().all()


def test_gradients_for_monitors_hold_no_graph() -> None:
    x, *clean = (t.requires_grad_() for t in torch.randn(5, 2, 6).unbind())
    names = ("dm_real_clean", "dm_fake_clean", "ca_cond_clean", "ca_uncond_clean")
    terms = losses.decoupled_dmd_terms(x, **dict(zip(names, clean, strict=True)), guidance=3.0)
    for gradient in (losses.dmd_gradient(x, *clean[:2]), *terms):
        assert not gradient.requires_grad


def test_eps_is_not_felt_above_it() -> None:
    x, real, fake = torch.randn(3, 2, 5, dtype=torch.float64).unbind()
    assert torch.equal(losses.dmd_loss(x, real, fake), losses.dmd_loss(x, real, fake, eps=1e-300))


def test_what_is_not_finite_stays_visible() -> None:
    x, real, fake = torch.randn(3, 2, 5).unbind()
    for wrong in (math.nan, math.inf):
        for number in range(3):
            tensors = [x.clone(), real.clone(), fake.clone()]
            tensors[number][0, 2] = wrong
            found = [losses.dmd_gradient(*tensors), ops.dmd_direction(*tensors)]
            found += [reference.dmd_direction(*tensors), ops.dmd_direction(*(t.repeat(1, 20_000) for t in tensors))]
            for gradient in found:
                assert gradient[1].isfinite().all() and not gradient[0].isfinite().all()
                assert not (gradient[0] == 0).any()
            assert not losses.dmd_loss(*tensors).isfinite()
    assert losses.dmd_gradient(x + 3e38, real - 3e38, fake).isnan().all()  # a difference that overflows


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"guidance": 0.5}, ValueError, r"guidance is 0.5, expected at least 1 \(the usual scale w"),
        ({"guidance": float("nan")}, ValueError, "guidance is nan, expected a finite number"),
        ({"guidance": "4"}, TypeError, "guidance is str, expected a number"),
        ({"normalizer": "dmd2"}, ValueError, "normalizer is 'dmd2', expected one of 'guided', 'separate', 'none'"),
        ({"dm_weight": torch.ones(3)}, ValueError, r"dm_weight has shape \[3\], expected \[4\]"),
        ({"dm_weight": None}, TypeError, "dm_weight is NoneType, expected a number"),
        ({"eps": 0.0}, ValueError, "eps is 0.0, expected a number above 0"),
        ({"eps": -1.0}, ValueError, "eps is -1.0, expected a number above 0"),
    ],
)
def test_says_what_is_wrong(options: dict, error: type[Exception], message: str) -> None:
    x, clean = guided_parts(0.8, 0.3, torch.float64)
    with pytest.raises(error, match=f"decoupled_dmd_loss: {message}"):
        losses.decoupled_dmd_loss(x, **{**clean, "guidance": 3.0, **options})


@pytest.mark.slow
def test_runs_through_the_default_compiler() -> None:
    torch.compiler.reset()
    x, real, fake = torch.randn(3, 4, 8, 8).unbind()
    x.requires_grad_()
    compiled = torch.compile(losses.dmd_loss, fullgraph=True)
    actual, expected = compiled(x, real, fake), losses.dmd_loss(x, real, fake)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, x)[0], torch.autograd.grad(expected, x)[0])
