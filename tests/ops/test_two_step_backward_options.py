"""What the options promise: replayed randomness, verification, scaling, accumulation, hooks, errors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from twostep import ops
from twostep.ops import two_step_offload

from . import unrolled_steps as steps
from .unrolled_steps import SIGMAS, Steps, assert_same, by_hand, final_loss, first_loss, parameters, taken

MODES = ("plain", "retain", "recompute")
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _unroll(first: Any, second: Any, eps: Tensor, mode: str = "recompute", **options: Any) -> ops.TwoStepResult:
    return ops.two_step_backward(first, second, eps, SIGMAS, first_loss, final_loss, mode=mode, **options)


class Noisy(nn.Module):
    """Multiplies by noise from a generator of its own."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.net, self.generator = Steps(), generator

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * (1 + 0.1 * torch.randn(x.shape, generator=self.generator, device=x.device))


class Counting(nn.Module):
    """Its output depends on how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Steps()
        self.register_buffer("runs", torch.zeros(()))
        self.register_buffer("untouched", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.net(x) * (1 + 1e-3 * self.runs)


@every_mode
def test_generators_that_are_named_are_replayed_and_go_on(mode: str) -> None:
    generator = torch.Generator().manual_seed(9)
    first, second, eps = Noisy(generator), Noisy(generator), steps.noise()
    by_hand(first, second, eps)[0].backward()
    expected, state = taken(parameters(first, second)), generator.get_state()
    generator.manual_seed(9)
    _unroll(first, second, eps, mode, generators=[generator], verify=True)
    assert_same([*taken(parameters(first, second)), generator.get_state()], [*expected, state])


def test_verify_names_a_generator_that_was_not_given() -> None:
    first, second = Noisy(torch.Generator().manual_seed(9)), Steps()
    with pytest.raises(
        RuntimeError, match=r"first gave another output .* max difference \d\.\de-0[123] at \["
    ) as caught:
        _unroll(first, second, steps.noise(), verify=True)
    assert "pass it in generators=" in str(caught.value) and "180 of 180 values" in str(caught.value)
    assert all(p.grad is None for p in first.parameters())


@pytest.mark.parametrize("named", [True, False])
def test_verify_names_the_buffers_that_changed(named: bool) -> None:
    first, second, hidden = Counting(), Steps(), {}
    hidden["net"] = [first]
    step: Callable[[Tensor], Tensor] = lambda x: hidden["net"][0](x)  # noqa: E731
    options = {"modules": (first, second)} if named else {}
    with pytest.raises(RuntimeError, match="first gave another output") as caught:
        _unroll(step, second, steps.noise(), verify=True, **options)
    assert ("first changes state whenever it runs: runs" in str(caught.value)) == named
    assert ("pass modules=" in str(caught.value)) != named
    assert "untouched" not in str(caught.value)


def test_verify_finds_the_modules_of_a_closure() -> None:
    first, second = Counting(), Steps()
    with pytest.raises(RuntimeError, match="whenever it runs: runs"):
        _unroll(lambda x: first(x), second, steps.noise(), verify=True)


def test_verify_names_state_that_moves_twice_under_an_equal_output() -> None:
    """Batch norm normalises by the batch, so its running statistics alone tell."""

    class Normed(Steps):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x))

    first, second = Normed(), Steps()
    with pytest.raises(RuntimeError, match=r"state moves twice") as caught:
        _unroll(first, second, steps.noise(), verify=True)
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert name in str(caught.value)
    first.eval()
    _unroll(first, second, steps.noise(), verify=True)


@every_mode
def test_verify_is_content_with_dropout_and_checkpoints(mode: str) -> None:
    net = Steps(dropout=0.5, checkpointed=True)
    _unroll(net, net, steps.noise(), mode, verify=True)


def test_a_first_pass_with_a_graph_serves_programs_that_round_differently_without_one() -> None:
    first, second, eps = Steps(), Steps(), steps.noise()

    def step(x: Tensor) -> Tensor:  # as a compiled model does, whose two programs fuse differently
        return first(x) * (1.0 if torch.is_grad_enabled() else 1.0 + 1e-6)

    with pytest.raises(RuntimeError, match="use first_pass='grad'"):
        _unroll(step, second, eps, verify=True)
    taken(parameters(first, second))
    by_hand(step, second, eps)[0].backward()
    expected = taken(parameters(first, second))
    _unroll(step, second, eps, verify=True, first_pass="grad")
    assert_same(taken(parameters(first, second)), expected)


@pytest.mark.parametrize(("mode", "runs"), [("plain", [True]), ("retain", [True]), ("recompute", [False, True])])
def test_step_one_runs_once_more_at_most_and_then_without_a_graph(mode: str, runs: list[bool]) -> None:
    first, second = Steps(), Steps()
    found: list[bool] = []

    def step(x: Tensor) -> Tensor:
        found.append(torch.is_grad_enabled())
        return first(x)

    _unroll(step, second, steps.noise(), mode)
    assert found == runs and second.calls == 1


@every_mode
def test_gradients_are_added_to_what_is_there(mode: str) -> None:
    first, second, eps = Steps(dtype=torch.float64), Steps(dtype=torch.float64), steps.noise(torch.float64, batch=6)
    by_hand(first, second, eps)[0].backward()
    whole = taken(parameters(first, second))
    for part in eps.chunk(3):
        _unroll(first, second, part, mode, loss_scale=1 / 3)
    torch.testing.assert_close(taken(parameters(first, second)), whole, rtol=1e-11, atol=1e-14)


@every_mode
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_scales_change_gradients_and_nothing_else(mode: str, clip: float | None) -> None:
    """Powers of two, so that they change no rounding."""
    first, second, eps = Steps(), Steps(), steps.noise()
    unscaled = _unroll(first, second, eps, mode, clip=clip, inherit=0.5)
    expected = taken(parameters(first, second))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    result = _unroll(first, second, eps, mode, clip=clip, inherit=0.5, scaler=scaler, loss_scale=0.25)
    assert_same([None if g is None else g / 2**10 for g in taken(parameters(first, second))], expected)
    for name in ("inherited_norm", "first_loss", "final_loss", "x"):
        assert torch.equal(getattr(result, name), getattr(unscaled, name)), name
    assert clip is None or float(unscaled.inherited_norm) > clip


def test_a_gradient_scaler_s_optimizer_step_works_as_usual() -> None:
    first, second, eps = Steps(), Steps(), steps.noise()
    optimizer = torch.optim.SGD(parameters(first, second), lr=0.1)
    before = [p.detach().clone() for p in parameters(first, second)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    _unroll(first, second, eps, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    after = [p.detach().clone() for p in parameters(first, second)]
    for p, old in zip(parameters(first, second), before, strict=True):
        p.data.copy_(old)
    optimizer.zero_grad()
    by_hand(first, second, eps)[0].backward()
    optimizer.step()
    assert_same(after, [p.detach() for p in parameters(first, second)])


@every_mode
def test_hooks_of_shared_parameters_see_one_complete_gradient(mode: str) -> None:
    net, eps = Steps(twice=True), steps.noise()
    by_hand(net, net, eps)[0].backward()
    expected = taken(parameters(net))
    seen: dict[int, list[Tensor]] = {i: [] for i in range(len(expected))}
    finished = []
    for i, p in enumerate(parameters(net)):
        p.register_hook(lambda g, i=i: (seen[i].append(g.clone()), 2 * g)[1])
        p.register_post_accumulate_grad_hook(finished.append)
    _unroll(net, net, eps, mode)
    assert all(len(found) == 1 for found in seen.values()) and len(finished) == len(expected)
    assert_same([found[0] for found in seen.values()], expected)
    assert_same(taken(parameters(net)), [None if g is None else 2 * g for g in expected])


def test_separate_parameters_are_accumulated_as_soon_as_they_can_be() -> None:
    """So that no gradient of step 2 waits while step 1's activations are there; sync='last' asks for that."""
    for sync, waits in ((None, False), ("each", False), ("last", True)):
        first, second = Steps(), Steps()
        order: list[str] = []
        for name, net in (("first", first), ("second", second)):
            next(net.parameters()).register_post_accumulate_grad_hook(lambda _, o=order, name=name: o.append(name))

        def loss(x: Tensor, order: list[str] = order) -> Tensor:
            order.append("loss")
            return first_loss(x)

        ops.two_step_backward(first, second, steps.noise(), SIGMAS, loss, final_loss, sync=sync)
        assert order == (["loss", "second", "first"] if waits else ["second", "loss", "first"])


