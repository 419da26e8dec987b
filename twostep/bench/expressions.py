"""Each operator as eager PyTorch code has it today: what a fused operator is compared with, in speed and in error.

The expressions are those of diffusers' Z-Image and FLUX.2: its RMSNorm (statistics in float32, the rest in the dtype of
the activations), `layer_norm`, rotation through complex numbers, `silu(gate) * up`. torch.compile is given these very
functions. `native` holds what PyTorch's own functions make shorter: the same with `rms_norm`, and a step as one `add`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

RmsNorm = Callable[[Tensor, Any, float], Tensor]  # activations, weight or None, eps


def diffusers_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x * torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return y.to(x.dtype)
    if weight.dtype in (torch.float16, torch.bfloat16):
        y = y.to(weight.dtype)
    return y * weight


def native_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rope(x: Tensor, freqs: Tensor) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = torch.view_as_complex(x.to(wide).reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.view_as_complex(freqs).unsqueeze(2)).flatten(3).type_as(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def euler_step(x: Tensor, v: Tensor, delta: float | Tensor) -> Tensor:
    """As diffusers' FlowMatchEulerDiscreteScheduler.step has it."""
    if isinstance(delta, Tensor) and delta.dim():
        delta = delta.reshape(-1, *([1] * (x.dim() - 1)))
    return (x + delta * v).to(x.dtype)


def two_step_split(noise: Tensor, v: Tensor, mid: float, *, inherit: float = 1.0) -> tuple[Tensor, Tensor]:
    passed = v if inherit == 1 else v.detach() + inherit * (v - v.detach())
    start = noise if inherit == 1 else noise.detach() + inherit * (noise - noise.detach())
    return start + (mid - 1) * passed, noise - v


def inject_gradient(
    inherited: Tensor, own: Tensor, mid: float, *, weight: float = 1.0, factor: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    factor = factor.reshape(-1, *([1] * (own.dim() - 1))) if factor.dim() else factor
    return (weight * (mid - 1) * factor * inherited - own).to(dtype or own.dtype)


def gradient_norms(g: Tensor) -> tuple[Tensor, Tensor]:
    norms = g.float().flatten(1).norm(dim=1)
    return norms, norms.norm()


def dmd_direction(x: Tensor, real_clean: Tensor, fake_clean: Tensor, *, eps: float = 1e-6) -> Tensor:
    """As DMD2's released code has it, in float32."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    p_real, p_fake = x.to(wide) - real_clean.to(wide), x.to(wide) - fake_clean.to(wide)
    return (p_real - p_fake) / p_real.abs().mean(tuple(range(1, x.dim())), keepdim=True).clamp_min(eps)


def _per_token(m: Tensor | None, x: Tensor) -> Tensor | None:
    return m.unsqueeze(1) if m is not None and m.dim() == 2 and x.dim() == 3 else m


def with_rms_norm(rms_norm: RmsNorm) -> dict[str, Callable[..., Any]]:
    """The expressions that hold a norm, around somebody's RMSNorm."""

    def apply_norm(x: Tensor, weight: Tensor | None, norm: str, eps: float) -> Tensor:
        if norm == "rms":
            return rms_norm(x, weight, eps)
        if norm == "layer":
            x = F.layer_norm(x, x.shape[-1:], None, None, eps)
        return x if weight is None else x * weight

    def norm_modulate(
        x: Tensor,
        weight: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        norm: str = "rms",
        eps: float = 1e-5,
    ) -> Tensor:
        scale, shift = _per_token(scale, x), _per_token(shift, x)
        y = apply_norm(x, weight, norm, eps)
        if scale is not None:
            y = y * (1 + scale)
        return (y if shift is None else y + shift).to(x.dtype)

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
        gate = _per_token(gate, x)
        branch = apply_norm(z, weight, norm, eps)
        if gate is not None:
            branch = (gate.tanh() if gate_act == "tanh" else gate) * branch
        return (x + branch).to(x.dtype)  # the residual stream keeps its dtype, whatever the parameters'

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
        out = gated_residual(x, z, gate, post_weight, norm=post_norm, gate_act=gate_act, eps=eps)
        return out, norm_modulate(out, pre_weight, scale, shift, norm=norm, eps=eps)

    def qk_norm_rope(
        q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, freqs: Tensor, *, eps: float = 1e-5
    ) -> tuple[Tensor, Tensor]:
        return rope(rms_norm(q, q_weight, eps), freqs), rope(rms_norm(k, k_weight, eps), freqs)

    return {
        "norm_modulate": norm_modulate,
        "gated_residual": gated_residual,
        "gated_residual_norm_modulate": gated_residual_norm_modulate,
        "qk_norm_rope": qk_norm_rope,
    }


diffusers = SimpleNamespace(
    **with_rms_norm(diffusers_rms_norm),
    rope=rope,
    swiglu=swiglu,
    euler_step=euler_step,
    two_step_split=two_step_split,
    inject_gradient=inject_gradient,
    gradient_norms=gradient_norms,
    dmd_direction=dmd_direction,
)
native = SimpleNamespace(**with_rms_norm(native_rms_norm), euler_step=lambda x, v, delta: torch.add(x, v, alpha=delta))
NATIVE_NAMES = {"euler_step": "torch.add"}  # the others are F.rms_norm
