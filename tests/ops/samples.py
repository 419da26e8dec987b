"""One representative call of each operator, with everything switched on: for tests that hold for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .oracle import Case

OPS = (
    "norm_modulate",
    "gated_residual",
    "gated_residual_norm_modulate",
    "qk_norm_rope",
    "rope",
    "swiglu",
    "euler_step",
    "two_step_split",
)
DATA_OPS = ("inject_gradient", "gradient_norms", "dmd_direction")  # what they return carries no gradient


def sample(
    op: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    batch: int = 2,
    length: int = 5,
    width: int = 24,
    heads: int = 3,
    per_token: bool = False,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    def modulation() -> Tensor:
        return randn(batch, length if per_token else 1, width)

    def table() -> Tensor:
        angles = torch.randn(1, length, width // 2, generator=generator, dtype=torch.float64)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.stack((angles.cos(), angles.sin()), -1).to(device, wide)

    if op == "norm_modulate":
        tensors = {
            "x": randn(batch, length, width),
            "weight": randn(width),
            "scale": modulation(),
            "shift": modulation(),
        }
        return Case(op, tensors, {"norm": "layer"})
    if op == "gated_residual":
        rows = {"x": randn(batch, length, width), "z": randn(batch, length, width)}
        return Case(op, {**rows, "gate": modulation(), "weight": randn(width)})
    if op == "gated_residual_norm_modulate":
        rows = {"x": randn(batch, length, width), "z": randn(batch, length, width)}
        weights = {"gate": modulation(), "post_weight": randn(width), "pre_weight": randn(width)}
        return Case(op, {**rows, **weights, "scale": modulation(), "shift": modulation()})
    if op == "qk_norm_rope":
        qk = {"q": randn(batch, length, heads, width), "k": randn(batch, length, heads, width)}
        return Case(op, {**qk, "q_weight": randn(width), "k_weight": randn(width), "freqs": table()})
    if op == "rope":
        return Case(op, {"x": randn(batch, length, heads, width), "freqs": table()})
    if op == "euler_step":
        deltas = torch.randn(batch, generator=generator).to(device)
        return Case(op, {"x": randn(batch, length, width), "v": randn(batch, length, width), "delta": deltas})
    if op == "two_step_split":
        tensors = {"noise": randn(batch, length, width), "v": randn(batch, length, width)}
        return Case(op, tensors, {"mid": 0.75})
    if op == "inject_gradient":
        tensors = {"inherited": randn(batch, length, width), "own": randn(batch, length, width)}
        return Case(op, {**tensors, "factor": torch.rand(batch, generator=generator).to(device)}, {"mid": 0.75})
    if op == "gradient_norms":
        return Case(op, {"g": randn(batch, length, width)})
    if op == "dmd_direction":
        return Case(op, {name: randn(batch, length, width) for name in ("x", "real_clean", "fake_clean")})
    return Case(op, {"gate": randn(batch, length, width), "up": randn(batch, length, width)})
