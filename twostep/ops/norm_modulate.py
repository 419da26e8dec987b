"""y = norm(x) * weight * (1 + scale) + shift. The maths and the bytes are in csrc/norm_modulate.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import arguments, reference
from .autograd import differentiable, first_order
from .library import choose, gradient, register_fake, statistics


def norm_modulate(
    x: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    norm: str = "rms",
    eps: float = 1e-5,
) -> Tensor:
    """norm(x) * weight * (1 + scale) + shift, in one pass.

    Args:
        x: activations [batch, length, width]; any leading shape is accepted.
        weight: [width], or None for 1.
        scale, shift: per sample [batch, width] or [batch, 1, width], per token [batch, length, width], or None for 0.
            Views with a dense last dimension (chunks of a larger tensor) are read in place.
        norm: "rms", or "layer" (which subtracts the mean).
        eps: added to the mean square, or to the variance.

    Returns a tensor with x's shape and dtype, whatever the dtype of the parameters.
    """
    op = "norm_modulate"
    arguments.check_rows(op, "x", x)
    arguments.check_weight(op, "weight", weight, x)
    arguments.check_modulation(op, "scale", scale, x)
    arguments.check_modulation(op, "shift", shift, x)
    arguments.check_choice(op, "norm", norm, ("rms", "layer"))
    arguments.check_eps(op, eps)
    if choose(op, x, x.shape[-1]) == "reference":
        return reference.norm_modulate(x, weight, scale, shift, norm=norm, eps=eps)
    rows = arguments.as_rows(x)
    scale = arguments.modulation_rows(scale, x, rows)
    shift = arguments.modulation_rows(shift, x, rows)
    weight, scale, shift = arguments.share_dtype(x, weight, scale, shift)
    run = _differentiable if arguments.wants_grad(x, weight, scale, shift) else torch.ops.twostep.norm_modulate
    y: Tensor = run(rows, weight, scale, shift, norm == "layer", float(eps))[0]
    return y if x.dim() == 3 else y.view(x.shape)


class _NormModulate(Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.twostep.norm_modulate(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, scale, shift, layer, _ = inputs
        _, mean, rstd = output
        ctx.save_for_backward(x, weight, scale, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.layer = layer
        ctx.param_dtype = arguments.parameter_dtype(x, weight, scale, shift)
        ctx.shift_shape = None if shift is None else shift.shape

    @staticmethod
    @first_order("norm_modulate")
    def backward(ctx: Any, saved: Any, dy: Tensor | None, *_: None) -> Any:
        if dy is None:
            return (None,) * 6
        x, weight, scale, mean, rstd = saved
        _, need_weight, need_scale, need_shift, *_ = ctx.needs_input_grad
        shift_per_token = need_shift and len(ctx.shift_shape) == 3 and ctx.shift_shape[1] != 1
        dx, dweight, dscale, dshift = torch.ops.twostep.norm_modulate_backward(
            dy,
            x,
            weight,
            scale,
            mean,
            rstd,
            ctx.layer,
            ctx.param_dtype,
            need_weight,
            need_scale,
            need_shift and not shift_per_token,
        )
        dshift = dy.to(ctx.param_dtype) if shift_per_token else dshift.view(ctx.shift_shape) if need_shift else None
        return (
            dx,
            dweight if need_weight else None,
            dscale if need_scale else None,
            dshift,
            None,
            None,
        )


_differentiable = differentiable(_NormModulate)


@register_fake("norm_modulate")
def _(x: Any, weight: Any, scale: Any, shift: Any, layer: bool, eps: float) -> Any:
    return x.new_empty(x.shape), statistics(x, layer), statistics(x, True)


@register_fake("norm_modulate_backward")
def _(
    dy: Any,
    x: Any,
    weight: Any,
    scale: Any,
    mean: Any,
    rstd: Any,
    layer: bool,
    param_dtype: torch.dtype,
    need_weight: bool,
    need_scale: bool,
    need_shift: bool,
) -> Any:
    return (
        x.new_empty(x.shape),
        gradient(x, weight, param_dtype, need_weight),
        gradient(x, scale, param_dtype, need_scale),
        x.new_empty((x.shape[0], x.shape[2]) if need_shift else 0, dtype=param_dtype),
    )
