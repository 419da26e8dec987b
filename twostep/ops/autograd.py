"""One autograd.Function, two ways in, and one clear end.

PyTorch's function transforms (torch.func.grad, vjp, ...) need the form with `setup_context`, which costs some 15
microseconds more a call than the form with `ctx` first: as much as a small kernel. So each operator is written once, in
the first form, and `differentiable` derives the second for everyday use.

The operators have a first derivative. `first_order` lets a second one fail where it is asked for, by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def _distinct(inputs: tuple[Any, ...]) -> list[Any]:
    """Dynamo refuses one tensor in two places (a weight shared by two norms): the second becomes a view."""
    distinct: list[Any] = []
    for i, value in enumerate(inputs):
        repeated = isinstance(value, Tensor) and any(value is earlier for earlier in inputs[:i])
        distinct.append(value.view_as(value) if repeated else value)
    return distinct


def differentiable(function: type[Function]) -> Callable[..., Any]:
    """A callable that applies `function`, which defines forward(*inputs), setup_context and backward."""

    class Direct(Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = function.forward(*inputs)
            function.setup_context(ctx, inputs, outputs)
            return outputs

        backward = staticmethod(function.backward)

    Direct.__name__ = Direct.__qualname__ = function.__name__.lstrip("_")

    def apply(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            if torch._C._are_functorch_transforms_active():
                # Dynamo would trace the operator without its derivative. Under fullgraph this is an error; otherwise
                # the function runs uncompiled, and right.
                raise RuntimeError(f"{Direct.__name__}: torch.func transforms inside torch.compile are not supported")
            return Direct.apply(*_distinct(inputs))  # type: ignore[no-untyped-call]
        if torch._C._are_functorch_transforms_active():
            return function.apply(*inputs)
        return Direct.apply(*inputs)  # type: ignore[no-untyped-call]

    return apply


class _FirstOrder(Function):
    """Hands the gradients on, and raises when somebody differentiates them."""

    @staticmethod
    def forward(op: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.op}: double backward is not implemented: the fused operators have a first derivative only. Use "
            f"twostep.ops.reference.{ctx.op}, plain PyTorch, where a gradient of a gradient is needed"
        )


def first_order(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks a backward(ctx, saved tensors, *gradients) whose results cannot be differentiated again."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def wrapped(ctx: Any, *gradients: Tensor | None) -> Any:
            saved = ctx.saved_tensors  # once: under checkpointing a second look would be an error
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, saved, *gradients)
            with torch.no_grad():
                results = backward(ctx, saved, *gradients)
            tensors = (*results, *gradients, *saved)
            return _FirstOrder.apply(op, len(results), *tensors)  # type: ignore[no-untyped-call]

        return wrapped

    return decorate
