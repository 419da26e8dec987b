"""two_step_split and inject_gradient: against float64, and against a two-step unroll that PyTorch differentiates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twostep import ops

from . import oracle, strategies


@pytest.mark.parametrize("dtype", strategies.DTYPES, ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_is_as_exact_as_eager_pytorch(cpu_isa: str, dtype: torch.dtype, data: st.DataObject) -> None:
    oracle.check(data.draw(strategies.two_step_split(dtype)))


@pytest.mark.parametrize("dtype", strategies.DTYPES, ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_injected_gradient_is_as_exact_as_one_rounding(
    cpu_isa: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Over layouts, absent gradients, factors and dtypes: |found - exact| is half a unit of the result, and what
    float32 arithmetic costs on the terms."""
    tensors = strategies.Draw(data.draw, dtype, "cpu")
    shape = strategies._samples(data.draw)
    present = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    inherited, own = (strategies.state(tensors, shape) if p else None for p in present)
    forms = {"none": None, "shared": tensors.randn(dtype=torch.float32)}
    factor = data.draw(st.sampled_from([*forms.values(), tensors.randn(shape[0], dtype=torch.float32)]))
    to = strategies.network_dtype(data.draw, dtype)
    options: dict[str, Any] = {"weight": data.draw(st.sampled_from([1.0, 0.1])), "factor": factor, "dtype": to}
    found = ops.inject_gradient(inherited, own, 0.75, **options)
    assert found.dtype == to and found.shape == shape and not found.requires_grad
    options["dtype"] = torch.float64
    exact = ops.reference.inject_gradient(
        *(None if g is None else g.double() for g in (inherited, own)), 0.75, **options
    )
    terms = sum(g.double().abs() for g in (inherited, own) if g is not None) * 2
    wide = torch.finfo(torch.float64 if dtype == torch.float64 and to == torch.float64 else torch.float32).eps
    tiny = torch.finfo(to).smallest_normal * torch.finfo(to).eps
    allowed = torch.finfo(to).eps / 2 * exact.abs() + 2 * wide * terms + tiny
    assert ((found.double() - exact).abs() <= allowed).all()


def _networks() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    return torch.nn.Linear(24, 24).double(), torch.nn.Linear(24, 24).double()


@pytest.mark.parametrize("inherit", [1.0, 0.1])
def test_a_two_step_backward_made_of_these_operators_has_the_gradient_of_the_unroll(inherit: float) -> None:
    """The memory-efficient update of Turbo++ (appendix A), once with a graph kept and once with the operators alone,
    against the plain expressions; the closed form is d(L_x + L_a) with the path through z weighted by inherit."""
    mid, noise = 0.75, torch.randn(3, 24, dtype=torch.float64)
    target = torch.randn(3, 24, dtype=torch.float64)

    def gradients(modules: tuple[torch.nn.Module, ...]) -> list[torch.Tensor]:
        return [p.grad for m in modules for p in m.parameters()]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (x - target).square().sum()

    first, second = _networks()
    u = first(noise)
    leaf = u.detach().requires_grad_()
    z = noise + (mid - 1) * leaf
    loss(z - mid * second(z)).backward()
    (loss(noise - u) + inherit * (u * leaf.grad).sum()).backward()
    expected = gradients((first, second))

    first, second = _networks()
    z, x_a = ops.two_step_split(noise, first(noise), mid, inherit=inherit)
    (loss(ops.euler_step(z, second(z), -mid)) + loss(x_a)).backward()
    with_graph = gradients((first, second))

    first, second = _networks()
    with torch.no_grad():
        z, x_a = ops.two_step_split(noise, first(noise), mid)
    z.requires_grad_(), x_a.requires_grad_()
    loss(ops.euler_step(z, second(z), -mid)).backward()
    loss(x_a).backward()
    first(noise).backward(ops.inject_gradient(z.grad, x_a.grad, mid, weight=inherit))
    without_graph = gradients((first, second))

    for e, a, b in zip(expected, with_graph, without_graph, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float32, torch.float32)], ids=str)
