"""x + delta * v, a sampler's step, and with delta = -sigma the clean prediction. The maths is in csrc/euler_step.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import arguments, reference
from .autograd import differentiable, first_order
from .library import choose, register_fake


def euler_step(x: Tensor, v: Tensor, delta: float | Tensor) -> Tensor:
    """x + delta * v, in one pass: the state x at sigma a, moved along the velocity v to sigma a + delta.

    Args:
        x: the state [batch, ...], in float32 as a rule.
        v: the velocity, of x's shape; a bfloat16 or float16 one is read as it is beside a float32 state.
        delta: a number, or a tensor [batch] (one a sample) or [] (one for all), a constant without a gradient. To
            torch.compile a number is part of the graph, so that each compiles anew; a tensor's values are not.

    Returns a tensor with x's shape and dtype, whatever the dtype of v.
    """
    return _step("euler_step", "delta", x, v, delta, 1.0)


def clean_prediction(x: Tensor, v: Tensor, sigma: float | Tensor) -> Tensor:
    """x - sigma * v: the clean image that the velocity v points to from the state x at sigma. As euler_step has it."""
    return _step("clean_prediction", "sigma", x, v, sigma, -1.0)


def _step(op: str, name: str, x: Tensor, v: Tensor, delta: float | Tensor, sign: float) -> Tensor:
    arguments.check_samples(op, "x", x)
    arguments.check_same(op, "v", v, "x", x)
    if isinstance(delta, Tensor):
        arguments.check_per_sample(op, name, delta, x)
    else:
        arguments.check_number(op, name, delta)
    if choose(op, x, 1) == "reference":
        return reference.euler_step(x, v, sign * delta)
    state, velocity = arguments.share_samples_dtype(x, v)
    number, deltas = 0.0, None
    if isinstance(delta, Tensor):
        deltas = (sign * delta.to(arguments.accumulation_dtype(state))).expand(x.shape[0]).contiguous()
    else:
        number = sign * float(delta)
    run = _differentiable if arguments.wants_grad(x, v) else torch.ops.twostep.euler_step
    y: Tensor = run(*arguments.as_samples(state, velocity), deltas, number)
    return arguments.from_samples(y, x)


class _EulerStep(Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.twostep.euler_step(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, v, deltas, delta = inputs
        ctx.save_for_backward(deltas)
        ctx.delta, ctx.velocity = delta, v.dtype

    @staticmethod
    @first_order("euler_step")
    def backward(ctx: Any, saved: Any, dy: Tensor) -> Any:
        (deltas,) = saved
        need_x, need_v, *_ = ctx.needs_input_grad
        dv = torch.ops.twostep.euler_step_backward(dy, deltas, ctx.delta, ctx.velocity) if need_v else None
        return dy if need_x else None, dv, None, None


_differentiable = differentiable(_EulerStep)


@register_fake("euler_step")
def _(x: Any, v: Any, deltas: Any, delta: float) -> Any:
    return x.new_empty(x.shape)


@register_fake("euler_step_backward")
def _(dy: Any, deltas: Any, delta: float, velocity: torch.dtype) -> Any:
    return dy.new_empty(dy.shape, dtype=velocity)
