"""The normalised direction of distribution matching distillation (DMD2, arXiv 2405.14867).

The maths is in csrc/dmd_direction.h.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import arguments, reference
from .library import choose, register_fake


def dmd_direction(x: Tensor, real_clean: Tensor, fake_clean: Tensor, *, eps: float = 1e-6) -> Tensor:
    """(p_real - p_fake) / max(mean |p_real|, eps), with p_real = x - real_clean and p_fake = x - fake_clean.

    Args:
        x: the student's image [batch, ...], in float32 as a rule.
        real_clean, fake_clean: the clean predictions of the real and the fake score, of x's shape; bfloat16 or float16
            ones of one dtype are read as they are beside float32 images.
        eps: below which a sample's mean |x - real_clean| is not divided by.

    Returns float32 (float64 where x is), with x's shape. It is data: no gradient flows through it, so that
    .5 * (x - (x - direction).detach()).square() has it as the gradient of x.
    """
    op = "dmd_direction"
    arguments.check_samples(op, "x", x)
    arguments.check_same(op, "real_clean", real_clean, "x", x)
    arguments.check_same(op, "fake_clean", fake_clean, "x", x)
    arguments.check_eps(op, eps)
    if choose(op, x, 1) == "reference":
        return reference.dmd_direction(x, real_clean, fake_clean, eps=eps)
    tensors = arguments.share_samples_dtype(*arguments.as_data(x, real_clean, fake_clean))
    direction: Tensor = torch.ops.twostep.dmd_direction(*arguments.as_samples(*tensors), float(eps))
    direction = direction if direction.shape == x.shape else direction.view(x.shape)
    wide = arguments.accumulation_dtype(x)
    return direction if direction.dtype == wide else direction.to(wide)


@register_fake("dmd_direction")
def _(x: Any, real: Any, fake: Any, eps: float) -> Any:
    return x.new_empty(x.shape, dtype=arguments.accumulation_dtype(x))
