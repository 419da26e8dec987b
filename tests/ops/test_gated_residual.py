"""gated_residual against float64, and what is particular to it."""

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
    oracle.check(data.draw(strategies.gated_residual(dtype)))


def test_takes_a_branch_in_another_dtype() -> None:
    x, z = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 5, 24, dtype=torch.bfloat16, requires_grad=True)
    out = ops.gated_residual(x, z, torch.randn(2, 24), torch.randn(24))
    out.sum().backward()
    assert out.dtype == torch.float32 and z.grad is not None and z.grad.dtype == torch.bfloat16


def test_the_residual_stream_passes_its_gradient_on() -> None:
    x = torch.randn(2, 5, 24, requires_grad=True)
    out = ops.gated_residual(x, torch.randn(2, 5, 24), torch.randn(2, 24))
    incoming = torch.randn_like(out)
    out.backward(incoming)
    assert torch.equal(x.grad, incoming)


def test_a_closed_gate_leaves_the_stream_untouched() -> None:
    x = torch.randn(2, 5, 24)
    assert torch.equal(ops.gated_residual(x, torch.randn(2, 5, 24), torch.zeros(2, 24)), x)


@pytest.mark.parametrize("per_token", [False, True])
def test_without_a_norm_the_branchs_gradient_does_not_look_at_the_branch(cpu_isa: str, per_token: bool) -> None:
    """So that a branch that overflows, and is clipped afterwards as diffusers does in float16, stops nothing."""
    x, gate = torch.randn(2, 5, 37), torch.randn(2, 5 if per_token else 1, 37)
    z = torch.randn(2, 5, 37)
    z[0, 1, 3], z[1, 4, 36], z[1, 0, 0] = float("inf"), float("nan"), float("-inf")
    z.requires_grad_()
    incoming = torch.randn(2, 5, 37)
    ops.gated_residual(x, z, gate, norm="none", gate_act="none").backward(incoming)
    assert torch.equal(z.grad, incoming * gate)


@pytest.mark.parametrize("width", [1, 2047, 3840, 16384])
def test_takes_any_width(width: int) -> None:
    tensors = {"x": torch.randn(2, 3, width), "z": torch.randn(2, 3, width), "gate": torch.randn(2, width)}
    oracle.check(Case("gated_residual", {**tensors, "weight": torch.randn(width)}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z": torch.randn(2, 5, 23)}, ValueError, r"z has shape \[2, 5, 23\], expected \[2, 5, 24\], the shape of x"),
        ({"z": torch.randn(2, 5, 24, device="meta")}, ValueError, "z is on meta, expected cpu"),
        ({"gate": torch.ones(2, 1, 1, 24)}, ValueError, r"gate has shape \[2, 1, 1, 24\], expected \[2, 24\]"),
        ({"norm": "layer"}, ValueError, "norm is 'layer', expected one of 'rms', 'none'"),
        ({"gate_act": "relu"}, ValueError, "gate_act is 'relu', expected one of 'tanh', 'none'"),
    ],
)
def test_says_what_is_wrong(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.gated_residual(**{"x": torch.randn(2, 5, 24), "z": torch.randn(2, 5, 24), **change})
