"""Distribution matching distillation: the gradient of KL(student || teacher), taken from two clean predictions.

At one re-noise level sigma, with x_sigma = (1 - sigma) x + sigma eps, a clean prediction x_hat and the score s of the
noised density are the same thing (Tweedie):  s = ((1 - sigma) x_hat - x_sigma) / sigma^2.  Hence

    x_hat_fake - x_hat_real = sigma^2 / (1 - sigma) * (s_fake - s_real)

which is the gradient of the KL with respect to x up to a positive factor (DMD, arXiv 2311.18828). In the factor's place
stands a normaliser that evens out the noise levels (DMD2, arXiv 2405.14867, in code):

    grad = (x_hat_fake - x_hat_real) / mean|x - x_hat_real|        the mean over each sample's values

and the loss is the function whose gradient with respect to x is grad / (number of x's values):

    loss = 1/2 mean (x - stopgrad(x - grad))^2

Here x - stopgrad(x - grad) is written (x - stopgrad(x)) + stopgrad(grad): the same function, but x - x is exactly 0, so
that grad is not rounded to the spacing of numbers as large as x.
"""

from __future__ import annotations

from torch import Tensor

from . import arguments
from .reduction import check, reduce, sample_mean, widen

# Ours: mean|x - x_hat_real| cannot be told from 0 in float32 below this, for x of order 1; see docs/losses.md.
SMALLEST_NORMALIZER = 1e-6

NORMALIZERS = ("guided", "separate", "none")


def dmd_gradient(x: Tensor, real_clean: Tensor, fake_clean: Tensor, *, eps: float = SMALLEST_NORMALIZER) -> Tensor:
    """DMD2's normalised gradient with respect to x, x's shape, float32 or better, without a graph: for monitors."""
    _check_predictions("dmd_gradient", x, eps, real_clean=real_clean, fake_clean=fake_clean)
    x, real_clean, fake_clean = widen(x.detach(), real_clean.detach(), fake_clean.detach())
    return (fake_clean - real_clean) / _normalizer(x, real_clean, eps)


def dmd_loss(
    x: Tensor,
    real_clean: Tensor,
    fake_clean: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    eps: float = SMALLEST_NORMALIZER,
) -> Tensor:
    """DMD2's loss (arXiv 2405.14867): its gradient moves x from where the fake score looks to where the real one does.

    Args:
        x: the student's samples [B, ...]; carries the gradient.
        real_clean: clean prediction of the real score for the re-noised x, with guidance if any. Data: it is detached.
        fake_clean: clean prediction of the fake score for the same re-noised x. Data: it is detached.
        weight: [B], multiplies each sample's loss and gradient; see `f_divergence_weight`.
        reduction: "mean" (of weight * loss over the samples), "sum", or "none" for [B].
        eps: the least normaliser. A sample that equals its real prediction would divide by 0; it divides by eps.
    """
    check("dmd_loss", "x", x, weight, reduction)
    _check_predictions("dmd_loss", x, eps, real_clean=real_clean, fake_clean=fake_clean)
    return _with_gradient(x, dmd_gradient(x, real_clean, fake_clean, eps=eps), weight, reduction)


def decoupled_dmd_terms(
    x: Tensor,
    *,
    dm_real_clean: Tensor,
    dm_fake_clean: Tensor,
    ca_uncond_clean: Tensor,
    guidance: float,
    ca_cond_clean: Tensor | None = None,
    normalizer: str = "guided",
    eps: float = SMALLEST_NORMALIZER,
) -> tuple[Tensor, Tensor]:
    """The two gradients (distribution matching, guidance augmentation) of `decoupled_dmd_loss`, each with x's shape."""
    loss = "decoupled_dmd_loss"
    predictions = {
        "dm_real_clean": dm_real_clean,
        "dm_fake_clean": dm_fake_clean,
        "ca_cond_clean": dm_real_clean if ca_cond_clean is None else ca_cond_clean,
        "ca_uncond_clean": ca_uncond_clean,
    }
    _check_predictions(loss, x, eps, **predictions)
    arguments.check_number(loss, "guidance", guidance)
    if guidance < 1:
        raise ValueError(
            f"{loss}: guidance is {guidance}, expected at least 1 (the usual scale w in uncond + w * (cond - uncond);"
            " 1 is no guidance; a paper's alpha that multiplies cond - uncond alone is w - 1)"
        )
    arguments.check_choice(loss, "normalizer", normalizer, NORMALIZERS)
    x, dm_real, dm_fake, cond, uncond = widen(x.detach(), *(t.detach() for t in predictions.values()))
    matching = dm_fake - dm_real
    augmentation = (guidance - 1) * (uncond - cond)
    if normalizer == "guided":
        shared = _normalizer(x, dm_real - augmentation, eps)
        return matching / shared, augmentation / shared
    if normalizer == "separate":
        return matching / _normalizer(x, dm_real, eps), augmentation / _normalizer(x, cond, eps)
    return matching, augmentation


