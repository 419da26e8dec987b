"""RMSNorm of each head of q and k, then rotary embedding. The maths and the bytes are in csrc/qk_norm_rope.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import arguments, reference
from .autograd import differentiable, first_order
from .library import CUDA_MAX_HEAD_WIDTH, choose, gradient, register_fake


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    freqs: Tensor,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of each head of q and of k, then rotation of interleaved pairs, in one pass.

    Args:
        q, k: [batch, length, heads, head width]; they may differ in their number of heads. Views with a dense last
            dimension (chunks of a fused projection) are read in place.
        q_weight, k_weight: [head width], or None for 1.
        freqs: [batch or 1, length, head width / 2, 2], real (cos, sin) pairs; a constant, without a gradient.
        eps: added to the mean square.

    Returns (q, k), contiguous.
    """
    op = "qk_norm_rope"
    arguments.check_heads(op, "q", q)
    arguments.check_heads(op, "k", k)
    arguments.check_device(op, "k", k, q)
    if k.dtype != q.dtype:
        raise TypeError(f"{op}: k has dtype {k.dtype}, expected {q.dtype}, the dtype of q")
    if (k.shape[0], k.shape[1], k.shape[3]) != (q.shape[0], q.shape[1], q.shape[3]):
        raise ValueError(
            f"{op}: k has shape {arguments.shape_text(k)}, expected [{q.shape[0]}, {q.shape[1]}, heads, {q.shape[3]}]: "
            "q's batch, length and head width"
        )
    arguments.check_weight(op, "q_weight", q_weight, q)
    arguments.check_weight(op, "k_weight", k_weight, k)
    arguments.check_eps(op, eps)
    freqs = arguments.check_freqs(op, freqs, q)
    if choose(op, q, q.shape[3], CUDA_MAX_HEAD_WIDTH) == "reference":
        return reference.qk_norm_rope(q, k, q_weight, k_weight, freqs, eps=eps)
    weights = arguments.share_dtype(q, q_weight, k_weight)
    run = _differentiable if arguments.wants_grad(q, k, *weights) else torch.ops.twostep.qk_norm_rope
    q, k = run(q, k, *weights, freqs, float(eps))
    return q, k


class _QkNormRope(Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:
        return torch.ops.twostep.qk_norm_rope(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, eps = inputs
        ctx.save_for_backward(*tensors)
        ctx.eps = eps

    @staticmethod
    @first_order("qk_norm_rope")
    def backward(ctx: Any, saved: Any, dq_out: Tensor, dk_out: Tensor) -> Any:
        need_q, need_k, need_q_weight, need_k_weight, *_ = ctx.needs_input_grad
        dq, dk, dq_weight, dk_weight = torch.ops.twostep.qk_norm_rope_backward(
            dq_out, dk_out, *saved, ctx.eps, need_q_weight, need_k_weight
        )
        return (
            dq if need_q else None,
            dk if need_k else None,
            dq_weight if need_q_weight else None,
            dk_weight if need_k_weight else None,
            None,
            None,
        )


_differentiable = differentiable(_QkNormRope)


@register_fake("qk_norm_rope")
def _(q: Any, k: Any, q_weight: Any, k_weight: Any, freqs: Any, eps: float) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@register_fake("qk_norm_rope_backward")
def _(
    dq_out: Any,
    dk_out: Any,
    q: Any,
    k: Any,
    q_weight: Any,
    k_weight: Any,
    freqs: Any,
    eps: float,
    need_q_weight: bool,
    need_k_weight: bool,
) -> Any:
    dtype = arguments.parameter_dtype(q, q_weight, k_weight)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        gradient(q, q_weight, dtype, need_q_weight),
        gradient(k, k_weight, dtype, need_k_weight),
    )
