"""What each operator's forward is in PyTorch's own operators: for exporters that know no others, such as ONNX.

program.run_decompositions({**torch.export.default_decompositions(), **ops.decompositions()})
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .library import build_info


def decompositions() -> dict[Any, Callable[..., Any]]:
    """By operator, for torch.export's run_decompositions. Statistics, which a backward would read, come out empty."""
    if not build_info()["usable"]:
        return {}  # without the library a program holds no operators of it
    made: dict[str, Callable[..., Any]] = {
        "norm_modulate": _norm_modulate,
        "gated_residual": _gated_residual,
        "gated_residual_norm_modulate": _gated_residual_norm_modulate,
        "qk_norm_rope": _qk_norm_rope,
        "rope": _rope,
        "swiglu": reference.swiglu,
    }
    return {getattr(torch.ops.twostep, name).default: function for name, function in made.items()}


def _norm(of: bool) -> str:
    return "layer" if of else "rms"


def _post_norm(rms: bool) -> str:
    return "rms" if rms else "none"


def _act(tanh: bool) -> str:
    return "tanh" if tanh else "none"


def _norm_modulate(
    x: Tensor, weight: Tensor | None, scale: Tensor | None, shift: Tensor | None, layer: bool, eps: float
) -> tuple[Tensor, ...]:
    y = reference.norm_modulate(x, weight, scale, shift, norm=_norm(layer), eps=eps)
    return y, x.new_empty(0), x.new_empty(0)


def _gated_residual(
    x: Tensor, z: Tensor, gate: Tensor | None, weight: Tensor | None, rms: bool, tanh: bool, eps: float
) -> tuple[Tensor, ...]:
    out = reference.gated_residual(x, z, gate, weight, norm=_post_norm(rms), gate_act=_act(tanh), eps=eps)
    return out, x.new_empty(0)


def _gated_residual_norm_modulate(
    x: Tensor,
    z: Tensor,
    gate: Tensor | None,
    post_weight: Tensor | None,
    pre_weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    post_rms: bool,
    layer: bool,
    tanh: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    inputs = (x, z, gate, post_weight, pre_weight, scale, shift)
    post = _post_norm(post_rms)
    both = reference.gated_residual_norm_modulate(
        *inputs, norm=_norm(layer), post_norm=post, gate_act=_act(tanh), eps=eps
    )
    return *both, x.new_empty(0), x.new_empty(0), x.new_empty(0)


def _qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, freqs: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return reference.qk_norm_rope(q, k, q_weight, k_weight, freqs, eps=eps)


def _rope(x: Tensor, freqs: Tensor, inverse: bool) -> Tensor:
    if inverse:
        cos, sin = freqs.unbind(-1)
        freqs = torch.stack([cos, -sin], -1)
    return reference.rope(x, freqs)
