"""Flow matching (arXiv 2210.02747; rectified flow, arXiv 2209.03003) in the convention v = eps - x.

    x_sigma = (1 - sigma) x + sigma eps          loss = mean (v(x_sigma, sigma) - (eps - x))^2

Its minimiser is the velocity of the density that x comes from, so trained on the student's samples it is the fake score
of DMD2 (arXiv 2405.14867: a plain denoising loss on detached samples). As a loss on clean predictions it weighs each
sample by 1 / sigma^2: pass weight=sigma**2 for the loss mean (x_hat - x)^2.
"""

from __future__ import annotations

from torch import Tensor

from . import arguments
from .reduction import check, mean_squared_error, widen


def flow_matching_loss(
    v: Tensor, x: Tensor, noise: Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """mean (v - (noise - x))^2.

    Args:
        v: predicted velocity at (1 - sigma) * x + sigma * noise [B, ...]; carries the gradient.
        x, noise: clean samples and the noise that they were mixed with, v's shape. Data: they are detached.
        weight: [B], multiplies each sample's loss.
        reduction: "mean" (of weight * loss over the samples), "sum", or "none" for [B].
    """
    return _velocity_error("flow_matching_loss", v, x, noise, weight, reduction)


def fake_score_loss(
    v: Tensor, x: Tensor, noise: Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """`flow_matching_loss` of the fake score on the student's samples x.

    x is detached here, but v was predicted from a mixture with x: mix with x.detach(), or the student learns to be
    easy to denoise. Arguments as in `flow_matching_loss`.
    """
    return _velocity_error("fake_score_loss", v, x, noise, weight, reduction)


def _velocity_error(loss: str, v: Tensor, x: Tensor, noise: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    check(loss, "v", v, weight, reduction)
    arguments.check_same(loss, "x", x, "v", v)
    arguments.check_same(loss, "noise", noise, "v", v)
    v, x, noise = widen(v, x.detach(), noise.detach())
    return mean_squared_error(v, noise - x, weight, reduction)
