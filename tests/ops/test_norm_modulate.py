"""norm_modulate against float64, and what is particular to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twostep import ops

from . import oracle, strategies
from .oracle import Case


@pytest.mark.parametrize("dtype", strategies.DTYPES, ids=str)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_is_as_exact_as_eager_pytorch(cpu_isa: str, dtype: torch.dtype, data: st.DataObject) -> None:
    oracle.check(data.draw(strategies.norm_modulate(dtype)))


@pytest.mark.parametrize("width", [1, 2047, 3840, 16384, 20001])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_takes_any_width(width: int, norm: str) -> None:
    x, weight = torch.randn(2, 3, width), torch.randn(width)
    scale, shift = torch.randn(2, 1, 4 * width).chunk(4, 2)[:2]
    tensors = {"x": x, "weight": weight, "scale": scale, "shift": shift}
    oracle.check(Case("norm_modulate", tensors, {"norm": norm}))


def test_layer_norm_survives_a_large_mean() -> None:
    x = torch.randn(2, 4, 512) + 1000.0
    y = ops.norm_modulate(x, norm="layer")
    exact = ops.reference.norm_modulate(x.double(), norm="layer")
    eager = torch.nn.functional.layer_norm(x, (512,))
    assert (y - exact).norm() <= 2 * (eager - exact).norm()


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 5, 24), (2, 3, 5, 24)])
def test_takes_any_leading_shape(shape: tuple[int, ...]) -> None:
    batch = shape[0] if len(shape) > 2 else 1
    x, weight, scale = torch.randn(shape), torch.randn(24), torch.randn(shape if len(shape) < 3 else (batch, 24))
    oracle.check(Case("norm_modulate", {"x": x, "weight": weight, "scale": scale, "shift": torch.randn(24)}))
    per_row = torch.randn(shape)
    oracle.check(Case("norm_modulate", {"x": x, "weight": None, "scale": per_row, "shift": per_row.clone()}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "norm_modulate: x is list, expected a torch.Tensor"),
        ({"x": torch.ones(2, 5, 24, dtype=torch.int32)}, TypeError, "x has dtype torch.int32, expected one of"),
        ({"x": torch.ones(2, 5, 0)}, ValueError, r"x has shape \[2, 5, 0\], expected \[..., width\]"),
        ({"weight": torch.ones(23)}, ValueError, r"weight has shape \[23\], expected \[24\] \(width\)"),
        (
            {"scale": torch.ones(2, 23)},
            ValueError,
            r"scale has shape \[2, 23\], expected \[2, 24\] \(batch, width\) or \[2, 5, 24\] \(per token\)",
        ),
        ({"scale": torch.ones(3, 24)}, ValueError, r"scale has shape \[3, 24\]"),
        ({"shift": torch.ones(2, 4, 24)}, ValueError, r"shift has shape \[2, 4, 24\]"),
        ({"shift": torch.ones(2, 24, device="meta")}, ValueError, "shift is on meta, expected cpu"),
        ({"norm": "batch"}, ValueError, "norm is 'batch', expected one of 'rms', 'layer'"),
        ({"eps": -1.0}, ValueError, "eps is -1.0, expected a finite number that is not negative"),
        ({"eps": float("nan")}, ValueError, "eps is nan"),
        ({"eps": "1e-5"}, TypeError, "eps is str, expected a number"),
    ],
)
def test_says_what_is_wrong(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.norm_modulate(**{"x": torch.randn(2, 5, 24), **change})
