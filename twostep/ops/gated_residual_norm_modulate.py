"""The seam between two branches of a block: gated_residual, then norm_modulate of its result, in one pass.

The maths and the bytes are in csrc/gated_residual_norm_modulate.h.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import arguments, reference
from .autograd import differentiable, first_order
from .library import choose, gradient, register_fake, statistics


def gated_residual_norm_modulate(
    x: Tensor,
    z: Tensor,
    gate: Tensor | None = None,
    post_weight: Tensor | None = None,
    pre_weight: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    norm: str = "rms",
    post_norm: str = "rms",
    gate_act: str = "tanh",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """out = x + act(gate) * post_norm(z) * post_weight and h = norm(out) * pre_weight * (1 + scale) + shift.

    Args:
        x: the residual stream [batch, length, width]; any leading shape is accepted.
        z: the branch's output, of x's shape; it is cast to x's dtype where it has another.
        gate, scale, shift: per sample [batch, width] or [batch, 1, width], per token [batch, length, width], or None.
        post_weight, pre_weight: of the norm after the old branch and before the new one, [width], or None for 1.
        norm: of the sum, before the new branch: "rms" or "layer".
        post_norm: of the branch's output z: "rms" or "none".
        gate_act: "tanh" or "none".
        eps: of both norms.

    Returns (out, h), both with x's shape and dtype: the very bits of gated_residual and of norm_modulate of its result.
    """
    op = "gated_residual_norm_modulate"
    arguments.check_rows(op, "x", x)
    arguments.check_same(op, "z", z, "x", x)
    for name, m in (("gate", gate), ("scale", scale), ("shift", shift)):
        arguments.check_modulation(op, name, m, x)
    arguments.check_weight(op, "post_weight", post_weight, x)
    arguments.check_weight(op, "pre_weight", pre_weight, x)
    arguments.check_choice(op, "norm", norm, ("rms", "layer"))
    arguments.check_choice(op, "post_norm", post_norm, ("rms", "none"))
    arguments.check_choice(op, "gate_act", gate_act, ("tanh", "none"))
    arguments.check_eps(op, eps)
    if choose(op, x, x.shape[-1]) == "reference":
        return reference.gated_residual_norm_modulate(
            x,
            z,
            gate,
            post_weight,
            pre_weight,
            scale,
            shift,
            norm=norm,
            post_norm=post_norm,
            gate_act=gate_act,
            eps=eps,
        )
    rows, z = arguments.as_rows(x), arguments.as_rows(z).to(x.dtype)
    gate, scale, shift = (arguments.modulation_rows(m, x, rows) for m in (gate, scale, shift))
    parameters = arguments.share_dtype(x, gate, post_weight, pre_weight, scale, shift)
    fused = torch.ops.twostep.gated_residual_norm_modulate
    run = _differentiable if arguments.wants_grad(x, z, *parameters) else fused
    out, h, *_ = run(rows, z, *parameters, post_norm == "rms", norm == "layer", gate_act == "tanh", float(eps))
    return (out, h) if x.dim() == 3 else (out.view(x.shape), h.view(x.shape))


class _GatedResidualNormModulate(Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.twostep.gated_residual_norm_modulate(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, z, gate, post_weight, pre_weight, scale, shift, post_rms, layer, tanh, _ = inputs
        out, _, *stats = output
        ctx.save_for_backward(out, z, gate, post_weight, pre_weight, scale, *stats)
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        ctx.flags = post_rms, layer, tanh
        ctx.param_dtype = arguments.parameter_dtype(x, gate, post_weight, pre_weight, scale, shift)
        ctx.shift_shape = None if shift is None else shift.shape

    @staticmethod
    @first_order("gated_residual_norm_modulate")
    def backward(ctx: Any, saved: Any, dout: Tensor | None, dh: Tensor | None, *_: None) -> Any:
        if dout is None and dh is None:
            return (None,) * 11
        out, z, gate, post_weight, pre_weight, scale, *stats = saved
        _, need_z, need_gate, need_post_weight, need_pre_weight, need_scale, need_shift, *_ = ctx.needs_input_grad
        shift_per_token = need_shift and len(ctx.shift_shape) == 3 and ctx.shift_shape[1] != 1
        if dh is None:  # only the residual stream was used
            post_rms, _, tanh = ctx.flags
            dz, dgate, dpost_weight = torch.ops.twostep.gated_residual_backward(
                dout, z, gate, post_weight, stats[0], post_rms, tanh, need_gate, need_post_weight
            )
            wanted = (need_z, dz), (need_gate, dgate), (need_post_weight, dpost_weight)
            return dout, *(gradient if need else None for need, gradient in wanted), *(None,) * 7
        dx, dz, dgate, dpost_weight, dpre_weight, dscale, dshift = (
            torch.ops.twostep.gated_residual_norm_modulate_backward(
                dout,
                dh,
                out,
                z,
                gate,
                post_weight,
                pre_weight,
                scale,
                *stats,
                *ctx.flags,
                ctx.param_dtype,
                need_gate,
                need_post_weight,
                need_pre_weight,
                need_scale,
                need_shift and not shift_per_token,
            )
        )
        dshift = dh.to(ctx.param_dtype) if shift_per_token else dshift.view(ctx.shift_shape) if need_shift else None
        return (
            dx,
            dz if need_z else None,
            dgate if need_gate else None,
            dpost_weight if need_post_weight else None,
            dpre_weight if need_pre_weight else None,
            dscale if need_scale else None,
            dshift,
            None,
            None,
            None,
            None,
        )


_differentiable = differentiable(_GatedResidualNormModulate)


@register_fake("gated_residual_norm_modulate")
def _(
    x: Any,
    z: Any,
    gate: Any,
    post_weight: Any,
    pre_weight: Any,
    scale: Any,
    shift: Any,
    post_rms: bool,
    layer: bool,
    tanh: bool,
    eps: float,
) -> Any:
    rows = x.new_empty(x.shape), x.new_empty(x.shape)
    return *rows, statistics(x, post_rms), statistics(x, layer), statistics(x, True)


@register_fake("gated_residual_norm_modulate_backward")
def _(
    dout: Any,
    dh: Any,
    out: Any,
    z: Any,
    gate: Any,
    post_weight: Any,
    pre_weight: Any,
    scale: Any,
    post_rstd: Any,
    mean: Any,
    rstd: Any,
    post_rms: bool,
    layer: bool,
    tanh: bool,
    param_dtype: torch.dtype,
    need_gate: bool,
    need_post_weight: bool,
    need_pre_weight: bool,
    need_scale: bool,
    need_shift: bool,
) -> Any:
    return (
        z.new_empty(z.shape),
        z.new_empty(z.shape),
        gradient(z, gate, param_dtype, need_gate),
        gradient(z, post_weight, param_dtype, need_post_weight),
        gradient(z, pre_weight, param_dtype, need_pre_weight),
        gradient(z, scale, param_dtype, need_scale),
        z.new_empty((z.shape[0], z.shape[2]) if need_shift else 0, dtype=param_dtype),
    )
