"""From a tensor of squared errors to a loss: precision inside, one value per sample, weights, reduction.

    per sample      l_b = mean of the sample's values                         [B]
    reduction       "none": w_b * l_b     "sum": sum_b w_b * l_b     "mean": (1/B) sum_b w_b * l_b

The weighted mean divides by B, not by the sum of the weights: a weight is then an exact factor of its sample's gradient
(sigma**2, a density ratio), and rescaling all weights rescales the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import arguments


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in one dtype: float64 if any is float64, otherwise float32."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return tuple(t.to(wide) for t in tensors)


def sample_mean(t: Tensor) -> Tensor:
    """The mean of each sample's values: [B, ...] -> [B]."""
    return t.mean(tuple(range(1, t.dim()))) if t.dim() > 1 else t


def check(loss: str, name: str, t: Tensor, weight: Tensor | None, reduction: str) -> None:
    """What every loss checks about its first argument, its weight and its reduction."""
    arguments.check_samples(loss, name, t)
    if weight is not None:
        arguments.check_per_sample(loss, "weight", weight, name, t)
    arguments.check_choice(loss, "reduction", reduction, arguments.REDUCTIONS)


def reduce(per_sample: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    if weight is not None:
        per_sample = per_sample * weight.detach().to(per_sample.dtype)
    if reduction == "none":
        return per_sample
    return per_sample.sum() if reduction == "sum" else per_sample.mean()


def mean_squared_error(prediction: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    return reduce(sample_mean((prediction - target).square()), weight, reduction)
