"""dmd_direction against float64 and against DMD2's released expression, and what is particular to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twostep import losses, ops
from twostep.bench import expressions

from . import strategies


@pytest.mark.parametrize("dtype", strategies.DTYPES, ids=str)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_is_as_exact_as_the_released_expression(cpu_isa: str, dtype: torch.dtype, data: st.DataObject) -> None:
    tensors, shape = strategies.Draw(data.draw, dtype, "cpu"), strategies._samples(data.draw)
    shape = (*shape, 1) if len(shape) == 1 else shape  # the released expression takes the mean over something
    kinds = [strategies.network_dtype(data.draw, dtype)] * 2
    kinds[1] = data.draw(st.sampled_from([kinds[0], kinds[0], dtype]))
    x, real, fake = (strategies.state(tensors, shape, k) for k in (dtype, *kinds))
    found = ops.dmd_direction(x, real, fake, eps=1e-3)
    assert found.shape == x.shape
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = expressions.dmd_direction(x.double(), real.double(), fake.double(), eps=1e-3)
    eager = expressions.dmd_direction(x, real, fake, eps=1e-3)
    error, yardstick = ((t.double() - exact).norm() for t in (found, eager))
    units = 2 if found.dtype == torch.float32 else 16  # float64 is held against itself: both round over the sum
    assert error <= 2 * yardstick + units * torch.finfo(found.dtype).eps * exact.norm()


@pytest.mark.parametrize("size", [1, 4095, 4097, 16 * 4096 - 1, 16 * 4096, 17 * 4096 + 3])
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_large_samples_that_threads_share_and_small_ones(cpu_isa: str, size: int, batch: int) -> None:
    x, real, fake = (torch.randn(batch, size) for _ in range(3))
    exact = expressions.dmd_direction(x.double(), real.double(), fake.double())
    torch.testing.assert_close(ops.dmd_direction(x, real, fake).double(), exact, rtol=4e-7, atol=1e-30)


def test_every_sample_has_its_own_normaliser() -> None:
    x, real, fake = (torch.randn(3, 4, 9, 9) for _ in range(3))
    each = torch.cat([ops.dmd_direction(x[i : i + 1], real[i : i + 1], fake[i : i + 1]) for i in range(3)])
    assert torch.equal(ops.dmd_direction(x, real, fake), each)
    scaled = ops.dmd_direction(8 * x, 8 * real, 8 * fake)
    assert torch.equal(scaled, each)  # a power of two cancels exactly


def test_is_the_gradient_of_the_loss_that_it_is_meant_for() -> None:
    x, real, fake = (torch.randn(2, 4, 9, 9, dtype=torch.float64) for _ in range(3))
    x.requires_grad_()
    direction = ops.dmd_direction(x, real, fake)
    assert not direction.requires_grad
    (0.5 * (x - (x - direction).detach()).square().mean()).backward()
    torch.testing.assert_close(x.grad, direction / x.numel())


def test_eps_bounds_what_is_divided_by(cpu_isa: str) -> None:
    real, fake = torch.randn(2, 50), torch.randn(2, 50)
    x = real.clone()
    x[1] += 3.0
    found = ops.dmd_direction(x, real, fake, eps=0.5)
    torch.testing.assert_close(found[0], (fake - real)[0] / 0.5)
    torch.testing.assert_close(found[1], (fake - real)[1] / 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [10, 70000])
def test_what_is_not_finite_stays_in_its_sample_and_shows(cpu_isa: str, size: int, value: float) -> None:
    x, real, fake = (torch.randn(2, size) for _ in range(3))
    x[1, 7] = value
    found = ops.dmd_direction(x, real, fake)
    assert found[0].isfinite().all() and found[1].isnan().all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3,)])
def test_empty_and_flat(shape: tuple[int, ...]) -> None:
    x, real, fake = (torch.randn(shape) for _ in range(3))
    torch.testing.assert_close(ops.dmd_direction(x, real, fake), (fake - real) / (x - real).abs())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"real_clean": torch.ones(2, 9)}, ValueError, r"real_clean has shape \[2, 9\], expected \[2, 8\]"),
        ({"fake_clean": torch.ones(2, 8).int()}, TypeError, "fake_clean has dtype torch.int32"),
        ({"x": torch.ones(())}, ValueError, r"x has shape \[\], expected \[batch, ...\]"),
        ({"eps": -1.0}, ValueError, "eps is -1.0, expected"),
        ({"eps": None}, TypeError, "eps is NoneType, expected a number"),
    ],
)
def test_says_what_is_wrong(change: dict, error: type[Exception], message: str) -> None:
    given_ = {name: torch.ones(2, 8) for name in ("x", "real_clean", "fake_clean")}
    with pytest.raises(error, match=message):
        ops.dmd_direction(**{**given_, **change})


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (torch.ones(2, 9), "fake must have the first tensor's shape"),
        (torch.ones(2, 8).bfloat16(), "must share one dtype"),
        (torch.ones(2, 8).double(), "fake has dtype Double"),
    ],
)
def test_the_raw_operator_never_reads_past_its_tensors(fake: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.twostep.dmd_direction(torch.ones(2, 8), torch.ones(2, 8), fake, 1e-8)


def test_is_the_gradient_of_the_loss_with_the_same_defaults() -> None:
    """Also where a sample equals its real prediction, which the least normaliser decides."""
    x, real, fake = torch.randn(3, 4, 8, 8).unbind(0)
    x[0] = real[0]
    found, expected = ops.dmd_direction(x, real, fake), losses.dmd_gradient(x, real, fake)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert float(found[0].abs().max()) > 1e5
