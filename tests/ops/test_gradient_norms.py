"""gradient_norms against float64, and the clip that is made of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twostep import ops

from . import strategies


def _exact(g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = g.double().reshape(g.shape[0], -1)
    return wide.square().sum(1).sqrt(), wide.square().sum().sqrt()


@pytest.mark.parametrize("dtype", strategies.DTYPES, ids=str)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_is_exact_to_the_last_place(cpu_isa: str, dtype: torch.dtype, data: st.DataObject) -> None:
    g = strategies.state(strategies.Draw(data.draw, dtype, "cpu"), strategies._samples(data.draw))
    for found, exact in zip(ops.gradient_norms(g), _exact(g), strict=True):
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert found.shape == exact.shape
        unit = torch.finfo(found.dtype).eps
        torch.testing.assert_close(found.double(), exact, rtol=2 * unit, atol=0)


@pytest.mark.parametrize("size", [4095, 4096, 4097, 3 * 4096, 1_000_003])
def test_many_elements_lose_nothing(cpu_isa: str, size: int) -> None:
    """A million squares, added one by one in float32, are off by 1e-4; here the last place is right but one."""
    g = 1 + torch.rand(2, size)
    for found, exact in zip(ops.gradient_norms(g), _exact(g), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=2.5e-7, atol=0)


def test_clips_without_a_look_at_the_numbers() -> None:
    """The factor is a tensor made of a tensor; the clipped gradient has the limit's norm, a small one its own."""
    g = torch.randn(3, 4, 20, 20, dtype=torch.float64)
    for limit in (0.5, 1e6):
        factor = (limit / ops.gradient_norms(g)[1]).clamp(max=1)
        clipped = ops.inject_gradient(g, None, 0.75, factor=factor) / -0.25
        torch.testing.assert_close(clipped.norm(), torch.minimum(g.norm(), torch.tensor(limit).double()))
        each = (limit / ops.gradient_norms(g)[0]).clamp(max=1)
        clipped = ops.inject_gradient(g, None, 0.75, factor=each) / -0.25
        assert (clipped.flatten(1).norm(dim=1) <= limit * (1 + 1e-12)).all()


def test_what_is_not_finite_shows(cpu_isa: str) -> None:
    g = torch.ones(3, 5000)
    g[1, 4999] = float("nan")
    g[2, 0] = float("inf")
    norms, total = ops.gradient_norms(g)
    assert norms[0] == 5000**0.5 and norms[1].isnan() and norms[2].isinf() and total.isnan()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (3,)])
def test_empty_and_flat(shape: tuple[int, ...]) -> None:
    norms, total = ops.gradient_norms(torch.full(shape, 2.0))
    assert torch.equal(norms, torch.full(shape[:1], 0.0 if 0 in shape else 2.0))
    assert total == (0 if 0 in shape else 12**0.5)


def test_says_what_is_wrong() -> None:
    with pytest.raises(TypeError, match=r"g has dtype torch\.int64"):
        ops.gradient_norms(torch.ones(2, 3).long())
    with pytest.raises(ValueError, match=r"g has shape \[\], expected \[batch, ...\]"):
        ops.gradient_norms(torch.ones(()))
    with pytest.raises(RuntimeError, match="no dimension, expected"):
        torch.ops.twostep.gradient_norms(torch.ones(()))
