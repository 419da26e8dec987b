"""out = x + act(gate) * norm(z) * weight. The maths and the bytes are in csrc/gated_residual.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import arguments, reference
from .autograd import differentiable, first_order
from .library import choose, gradient, register_fake, statistics


def gated_residual(
    x: Tensor,
    z: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    norm: str = "rms",
    gate_act: str = "tanh",
    eps: float = 1e-5,
) -> Tensor:
    """x + act(gate) * norm(z) * weight, in one pass: the end of a transformer block's branch.

    Args:
        x: the residual stream [batch, length, width]; any leading shape is accepted.
        z: the branch's output, of x's shape; it is cast to x's dtype where it has another.
        gate: per sample [batch, width] or [batch, 1, width], per token [batch, length, width], or None for no gate.
        weight: of the norm, [width], or None for 1.
        norm: "rms" or "none".
        gate_act: "tanh" or "none".
        eps: added to the mean square.

    Returns a tensor with x's shape and dtype.
    """
    op = "gated_residual"
    arguments.check_rows(op, "x", x)
    arguments.check_same(op, "z", z, "x", x)
    arguments.check_modulation(op, "gate", gate, x)
    arguments.check_weight(op, "weight", weight, x)
    arguments.check_choice(op, "norm", norm, ("rms", "none"))
    arguments.check_choice(op, "gate_act", gate_act, ("tanh", "none"))
    arguments.check_eps(op, eps)
    if choose(op, x, x.shape[-1]) == "reference":
        return reference.gated_residual(x, z, gate, weight, norm=norm, gate_act=gate_act, eps=eps)
    rows, z = arguments.as_rows(x), arguments.as_rows(z).to(x.dtype)
    gate, weight = arguments.share_dtype(x, arguments.modulation_rows(gate, x, rows), weight)
    run = _differentiable if arguments.wants_grad(x, z, gate, weight) else torch.ops.twostep.gated_residual
    out: Tensor = run(rows, z, gate, weight, norm == "rms", gate_act == "tanh", float(eps))[0]
    return out if x.dim() == 3 else out.view(x.shape)


class _GatedResidual(Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.twostep.gated_residual(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, z, gate, weight, rms, tanh, _ = inputs
        _, rstd = output
        ctx.save_for_backward(z, gate, weight, rstd)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        ctx.flags = rms, tanh

    @staticmethod
    @first_order("gated_residual")
    def backward(ctx: Any, saved: Any, dout: Tensor | None, _: None) -> Any:
        if dout is None or not any(ctx.needs_input_grad[1:4]):
            return dout, None, None, None, None, None, None
        z, gate, weight, rstd = saved
        _, need_z, need_gate, need_weight, *_ = ctx.needs_input_grad
        dz, dgate, dweight = torch.ops.twostep.gated_residual_backward(
            dout, z, gate, weight, rstd, *ctx.flags, need_gate, need_weight
        )
        return (
            dout,
            dz if need_z else None,
            dgate if need_gate else None,
            dweight if need_weight else None,
            None,
            None,
            None,
        )


_differentiable = differentiable(_GatedResidual)


@register_fake("gated_residual")
def _(x: Any, z: Any, gate: Any, weight: Any, rms: bool, tanh: bool, eps: float) -> Any:
    return x.new_empty(x.shape), statistics(x, rms)


@register_fake("gated_residual_backward")
def _(
    dout: Any, z: Any, gate: Any, weight: Any, rstd: Any, rms: bool, tanh: bool, need_gate: bool, need_weight: bool
) -> Any:
    dtype = arguments.parameter_dtype(z, gate, weight)
    return z.new_empty(z.shape), gradient(z, gate, dtype, need_gate), gradient(z, weight, dtype, need_weight)
