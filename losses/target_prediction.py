"""Target prediction of DP-DMD (arXiv 2602.03139): the first step learns the teacher's average velocity.

From the student's own noise eps (sigma 1) the teacher's ODE runs to an anchor z_K at sigma_K. On the way

    z_K = eps + integral from 1 to sigma_K of v d sigma,     so the average velocity is  (eps - z_K) / (1 - sigma_K)

and one Euler step with it lands on z_K. The loss is mean (v - average)^2, for any anchor sigma_K in [0, 1).
"""

from __future__ import annotations

from torch import Tensor

from . import arguments
from .reduction import check, mean_squared_error, widen


def average_velocity(noise: Tensor, anchor: Tensor, anchor_sigma: float | Tensor) -> Tensor:
    """(noise - anchor) / (1 - anchor_sigma), detached, float32 or better. Arguments as in `target_prediction_loss`."""
    arguments.check_samples("average_velocity", "noise", noise)
    return _average_velocity("average_velocity", noise, anchor, anchor_sigma)


def target_prediction_loss(
    v: Tensor,
    noise: Tensor,
    anchor: Tensor,
    anchor_sigma: float | Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """mean (v - (noise - anchor) / (1 - anchor_sigma))^2.

    Args:
        v: the student's velocity at (noise, sigma 1) [B, ...]; carries the gradient.
        noise: where both started, v's shape. anchor: where the teacher's ODE stands at anchor_sigma. Data: detached.
        anchor_sigma: in [0, 1), a number or one per sample [B].
        weight: [B], multiplies each sample's loss.
        reduction: "mean" (of weight * loss over the samples), "sum", or "none" for [B].
    """
    check("target_prediction_loss", "v", v, weight, reduction)
    arguments.check_same("target_prediction_loss", "noise", noise, "v", v)
    v, target = widen(v, _average_velocity("target_prediction_loss", noise, anchor, anchor_sigma))
    return mean_squared_error(v, target, weight, reduction)


def _average_velocity(loss: str, noise: Tensor, anchor: Tensor, anchor_sigma: float | Tensor) -> Tensor:
    arguments.check_same(loss, "anchor", anchor, "noise", noise)
    arguments.check_sigma(loss, "anchor_sigma", anchor_sigma, "noise", noise, zero=True, one=False)
    noise, anchor = widen(noise.detach(), anchor.detach())
    return (noise - anchor) / (1 - arguments.per_sample_factor(anchor_sigma, noise))
