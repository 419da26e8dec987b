"""Adversarial losses on logits, real positive. d = logit of D.

    kind           discriminator                                  generator
    softplus       softplus(d_fake) + softplus(-d_real)           softplus(-d_fake)              DMD2, arXiv 2405.14867
    bce            -log(1 - sig(d_fake)) - log sig(d_real)        -log sig(d_fake)               GAN, arXiv 1406.2661
    hinge          relu(1 + d_fake) + relu(1 - d_real)            -d_fake                        arXiv 1705.02894
    relativistic   softplus(d_fake - d_real)                      softplus(d_real - d_fake)      arXiv 1807.00734

"bce" is the non-saturating GAN in its published form, which Z-Image Turbo++ (arXiv 2606.12575) names; the same function
as "softplus", computed by torch's binary cross entropy. The minimax generator loss log(1 - sig(d_fake)) is not offered:
its gradient dies exactly where the generator is worst.

A real and a fake logit at the same place form a pair in "relativistic": they should share caption and sigma.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from twostep.graphs import is_leafs, nodes

from ..values import in_transform
from . import arguments
from .reduction import check, mean_squared_error, reduce, sample_mean, widen

KINDS = ("softplus", "hinge", "bce", "relativistic")
MISSING_GRADIENT = ("warn", "error", "ignore")


def generator_adversarial_loss(
    fake_logits: Tensor,
    real_logits: Tensor | None = None,
    *,
    kind: str = "softplus",
    weight: Tensor | None = None,
    reduction: str = "mean",
    sample: Tensor | None = None,
    missing_gradient: str = "warn",
) -> Tensor:
    """What the student minimises. The gradient must reach it through the discriminator's input.

    Args:
        fake_logits: D of the student's samples, [B] or [B, ...] (several logits a sample are averaged). D's parameters
            may be frozen with requires_grad_(False); D must not run under torch.no_grad(), nor on a detached sample.
        real_logits: D of the paired real samples, fake_logits' shape, required by "relativistic", and data: detached.
            The other kinds do not use it.
        kind: "softplus", "hinge", "bce" or "relativistic".
        weight: [B], multiplies each sample's loss.
        reduction: "mean" (of weight * loss over the samples), "sum", or "none" for [B].
        sample: the student's samples. Where D's parameters are not frozen fake_logits carries their gradient whatever
            becomes of the samples'; given these, it is looked for: the very tensor that D's input was made of, and not
            a view of it. It does not enter the loss.
        missing_gradient: what to do if gradients are enabled and fake_logits carries none, or not that of `sample`:
            "warn", "error" (for trainers) or "ignore" (for monitors).
    """
    loss = "generator_adversarial_loss"
    check(loss, "fake_logits", fake_logits, weight, reduction)
    arguments.check_choice(loss, "kind", kind, KINDS)
    arguments.check_choice(loss, "missing_gradient", missing_gradient, MISSING_GRADIENT)
    if sample is not None:
        arguments.check_tensor(loss, "sample", sample)
    _check_gradient(loss, fake_logits, sample, missing_gradient)
    if kind == "relativistic":
        if real_logits is None:
            raise ValueError(f"{loss}: kind 'relativistic' compares pairs: pass real_logits of the paired real samples")
        arguments.check_same(loss, "real_logits", real_logits, "fake_logits", fake_logits)
        fake, real = widen(fake_logits, real_logits.detach())
        values = _softplus(real - fake)
    else:
        (fake,) = widen(fake_logits)
        if kind == "hinge":
            values = -fake
        elif kind == "bce":
            values = F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake), reduction="none")
        else:
            values = _softplus(-fake)
    return reduce(sample_mean(values), weight, reduction)


def discriminator_loss(
    fake_logits: Tensor,
    real_logits: Tensor,
    *,
    kind: str = "softplus",
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """What the discriminator minimises: the sum (not the mean) of its fake and its real part, per sample.

    Args:
        fake_logits: D of the student's *detached* samples, [B] or [B, ...]; a loss cannot detach D's input for you.
        real_logits: D of the real samples, same shape. Both carry the gradient.
        kind: "softplus", "hinge", "bce" or "relativistic".
        weight: [B], multiplies each sample's loss (fake and real part alike).
        reduction: "mean" (of weight * loss over the samples), "sum", or "none" for [B].
    """
    loss = "discriminator_loss"
    check(loss, "fake_logits", fake_logits, weight, reduction)
    arguments.check_same(loss, "real_logits", real_logits, "fake_logits", fake_logits)
    arguments.check_choice(loss, "kind", kind, KINDS)
    fake, real = widen(fake_logits, real_logits)
    if kind == "relativistic":
        values = _softplus(fake - real)
    elif kind == "hinge":
        values = F.relu(1 + fake) + F.relu(1 - real)
    elif kind == "bce":
        values = F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake), reduction="none")
        values = values + F.binary_cross_entropy_with_logits(real, torch.ones_like(real), reduction="none")
    else:
        values = _softplus(fake) + _softplus(-real)
    return reduce(sample_mean(values), weight, reduction)


def approximate_r1(
    real_logits: Tensor, perturbed_logits: Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """(D(x) - D(x + s n))^2 for real x and normal n: R1 without second derivatives (APT, arXiv 2501.08316).

    To first order its mean over n is s^2 |grad D(x)|^2: divide the coefficient of an R1 penalty by s^2. Both arguments
    carry the gradient; shapes, `weight` and `reduction` as in `discriminator_loss`.
    """
    check("approximate_r1", "real_logits", real_logits, weight, reduction)
    arguments.check_same("approximate_r1", "perturbed_logits", perturbed_logits, "real_logits", real_logits)
    real, perturbed = widen(real_logits, perturbed_logits)
    return mean_squared_error(real, perturbed, weight, reduction)


def _softplus(z: Tensor) -> Tensor:
    # torch's softplus returns z itself above 20, which costs float64 seven digits there (2e-9); logsigmoid is exact.
    return -F.logsigmoid(-z)


def _check_gradient(loss: str, fake_logits: Tensor, sample: Tensor | None, missing_gradient: str) -> None:
    if missing_gradient == "ignore" or not torch.is_grad_enabled():
        return
    if torch.compiler.is_compiling() or in_transform():  # there requires_grad does not tell
        return
    if fake_logits.requires_grad and (sample is None or _reaches(fake_logits, sample)):
        return
    what = "no gradient of sample" if fake_logits.requires_grad else "no gradient"
    message = (
        f"{loss}: fake_logits carries {what}, so nothing would reach the generator. Run the discriminator outside"
        " torch.no_grad() and on a sample that is not detached (and pass that very tensor as"
        " sample, no view of it); to freeze it, call requires_grad_(False) on its"
        " parameters. If only the value is wanted, pass missing_gradient='ignore'"
    )
    if missing_gradient == "error":
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)


def _reaches(logits: Tensor, sample: Tensor) -> bool:
    return any(node is sample.grad_fn or (is_leafs(node) and node.variable is sample) for node in nodes([logits]))