@pytest.mark.parametrize("mode", ["retain", "recompute"])
def test_offload_changes_nothing_but_where_tensors_wait(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has no other memory; with copies for the host's, none of what waits is kept where it was made."""
    net, eps = Steps(dropout=0.3), steps.noise()
    there: list[StorageWeakRef] = []
    alive: list[int] = []

    def to_host(t: Tensor) -> Tensor:
        there.append(StorageWeakRef(t.untyped_storage()))
        return t.clone()

    def loss(x: Tensor) -> Tensor:
        alive.append(sum(not storage.expired() for storage in there))
        return first_loss(x)

    found = []
    monkeypatch.setattr(two_step_offload, "to_host", to_host)
    for offload in (False, True):
        torch.manual_seed(4)
        result = ops.two_step_backward(
            net, net, eps, SIGMAS, loss, final_loss, mode=mode, offload=offload, verify=mode == "recompute"
        )
        found.append([*taken(parameters(net)), result.x, result.z, result.x_A])
    assert_same(found[0], found[1])
    assert len(there) == (2 if mode == "retain" else 3) and alive == [0, 0]  # x, the inherited gradient; v0


@every_mode
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_a_stash_around_it_changes_nothing_but_where_activations_wait(mode: str, shared: bool) -> None:
    settings = {"dropout": 0.3, "checkpointed": True}
    first = Steps(**settings)
    second = first if shared else Steps(**settings)
    eps, leaves, held = steps.noise(), parameters(first, second), ops.stash(min_bytes=0)
    found = []
    for around in (nullcontext(), held, held):
        torch.manual_seed(4)
        with around:
            result = _unroll(first, second, eps, mode)
        found.append([*taken(leaves), result.x, result.z, result.x_A, result.inherited_norm])
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])
    # The inputs of both blocks of a step at the least, those of both steps where both graphs are kept.
    assert held.peak_bytes >= (2 if mode == "recompute" else 4) * eps.nbytes and held.bytes == 0


