"""swiglu against float64, and what is particular to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from twostep import ops
from twostep.ops.swiglu import swiglu_of_spent

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


@pytest.mark.parametrize("shape", [(2, 5, 46), (3, 7, 1, 16), (4, 10), (6,), (0, 3, 8), (2, 3, 5000)], ids=str)
@pytest.mark.parametrize("dtype", strategies.DTYPES, ids=str)
def test_gate_and_up_in_one_tensor_are_its_halves(cpu_isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The very bits of two tensors, forward and backward; also where the projection is a part of a wider one."""
    wide = torch.randn(*shape[:-1], shape[-1] + 3).to(dtype).requires_grad_()
    results = []
    for run in (ops.swiglu, lambda both: ops.swiglu(*both.chunk(2, -1))):
        y = run(wide[..., 1:-2])
        (gradient,) = torch.autograd.grad(y.float().sin().sum(), wide)
        with torch.no_grad():
            assert torch.equal(run(wide[..., 1:-2]), y)
        results.append((y, gradient))
    for ours, halves in zip(*results, strict=True):
        assert torch.equal(ours, halves)


def test_the_gradient_of_gate_and_up_in_one_tensor_is_reached_by_every_road() -> None:
    tensors = torch.randn(2, 3, 4), torch.randn(2, 3, 8)
    torch.library.opcheck(torch.ops.twostep.swiglu_halves_backward.default, tensors)
    both = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.swiglu, both)
    (true,) = torch.autograd.grad(ops.swiglu(both).sum(), both)
    assert torch.equal(torch.func.grad(lambda t: ops.swiglu(t).sum())(both.detach()), true)
    with pytest.raises(RuntimeError, match="swiglu: double backward is not implemented"):
        torch.autograd.grad(ops.swiglu(both).sum(), both, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("shape", [(2, 5, 23), (3, 7, 1, 16), (4, 10), (6,), (0, 3, 8), (2, 1100, 1056)], ids=str)
@pytest.mark.parametrize("dtype", strategies.DTYPES, ids=str)
def test_a_spent_gate_is_written_over(cpu_isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The very bits of swiglu, in gate's own memory."""
    gate, up = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    expected, kept = ops.swiglu(gate, up), up.clone()
    with torch.no_grad():
        version, y = gate._version, swiglu_of_spent(gate, up)
    assert gate._version > version
    assert torch.equal(y, expected) and y.data_ptr() == gate.data_ptr()
    assert torch.equal(up, kept)


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_a_gate_is_not_written_over_where_that_could_be_seen() -> None:
    plain, up = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    with_grad = torch.randn(2, 3, 8, requires_grad=True)
    rows = torch.randn(2, 3, 16)[..., :8]
    for gate, other in ((with_grad * 1, up), (plain, with_grad), (plain, up)):  # autograd is on
        before = gate.detach().clone()
        assert torch.equal(swiglu_of_spent(gate, other), ops.swiglu(before, other))
        assert torch.equal(gate, before)
    before, rows_before = plain.clone(), rows.clone()
    with torch.no_grad():
        swiglu_of_spent(rows, up)
        with _Watching():
            swiglu_of_spent(plain, up)
    assert torch.equal(plain, before) and torch.equal(rows, rows_before)
    with torch.inference_mode():
        gate, expected = plain * 1, ops.swiglu(plain, up)
        assert torch.equal(swiglu_of_spent(gate, up), expected) and torch.equal(gate, expected)
    with torch.no_grad():
        assert torch.equal(torch.compile(swiglu_of_spent, fullgraph=True)(plain, up), ops.swiglu(before, up))
    assert torch.equal(plain, before)
    with pytest.raises(ValueError, match="up has shape"):
        swiglu_of_spent(plain, up[:1])
    torch.library.opcheck(torch.ops.twostep.swiglu_over_gate.default, (plain, up))
    with pytest.raises(RuntimeError, match="gate must be contiguous"):
        torch.ops.twostep.swiglu_over_gate(rows, up)


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
        (torch.randn(2, 7), None, ValueError, r"gate has shape \[2, 7\] and up is None, expected \[..., 2 \* width\]"),
        (torch.randn(2, 8), torch.randn(2, 9), ValueError, r"up has shape \[2, 9\], expected \[2, 8\]"),
        (
            torch.randn(2, 8),
            torch.randn(2, 8).double(),
            TypeError,
            "up has dtype torch.float64, expected",
        ),
    ],
)
def test_says_what_is_wrong(gate: torch.Tensor, up: torch.Tensor | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.swiglu(gate, up)
