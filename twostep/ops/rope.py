"""Rotary embedding of interleaved pairs by a real (cos, sin) table. The maths and the bytes are in csrc/rope.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import arguments, reference
from .autograd import differentiable, first_order
from .library import CUDA_MAX_HEAD_WIDTH, choose, register_fake


def rope(x: Tensor, freqs: Tensor) -> Tensor:
    """x [batch, length, heads, head width] with its interleaved pairs rotated.

    freqs is [batch or 1, length, head width / 2, 2]: real (cos, sin) pairs, a constant without a gradient. A complex
    table goes in as torch.view_as_real(table).
    """
    op = "rope"
    arguments.check_heads(op, "x", x)
    freqs = arguments.check_freqs(op, freqs, x)
    if choose(op, x, x.shape[3], CUDA_MAX_HEAD_WIDTH) == "reference":
        return reference.rope(x, freqs)
    run = _differentiable if arguments.wants_grad(x) else torch.ops.twostep.rope
    y: Tensor = run(x, freqs, False)
    return y


class _Rope(Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.twostep.rope(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, freqs, inverse = inputs
        ctx.save_for_backward(freqs)
        ctx.inverse = inverse

    @staticmethod
    @first_order("rope")
    def backward(ctx: Any, saved: Any, dy: Tensor) -> Any:
        (freqs,) = saved
        return torch.ops.twostep.rope(dy, freqs, not ctx.inverse), None, None


_differentiable = differentiable(_Rope)


@register_fake("rope")
def _(x: Any, freqs: Any, inverse: bool) -> Any:
    return x.new_empty(x.shape)