def test_the_graph_and_the_function_give_the_same_bits(cpu_isa: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    noise, dz, dx_a = (torch.randn(2, 16, 33, 9, dtype=dtypes[0]) for _ in range(3))
    v = torch.randn(2, 16, 33, 9).to(dtypes[1]).requires_grad_()
    outputs = ops.two_step_split(noise, v, 0.75, inherit=0.1)
    (dv,) = torch.autograd.grad(outputs, v, (dz, dx_a))
    found = ops.inject_gradient(dz, dx_a, 0.75, weight=0.1, factor=torch.ones(2), dtype=dtypes[1])
    assert torch.equal(dv, found)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_may_go_unused(used: int) -> None:
    noise, v = torch.randn(2, 30, dtype=torch.float64), torch.randn(2, 30, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (noise, v)]
    ops.two_step_split(*leaves, 0.75, inherit=0.1)[used].square().sum().backward()
    exact = [t.clone().requires_grad_() for t in (noise, v)]
    ops.reference.two_step_split(*exact, 0.75, inherit=0.1)[used].square().sum().backward()
    for t, e in zip(leaves, exact, strict=True):
        torch.testing.assert_close(t.grad, e.grad, rtol=1e-14, atol=1e-14)


def test_the_reference_scales_the_gradient_and_leaves_the_value() -> None:
    """By the closed form dv = inherit * (mid - 1) * dz - dx_a, dnoise = inherit * dz + dx_a."""
    noise, v, dz, dx_a = (torch.randn(2, 30, dtype=torch.float64) for _ in range(4))
    leaves = [t.clone().requires_grad_() for t in (noise, v)]
    z, x_a = ops.reference.two_step_split(*leaves, 0.75, inherit=0.1)
    assert torch.equal(z, noise - 0.25 * v) and torch.equal(x_a, noise - v)
    dnoise, dv = torch.autograd.grad((z, x_a), leaves, (dz, dx_a))
    torch.testing.assert_close(dnoise, 0.1 * dz + dx_a)
    torch.testing.assert_close(dv, -0.025 * dz - dx_a)


def test_saves_nothing() -> None:
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        ops.two_step_split(torch.randn(2, 30), torch.randn(2, 30, requires_grad=True), 0.75)
    assert not saved


def test_the_injected_gradient_takes_tensors_that_require_grad_and_gives_data() -> None:
    g = torch.randn(2, 5, requires_grad=True)
    assert not ops.inject_gradient(g * 2, None, 0.75).requires_grad


ONES = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.two_step_split(ONES, torch.ones(2, 9), 0.75), ValueError, r"v has shape \[2, 9\], expected"),
        (lambda: ops.two_step_split(ONES, ONES, 1.0), ValueError, "mid is 1.0, expected the sigma between"),
        (lambda: ops.two_step_split(ONES, ONES, "a"), TypeError, "mid is str, expected a number"),
        (lambda: ops.two_step_split(ONES, ONES, 0.5, inherit=float("inf")), ValueError, "inherit is inf"),
        (lambda: ops.inject_gradient(None, None, 0.75), ValueError, "expected at least one gradient"),
        (lambda: ops.inject_gradient(ONES, torch.ones(2, 7), 0.75), ValueError, r"own has shape \[2, 7\]"),
        (lambda: ops.inject_gradient(ONES, ONES.double(), 0.75), TypeError, "own has dtype torch.float64, expected"),
        (lambda: ops.inject_gradient(ONES, None, 0.75, factor=torch.ones(3)), ValueError, r"factor has shape \[3\]"),
        (lambda: ops.inject_gradient(ONES, None, 0.75, dtype=torch.int8), TypeError, "dtype is torch.int8"),
        (lambda: ops.inject_gradient(torch.ones(()), None, 0.75), ValueError, r"inherited has shape \[\]"),
    ],
)
def test_says_what_is_wrong(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, None, torch.ones(2), 0.75, 1.0, torch.float32), "neither inherited nor own"),
        ((ONES, torch.ones(2, 7), None, 0.75, 1.0, torch.float32), "own must have the first tensor's shape"),
        ((ONES, None, torch.ones(3), 0.75, 1.0, torch.float32), r"factors must be \[batch\]"),
        ((ONES.bfloat16(), None, None, 0.75, 1.0, torch.float32), "v has dtype Float"),
    ],
)
def test_the_raw_operator_never_reads_past_its_tensors(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.twostep.two_step_split_backward(*arguments)