@every_mode
@pytest.mark.parametrize(("bad", "where"), [("first_loss", "first_loss"), ("final_loss", "final_loss")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_reported_or_raised_by_name(mode: str, bad: str, where: str, value: float) -> None:
    net, eps = Steps(), steps.noise()
    losses = {"first_loss": first_loss, "final_loss": final_loss}
    losses[bad] = lambda x: x.sum() * value
    result = ops.two_step_backward(net, net, eps, SIGMAS, **losses, mode=mode)
    assert not bool(result.finite) and where in result.not_finite()
    assert any(g is not None and not bool(g.isfinite().all()) for g in taken(parameters(net)))  # nothing is hidden
    with pytest.raises(FloatingPointError, match=f"{where} is (nan|-?inf)"):
        ops.two_step_backward(net, net, eps, SIGMAS, **losses, mode=mode, check_finite=True)
    assert all(g is None for g in taken(parameters(net)))


class _Explodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.full_like(g, float("inf"))


@every_mode
def test_an_inherited_gradient_that_explodes_is_never_turned_into_zeros(mode: str) -> None:
    first, second, eps = Steps(), Steps(), steps.noise()
    on_final = lambda x: final_loss(_Explodes.apply(x))  # noqa: E731
    result = ops.two_step_backward(first, second, eps, SIGMAS, first_loss, on_final, mode=mode, clip=1.0)
    assert result.not_finite() == ["inherited_norm"] and not bool(result.finite)
    assert any(not bool(g.isfinite().all()) for g in taken(parameters(first)) if g is not None)
    with pytest.raises(FloatingPointError, match="the inherited gradient has norm"):
        ops.two_step_backward(first, second, eps, SIGMAS, first_loss, on_final, mode=mode, check_finite=True)
    taken(parameters(first))
    ops.two_step_backward(first, second, eps, SIGMAS, first_loss, on_final, mode=mode, inherit=0.0)
    assert all(bool(g.isfinite().all()) for g in taken(parameters(first)) if g is not None)  # it was cut


def test_a_norm_that_overflows_is_not_a_clip_to_zero() -> None:
    first, second, eps = Steps(), Steps(), steps.noise()
    result = ops.two_step_backward(first, second, eps, SIGMAS, None, lambda x: x.sum() * 1e30, clip=1.0)
    assert result.not_finite() == ["inherited_norm"]
    assert any(not bool(g.isfinite().all()) for g in taken(parameters(first)) if g is not None)


def _shape(x: Tensor) -> Tensor:
    return x[:, :1]


@every_mode
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "paper"}, ValueError, "mode is 'paper', expected one of 'recompute', 'retain', 'plain'"),
        ({"sigmas": (1, 0)}, ValueError, r"sigmas is \(1.0, 0.0\), expected \(1, mid, 0\)"),
        ({"sigmas": (1, 1, 0)}, ValueError, "with mid between 0 and 1"),
        ({"sigmas": (0.9, 0.5, 0)}, ValueError, "expected"),
        ({"sigmas": (1, 0.5, 0.1)}, ValueError, "expected"),
        ({"sigmas": (1, float("nan"), 0)}, ValueError, "with mid between"),
        ({"sigmas": 0.75}, TypeError, r"sigmas is 0.75, expected three numbers \(1, mid, 0\)"),
        ({"sigmas": "abc"}, TypeError, "sigmas is 'abc', expected three numbers"),
        ({"first_loss": None, "final_loss": None}, ValueError, "nothing to learn from"),
        ({"first_loss": 3}, TypeError, "first_loss is int, expected a callable or None"),
        ({"second": None}, TypeError, "second is NoneType, expected a callable"),
        ({"first": lambda x: (x,)}, TypeError, "first returned tuple, expected a tensor; wrap it"),
        (
            {"second": lambda x: _shape(x)},
            ValueError,
            r"second returned a velocity of shape \[5, 1, 12\] on cpu, expected",
        ),
        ({"second": lambda x: x.int()}, TypeError, "second returned dtype torch.int32"),
        ({"first": lambda x: x * 2}, ValueError, "first's output has no graph: its parameters are frozen"),
        ({"first_loss": lambda x: x.mean(0)}, ValueError, "first_loss returned a tensor of shape"),
        ({"final_loss": lambda x: x.mean(0)}, ValueError, "final_loss returned a tensor of shape"),
        ({"final_loss": lambda x: 1.0}, TypeError, "final_loss returned float, expected a scalar tensor"),
        ({"final_loss": lambda x: x.detach().mean()}, ValueError, "final_loss returned a tensor without a graph"),
        ({"first_loss": lambda x: x.detach().mean()}, ValueError, "first_loss returned a tensor without a graph"),
        ({"noise": steps.noise().requires_grad_()}, ValueError, r"pass noise\.detach\(\)"),
        ({"noise": steps.noise().int()}, TypeError, "noise is torch.int32"),
        ({"noise": [1.0]}, TypeError, "noise is list"),
        ({"noise": torch.tensor(1.0)}, ValueError, r"noise has shape \[\], expected \[batch, ...\]"),
        ({"noise": torch.zeros(0, 3, steps.WIDTH)}, ValueError, r"noise has shape \[0, 3, 12\], expected"),
        ({"first": lambda x: x.mul_(2)}, ValueError, "first changes its input in place"),
        ({"second": lambda x: x.mul_(2)}, ValueError, "second changes its input in place"),
        ({"generators": torch.Generator()}, TypeError, "generators is Generator, expected a list"),
        ({"generators": [3]}, TypeError, "generators holds int, expected torch.Generator"),
        ({"scaler": 3}, TypeError, r"scaler is int, expected a torch\.amp\.GradScaler"),
        ({"inherit": "0.1"}, TypeError, "inherit is str, expected a number"),
        ({"clip": torch.ones(())}, TypeError, "clip is Tensor, expected a number"),
        ({"inherit": -1.0}, ValueError, "inherit is -1.0"),
        ({"inherit": float("nan")}, ValueError, "inherit is nan"),
        ({"inherit": 0.0, "first_loss": None}, ValueError, "step 1 learns from nothing"),
        ({"clip": 0.0}, ValueError, "clip is 0.0"),
        ({"loss_scale": 0.0}, ValueError, "loss_scale is 0.0"),
        ({"sync": "both"}, ValueError, "sync is 'both', expected one of 'each', 'last'"),
        ({"first_pass": "eval"}, ValueError, "first_pass is 'eval'"),
        ({"modules": nn.Linear(1, 1)}, TypeError, r"expected a pair \(of first, of second\)"),
        ({"modules": (None, nn.Linear(1, 1))}, TypeError, "modules holds NoneType"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_named(mode: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "first": Steps(),
        "second": Steps(),
        "noise": steps.noise(),
        "sigmas": SIGMAS,
        "first_loss": first_loss,
        "final_loss": final_loss,
        "mode": mode,
    }
    with pytest.raises(error, match=message) as caught:
        ops.two_step_backward(**{**arguments, **change})
    assert str(caught.value).startswith("two_step_backward: ")


@every_mode
@pytest.mark.parametrize("sync", [None, "last", "each"])
def test_a_frozen_step_one_is_an_error_and_leaves_no_half_of_the_gradients(mode: str, sync: str | None) -> None:
    net = Steps()
    frozen = Steps().requires_grad_(False)
    with pytest.raises(ValueError, match="first's output has no graph"):
        _unroll(frozen, net, steps.noise(), mode, sync=sync)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("mode", ["retain", "recompute"])
def test_a_graph_outside_the_steps_that_both_use_is_explained(mode: str) -> None:
    net, projection = Steps(), nn.Linear(3, 3)

    def made() -> Callable[[Tensor], Tensor]:
        context = torch.tanh(projection(torch.ones(3))).mean()
        return lambda x: net(x + context)

    step = made()
    with pytest.raises(RuntimeError, match=r"Make it inside each, or use mode='plain'"):
        _unroll(step, step, steps.noise(), mode)
    step = made()
    _unroll(step, step, steps.noise(), "plain")
    assert projection.weight.grad is not None


class Keeping(Steps):
    """Projects its context once, and keeps what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.projection, self.kept = nn.Linear(3, 1), None

    def forward(self, x: Tensor) -> Tensor:
        context = self.projection(torch.ones(3)) if self.kept is None else self.kept
        self.kept = context.detach()
        return super().forward(x + context)


def test_verify_names_parameters_that_the_second_run_no_longer_uses() -> None:
    with pytest.raises(RuntimeError, match=r"first did not use projection\.weight, projection\.bias when it was run"):
        _unroll(Keeping(), Steps(), steps.noise(), verify=True, first_pass="grad")


def test_verify_is_content_with_a_table_that_is_made_on_its_first_use() -> None:
    class Rotary(Steps):
        def __init__(self, moving: bool) -> None:
            super().__init__()
            self.register_buffer("table", None)
            self.moving = moving

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.ones(3)
            elif self.moving:
                self.table = self.table + 1
            return super().forward(x)

    _unroll(Rotary(False), Steps(), steps.noise(), verify=True)
    with pytest.raises(RuntimeError, match="first changes state whenever it runs: table"):
        _unroll(Rotary(True), Steps(), steps.noise(), verify=True)


def test_verify_tells_zeros_of_either_sign_apart() -> None:
    class Turning(Steps):
        sign = 1.0

        def forward(self, x: Tensor) -> Tensor:
            self.sign = -self.sign
            return super().forward(x) * 0.0 * self.sign

    with pytest.raises(RuntimeError, match="first gave another output when it was run again"):
        _unroll(Turning(), Steps(), steps.noise(), verify=True)


@every_mode
def test_an_overflow_at_a_scalers_scale_is_left_to_the_scaler(mode: str) -> None:
    first, second, eps = Steps(), Steps(), steps.noise()
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    huge = lambda x: 1e6 * final_loss(x)  # noqa: E731
    result = ops.two_step_backward(
        first, second, eps, SIGMAS, first_loss, huge, mode=mode, scaler=scaler, check_finite=True
    )
    assert "inherited_norm" in result.not_finite()
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    before = [p.detach().clone() for p in first.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 1e38 and all(torch.equal(a, b) for a, b in zip(before, first.parameters(), strict=True))


@every_mode
@pytest.mark.parametrize("region", [torch.no_grad, torch.inference_mode])
def test_a_region_without_gradients_is_an_error(mode: str, region: Any) -> None:
    with region(), pytest.raises(ValueError, match=r"called under torch\.no_grad or inference_mode"):
        _unroll(Steps(), Steps(), steps.noise(), mode)


@every_mode
def test_step_two_may_be_frozen(mode: str) -> None:
    first, second, eps = Steps(), Steps().requires_grad_(False), steps.noise()
    by_hand(first, second, eps)[0].backward()
    expected = taken(parameters(first))
    _unroll(first, second, eps, mode)
    assert_same(taken(parameters(first)), expected)


@every_mode
@pytest.mark.parametrize("name", ["first_loss", "final_loss"])
def test_a_loss_that_has_a_graph_without_the_image_is_an_error(mode: str, name: str) -> None:
    """As a critic's loss on a detached image: it has a gradient, and none of it is the student's."""
    net, critic = Steps(), nn.Linear(steps.WIDTH, 1)
    losses = {"first_loss": first_loss, "final_loss": final_loss, name: lambda x: critic(x.detach()).mean()}
    with pytest.raises(ValueError, match=f"{name} does not depend on the image that it was given"):
        ops.two_step_backward(net, net, steps.noise(), SIGMAS, **losses, mode=mode)
    assert all(p.grad is None for p in parameters(net, critic))


@every_mode
def test_a_loss_may_change_its_image_in_place(mode: str) -> None:
    first, second, eps = Steps(), Steps(), steps.noise()
    by_hand(first, second, eps, lambda x: first_loss(x * 2), lambda x: final_loss(x * 2))[0].backward()
    expected = taken(parameters(first, second))
    losses = (lambda x: first_loss(x.mul_(2)), lambda x: final_loss(x.mul_(2)))
    ops.two_step_backward(first, second, eps, SIGMAS, *losses, mode=mode)
    assert_same(taken(parameters(first, second)), expected)


@every_mode
@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_loss_may_be_one_number_of_any_shape(mode: str, shape: tuple[int, ...], scaled: bool) -> None:
    first, second, eps = Steps(), Steps(), steps.noise()
    options = {"clip": 1e-3, "scaler": torch.amp.GradScaler("cpu") if scaled else None}
    _unroll(first, second, eps, mode, **options)
    expected = taken(parameters(first, second))
    shaped = [lambda x, loss=loss: loss(x).reshape(shape) for loss in (first_loss, final_loss)]
    result = ops.two_step_backward(first, second, eps, SIGMAS, *shaped, mode=mode, **options)
    assert_same(taken(parameters(first, second)), expected)
    assert result.final_loss.shape == shape and result.inherited_norm.shape == () and bool(result.finite)


@every_mode
def test_a_second_step_that_changes_its_input_is_an_error(mode: str) -> None:
    first, second = Steps(), Steps()
    with pytest.raises((ValueError, RuntimeError), match=r"in place|in-place"):
        _unroll(first, lambda x: second(x.mul_(2)), steps.noise(), mode)
    assert all(p.grad is None for p in parameters(first, second))


@pytest.mark.gpu
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_modes_agree_bit_for_bit(mode: str, dtype: torch.dtype) -> None:
    net, eps = Steps(dropout=0.3, dtype=dtype).cuda(), steps.noise(dtype, device="cuda")
    found = []
    for run in (
        lambda: by_hand(net, net, eps)[0].backward(),
        lambda: _unroll(net, net, eps, mode, verify=True, offload=True),
    ):
        torch.manual_seed(6)
        run()
        found.append([*taken(parameters(net)), torch.cuda.get_rng_state()])
    assert_same(found[1], found[0])


@pytest.mark.gpu
@every_mode
@pytest.mark.parametrize("checkpointed", [False, True])
def test_on_a_gpu_everything_together(mode: str, checkpointed: bool) -> None:
    """A generator on the device, autocast, a gradient scaler and checkpointed blocks."""
    generator = torch.Generator("cuda")
    net, eps = Noisy(generator).cuda(), steps.noise(device="cuda")
    net.net.checkpointed = checkpointed
    found = []
    for kind in ("plain", mode):
        scaler = torch.amp.GradScaler("cuda", init_scale=64.0)
        generator.manual_seed(8)
        with torch.autocast("cuda", torch.bfloat16):
            _unroll(net, net, eps, kind, generators=(generator,), scaler=scaler, offload=True, inherit=0.5)
        found.append([*taken(parameters(net)), generator.get_state()])
    assert_same(found[1], found[0])


@pytest.mark.gpu
def test_on_a_gpu_what_waits_is_in_pinned_memory() -> None:
    t = torch.randn(1 << 20, device="cuda")
    host = two_step_offload.to_host(t)
    torch.cuda.synchronize()
    assert host.is_pinned() and torch.equal(host, t.cpu())
    assert torch.equal(two_step_offload.to_device(host, t.device), t)
