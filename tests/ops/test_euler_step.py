"""euler_step and clean_prediction against float64, and what is particular to them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from twostep import ops

from . import oracle, strategies


@pytest.mark.parametrize("dtype", strategies.DTYPES, ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_is_as_exact_as_eager_pytorch(cpu_isa: str, dtype: torch.dtype, data: st.DataObject) -> None:
    oracle.check(data.draw(strategies.euler_step(dtype)))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrow_velocity_moves_a_float32_state_with_one_rounding(cpu_isa: str, narrow: torch.dtype) -> None:
    x, v = torch.randn(2, 16, 9, 7), torch.randn(2, 16, 9, 7).to(narrow)
    y = ops.euler_step(x, v, -0.25)
    assert y.dtype == torch.float32
    exact = x.double() - 0.25 * v.double()
    # The product with a power of two is exact, so the sum is rounded once: the nearest float.
    assert torch.equal(y, exact.float())


def test_the_gradient_of_the_velocity_has_its_dtype_and_one_rounding() -> None:
    x, v = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40).bfloat16().requires_grad_()
    dy = torch.randn(3, 40)
    dx, dv = torch.autograd.grad(ops.euler_step(x, v, -0.75), (x, v), dy)
    assert torch.equal(dx, dy)
    assert torch.equal(dv, (-0.75 * dy).bfloat16())


def test_a_grid_of_steps_ends_where_the_last_clean_prediction_points() -> None:
    """Steps of one constant velocity from sigma 1 to 0 are one jump: x_0 = noise - v."""
    noise, v = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    x, sigmas = noise, [1.0, 0.9, 0.75, 0.5, 0.0]
    for a, b in itertools.pairwise(sigmas):
        torch.testing.assert_close(ops.clean_prediction(x, v, a), noise - v)
        x = ops.euler_step(x, v, b - a)
    torch.testing.assert_close(x, noise - v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_sigma_may_be_one_a_sample(dtype: torch.dtype) -> None:
    x, v = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    if dtype == torch.int64:
        with pytest.raises(TypeError, match=r"sigma has dtype torch\.int64"):
            ops.clean_prediction(x, v, torch.tensor([1, 0, 2]))
        return
    sigma = torch.tensor([1.0, 0.75, 0.3], dtype=dtype)
    each = torch.stack([ops.clean_prediction(x[i : i + 1], v[i : i + 1], float(sigma[i]))[0] for i in range(3)])
    assert torch.equal(ops.clean_prediction(x, v, sigma), each)
    assert torch.equal(ops.clean_prediction(x, v, sigma[1]), ops.clean_prediction(x, v, 0.75))


def test_a_state_narrower_than_its_velocity_keeps_its_dtype() -> None:
    x, v = torch.randn(2, 50).bfloat16().requires_grad_(), torch.randn(2, 50).requires_grad_()
    y = ops.euler_step(x, v, 0.5)
    assert torch.equal(y, (x.float() + 0.5 * v).bfloat16())
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and v.grad.dtype == torch.float32
    assert torch.equal(v.grad, torch.full_like(v, 0.5))


@pytest.mark.parametrize("size", [1, 2047, 2048, 2049, 4096, 3 * 2048 + 5])
def test_any_size_about_a_piece(cpu_isa: str, size: int) -> None:
    for batch, gap in ((1, 0), (3, 0), (3, 5)):
        memory = torch.randn(batch, size + gap, dtype=torch.float64)
        x, v = memory[:, :size], torch.randn(batch, size, dtype=torch.float64)
        for delta in (0.5, torch.linspace(-1, 1, batch)):
            torch.testing.assert_close(ops.euler_step(x, v, delta), ops.reference.euler_step(x, v, delta))


def test_saves_nothing_but_the_steps() -> None:
    x, v = torch.randn(2, 300, requires_grad=True), torch.randn(2, 300, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        ops.euler_step(x, v, 0.5)
        ops.euler_step(x, v, torch.ones(2))
    assert [s.shape for s in saved] == [(2,)]


@pytest.mark.parametrize(
    ("x", "v", "delta", "error", "message"),
    [
        (torch.randn(2, 8), torch.randn(2, 9), 1.0, ValueError, r"v has shape \[2, 9\], expected \[2, 8\]"),
        (torch.randn(()), torch.randn(()), 1.0, ValueError, r"x has shape \[\], expected \[batch, ...\]"),
        (torch.randn(2, 8), torch.randn(2, 8), torch.ones(3), ValueError, r"delta has shape \[3\], .* \[2\] \(batch\)"),
        (torch.randn(2, 8), torch.randn(2, 8), torch.ones(2, 1), ValueError, r"expected \[\] or \[2\]"),
        (torch.randn(2, 8), torch.randn(2, 8), float("nan"), ValueError, "delta is nan, expected a finite number"),
        (torch.randn(2, 8), torch.randn(2, 8), "1", TypeError, "delta is str, expected a number"),
        (torch.randn(2, 8), torch.randn(2, 8), torch.ones(2, requires_grad=True), ValueError, "pass delta.detach()"),
        (torch.randn(2, 8).int(), torch.randn(2, 8), 1.0, TypeError, "x has dtype torch.int32"),
        (torch.randn(2, 8), torch.randn(2, 8, device="meta"), 1.0, ValueError, "v is on meta, expected cpu"),
    ],
)
def test_says_what_is_wrong(
    x: torch.Tensor, v: torch.Tensor, delta: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ops.euler_step(x, v, delta)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: op(torch.ones(()), torch.ones(()), None, 1.0), r"no dimension, expected \[batch, ...\]"),
        (lambda op: op(torch.ones(2, 3, 4), torch.ones(2, 12), None, 1.0), "v must have the first tensor's shape"),
        (lambda op: op(torch.ones(2, 3), torch.ones(2, 4), None, 1.0), "v must have the first tensor's shape"),
        (lambda op: op(torch.ones(2, 3).bfloat16(), torch.ones(2, 3), None, 1.0), "v has dtype Float"),
        (lambda op: op(torch.ones(2, 3), torch.ones(2, 3), torch.ones(1), 1.0), r"deltas must be \[batch\]"),
        (lambda op: op(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2).double(), 1.0), "accumulation dtype"),
    ],
)
def test_the_raw_operator_never_reads_past_its_tensors(call, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.twostep.euler_step)


@pytest.mark.parametrize("shape", [(6,), (3, 4), (3, 2, 4), (3, 2, 2, 5), (2, 1, 3, 1, 2, 2)], ids=str)
def test_the_raw_operator_takes_samples_of_any_rank_and_stride(shape: tuple[int, ...]) -> None:
    x, v = torch.randn(shape), torch.randn(shape)
    turned = [torch.empty(shape[::-1]).permute(*reversed(range(len(shape)))).copy_(t) for t in (x, v)]
    wider = [torch.empty(shape[0], *(2 * n for n in shape[1:])) for _ in (x, v)]
    sliced = [w[tuple(slice(n) for n in shape)].copy_(t) for w, t in zip(wider, (x, v), strict=True)]
    expected = torch.add(x, v, alpha=0.5)
    for pair in ((x, v), turned, sliced, (turned[0], v), (x, sliced[1])):
        for step in (ops.euler_step, lambda a, b, delta: torch.ops.twostep.euler_step(a, b, None, delta)):
            y = step(*pair, 0.5)
            assert y.shape == x.shape and y.is_contiguous()
            torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


def test_tensors_of_other_steps_are_the_same_graph() -> None:
    torch.compiler.reset()
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.euler_step, fullgraph=True, backend=counted)
    x, v = torch.randn(2, 3, 4)
    for delta in (-0.25, -0.75, 0.5):
        torch.testing.assert_close(compiled(x, v, torch.tensor(delta)), x + delta * v)
    assert counted.frame_count == 1
