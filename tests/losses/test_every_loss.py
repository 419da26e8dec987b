"""What every loss promises: its formula at any shape and dtype, one meaning of weight and reduction, no surprises."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from twostep import losses

from .calls import CALLS, Call


def _decoupled(x: Tensor, real: Tensor, fake: Tensor, uncond: Tensor, **options: float) -> Tensor:
    return losses.decoupled_dmd_loss(x, dm_real_clean=real, dm_fake_clean=fake, ca_uncond_clean=uncond, **options)


def _divergence(logits: Tensor, **options: float) -> Tensor:
    return losses.f_divergence_weight(logits[:, 0], "jensen_shannon", **options)


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EACH = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@dataclass
class Drawn:
    tensors: list[Tensor]
    weight: Tensor | None
    reduction: str


@st.composite
def drawn(draw: st.DrawFn, call: Call) -> Drawn:
    shape = (draw(st.integers(1, 4)), *draw(st.lists(st.integers(1, 5), max_size=3)))
    dtypes = draw(
        st.sampled_from([(d,) for d in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0]))
    transposed = draw(st.booleans())

    def tensor(i: int) -> Tensor:
        t = (scale * torch.randn(shape[::-1] if transposed else shape, generator=generator)).to(dtypes[i % len(dtypes)])
        return t.permute(*range(t.dim() - 1, -1, -1)) if transposed else t

    tensors = [tensor(i).requires_grad_() for i in range(call.inputs)]
    for divisor in call.divides_by(*(t.double() for t in tensors)):
        assume(divisor.min() > 0.05 * scale)  # nearer to zero, float32 inputs do not determine the result
    weight = draw(st.sampled_from([None, torch.float32, torch.bfloat16, torch.float64]))
    return Drawn(
        tensors,
        None if weight is None else torch.rand(shape[0], generator=generator).to(weight) + 0.5,
        draw(st.sampled_from(["mean", "sum", "none"])),
    )


def naively(call: Call, tensors: list[Tensor], weight: Tensor | None, reduction: str) -> Tensor:
    values = call.naive(*tensors)
    if weight is not None:
        values = torch.stack([w.double() * value for w, value in zip(weight, values, strict=True)])
    return {"mean": sum(values) / len(values), "sum": sum(values), "none": values}[reduction]


@EACH
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_is_its_formula(call: Call, data: st.DataObject) -> None:
    case = data.draw(drawn(call))
    loss = call.loss(*case.tensors, weight=case.weight, reduction=case.reduction)
    exact = [t.detach().double().requires_grad_() for t in case.tensors]
    expected = naively(call, exact, case.weight, case.reduction)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in case.tensors[: used(call)]) else torch.float32
    assert loss.dtype == wide
    assert loss.shape == ((len(exact[0]),) if case.reduction == "none" else ())
    # float32 keeps some seven digits; a sum of a few terms and, in the normaliser, a difference lose two of them.
    near = {"rtol": 1e-10, "atol": 1e-10} if wide == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(loss.double(), expected, **near)

    cotangent = torch.rand_like(expected) + 0.5
    (loss * cotangent.to(wide)).sum().backward()
    wanted = torch.autograd.grad((expected * cotangent).sum(), [exact[i] for i in call.learns])
    for i, gradient in zip(call.learns, wanted, strict=True):
        given_gradient = case.tensors[i].grad
        rounding = torch.finfo(case.tensors[i].dtype).eps
        torch.testing.assert_close(
            given_gradient.double(),
            gradient,
            rtol=max(near["rtol"] * 2, rounding),
            atol=max(near["atol"] * 2, rounding),
        )
    for i in set(range(call.inputs)) - set(call.learns):
        assert case.tensors[i].grad is None, "data received a gradient"


def used(call: Call) -> int:
    """The generator's losses read real logits only where they compare pairs."""
    function = getattr(call.loss, "func", call.loss)
    kind = getattr(call.loss, "keywords", {}).get("kind")
    return 1 if function.__name__ == "generator_adversarial_loss" and kind != "relativistic" else call.inputs


