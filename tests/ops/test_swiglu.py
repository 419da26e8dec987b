"""swiglu against float64, and what is particular to it."""

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
    oracle.check(data.draw(strategies.swiglu(dtype)))


def test_reads_the_halves_of_a_projection_in_place() -> None:
    gate, up = torch.randn(2, 5, 200).chunk(2, -1)
    oracle.check(Case("swiglu", {"gate": gate, "up": up}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_is_finite_and_right_far_out(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1000.0, -100.0, -30.0, -0.0, 0.0, 30.0, 100.0, 1000.0], dtype=dtype, requires_grad=True)
    up = torch.ones_like(gate)
    y = ops.swiglu(gate, up)
    y.sum().backward()
    torch.testing.assert_close(y, torch.nn.functional.silu(gate.detach()))
    exact = gate.detach().double().requires_grad_()
    torch.nn.functional.silu(exact).sum().backward()
    torch.testing.assert_close(gate.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-12)


def test_nan_comes_out_where_nan_went_in() -> None:
    gate = torch.tensor([float("nan"), 1.0, float("inf"), 1.0])
    y = ops.swiglu(gate, torch.tensor([1.0, float("nan"), 1.0, 1.0]))
    assert y.isnan().tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("gate", "up", "error", "message"),
    [
        (torch.randn(2, 8), torch.randn(2, 9), ValueError, r"up has shape \[2, 9\], expected \[2, 8\]"),
        (
            torch.randn(2, 8),
            torch.randn(2, 8).double(),
            TypeError,
            "up has dtype torch.float64, expected",
        ),
    ],
)
def test_says_what_is_wrong(gate: torch.Tensor, up: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.swiglu(gate, up)
