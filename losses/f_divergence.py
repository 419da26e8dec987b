"""Weights that turn DMD's reverse KL into another f-divergence: f-distill, arXiv 2502.15681.

For D_f(p || q) = integral q f(p / q), with p the teacher's density, q the student's and r = p / q at the noised sample,

    grad D_f = E_q [ h(r) * (score_q - score_p) * dx ],      h(r) = r^2 f''(r)

so that another divergence is DMD's gradient, sample by sample, times h. An optimal discriminator's logit is log r.

    reverse_kl             f = -log r                           h = 1
    softened_reverse_kl    f = (r + 1) log((r + 1) / (2 r))     h = 1 / (r + 1)
    jensen_shannon         f = r log r - (r + 1) log((r+1)/2)   h = r / (r + 1)
    squared_hellinger      f = 1 - sqrt(r)                      h = sqrt(r) / 4
    forward_kl             f = r log r                          h = r
    jeffreys               f = (r - 1) log r                    h = r + 1

All are computed as log h from the logit, which neither overflows nor rounds to 0 before the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from . import arguments
from .reduction import sample_mean, widen

_LOG_WEIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.zeros_like,
    "softened_reverse_kl": lambda logit: F.logsigmoid(-logit),
    "jensen_shannon": F.logsigmoid,
    "squared_hellinger": lambda logit: 0.5 * logit - math.log(4),
    "forward_kl": lambda logit: logit,
    "jeffreys": lambda logit: -F.logsigmoid(-logit),
}


def f_divergence_weight(
    logit: Tensor, divergence: str, *, normalize: bool = False, max_logit: float | None = None
) -> Tensor:
    """h(exp(logit)), one weight per sample [B], as `weight` of `dmd_loss`. Detached; float32 or better.

    Args:
        logit: the discriminator's logits for the student's noised samples, real positive: [B], or [B, ...], whose
            mean is taken.
        divergence: "reverse_kl", "softened_reverse_kl", "jensen_shannon", "squared_hellinger", "forward_kl" or
            "jeffreys".
        normalize: divide by the mean over this batch, so that the weights change the samples' shares and not the step
            size. In a batch spread over ranks each rank takes its own mean.
        max_logit: bound logits to [-max_logit, max_logit] first. Without it a logit above 88 overflows the unnormalised
            weights that grow with r; normalised ones cannot overflow.
    """
    loss = "f_divergence_weight"
    arguments.check_samples(loss, "logit", logit)
    arguments.check_choice(loss, "divergence", divergence, tuple(_LOG_WEIGHT))
    (wide,) = widen(logit.detach())
    if max_logit is not None:
        arguments.check_positive(loss, "max_logit", max_logit)
        wide = wide.clamp(-max_logit, max_logit)
    log_weight = _LOG_WEIGHT[divergence](sample_mean(wide))
    if normalize:
        log_weight = log_weight - torch.logsumexp(log_weight, 0) + math.log(log_weight.shape[0])
    return log_weight.exp()
