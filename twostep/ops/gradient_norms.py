"""The L2 norm of each sample of a gradient, and of all of it. The maths and the bytes are in csrc/gradient_norms.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import arguments, reference
from .library import choose, register_fake


def gradient_norms(g: Tensor) -> tuple[Tensor, Tensor]:
    """(norms [batch], total []) of a gradient g [batch, ...], in float32 (float64 for float64), on g's device.

    A clip made of them needs no synchronisation: factor = (limit / total).clamp(max=1) goes into `inject_gradient`.
    The norms are data: no gradient flows through them. The sum of squares is held in float32 within 4096 elements, so
    elements beyond 1e17 give inf.
    """
    op = "gradient_norms"
    arguments.check_samples(op, "g", g)
    if choose(op, g, 1) == "reference":
        return reference.gradient_norms(g)
    norms, total = torch.ops.twostep.gradient_norms(*arguments.as_samples(*arguments.as_data(g)))
    return norms, total


@register_fake("gradient_norms")
def _(g: Any) -> Any:
    wide = arguments.accumulation_dtype(g)
    return g.new_empty(g.shape[0], dtype=wide), g.new_empty((), dtype=wide)
