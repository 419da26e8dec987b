"""All modes give the gradients of one graph written by hand, bit for bit, whatever the steps are made of."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from twostep import ops

from . import unrolled_steps as steps
from .unrolled_steps import SIGMAS, Steps, assert_same, by_hand, final_loss, first_loss, parameters, taken

MODES = ("plain", "retain", "recompute")
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _unroll(first: Any, second: Any, eps: Tensor, mode: str, **options: Any) -> ops.TwoStepResult:
    return ops.two_step_backward(first, second, eps, SIGMAS, first_loss, final_loss, mode=mode, **options)


def _after_seed(run: Callable[[], object], leaves: list[Tensor], times: int = 1) -> list[Tensor | None]:
    """Gradients after some calls from the same seed, and the state that the random generator is left in."""
    torch.manual_seed(5)
    for _ in range(times):
        run()
    return [*taken(leaves), torch.get_rng_state()]


@every_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("form", ["dropout", "twice", "checkpointed"])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_equals_one_graph_bit_for_bit(mode: str, dtype: torch.dtype, shared: bool, form: str, accumulated: int) -> None:
    settings = {"dropout": 0.3, "twice": form == "twice", "checkpointed": form == "checkpointed", "dtype": dtype}
    first = Steps(**settings)
    second = first if shared else Steps(**settings)
    eps, leaves = steps.noise(dtype), parameters(first, second)
    expected = _after_seed(lambda: by_hand(first, second, eps)[0].backward(), leaves, accumulated)
    assert_same(_after_seed(lambda: _unroll(first, second, eps, mode), leaves, accumulated), expected)


@every_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_equals_plain_expressions_within_their_own_rounding(mode: str, dtype: torch.dtype, shared: bool) -> None:
    """By distance from one graph in float64, with no operator of this library in it."""
    first = Steps(dtype=dtype)
    second = first if shared else Steps(dtype=dtype)
    eps, leaves = steps.noise(dtype), parameters(first, second)
    exact = [copy.deepcopy(net).double() for net in (first, second)]
    exact = [exact[0], exact[0] if shared else exact[1]]
    by_hand(*exact, eps.double(), plain=True)[0].backward()
    reference = taken(parameters(*exact))
    by_hand(first, second, eps, plain=True)[0].backward()
    expected = taken(leaves)
    _unroll(first, second, eps, mode)
    for found, plain, true in zip(taken(leaves), expected, reference, strict=True):
        error, allowed = (float((g.double() - true).norm() / true.norm()) for g in (found, plain))
        assert error <= 2 * allowed + 2 * torch.finfo(torch.float64).eps


@every_mode
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_the_arithmetic_of_the_steps_is_fused_and_waits_for_nothing(mode: str, clip: float | None) -> None:
    """Counted as dispatched: one pass makes z and x_A, one makes x, one each their gradients, and no value is read."""
    found: Counter[str] = Counter()

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "twostep" or func is torch.ops.aten._local_scalar_dense.default:
                found[func.name()] += 1
            return func(*args, **(kwargs or {}))

    first, second, eps = nn.Linear(steps.WIDTH, steps.WIDTH), nn.Linear(steps.WIDTH, steps.WIDTH), steps.noise()
    with Dispatched():
        _unroll(first, second, eps, mode, clip=clip, inherit=0.1)
    assert found == {
        "twostep::two_step_split": 2 if mode == "recompute" else 1,
        "twostep::euler_step": 1,
        "twostep::euler_step_backward": 1,
        "twostep::gradient_norms": 1,
        "twostep::two_step_split_backward": 1,
    }


@every_mode
def test_steps_that_are_functions_equal_one_graph_too(mode: str) -> None:
    """Nothing can be seen of their modules then, unless it is in their closure."""
    net = Steps(dropout=0.3, twice=True)
    hidden: dict[str, list[Steps]] = {"nets": [net]}
    eps, leaves = steps.noise(), parameters(net)
    expected = _after_seed(lambda: by_hand(net, net, eps)[0].backward(), leaves, 2)
    pairs = (
        (lambda x: net(x), lambda x: net(x)),
        (lambda x: hidden["nets"][0](x),) * 2,
        (net.forward, functools.partial(net)),
        (functools.partial(lambda model, x: model(x), net), net),
    )
    for pair in pairs:
        assert_same(_after_seed(lambda pair=pair: _unroll(*pair, eps, mode), leaves, 2), expected)


@every_mode
def test_returns_the_losses_and_samples_of_one_graph(mode: str) -> None:
    first, second, eps = Steps(), Steps(), steps.noise(torch.float32)
    _, v0, x_A, x = by_hand(first, second, eps)
    result = _unroll(first, second, eps, mode)
    assert torch.equal(result.x, x) and torch.equal(result.x_A, x_A) and torch.equal(result.z, eps - 0.25 * v0)
    assert torch.equal(result.final_loss, final_loss(x)) and torch.equal(result.first_loss, first_loss(x_A))
    (inherited,) = torch.autograd.grad(final_loss(x), v0)
    torch.testing.assert_close(result.inherited_norm, inherited.norm())
    assert bool(result.finite) and result.not_finite() == []
    for value in (result.x, result.x_A, result.z, result.first_loss, result.final_loss, result.inherited_norm):
        assert not value.requires_grad


@every_mode
def test_random_numbers_in_the_losses_are_those_of_one_graph(mode: str) -> None:
    net, eps = Steps(dropout=0.3), steps.noise()

    def noisy(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: loss(x + torch.randn_like(x))

    def run() -> None:
        ops.two_step_backward(net, net, eps, SIGMAS, noisy(first_loss), noisy(final_loss), mode=mode)

    expected = _after_seed(
        lambda: by_hand(net, net, eps, noisy(first_loss), noisy(final_loss))[0].backward(), parameters(net)
    )
    assert_same(_after_seed(run, parameters(net)), expected)


@every_mode
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("around", ["everything", "first"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_equals_one_graph_under_autocast(mode: str, shared: bool, around: str, checkpointed: bool) -> None:
    first = Steps(dropout=0.3, checkpointed=checkpointed)
    second = first if shared else Steps(dropout=0.3, checkpointed=checkpointed)
    eps, leaves = steps.noise(), parameters(first, second)

    def in_bfloat16(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return first(x)

    step = in_bfloat16 if around == "first" else first
    # Without the cache each use of a weight has a cast of its own, as each step has: see the header of the module.
    with torch.autocast("cpu", torch.bfloat16, enabled=around == "everything", cache_enabled=False):
        expected = _after_seed(lambda: by_hand(step, second, eps)[0].backward(), leaves)
    with torch.autocast("cpu", torch.bfloat16, enabled=around == "everything"):
        found = _after_seed(lambda: _unroll(step, second, eps, mode), leaves)
    assert_same(found, expected)


@every_mode
def test_the_second_run_of_first_has_the_first_run_s_autocast(mode: str) -> None:
    """Here `second` leaves autocast switched on behind it."""
    first, second, eps = Steps(), Steps(), steps.noise()

    def switches_on(x: Tensor) -> Tensor:
        torch.set_autocast_enabled("cpu", True)
        return second(x)

    expected = taken_from(lambda: by_hand(first, switches_on, eps)[0].backward(), first, second)
    assert_same(taken_from(lambda: _unroll(first, switches_on, eps, mode, verify=True), first, second), expected)


def taken_from(run: Callable[[], object], *modules: nn.Module) -> list[Tensor | None]:
    try:
        run()
    finally:
        torch.set_autocast_enabled("cpu", False)
        torch.clear_autocast_cache()
    return taken(parameters(*modules))


@every_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_state_between_the_steps_is_not_rounded_to_the_velocity_s_dtype(mode: str, dtype: torch.dtype) -> None:
    first, second, eps = Steps(dtype=dtype), Steps(), steps.noise()
    given: list[Tensor] = []

    def records(z: Tensor) -> Tensor:
        given.append(z.detach().clone())
        return second(z)

    result = _unroll(lambda x: first(x.to(dtype)), records, eps, mode)
    exact = eps - 0.25 * first(eps.to(dtype)).float()
    assert given[0].dtype == torch.float32 and torch.equal(given[0], exact) and torch.equal(result.z, exact)
    assert not torch.equal(exact, exact.to(dtype).float())
    assert result.x.dtype == torch.float32


def test_low_precision_noise_gives_both_steps_its_dtype_and_keeps_a_wide_state() -> None:
    seen: list[torch.dtype] = []
    net = Steps(dtype=torch.bfloat16)

    def step(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return net(x)

    result = _unroll(step, step, steps.noise(torch.bfloat16), "recompute")
    assert set(seen) == {torch.bfloat16}
    assert (result.z.dtype, result.x.dtype, result.x_A.dtype) == (torch.float32,) * 3


@every_mode
@pytest.mark.parametrize("inherit", [0.1, 0.0, 2.5])
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_step_one_gets_its_own_gradient_and_the_weighted_rest(mode: str, inherit: float, clip: float | None) -> None:
    """Against separate calls of autograd.grad in float64."""
    first, second = Steps(dtype=torch.float64), Steps(dtype=torch.float64)
    eps = steps.noise(torch.float64)
    _, v0, x_A, x = by_hand(first, second, eps)
    (inherited,) = torch.autograd.grad(final_loss(x), v0, retain_graph=True)
    kept = 1.0 if clip is None else min(1.0, clip / float(inherited.norm()))
    assert clip is None or kept < 1
    local = torch.autograd.grad(first_loss(x_A), parameters(first), retain_graph=True)
    crossed = torch.autograd.grad(v0, parameters(first), inherited, retain_graph=True)
    own = torch.autograd.grad(final_loss(x), parameters(second))

    result = _unroll(first, second, eps, mode, inherit=inherit, clip=clip)
    torch.testing.assert_close(result.inherited_norm, inherited.norm(), rtol=1e-12, atol=0)
    expected = [a + inherit * kept * b for a, b in zip(local, crossed, strict=True)]
    torch.testing.assert_close(taken(parameters(first)), expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(taken(parameters(second)), list(own), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("inherit", [1.0, 0.1])
@pytest.mark.parametrize("clip", [None, 1e-3, 1e3])
def test_modes_agree_bit_for_bit_on_weight_and_clip(inherit: float, clip: float | None) -> None:
    net, eps = Steps(twice=True), steps.noise()
    found = []
    for mode in MODES:
        norm = _unroll(net, net, eps, mode, inherit=inherit, clip=clip).inherited_norm
        found.append([*taken(parameters(net)), norm])
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


@every_mode
def test_without_a_first_loss_step_one_learns_from_the_image_alone(mode: str) -> None:
    first, second, eps = Steps(), Steps(), steps.noise()
    by_hand(first, second, eps, on_first=None)[0].backward()
    expected = taken(parameters(first, second))
    result = ops.two_step_backward(first, second, eps, SIGMAS, None, final_loss, mode=mode)
    assert_same(taken(parameters(first, second)), expected)
    assert result.first_loss is None and result.x_A.shape == eps.shape


@every_mode
def test_without_a_final_loss_step_two_only_makes_the_sample(mode: str) -> None:
    first, second, eps = Steps(), Steps(), steps.noise()
    _, _, _, x = by_hand(first, second, eps)
    by_hand(first, second, eps, on_final=None)[0].backward()
    expected = taken(parameters(first, second))
    first.calls = 0
    result = ops.two_step_backward(first, second, eps, SIGMAS, first_loss, None, mode=mode)
    assert_same(taken(parameters(first, second)), expected)
    assert result.final_loss is None and result.inherited_norm is None and torch.equal(result.x, x)
    assert bool(result.finite) and first.calls == 1


@every_mode
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_reentrant_checkpoints(mode: str, shared: bool) -> None:
    """They refuse autograd.grad, and accumulate by themselves in every mode."""

    class Reentrant(Steps):
        def __init__(self) -> None:
            super().__init__(dropout=0.3)
            self.embed = nn.Linear(steps.WIDTH, steps.WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=True)
            return x

    first = Reentrant()
    second = first if shared else Reentrant()
    eps, leaves = steps.noise(), parameters(first, second)
    expected = _after_seed(lambda: by_hand(first, second, eps)[0].backward(), leaves)
    assert_same(_after_seed(lambda: _unroll(first, second, eps, mode), leaves), expected)


def _adapted(names: tuple[str, ...], **settings: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=r"blocks\.\d\.[14]", lora_dropout=0.2, init_lora_weights=False
    )
    whole = Steps(**settings)
    model = peft.get_peft_model(whole, config, adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        model.add_adapter(name, config)
    return model


@every_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_one_adapter_for_both_steps(mode: str, dtype: torch.dtype, checkpointed: bool) -> None:
    model = _adapted(("both",), checkpointed=checkpointed).to(dtype)
    eps = steps.noise().to(dtype)
    leaves = parameters(model)
    expected = _after_seed(lambda: by_hand(model, model, eps)[0].backward(), leaves, 2)
    assert_same(_after_seed(lambda: _unroll(model, model, eps, mode), leaves, 2), expected)


@every_mode
@pytest.mark.parametrize("visible", [True, False])
def test_one_base_with_an_adapter_for_each_step_and_one_for_the_loss(mode: str, visible: bool) -> None:
    """set_adapter switches requires_grad of the others off, also of those whose gradient is still to come."""
    model, eps = _adapted(("first", "second", "critic")), steps.noise()

    def with_adapter(name: str, exclusive: bool = True) -> Callable[[Tensor], Tensor]:
        def step(x: Tensor) -> Tensor:
            if exclusive:
                model.set_adapter(name)
            else:  # the same choice of weights, and everything goes on requiring gradients
                model.base_model.set_adapter(name)
                for key, parameter in model.named_parameters():
                    parameter.requires_grad_("lora" in key)
            return model(x)

        return step if visible else (lambda x: step(x))

    def critic(x: Tensor) -> Tensor:
        with torch.no_grad():
            model.set_adapter("critic")
            target = model(x.detach())
        return (x - target).square().mean()

    leaves = [p for key, p in model.named_parameters() if "lora" in key]
    always = [with_adapter(name, exclusive=False) for name in ("first", "second")]

    def loss_by_hand(x: Tensor) -> Tensor:
        loss = critic(x)
        for leaf in leaves:
            leaf.requires_grad_(True)
        return loss

    expected = _after_seed(lambda: by_hand(always[0], always[1], eps, loss_by_hand, loss_by_hand)[0].backward(), leaves)
    pair = with_adapter("first"), with_adapter("second")
    found = _after_seed(lambda: ops.two_step_backward(*pair, eps, SIGMAS, critic, critic, mode=mode), leaves)
    trained = [key for key, p in model.named_parameters() if p.requires_grad]
    assert trained and all("critic" in key for key in trained)  # as the last set_adapter left it
    assert sum(g is not None for g in expected[:-1]) == 2 * len(leaves) // 3
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("backend", "shared"),
    [
        ("aot_eager", False),
        ("aot_eager", True),
        pytest.param("inductor", True, marks=pytest.mark.slow),  # a C++ compiler takes most of its time
    ],
)
def test_compiled_steps(backend: str, shared: bool) -> None:
    torch._dynamo.reset()
    first = Steps()
    second = first if shared else Steps()
    eps, leaves = steps.noise(), parameters(first, second)
    compiled = [torch.compile(step, backend=backend, fullgraph=True) for step in (first, second)]
    by_hand(compiled[0], compiled[-1], eps)[0].backward()
    expected = taken(leaves)
    for mode in MODES:
        for first_pass in ("grad", "no_grad") if backend == "aot_eager" else ("grad",):
            _unroll(compiled[0], compiled[-1], eps, mode, first_pass=first_pass, verify=True)
            assert_same(taken(leaves), expected)


def test_a_compiled_function_may_hold_the_call() -> None:
    torch._dynamo.reset()
    first, second, eps = Steps(), Steps(), steps.noise()
    _unroll(first, second, eps, "recompute", clip=1e-3)
    expected = taken(parameters(first, second))
    update = torch.compile(
        lambda noise: _unroll(first, second, noise * 1, "recompute", clip=1e-3).x * 2, backend="eager"
    )
    update(eps)
    assert_same(taken(parameters(first, second)), expected)
