"""What every operator promises: exact gradients, repeatable bits, and the manners of a PyTorch operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import checkpoint

from twostep import ops

from . import oracle
from .oracle import Case, as_tuple
from .samples import OPS, sample

every_op = pytest.mark.parametrize("op", OPS)


def _call(case: Case, leaves: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
    return as_tuple(getattr(ops, case.op)(**leaves, **case.options))


def _everything(case: Case, function: Any = None, seed: int = 7) -> dict[str, Tensor]:
    incoming = oracle.incoming_gradients(case, torch.Generator().manual_seed(seed))
    return oracle.run(function or getattr(ops, case.op), case, case.leaves(lambda t: t.clone()), incoming)


def _assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@every_op
@pytest.mark.parametrize("per_token", [False, True], ids=["per sample", "per token"])
@pytest.mark.parametrize("width", [8, 6])
def test_gradcheck(cpu_isa: str, op: str, per_token: bool, width: int) -> None:
    case = sample(op, torch.float64, batch=2, length=3, width=width, heads=2, per_token=per_token)
    leaves = case.leaves(lambda t: t.clone())
    names = [name for name, t in leaves.items() if t is not None and t.requires_grad]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return _call(case, {**leaves, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(function, [leaves[name] for name in names], fast_mode=False)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_on_every_run_and_any_number_of_threads(op: str, dtype: torch.dtype) -> None:
    case = sample(op, dtype, batch=3, length=150, width=96)
    threads = torch.get_num_threads()
    first = _everything(case)
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            _assert_equal(_everything(case), first)
    finally:
        torch.set_num_threads(threads)


@every_op
def test_takes_an_expanded_gradient(op: str) -> None:
    case = sample(op, torch.float64)
    leaves = case.leaves(lambda t: t.clone())
    sum(o.sum() for o in _call(case, leaves)).backward()  # an incoming gradient of strides 0
    exact = case.leaves(lambda t: t.clone())
    sum(o.sum() for o in as_tuple(getattr(ops.reference, op)(**exact, **case.options))).backward()
    for name, t in leaves.items():
        if t is not None and t.requires_grad:
            torch.testing.assert_close(t.grad, exact[name].grad, rtol=1e-9, atol=1e-9)


@every_op
@pytest.mark.parametrize("empty", [{"batch": 0}, {"length": 0}], ids=["batch", "length"])
def test_takes_an_empty_tensor(op: str, empty: dict[str, int]) -> None:
    case = sample(op, **empty)
    for name, value in _everything(case).items():
        assert torch.equal(value, torch.zeros_like(value)), name


@every_op
def test_length_one(op: str) -> None:
    oracle.check(sample(op, length=1))


@every_op
def test_only_wanted_gradients_are_made(op: str) -> None:
    case = sample(op, torch.float64)
    full = _everything(case)
    for wanted in (name for name in case.tensors if name not in case.constants):
        leaves = case.leaves(lambda t: t.clone())
        for name, t in leaves.items():
            if t is not None and name != wanted:
                t.requires_grad_(False)
        incoming = oracle.incoming_gradients(case, torch.Generator().manual_seed(7))
        torch.autograd.backward(_call(case, leaves), incoming)
        assert torch.equal(leaves[wanted].grad, full[f"gradient of {wanted}"]), wanted
        assert all(t.grad is None for name, t in leaves.items() if t is not None and name != wanted)


@every_op
def test_inputs_are_left_as_they_were(op: str) -> None:
    case = sample(op, torch.bfloat16)
    before = {name: t.clone() for name, t in case.tensors.items()}
    leaves = case.leaves(lambda t: t)
    incoming = oracle.incoming_gradients(case, torch.Generator())
    kept = [g.clone() for g in incoming]
    torch.autograd.backward(_call(case, leaves), incoming)
    assert all(torch.equal(t, before[name]) for name, t in case.tensors.items())
    assert all(torch.equal(a, b) for a, b in zip(incoming, kept, strict=True))


@every_op
def test_without_gradients_nothing_is_saved(op: str) -> None:
    case = sample(op)
    saved: list[Tensor] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        outputs = _call(case, case.leaves(lambda t: t))
    assert not saved and not any(o.requires_grad for o in outputs)


@every_op
def test_double_backward_raises(op: str) -> None:
    case = sample(op, torch.float64)
    leaves = case.leaves(lambda t: t.clone())
    inputs = [t for t in leaves.values() if t is not None and t.requires_grad]
    grads = torch.autograd.grad(sum(o.square().sum() for o in _call(case, leaves)), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: double backward is not implemented.*ops.reference.{op}"):
        torch.autograd.grad(sum(g.sum() for g in grads), inputs)


@every_op
def test_opcheck(op: str) -> None:
    case = sample(op, per_token=False)
    seen: list[tuple[Any, tuple[Any, ...]]] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "twostep":
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        _everything(case)
    assert len({func for func, _ in seen}) == (1 if op == "rope" else 2)
    for func, args in seen:
        detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(func, detached)


@every_op
def test_fake_and_meta_tensors(op: str) -> None:
    case = sample(op, torch.bfloat16)
    real = _call(case, case.tensors)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = _call(case, {n: None if t is None else mode.from_tensor(t) for n, t in case.tensors.items()})
    meta = _call(case, {n: None if t is None else t.to("meta") for n, t in case.tensors.items()})
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
        _assert_equal(_everything(case, function), _everything(case))


@pytest.mark.slow
@every_op
def test_compiles_with_inductor(op: str) -> None:
    torch._dynamo.reset()
    case = sample(op)

    @torch.compile(fullgraph=True)
    def function(**arguments: Any) -> Any:
        return tuple(o * 2 for o in as_tuple(getattr(ops, op)(**arguments)))

    doubled = _everything(case, function)
    for name, value in _everything(case).items():
        torch.testing.assert_close(doubled[name], 2 * value)


@every_op
def test_exports(op: str) -> None:
    case = sample(op)

    class Module(torch.nn.Module):
        def forward(self, *values: Tensor) -> Any:
            return getattr(ops, op)(**dict(zip(case.tensors, values, strict=True)), **case.options)

    values = tuple(case.tensors.values())
    program = torch.export.export(Module(), values)
    assert any("twostep" in str(node.target) for node in program.graph.nodes)
    for left, right in zip(as_tuple(program.module()(*values)), _call(case, case.tensors), strict=True):
        assert torch.equal(left, right)


@every_op
def test_autocast_changes_nothing(op: str) -> None:
    """The operators compute in float32 whatever autocast says: a float32 residual stream stays float32, and takes the
    bfloat16 branch that autocast's matrix products make."""
    case = sample(op)
    if "z" in case.tensors:
        case.tensors["z"] = case.tensors["z"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = _everything(case)
    assert inside["output 0"].dtype == torch.float32
    _assert_equal(inside, _everything(case))


@every_op
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(op: str, reentrant: bool) -> None:
    case = sample(op, torch.float64)

    def function(**arguments: Any) -> Any:
        names = list(arguments)
        return checkpoint.checkpoint(
            lambda *values: getattr(ops, op)(**dict(zip(names, values, strict=True))),
            *arguments.values(),
            use_reentrant=reentrant,
        )

    _assert_equal(_everything(case, function), _everything(case))


@every_op
def test_selective_activation_checkpointing(op: str) -> None:
    case = sample(op, torch.float64)
    kept = getattr(torch.ops.twostep, op).default

    def policy(_: Any, func: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
        policy_of = checkpoint.CheckpointPolicy
        return policy_of.MUST_SAVE if func == kept else policy_of.PREFER_RECOMPUTE

    def function(**arguments: Any) -> Any:
        return checkpoint.checkpoint(
            lambda: tuple(o * 1 for o in as_tuple(getattr(ops, op)(**arguments))),
            use_reentrant=False,
            context_fn=lambda: checkpoint.create_selective_checkpoint_contexts(policy),
        )

    _assert_equal(_everything(case, function), _everything(case))


@every_op
def test_function_transforms(op: str) -> None:
    case = sample(op, torch.float64)
    names = [name for name in case.tensors if name not in case.constants]
    generator = torch.Generator().manual_seed(7)
    incoming = oracle.incoming_gradients(case, generator)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return _call(case, {**case.tensors, **dict(zip(names, values, strict=True))})

    outputs, pull_back = torch.func.vjp(function, *(case.tensors[name] for name in names))
    expected = _everything(case)
    for i, (output, gradient) in enumerate(zip(outputs, incoming, strict=True)):
        assert torch.equal(output, expected[f"output {i}"]) and output.shape == gradient.shape
    for name, gradient in zip(names, pull_back(tuple(incoming)), strict=True):
        torch.testing.assert_close(gradient, expected[f"gradient of {name}"], rtol=1e-14, atol=1e-14)
    grads = torch.func.grad(lambda *v: sum(o.square().sum() for o in function(*v)), argnums=tuple(range(len(names))))(
        *(case.tensors[name] for name in names)
    )
    assert all(g.shape == case.tensors[n].shape for g, n in zip(grads, names, strict=True))


@every_op
def test_forward_mode_raises(op: str) -> None:
    case = sample(op, torch.float64)
    first = next(iter(case.tensors))
    x = case.tensors[first]

    def function(value: Tensor) -> Any:
        return _call(case, {**case.tensors, first: value})

    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(function, (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        function(torch.autograd.forward_ad.make_dual(x, x))


@every_op
def test_a_function_transform_inside_compile_is_right_or_an_error(op: str) -> None:
    case = sample(op)
    first = next(iter(case.tensors))

    def gradient(value: Tensor) -> Tensor:
        return torch.func.grad(lambda v: sum(o.square().sum() for o in _call(case, {**case.tensors, first: v})))(value)

    expected = gradient(case.tensors[first])
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager")(case.tensors[first]), expected)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"(?i)unsupported|not supported"):
        torch.compile(gradient, backend="aot_eager", fullgraph=True)(case.tensors[first])


@every_op
def test_one_tensor_in_two_places(op: str) -> None:
    case = sample(op)
    shared = {"up": "gate", "k": "q", "k_weight": "q_weight", "z": "x", "pre_weight": "post_weight", "shift": "scale"}
    shared |= {"v": "noise"} if op == "two_step_split" else {"v": "x"}
    case.tensors.update({n: case.tensors[o] for n, o in shared.items() if n in case.tensors and o in case.tensors})

    def total(function: Any) -> list[Tensor]:
        leaves = {n: t for n, t in case.tensors.items() if n not in case.constants}
        unique = {id(t): t.clone().requires_grad_() for t in leaves.values()}
        outputs = as_tuple(function({n: unique[id(t)] for n, t in leaves.items()}))
        return list(torch.autograd.grad(sum(o.square().sum() for o in outputs), list(unique.values())))

    def call(arguments: dict[str, Tensor]) -> Any:
        rest = {n: t for n, t in case.tensors.items() if n in case.constants}
        return getattr(ops, op)(**arguments, **rest, **case.options)

    torch._dynamo.reset()
    compiled = total(torch.compile(call, backend="aot_eager", fullgraph=True))
    for left, right in zip(compiled, total(call), strict=True):
        torch.testing.assert_close(left, right)


@every_op
def test_checkpointing_with_create_graph(op: str) -> None:
    case = sample(op, torch.float64)
    leaves = case.leaves(lambda t: t.clone())
    wanted = [t for t in leaves.values() if t is not None and t.requires_grad]
    outputs = checkpoint.checkpoint(lambda: as_tuple(_call(case, leaves)), use_reentrant=False)
    gradients = torch.autograd.grad(sum(o.sum() for o in outputs), wanted, create_graph=True)
    plain = torch.autograd.grad(sum(o.sum() for o in _call(case, leaves)), wanted)
    assert all(torch.equal(left, right) for left, right in zip(gradients, plain, strict=True))


@every_op
def test_many_rows(op: str) -> None:
    """Long enough for several runs of rows in each sample, and for the second stage that adds them up."""
    for dtype in (torch.float32, torch.bfloat16):
        for batch, length in ((2, 300), (70, 65), (20000, 1)):
            oracle.check(sample(op, dtype, batch=batch, length=length, width=40, heads=2), strict=True)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1030, 1032, 1056])
def test_outputs_large_enough_to_go_past_the_caches(cpu_isa: str, op: str, width: int, dtype: torch.dtype) -> None:
    """5 MiB and more. Rows of 1056 begin where whole vectors can go past the caches; of 1032, where AVX2's of float32
    can; of 1030, where none can. And inputs begin off a line: by an element, in half of the cases."""
    case = sample(op, dtype, batch=2, length=1300 if dtype.itemsize == 2 else 650, width=width, heads=2)
    for name, t in case.tensors.items():
        if width != 1056 and name != "freqs" and t.dim() > 2 and t.shape[1] > 1:
            padded = torch.empty(t.numel() + 1, dtype=dtype)
            case.tensors[name] = padded[1:].view(t.shape).copy_(t)
    oracle.check(case)


@every_op
def test_float16_and_mixed_parameters_keep_their_dtypes(op: str) -> None:
    case = sample(op, torch.float16)
    mixed = {n: t.float() if "weight" in n else t for n, t in case.tensors.items()}
    case = Case(op, mixed, case.options)
    leaves = case.leaves(lambda t: t.clone())
    outputs = _call(case, leaves)
    torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
    assert all(o.dtype == torch.float16 for o in outputs)
    assert all(t.grad.dtype == t.dtype for t in leaves.values() if t is not None and t.requires_grad)