def example(call: Call, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, 4, 5, generator=generator).to(dtype) for _ in range(call.inputs)]
    return [t.requires_grad_(i in call.learns) for i, t in enumerate(tensors)]


@EACH
def test_reductions_agree(call: Call) -> None:
    weight = torch.tensor([0.0, 1.5, 3.0], dtype=torch.float64)
    tensors = example(call, torch.float64)
    per_sample = call.loss(*tensors, reduction="none")
    torch.testing.assert_close(call.loss(*tensors, weight=weight, reduction="none"), weight * per_sample)
    torch.testing.assert_close(call.loss(*tensors, weight=weight, reduction="sum"), (weight * per_sample).sum())
    torch.testing.assert_close(call.loss(*tensors, weight=weight), (weight * per_sample).sum() / 3)
    torch.testing.assert_close(call.loss(*tensors), per_sample.mean())


@EACH
def test_samples_do_not_mix(call: Call) -> None:
    tensors = example(call)
    alone = [call.loss(*(t[i : i + 1] for t in tensors)) for i in range(3)]
    torch.testing.assert_close(call.loss(*tensors, reduction="none"), torch.stack(alone))


@EACH
def test_weight_is_data(call: Call) -> None:
    weight = torch.rand(3, requires_grad=True)
    call.loss(*example(call), weight=weight).backward()
    assert weight.grad is None


@EACH
def test_changes_nothing_in_place(call: Call) -> None:
    tensors = example(call)
    weight = torch.rand(3)
    copies, versions = [t.detach().clone() for t in [*tensors, weight]], [t._version for t in [*tensors, weight]]
    call.loss(*tensors, weight=weight).backward()
    for t, copy, version in zip([*tensors, weight], copies, versions, strict=True):
        assert torch.equal(t, copy)
        assert t._version == version


@EACH
def test_half_precision_inputs_lose_nothing_more(call: Call) -> None:
    tensors = [t.detach() for t in example(call, torch.bfloat16)]
    assert torch.equal(call.loss(*tensors), call.loss(*(t.float() for t in tensors)))


@EACH
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_lower_precision(call: Call, low: torch.dtype) -> None:
    tensors = example(call)
    expected = torch.autograd.grad(call.loss(*tensors), [tensors[i] for i in call.learns])
    with torch.autocast("cpu", low):
        loss = call.loss(*tensors)
        gradients = torch.autograd.grad(loss, [tensors[i] for i in call.learns])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, call.loss(*tensors))
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@EACH
def test_compiles_in_one_graph(call: Call) -> None:
    def run(loss, *tensors: Tensor) -> tuple[Tensor, ...]:
        value = loss(*tensors, weight=weight)
        return value, *torch.autograd.grad(value, [tensors[i] for i in call.learns])

    torch.compiler.reset()  # or the graphs of all losses count against one limit
    weight = torch.tensor([0.5, 1.0, 2.0])
    tensors = example(call)
    compiled = torch.compile(call.loss, fullgraph=True, backend="aot_eager", dynamic=False)
    for actual, expected in zip(run(compiled, *tensors), run(call.loss, *tensors), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("loss", "inputs", "once", "options"),
    [
        (losses.self_distillation_loss, 2, True, [{"sigma": s, "form": "clean"} for s in (0.9, 0.75, 0.5)]),
        (losses.target_prediction_loss, 3, True, [{"anchor_sigma": s} for s in (0.9, 0.75, 0.5)]),
        (losses.dmd_loss, 3, False, [{"eps": e} for e in (1e-6, 1e-5, 1e-4)]),
        (_decoupled, 4, True, [{"guidance": g, "dm_weight": w} for g, w in ((2.0, 1.0), (3.5, 0.5), (1.5, 0.25))]),
        (_divergence, 1, False, [{"max_logit": m} for m in (1.0, 2.0, 3.0)]),
    ],
    ids=["self_distillation", "target_prediction", "dmd", "decoupled", "f_divergence"],
)
def test_compiles_in_one_graph_for_other_numbers_too(
    loss: Callable[..., Tensor], inputs: int, once: bool, options: list[dict[str, float]]
) -> None:
    """From the second value on torch.compile takes a Python number for a symbol; what reaches an operator's own number,
    or clamp's, is a constant of the graph for all that."""
    torch.compiler.reset()
    tensors = torch.randn(inputs, 3, 4).unbind()
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counted)
    for numbers in options:
        torch.testing.assert_close(compiled(*tensors, **numbers), loss(*tensors, **numbers))
    if once:
        assert counted.frame_count == 2  # for the first, and for all others


