"""Every operator in plain PyTorch: differentiable, any device, any dtype that PyTorch adds and multiplies.

The arithmetic is done in float32 (float64 for float64 inputs) and rounded once, to the dtype of the activations. These
functions take the shapes that the fused operators take; with float64 inputs they are the oracle of the tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import accumulation_dtype, align_modulation


def _wide(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _normalise(x: Tensor, norm: str, eps: float) -> Tensor:
    if norm == "none":
        return x
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _modulate(x: Tensor, weight: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * weight
    if scale is not None:
        x = x * (1 + scale)
    return x if shift is None else x + shift


def _gated(z: Tensor, gate: Tensor | None, weight: Tensor | None, gate_act: str) -> Tensor:
    if weight is not None:
        z = z * weight
    if gate is None:
        return z
    return z * (gate.tanh() if gate_act == "tanh" else gate)


def norm_modulate(
    x: Tensor,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    norm: str = "rms",
    eps: float = 1e-5,
) -> Tensor:
    """norm(x) * weight * (1 + scale) + shift"""
    wide = accumulation_dtype(x)
    scale, shift = (_wide(align_modulation(m, x), wide) for m in (scale, shift))
    return _modulate(_normalise(x.to(wide), norm, eps), _wide(weight, wide), scale, shift).to(x.dtype)


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
    """x + act(gate) * norm(z) * weight"""
    wide = accumulation_dtype(x)
    gate = _wide(align_modulation(gate, x), wide)
    branch = _gated(_normalise(z.to(x.dtype).to(wide), norm, eps), gate, _wide(weight, wide), gate_act)
    return (x.to(wide) + branch).to(x.dtype)


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
    """out = x + act(gate) * post_norm(z) * post_weight; h = norm(out) * pre_weight * (1 + scale) + shift"""
    wide = accumulation_dtype(x)
    gate, scale, shift = (_wide(align_modulation(m, x), wide) for m in (gate, scale, shift))
    branch = _gated(_normalise(z.to(x.dtype).to(wide), post_norm, eps), gate, _wide(post_weight, wide), gate_act)
    out = (x.to(wide) + branch).to(x.dtype)
    h = _modulate(_normalise(out.to(wide), norm, eps), _wide(pre_weight, wide), scale, shift)
    return out, h.to(x.dtype)


def _rotate(x: Tensor, freqs: Tensor) -> Tensor:
    cos, sin = freqs.to(x.dtype).unsqueeze(-3).unbind(-1)  # [B or 1, L, 1, Dh/2]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # [B, L, H, Dh/2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def rope(x: Tensor, freqs: Tensor) -> Tensor:
    """Interleaved pairs of x [B, L, H, Dh], rotated by freqs [B or 1, L, Dh/2, 2] = (cos, sin)."""
    return _rotate(x.to(accumulation_dtype(x)), freqs).to(x.dtype)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    freqs: Tensor,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of each head of q and k [B, L, H, Dh], then rope."""
    wide = accumulation_dtype(q)

    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        normed = _modulate(_normalise(x.to(wide), "rms", eps), _wide(weight, wide), None, None)
        return _rotate(normed, freqs).to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up"""
    wide = accumulation_dtype(gate)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)
