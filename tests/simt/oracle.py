"""The maths of csrc's headers in float64, differentiated by PyTorch, and how near a kernel must come."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# Half a unit in the last place, relative: what one rounding may cost.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# fp32 arithmetic inside, against the largest value of the row or sum.
ARITHMETIC = 3e-6
SMALLEST_HALF = 2.0**-25  # float16 rounds to multiples of 2^-24 below 2^-14


def wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().to(torch.float64)


def per_row(modulation: Tensor | None) -> Tensor | None:
    """[B, D] -> [B, 1, D]; [B, L, D] stays."""
    return modulation[:, None] if modulation is not None and modulation.dim() == 2 else modulation


def normalise(x: Tensor, norm: str, eps: float, frozen: bool = False) -> Tensor:
    """With `frozen`, statistics count as constants: a gradient is then its leading term, before what cancels it."""
    if norm == "none":
        return x
    of = x.detach() if frozen else x
    mean = of.mean(-1, keepdim=True) if norm == "layer" else 0.0
    return (x - mean) * torch.rsqrt((of - mean).square().mean(-1, keepdim=True) + eps)


def norm_modulate(
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    *,
    norm: str,
    eps: float,
    frozen: bool = False,
) -> Tensor:
    y = normalise(x, norm, eps, frozen)
    y = y if weight is None else y * weight
    scale, shift = per_row(scale), per_row(shift)
    y = y if scale is None else y * (1 + scale)
    return y if shift is None else y + shift


def branch(
    z: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    *,
    norm: str,
    gate_act: str,
    eps: float,
    frozen: bool = False,
) -> Tensor:
    y = normalise(z, norm, eps, frozen)
    y = y if weight is None else y * weight
    gate = per_row(gate)
    if gate is None:
        return y
    return y * (gate.tanh() if gate_act == "tanh" else gate)


def rope(x: Tensor, freqs: Tensor) -> Tensor:
    """x: [B, L, H, D]; freqs: [B or 1, L, D], (cos, sin) interleaved."""
    cosine, sine = freqs[:, :, None, 0::2], freqs[:, :, None, 1::2]
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack((first * cosine - second * sine, first * sine + second * cosine), dim=-1).flatten(-2)


def qk_norm(x: Tensor, weight: Tensor | None, freqs: Tensor, *, eps: float, frozen: bool = False) -> Tensor:
    y = normalise(x, "rms", eps, frozen)
    return rope(y if weight is None else y * weight, freqs)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def gradients(
    function: Callable[..., Tensor], inputs: Mapping[str, Tensor | None], cotangent: Tensor
) -> dict[str, Tensor]:
    """Gradients of <function(**inputs), cotangent> in float64, by input name."""
    leaves = {k: wide(v) for k, v in inputs.items()}
    present = {k: v.requires_grad_() for k, v in leaves.items() if v is not None}
    out = function(**leaves)
    found = torch.autograd.grad(out, list(present.values()), cotangent.to(torch.float64))
    return dict(zip(present, found, strict=True))


def assert_near(actual: Tensor, expected: Tensor, what: str, *, terms: Tensor | float = 0.0) -> None:
    """One rounding from the truth, and fp32 arithmetic before it on numbers as large as the row's and as `terms`."""
    assert actual.shape == expected.shape, what
    if actual.numel() == 0:
        return
    sizes = torch.maximum(expected.abs(), torch.as_tensor(terms, dtype=torch.float64).abs())
    bound = ROUNDING[actual.dtype] * expected.abs() + ARITHMETIC * sizes.amax(-1, keepdim=True) + 1e-12
    if actual.dtype == torch.float16:
        bound = bound + SMALLEST_HALF
    error = (actual.to(torch.float64) - expected).abs()
    bad = ~(error <= bound)  # NaN is bad
    if bad.any():
        at = tuple(int(i) for i in bad.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} wrong; first at {at}: "
            f"{float(actual[at])} for {float(expected[at])}, error {float(error[at]):.3g} over {float(bound[at]):.3g}"
        )