@EACH
def test_works_under_func_grad_and_vmap(call: Call) -> None:
    tensors = example(call, torch.float64)
    expected = torch.autograd.grad(call.loss(*tensors), [tensors[i] for i in call.learns])
    plain = [t.detach() for t in tensors]
    for i, wanted in zip(call.learns, expected, strict=True):
        torch.testing.assert_close(torch.func.grad(call.loss, argnums=i)(*plain), wanted)
    per_sample = torch.func.vmap(lambda *one: call.loss(*(t[None] for t in one)))(*plain)
    torch.testing.assert_close(per_sample, call.loss(*plain, reduction="none"))


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_half_precision_values_stay_finite(call: Call, dtype: torch.dtype) -> None:
    tensors = [300 * t.detach().to(dtype) for t in example(call)]  # squares overflow float16
    assert call.loss(*tensors).isfinite()


@EACH
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": "avg"}, ValueError, "reduction is 'avg', expected one of 'mean', 'sum', 'none'"),
        ({"weight": torch.ones(2)}, ValueError, r"weight has shape \[2\], expected \[3\], one value for each sample"),
        ({"weight": torch.ones(3, 1)}, ValueError, r"weight has shape \[3, 1\], expected \[3\]"),
        ({"weight": 2.0}, TypeError, "weight is float, expected a torch.Tensor"),
        ({"weight": torch.ones(3, dtype=torch.int64)}, TypeError, "weight has dtype torch.int64, expected one of"),
        ({"weight": torch.ones(3, device="meta")}, ValueError, "weight is on meta, expected cpu"),
    ],
)
def test_says_what_is_wrong_with_options(call: Call, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call.loss(*example(call), **options)


@EACH
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (torch.ones(3, 4), ValueError, r"has shape \[3, 4\], expected"),
        (torch.ones(3, 1, 5), ValueError, r"has shape \[3, 1, 5\], expected \[3, 4, 5\]"),
        ([1.0], TypeError, "is list, expected a torch.Tensor"),
        (torch.ones(3, 4, 5, dtype=torch.complex64), TypeError, "has dtype torch.complex64, expected one of"),
        (torch.ones(3, 4, 5, device="meta"), ValueError, "is on meta, expected cpu"),
    ],
)
def test_says_what_is_wrong_with_tensors(call: Call, wrong: object, error: type[Exception], message: str) -> None:
    for i in range(1, used(call)):
        tensors: list = list(example(call))
        tensors[i] = wrong
        with pytest.raises(error, match=message):
            call.loss(*tensors)


@EACH
@pytest.mark.parametrize("shape", [(), (0, 4), (2, 0)])
def test_refuses_what_has_no_samples(call: Call, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[batch, ...\] with at least one sample"):
        call.loss(*(torch.ones(shape) for _ in range(call.inputs)))


def test_needs_nothing_else_of_the_library() -> None:
    code = (
        "import sys, twostep.losses; "
        "print(sorted(m for m in sys.modules if m.startswith('twostep.') and not m.startswith('twostep.losses')))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "['twostep.graphs', 'twostep.values', 'twostep.version']"
