"""What the operators promise that have no gradient: repeatable bits, and the manners of a PyTorch operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from twostep import ops

from .oracle import Case, as_tuple
from .samples import DATA_OPS, sample

every_op = pytest.mark.parametrize("op", DATA_OPS)


def _call(case: Case, **changes: Any) -> tuple[Tensor, ...]:
    return as_tuple(getattr(ops, case.op)(**{**case.tensors, **changes}, **case.options))


def _equal(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(left, right, strict=True))


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("length", [150, 900])
def test_the_same_bits_on_every_run_and_any_number_of_threads(op: str, dtype: torch.dtype, length: int) -> None:
    case = sample(op, dtype, batch=3, length=length, width=96)
    threads = torch.get_num_threads()
    first = _call(case)
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            assert _equal(_call(case), first)
    finally:
        torch.set_num_threads(threads)


@every_op
def test_inputs_are_left_as_they_were_and_nothing_is_saved(op: str) -> None:
    case = sample(op)
    before = {name: t.clone() for name, t in case.tensors.items()}
    wanting = {n: t.clone().requires_grad_() for n, t in case.tensors.items() if n != "factor"}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        outputs = _call(case, **wanting)
    assert not saved and not any(o.requires_grad for o in outputs)
    assert _equal(outputs, _call(case))
    assert all(torch.equal(t, before[name]) for name, t in case.tensors.items())


@every_op
def test_opcheck(op: str) -> None:
    seen: list[tuple[Any, tuple[Any, ...]]] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "twostep":
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        _call(sample(op))
    assert len(seen) == 1
    torch.library.opcheck(*seen[0])


@every_op
def test_fake_and_meta_tensors(op: str) -> None:
    case = sample(op, torch.bfloat16)
    real = _call(case)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = _call(case, **{n: mode.from_tensor(t) for n, t in case.tensors.items()})
    meta = _call(case, **{n: t.to("meta") for n, t in case.tensors.items()})
    for r, f, m in zip(real, fake, meta, strict=True):
        assert r.shape == f.shape == m.shape and r.dtype == f.dtype == m.dtype and r.stride() == f.stride()


@every_op
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_break(op: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def function(**arguments: Any) -> Any:
        return getattr(ops, op)(**arguments)

    for length in (5, 9):
        case = sample(op, length=length)
        assert _equal(as_tuple(function(**case.tensors, **case.options)), _call(case))


@every_op
def test_exports(op: str) -> None:
    case = sample(op)

    class Module(torch.nn.Module):
        def forward(self, *values: Tensor) -> Any:
            return getattr(ops, op)(**dict(zip(case.tensors, values, strict=True)), **case.options)

    values = tuple(case.tensors.values())
    program = torch.export.export(Module(), values)
    assert any("twostep" in str(node.target) for node in program.graph.nodes)
    assert _equal(as_tuple(program.module()(*values)), _call(case))


@every_op
@pytest.mark.parametrize("empty", [{"batch": 0}, {"length": 0}], ids=["batch", "length"])
def test_takes_an_empty_tensor(op: str, empty: dict[str, int]) -> None:
    case = sample(op, **empty)
    reference = as_tuple(getattr(ops.reference, op)(**case.tensors, **case.options))
    assert _equal(_call(case), reference)


@every_op
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("width", [1031, 1040])
def test_outputs_large_enough_to_go_past_the_caches(cpu_isa: str, op: str, width: int, offset: int) -> None:
    case = sample(op, batch=2, length=600 + offset, width=width + offset)
    for name, t in case.tensors.items():
        if offset and name != "factor":  # samples that start off a 64-byte line
            padded = torch.empty(t.numel() + offset)
            case.tensors[name] = padded[offset:].view(t.shape).copy_(t)
    wide = {n: t.double() for n, t in case.tensors.items()}
    for found, exact in zip(_call(case), as_tuple(getattr(ops.reference, op)(**wide, **case.options)), strict=True):
        assert (found.double() - exact).norm() <= 1.2e-7 * exact.norm()


@every_op
def test_works_under_a_function_transform(op: str) -> None:
    """The loss around them is differentiated by torch.func too, and they are constants to it."""
    case = sample(op, torch.float64)
    first = next(iter(case.tensors))

    def loss(value: Tensor) -> Tensor:
        return sum((o.sum() * value.sum() for o in _call(case, **{first: value})), value.sum() * 0)

    x = case.tensors[first]
    expected = sum(o.sum() for o in _call(case))
    torch.testing.assert_close(torch.func.grad(loss)(x), expected.expand_as(x))
