"""silu(gate) * up, with a backward that recomputes. The maths and the bytes are in csrc/swiglu.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import arguments, reference
from .autograd import differentiable, first_order
from .library import backend, choose, register_fake


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, of two tensors with one shape and dtype.

    Without `up`, gate holds both side by side, [..., 2 * width], as one projection makes them: they are read in place,
    and their gradient is one tensor too. Halves that are handed over as two views are read in place as well, but
    autograd then joins their gradients by a copy.
    """
    op = "swiglu"
    arguments.check_rows(op, "gate", gate)
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(
                f"{op}: gate has shape {arguments.shape_text(gate)} and up is None, expected [..., 2 * width]: gate "
                "and up side by side"
            )
    else:
        arguments.check_same(op, "up", up, "gate", gate)
        if up.dtype != gate.dtype:
            raise TypeError(f"{op}: up has dtype {up.dtype}, expected {gate.dtype}, the dtype of gate")
    if choose(op, gate, 1) == "reference":
        return reference.swiglu(gate, up)
    rows = arguments.as_rows(gate)
    if up is None:
        y: Tensor = _of_halves(rows) if arguments.wants_grad(gate) else torch.ops.twostep.swiglu(*rows.chunk(2, -1))
        return y if gate.dim() == 3 else y.view(*gate.shape[:-1], -1)
    run = _differentiable if arguments.wants_grad(gate, up) else torch.ops.twostep.swiglu
    y = run(rows, arguments.as_rows(up))
    return y if gate.dim() == 3 else y.view(gate.shape)


def swiglu_of_spent(gate: Tensor, up: Tensor) -> Tensor:
    """swiglu(gate, up), where nobody looks at gate again: it is written over where that is possible and pays, on a CPU
    with autograd switched off. New memory may cost there as much as the arithmetic, by its page faults.

    With autograd on it is not, even if nothing here wants a gradient: selective checkpointing keeps what it has seen.
    Nor under a dispatch mode, which may keep it too.
    """
    spent = (
        not torch.compiler.is_compiling()
        and type(gate) is Tensor
        and gate.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not arguments.wants_grad(gate, up)
        and not torch._C._len_torch_dispatch_stack()
        and gate.is_contiguous()
        and gate.dim() > 0
        and gate.shape == up.shape
        and gate.dtype == up.dtype
        and backend(gate) == "cpu"
    )
    if not spent:
        return swiglu(gate, up)
    torch.ops.twostep.swiglu_over_gate(arguments.as_rows(gate), arguments.as_rows(up))
    if not gate.is_inference():
        torch.autograd.graph.increment_version(gate)
    return gate


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


class _SwigluOfHalves(Function):
    @staticmethod
    def forward(halves: Any) -> Any:
        return torch.ops.twostep.swiglu(*halves.chunk(2, -1))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @first_order("swiglu")
    def backward(ctx: Any, saved: Any, dy: Tensor) -> Any:
        return (torch.ops.twostep.swiglu_halves_backward(dy, *saved),)


_differentiable = differentiable(_Swiglu)
_of_halves = differentiable(_SwigluOfHalves)


@register_fake("swiglu")
def _(gate: Any, up: Any) -> Any:
    return gate.new_empty(gate.shape)


@register_fake("swiglu_over_gate")
def _(gate: Any, up: Any) -> None:
    return None


@register_fake("swiglu_backward")
def _(dy: Any, gate: Any, up: Any) -> Any:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@register_fake("swiglu_halves_backward")
def _(dy: Any, halves: Any) -> Any:
    return halves.new_empty(halves.shape)
