"""The CUDA kernels on a GPU: the same promises as on the CPU, and those that only a GPU can keep or break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twostep import ops
from twostep.ops import arguments

from . import oracle, strategies
from .oracle import Case, as_tuple
from .samples import DATA_OPS, OPS, sample

pytestmark = pytest.mark.gpu
every_op = pytest.mark.parametrize("op", OPS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _everything(case: Case, function: Any = None) -> dict[str, torch.Tensor]:
    incoming = oracle.incoming_gradients(case, torch.Generator().manual_seed(7))
    return oracle.run(function or getattr(ops, case.op), case, case.leaves(lambda t: t.clone()), incoming)


def _assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@every_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_is_as_exact_as_eager_pytorch(op: str, dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(getattr(strategies, op)(dtype, "cuda"))
    activation = next(iter(case.tensors.values()))
    assert ops.backend(activation) == "cuda"
    oracle.check(case)


@every_op
@pytest.mark.parametrize("width", [1024, 2048, 3072, 3840, 4096, 8192, 16384])
def test_the_widths_that_count(op: str, width: int) -> None:
    size = {"width": 128, "heads": max(1, width // 128)} if op in ("rope", "qk_norm_rope") else {"width": width}
    for per_token in (False, True):
        oracle.check(sample(op, torch.bfloat16, "cuda", batch=2, length=300, per_token=per_token, **size))


def test_layer_norm_survives_a_large_mean() -> None:
    x = torch.randn(2, 4, 512, device="cuda") + 1000.0
    exact = ops.reference.norm_modulate(x.double(), norm="layer")
    eager = torch.nn.functional.layer_norm(x, (512,))
    assert (ops.norm_modulate(x, norm="layer") - exact).norm() <= 2 * (eager - exact).norm()


@every_op
def test_float64_falls_back_to_the_reference_and_says_so(op: str) -> None:
    case = sample(op, torch.float64, "cuda")
    ops.library._warned.clear()
    with pytest.warns(RuntimeWarning, match="the CUDA kernels do not take torch.float64"):
        outputs = as_tuple(getattr(ops, op)(**case.tensors, **case.options))
    for left, right in zip(outputs, as_tuple(getattr(ops.reference, op)(**case.tensors, **case.options)), strict=True):
        assert torch.equal(left, right)


@every_op
def test_the_same_bits_on_every_run_and_on_every_stream(op: str) -> None:
    case = sample(op, torch.bfloat16, "cuda", batch=3, length=700, width=256)
    first = _everything(case)
    for _ in range(10):
        with torch.cuda.stream(torch.cuda.Stream()):
            again = _everything(case)
            torch.cuda.current_stream().synchronize()
        _assert_equal(again, first)


@every_op
@pytest.mark.parametrize("empty", [{"batch": 0}, {"length": 0}], ids=["batch", "length"])
def test_takes_an_empty_tensor(op: str, empty: dict[str, int]) -> None:
    for name, value in _everything(sample(op, device="cuda", **empty)).items():
        assert torch.equal(value, torch.zeros_like(value)), name


@every_op
def test_in_a_cuda_graph(op: str) -> None:
    case = sample(op, torch.bfloat16, "cuda", length=64, width=128)
    expected = _everything(case)
    leaves = case.leaves(lambda t: t.clone())
    incoming = oracle.incoming_gradients(case, torch.Generator().manual_seed(7))
    inputs = [t for t in leaves.values() if t is not None and t.requires_grad]

    def step() -> tuple[torch.Tensor, ...]:
        outputs = as_tuple(getattr(ops, op)(**leaves, **case.options))
        return (*(o.detach() for o in outputs), *torch.autograd.grad(outputs, inputs, incoming))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for result in results:
        result.fill_(float("nan"))
    graph.replay()
    for result, value in zip(results, expected.values(), strict=True):
        assert torch.equal(result, value)


@every_op
def test_compiles_without_a_break(op: str) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def function(**arguments: Any) -> Any:
        return getattr(ops, op)(**arguments)

    case = sample(op, torch.bfloat16, "cuda")
    _assert_equal(_everything(case, function), _everything(case))


@every_op
def test_opcheck(op: str) -> None:
    case = sample(op, device="cuda")
    leaves = [t.detach() for t in case.tensors.values()]
    flags: dict[str, tuple[Any, ...]] = {
        "norm_modulate": (True, 1e-5),
        "gated_residual": (True, True, 1e-5),
        "gated_residual_norm_modulate": (True, False, True, 1e-5),
        "qk_norm_rope": (1e-5,),
        "rope": (False,),
        "swiglu": (),
        "euler_step": (0.0,),
        "two_step_split": (0.75,),
    }
    if op in ("euler_step", "two_step_split"):
        leaves = [arguments.as_samples(t) if t.dim() > 1 else t for t in leaves]
    torch.library.opcheck(getattr(torch.ops.twostep, op), (*leaves, *flags[op]))


@every_op
def test_on_the_tensors_device_whatever_the_current_one(op: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = sample(op, torch.bfloat16, "cuda:1")
    with torch.cuda.device(0):
        oracle.check(case)


@pytest.mark.parametrize(
    "op", ["norm_modulate", "gated_residual", "swiglu", "rope", "euler_step", "two_step_split", "dmd_direction"]
)
def test_more_than_2_to_the_31_elements(op: str) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GiB of GPU memory")
    length, width = 600_000, 3840  # 2.3e9 elements
    if op == "rope":
        x = torch.randn(1, length, width // 128, 128, device="cuda", dtype=torch.bfloat16)
        freqs = torch.randn(1, length, 64, 2, device="cuda")
        y = ops.rope(x, freqs)
        expected = ops.reference.rope(x[:, -8:], freqs[:, -8:])
        assert torch.equal(y[:, -8:], expected)
        return
    x = torch.randn(1, length, width, device="cuda", dtype=torch.bfloat16)
    tail = x[:, -8:].clone()
    if op == "swiglu":
        y, expected = ops.swiglu(x, x), ops.reference.swiglu(tail, tail)
    elif op == "norm_modulate":
        y, expected = ops.norm_modulate(x), ops.reference.norm_modulate(tail)
    elif op == "euler_step":
        y, expected = ops.euler_step(x, x, -0.25), ops.reference.euler_step(tail, tail, -0.25)
    elif op == "two_step_split":
        (y, _), (expected, _) = ops.two_step_split(x, x, 0.75), ops.reference.two_step_split(tail, tail, 0.75)
    elif op == "dmd_direction":
        fake = x.roll(1, -1)
        y = ops.dmd_direction(x, torch.zeros((), device="cuda", dtype=x.dtype).expand_as(x).contiguous(), fake)
        mean = torch.stack([part.double().abs().sum() for part in x.chunk(100, 1)]).sum() / x.numel()
        expected = (fake[:, -8:].double() / mean).float()
    else:
        y, expected = ops.gated_residual(x, x), ops.reference.gated_residual(tail, tail)
    torch.testing.assert_close(y[:, -8:], expected, rtol=2**-7, atol=1e-3)


def test_a_launch_error_is_reported_by_name() -> None:
    with pytest.raises(RuntimeError, match="norm_modulate"):
        torch.ops.twostep.norm_modulate(torch.ones(1, 1, 20000, device="cuda"), None, None, None, False, 1e-5)


every_data_op = pytest.mark.parametrize("op", DATA_OPS)


def _outputs(case: Case, wide: bool = False) -> tuple[torch.Tensor, ...]:
    tensors = {n: t.double() if wide else t for n, t in case.tensors.items()}
    return as_tuple(getattr(ops.reference if wide else ops, case.op)(**tensors, **case.options))


@every_data_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "width"), [(5, 24), (1, 1), (33, 1001), (700, 256)])
def test_data_ops_are_exact(op: str, dtype: torch.dtype, length: int, width: int) -> None:
    case = sample(op, dtype, "cuda", batch=3, length=length, width=width)
    for found, exact in zip(_outputs(case), _outputs(case, wide=True), strict=True):
        assert (found.double() - exact).norm() <= (torch.finfo(found.dtype).eps + 3e-7) * exact.norm()


@every_data_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_data_ops_read_a_narrow_network_beside_a_float32_state(op: str, dtype: torch.dtype) -> None:
    case = sample(op, torch.float32, "cuda", length=300, width=256)
    for name in ("real_clean", "fake_clean"):
        if name in case.tensors:
            case.tensors[name] = case.tensors[name].to(dtype)
    for found, exact in zip(_outputs(case), _outputs(case, wide=True), strict=True):
        assert (found.double() - exact).norm() <= 4e-7 * exact.norm()


@every_data_op
def test_data_ops_give_the_same_bits_on_every_run_stream_and_replay(op: str) -> None:
    case = sample(op, device="cuda", batch=3, length=700, width=256)
    first = _outputs(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        again = _outputs(case)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = _outputs(case)
    for t in replayed:
        t.fill_(float("nan"))
    graph.replay()
    for a, b, c in zip(first, again, replayed, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@every_data_op
@pytest.mark.parametrize("empty", [{"batch": 0}, {"length": 0}], ids=["batch", "length"])
def test_data_ops_take_an_empty_tensor(op: str, empty: dict[str, int]) -> None:
    case = sample(op, device="cuda", **empty)
    for found, expected in zip(_outputs(case), _outputs(case, wide=True), strict=True):
        assert torch.equal(found.double(), expected)