def decoupled_dmd_loss(
    x: Tensor,
    *,
    dm_real_clean: Tensor,
    dm_fake_clean: Tensor,
    ca_uncond_clean: Tensor,
    guidance: float,
    ca_cond_clean: Tensor | None = None,
    dm_weight: float | Tensor = 1.0,
    normalizer: str = "guided",
    weight: Tensor | None = None,
    reduction: str = "mean",
    eps: float = SMALLEST_NORMALIZER,
) -> Tensor:
    """Decoupled DMD (arXiv 2511.22677): distribution matching (DM) plus guidance augmentation (CA), each at its level.

    Before the normaliser the gradient with respect to x is

        dm_weight * (dm_fake_clean - dm_real_clean) + (guidance - 1) * (ca_uncond_clean - ca_cond_clean)

    Shared: all predictions at one level, where ca_cond_clean is dm_real_clean. This is the gradient of `dmd_loss` with
    the guided real prediction uncond + guidance * (cond - uncond), and the term of Z-Image Turbo++ (arXiv 2606.12575)
    with alpha = guidance - 1. Hybrid: the ca_ pair comes from a level below the student's input sigma, the dm_ pair
    from an independent one.

    Args:
        x: the student's samples [B, ...]; carries the gradient. The predictions are data: they are detached.
        dm_real_clean, dm_fake_clean: of the real score with the caption and of the fake score, at the DM level.
        ca_cond_clean, ca_uncond_clean: of the real score with and without the caption, at the CA level. ca_cond_clean
            may be left out where the level is shared: it is dm_real_clean then.
        guidance: the usual scale w, at least 1; 1 leaves distribution matching alone.
        dm_weight: factor of the DM term alone, a number or [B] (`f_divergence_weight`); 0 leaves augmentation alone.
        normalizer: what the gradient is divided by, a mean over each sample. "guided": both terms by
            mean|x - (dm_real_clean + (guidance - 1) * (ca_cond_clean - ca_uncond_clean))|, which makes the shared-level
            form DMD2's own. "separate": DM by mean|x - dm_real_clean|, CA by mean|x - ca_cond_clean|. "none": 1.
        weight, reduction, eps: as in `dmd_loss`.
    """
    loss = "decoupled_dmd_loss"
    check(loss, "x", x, weight, reduction)
    if isinstance(dm_weight, Tensor):
        arguments.check_per_sample(loss, "dm_weight", dm_weight, "x", x)
    else:
        arguments.check_number(loss, "dm_weight", dm_weight)
    matching, augmentation = decoupled_dmd_terms(
        x,
        dm_real_clean=dm_real_clean,
        dm_fake_clean=dm_fake_clean,
        ca_uncond_clean=ca_uncond_clean,
        guidance=guidance,
        ca_cond_clean=ca_cond_clean,
        normalizer=normalizer,
        eps=eps,
    )
    grad = arguments.per_sample_factor(dm_weight, matching) * matching + augmentation
    return _with_gradient(x, grad, weight, reduction)


def _check_predictions(loss: str, x: Tensor, eps: float, **predictions: Tensor) -> None:
    arguments.check_samples(loss, "x", x)
    for name, prediction in predictions.items():
        arguments.check_same(loss, name, prediction, "x", x)
    arguments.check_positive(loss, "eps", eps)


def _normalizer(x: Tensor, clean: Tensor, eps: float) -> Tensor:
    """mean|x - clean| of each sample, at least eps: [B, 1, ...]. NaN where it is infinite: what is divided by infinity
    would be a gradient of 0."""
    distance = sample_mean((x - clean).abs())
    distance = (distance + 0.0 * distance).clamp_min(eps)
    return distance.reshape(-1, *[1] * (x.dim() - 1))


def _with_gradient(x: Tensor, grad: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """1/2 mean (x - stopgrad(x - grad))^2, reduced; grad comes without a graph."""
    x = x.to(grad.dtype)
    return reduce(0.5 * sample_mean(((x - x.detach()) + grad).square()), weight, reduction)
