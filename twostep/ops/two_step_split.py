"""z = noise + (mid - 1) * v and x_a = noise - v, and the backward that injects an inherited gradient.

Z-Image Turbo++'s memory-efficient update, arXiv 2606.12575. The maths and the bytes are in csrc/two_step_split.h.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import arguments, reference
from .autograd import differentiable, first_order
from .library import choose, register_fake


def two_step_split(noise: Tensor, v: Tensor, mid: float, *, inherit: float = 1.0) -> tuple[Tensor, Tensor]:
    """What the first of two steps gives, in one pass: z, where the second starts, and x_a, the first step's own image.

    z = noise + (mid - 1) * v and x_a = noise - v, v being the velocity at sigma 1 and mid the sigma between the steps.

    Args:
        noise: [batch, ...], in float32 as a rule.
        v: the velocity, of noise's shape; a bfloat16 or float16 one is read as it is beside float32 noise.
        mid: above 0 and below 1.
        inherit: the share of z's gradient that goes on to v (and to noise): 1 is the exact gradient, 0 cuts it off.

    Returns two tensors with the shape and dtype of noise.
    """
    op = "two_step_split"
    arguments.check_samples(op, "noise", noise)
    arguments.check_same(op, "v", v, "noise", noise)
    arguments.check_mid(op, mid)
    arguments.check_number(op, "inherit", inherit)
    if choose(op, noise, 1) == "reference":
        return reference.two_step_split(noise, v, mid, inherit=inherit)
    state, velocity = arguments.share_samples_dtype(noise, v)
    samples = arguments.as_samples(state, velocity)
    if arguments.wants_grad(noise, v):
        z, x_a = _differentiable(*samples, float(mid), float(inherit))
    else:
        z, x_a = torch.ops.twostep.two_step_split(*samples, float(mid))
    return arguments.from_samples(z, noise), arguments.from_samples(x_a, noise)


def inject_gradient(
    inherited: Tensor | None,
    own: Tensor | None,
    mid: float,
    *,
    weight: float = 1.0,
    factor: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """weight * factor * (mid - 1) * inherited - own: the gradient of two_step_split's v, in one pass with one rounding.

    For a two-step backward that keeps no graph between the steps; `two_step_split` itself runs the same kernel.

    Args:
        inherited: the gradient of z [batch, ...] that the second step found, or None.
        own: the gradient of x_a, with the shape and dtype of inherited, or None. One of the two is needed.
        mid: the sigma between the steps.
        weight: the share of the inherited gradient that is injected.
        factor: a tensor [] or [batch] that the inherited gradient is multiplied with as well: a clip computed from
            `gradient_norms`, which stays on the device.
        dtype: of the result, the velocity's; that of the gradients where None.

    The result is data: no gradient flows through it.
    """
    op = "inject_gradient"
    state = inherited if inherited is not None else own
    if state is None:
        raise ValueError(f"{op}: inherited and own are None, expected at least one gradient")
    arguments.check_samples(op, "inherited" if inherited is not None else "own", state)
    if inherited is not None and own is not None:
        arguments.check_same(op, "own", own, "inherited", inherited)
        if own.dtype != inherited.dtype:
            raise TypeError(f"{op}: own has dtype {own.dtype}, expected {inherited.dtype}, the dtype of inherited")
    arguments.check_mid(op, mid)
    arguments.check_number(op, "weight", weight)
    if factor is not None:
        arguments.check_per_sample(op, "factor", factor, state)
    dtype = state.dtype if dtype is None else dtype
    if dtype not in arguments.DTYPES:
        raise TypeError(f"{op}: dtype is {dtype}, expected one of {', '.join(map(str, arguments.DTYPES))}")
    if choose(op, state, 1) == "reference":
        return reference.inject_gradient(inherited, own, mid, weight=weight, factor=factor, dtype=dtype)
    fits = arguments.network_dtype_fits(state.dtype, dtype)
    wide = state.dtype if fits else arguments.widest(state.dtype, dtype)
    given = [g for g in (inherited, own) if g is not None]
    samples = list(arguments.as_samples(*(g if fits else g.to(wide) for g in arguments.as_data(*given))))
    if factor is not None:
        (factor,) = arguments.as_data(factor)
        numbers = arguments.widest(wide)
        factor = (factor if factor.dtype == numbers else factor.to(numbers)).reshape(-1).contiguous()
    made: Tensor = torch.ops.twostep.two_step_split_backward(
        samples[0] if inherited is not None else None,
        samples[-1] if own is not None else None,
        factor,
        float(mid),
        float(weight),
        dtype if fits else wide,
    )
    made = made if made.shape == state.shape else made.view(state.shape)
    return made if made.dtype == dtype else made.to(dtype)


class _TwoStepSplit(Function):
    @staticmethod
    def forward(noise: Any, v: Any, mid: float, inherit: float) -> Any:
        return torch.ops.twostep.two_step_split(noise, v, mid)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, v, ctx.mid, ctx.inherit = inputs
        ctx.velocity = v.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_order("two_step_split")
    def backward(ctx: Any, saved: Any, dz: Tensor | None, dx_a: Tensor | None) -> Any:
        if dz is None and dx_a is None:
            return (None,) * 4
        need_noise, need_v, *_ = ctx.needs_input_grad
        dv = None
        if need_v:
            dv = torch.ops.twostep.two_step_split_backward(dz, dx_a, None, ctx.mid, ctx.inherit, ctx.velocity)
        return _noise_gradient(dz, dx_a, ctx.inherit) if need_noise else None, dv, None, None


def _noise_gradient(dz: Tensor | None, dx_a: Tensor | None, inherit: float) -> Tensor | None:
    """The noise is data in every use but a gradient check: one eager addition serves that."""
    if dz is None:
        return dx_a
    return inherit * dz if dx_a is None else torch.add(dx_a, dz, alpha=inherit)


_differentiable = differentiable(_TwoStepSplit)


@register_fake("two_step_split")
def _(noise: Any, v: Any, mid: float) -> Any:
    return noise.new_empty(noise.shape), noise.new_empty(noise.shape)


@register_fake("two_step_split_backward")
def _(inherited: Any, own: Any, factors: Any, mid: float, weight: float, velocity: torch.dtype) -> Any:
    state = own if inherited is None else inherited
    return state.new_empty(state.shape, dtype=velocity)
