"""Every operator in plain PyTorch: differentiable, any device, any dtype that PyTorch adds and multiplies.

The arithmetic is done in float32 (float64 for float64 inputs) and rounded once, to the dtype of the activations. These
functions take the shapes that the fused operators take; with float64 inputs they are the oracle of the tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import accumulation_dtype, align_modulation, widest


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


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up; without up, gate holds both side by side"""
    if up is None:
        gate, up = gate.chunk(2, -1)
    wide = accumulation_dtype(gate)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def _per_sample(value: float | Tensor, x: Tensor, dtype: torch.dtype) -> float | Tensor:
    """A number, or numbers [batch] that broadcast over x [batch, ...]."""
    if not isinstance(value, Tensor):
        return value
    return value.to(dtype).reshape(-1, *([1] * (x.dim() - 1))) if value.dim() else value.to(dtype)


def euler_step(x: Tensor, v: Tensor, delta: float | Tensor) -> Tensor:
    """x + delta * v"""
    wide = widest(x.dtype, v.dtype)
    return (x.to(wide) + _per_sample(delta, x, wide) * v.to(wide)).to(x.dtype)


def clean_prediction(x: Tensor, v: Tensor, sigma: float | Tensor) -> Tensor:
    """x - sigma * v"""
    return euler_step(x, v, -sigma)


def _scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x itself, whose gradient is multiplied by scale."""
    return x if scale == 1 else x.detach() + scale * (x - x.detach())


def two_step_split(noise: Tensor, v: Tensor, mid: float, *, inherit: float = 1.0) -> tuple[Tensor, Tensor]:
    """z = noise + (mid - 1) * v, whose gradient counts `inherit` times, and x_a = noise - v"""
    wide = widest(noise.dtype, v.dtype)
    state, velocity = noise.to(wide), v.to(wide)
    z = _scale_gradient(state, inherit) + (mid - 1) * _scale_gradient(velocity, inherit)
    return z.to(noise.dtype), (state - velocity).to(noise.dtype)


def inject_gradient(
    inherited: Tensor | None,
    own: Tensor | None,
    mid: float,
    *,
    weight: float = 1.0,
    factor: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """weight * factor * (mid - 1) * inherited - own"""
    state = inherited if inherited is not None else own
    assert state is not None
    wide = widest(state.dtype, dtype or state.dtype)
    gradient = torch.zeros_like(state, dtype=wide)
    if inherited is not None:
        gradient = weight * (mid - 1) * inherited.detach().to(wide)
        gradient = gradient if factor is None else gradient * _per_sample(factor, state, wide)
    if own is not None:
        gradient = gradient - own.detach().to(wide)
    return gradient.to(dtype or state.dtype)


def gradient_norms(g: Tensor) -> tuple[Tensor, Tensor]:
    """The L2 norm of each sample of g [batch, ...], and of all of it"""
    samples = g.detach().reshape(g.shape[0], g[:1].numel()).to(accumulation_dtype(g))
    return torch.linalg.vector_norm(samples, dim=1), torch.linalg.vector_norm(samples)


def dmd_direction(x: Tensor, real_clean: Tensor, fake_clean: Tensor, *, eps: float = 1e-6) -> Tensor:
    """(p_real - p_fake) / max(mean over a sample of |p_real|, eps), p_real = x - real_clean, p_fake = x - fake_clean"""
    wide = widest(x.dtype, real_clean.dtype, fake_clean.dtype)
    p_real = x.detach().to(wide) - real_clean.detach().to(wide)
    p_fake = x.detach().to(wide) - fake_clean.detach().to(wide)
    normaliser = p_real.abs() if x.dim() == 1 else p_real.abs().mean(tuple(range(1, x.dim())), keepdim=True)
    normaliser = normaliser + 0.0 * normaliser  # an infinite one is NaN: dividing by it would hide it
    return ((p_real - p_fake) / normaliser.clamp_min(eps)).to(accumulation_dtype(x))
