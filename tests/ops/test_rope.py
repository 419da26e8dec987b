"""rope against float64, and what is particular to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twostep import ops

from . import oracle, strategies


@pytest.mark.parametrize("dtype", strategies.DTYPES, ids=str)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_is_as_exact_as_eager_pytorch(cpu_isa: str, dtype: torch.dtype, data: st.DataObject) -> None:
    oracle.check(data.draw(strategies.rope(dtype)))


def test_equals_complex_multiplication() -> None:
    x = torch.randn(2, 5, 3, 16, dtype=torch.float64)
    angles = torch.randn(5, 8, dtype=torch.float64)
    table = torch.polar(torch.ones_like(angles), angles)
    turned = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * table[None, :, None]).flatten(3)
    torch.testing.assert_close(ops.rope(x, torch.view_as_real(table)[None]), turned, rtol=1e-14, atol=1e-14)


def test_the_backward_turns_back() -> None:
    angles = torch.randn(1, 5, 8, dtype=torch.float64)
    freqs = torch.stack((angles.cos(), angles.sin()), -1)
    x = torch.randn(2, 5, 3, 16, dtype=torch.float64, requires_grad=True)
    y = ops.rope(x, freqs)
    (back,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(back, x.detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("x", "freqs", "error", "message"),
    [
        (torch.randn(2, 5, 16), torch.randn(1, 5, 8, 2), ValueError, r"expected \[batch, length, heads, width\]"),
        (torch.randn(2, 5, 3, 15), torch.randn(1, 5, 7, 2), ValueError, "head width of 15, expected an even number"),
        (torch.randn(2, 5, 3, 16), torch.randn(1, 4, 8, 2), ValueError, r"freqs has shape \[1, 4, 8, 2\], expected"),
        (torch.randn(2, 5, 3, 16), torch.randn(3, 5, 8, 2), ValueError, r"expected \[1, 5, 8, 2\] or \[2, 5, 8, 2\]"),
        (torch.randn(2, 5, 3, 16), torch.randn(1, 5, 8, 2, requires_grad=True), ValueError, "pass freqs.detach()"),
        (torch.randn(2, 5, 3, 16), torch.randn(1, 5, 8, dtype=torch.cfloat), TypeError, "view_as_real"),
    ],
)
def test_says_what_is_wrong(x: torch.Tensor, freqs: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.rope(x, freqs)
