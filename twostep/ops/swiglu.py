"""silu(gate) * up, with a backward that recomputes. The maths and the bytes are in csrc/swiglu.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import arguments, reference
from .autograd import differentiable, first_order
from .library import choose, register_fake


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of two tensors with one shape and dtype. The halves of a fused projection are read in place."""
    op = "swiglu"
    arguments.check_rows(op, "gate", gate)
    arguments.check_same(op, "up", up, "gate", gate)
    if up.dtype != gate.dtype:
        raise TypeError(f"{op}: up has dtype {up.dtype}, expected {gate.dtype}, the dtype of gate")
    if choose(op, gate, 1) == "reference":
        return reference.swiglu(gate, up)
    run = _differentiable if arguments.wants_grad(gate, up) else torch.ops.twostep.swiglu
    y: Tensor = run(arguments.as_rows(gate), arguments.as_rows(up))
    return y if gate.dim() == 3 else y.view(gate.shape)


class _Swiglu(Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.twostep.swiglu(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @first_order("swiglu")
    def backward(ctx: Any, saved: Any, dy: Tensor) -> Any:
        gate, up = saved
        dgate, dup = torch.ops.twostep.swiglu_backward(dy, gate, up)
        need_gate, need_up = ctx.needs_input_grad
        return dgate if need_gate else None, dup if need_up else None


_differentiable = differentiable(_Swiglu)


@register_fake("swiglu")
def _(gate: Any, up: Any) -> Any:
    return gate.new_empty(gate.shape)


@register_fake("swiglu_backward")
def _(dy: Any, gate: Any, up: Any) -> Any:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)
