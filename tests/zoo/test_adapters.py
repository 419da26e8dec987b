"""One frozen base, several adapters: roles do not touch each other, whatever order their work is done in."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from twostep.zoo import AdapterBase, AdapterView, Discriminator, FakeScore, Teacher, TwoStepStudent
from twostep.zoo.adapters import TARGETS

from .models import Batch, Case, batch_of, call_stock, flux2, fused_backbone, relative_error, stock_model, z_image

CASES = {
    "z-image": Case("z-image", z_image(), lengths=(5, 40)),
    "flux2": Case("flux2", flux2(), size=(4, 3), lengths=(5, 11)),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def perturb(view: AdapterView, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in view.parameters():
        parameter.data.normal_(std=0.2, generator=generator)


def velocity(view: AdapterView, batch: Batch) -> Tensor:
    return view.velocity(batch.x, batch.sigma, batch.context)


def test_an_adapter_is_what_peft_makes_of_it_alone(case: Case) -> None:
    """The oracle: the same weights in a model that has this adapter only, switched on by PEFT's own means."""
    batch = batch_of(case)
    roles = AdapterBase(fused_backbone(case))
    views = [roles.add(name, rank=4) for name in ("step_1", "step_2")]
    for seed, view in enumerate(views):
        perturb(view, seed)
    plain = velocity(roles.base, batch)
    for view in views:
        alone = fused_backbone(case)
        from peft import LoraConfig

        from twostep.zoo.adapters import TARGETS

        alone.model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[case.family]), "default")
        own = {n.replace(".default.", "."): p for n, p in alone.model.named_parameters() if ".lora_" in n}
        assert own.keys() == view.state_dict().keys()
        for name, value in view.state_dict().items():
            own[name].data.copy_(value)
        found = velocity(view, batch)
        assert relative_error(found, alone.velocity(batch.x, batch.sigma, batch.context)) <= 1e-6
        assert relative_error(found, plain) > 1e-3
    with torch.no_grad():
        assert torch.equal(velocity(roles.base, batch), plain)
        assert torch.equal(plain, fused_backbone(case).velocity(batch.x, batch.sigma, batch.context))


def test_no_gradient_leaks_between_roles(case: Case) -> None:
    batch = batch_of(case)
    roles = AdapterBase(fused_backbone(case))
    student = TwoStepStudent.from_teacher(roles, kind="adapters", rank=4)
    fake = FakeScore.from_teacher(roles, rank=4)
    views = {"step_1": student.first, "step_2": student.second, "fake_score": fake.network}
    for seed, view in enumerate(views.values()):
        perturb(view, seed)
    for active, view in views.items():
        roles.backbone.zero_grad()
        velocity(view, batch).square().sum().backward()
        for name, other in views.items():
            assert all((p.grad is not None) == (name == active) for p in other.parameters()), (active, name)
        assert all(p.grad is None for p in roles.base.parameters())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_graphs_of_several_roles_may_be_open_at_once(case: Case, checkpointed: bool) -> None:
    """Both steps run forward before either goes backward, with the base in between: the recomputation of a block uses
    the adapter of its own forward. The oracle is each role on a model of its own."""
    batch = batch_of(case)
    roles = AdapterBase(fused_backbone(case))
    views = [roles.add(name, rank=4) for name in ("step_1", "step_2")]
    for seed, view in enumerate(views):
        perturb(view, seed)
    expected = []
    for view in views:
        roles.backbone.zero_grad()
        velocity(view, batch).sin().sum().backward()
        expected.append([p.grad.clone() for p in view.parameters()])
    roles.backbone.zero_grad()
    roles.backbone.enable_gradient_checkpointing(checkpointed)
    outs = [velocity(view, batch).sin().sum() for view in views]
    velocity(roles.base, batch)
    for out in outs:
        out.backward()
    for view, gradients in zip(views, expected, strict=True):
        for parameter, gradient in zip(view.parameters(), gradients, strict=True):
            assert torch.equal(parameter.grad, gradient)


def test_an_error_in_a_role_switches_its_adapter_off(case: Case) -> None:
    batch = batch_of(case)
    roles = AdapterBase(fused_backbone(case))
    view = roles.add("step_1", rank=4)
    perturb(view, 0)
    plain = velocity(roles.base, batch)
    with pytest.raises(ValueError, match="sigma has shape"):
        view.velocity(batch.x, torch.rand(7), batch.context)
    assert torch.equal(velocity(roles.base, batch), plain)


def test_the_backbone_itself_runs_without_an_adapter_after_a_role_has_run(case: Case) -> None:
    batch = batch_of(case)
    roles = AdapterBase(fused_backbone(case))
    view = roles.add("step_1", rank=4)
    perturb(view, 0)
    with torch.no_grad():
        plain = velocity(roles.base, batch)
        velocity(view, batch)
        assert torch.equal(roles.backbone.velocity(batch.x, batch.sigma, batch.context), plain)
        with roles._switch.on("step_1"):  # a role within a role
            velocity(roles.base, batch)
            assert not torch.equal(roles.backbone.velocity(batch.x, batch.sigma, batch.context), plain)


def test_switching_touches_no_layer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(case)
    roles = AdapterBase(fused_backbone(case))
    view = roles.add("step_1", rank=4)

    def forbidden(*_: object) -> None:
        raise AssertionError("PEFT walked over the layers")

    monkeypatch.setattr(BaseTunerLayer, "set_adapter", forbidden)
    monkeypatch.setattr(BaseTunerLayer, "enable_adapters", forbidden)
    velocity(view, batch)
    velocity(roles.base, batch)


def test_a_role_has_its_own_parameters_state_and_switches(case: Case) -> None:
    roles = AdapterBase(fused_backbone(case))
    first, second = roles.add("step_1", rank=4), roles.add("step_2", rank=2, dtype=torch.bfloat16)
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    assert {p.dtype for p in second.parameters()} == {torch.bfloat16}
    assert {id(p) for p in first.parameters()}.isdisjoint(id(p) for p in second.parameters())
    assert all(p.requires_grad for p in first.parameters()) and not any(
        p.requires_grad for p in roles.base.parameters()
    )
    first.requires_grad_(False)
    assert not any(p.requires_grad for p in first.parameters()) and all(p.requires_grad for p in second.parameters())
    roles.add("fake_score", rank=2)
    assert not any(p.requires_grad for p in first.parameters())  # a new adapter changes nobody's switch
    perturb(first, 1)
    other = AdapterBase(fused_backbone(case)).add("another_name", rank=4)
    other.load_state_dict(first.state_dict())
    batch = batch_of(case)
    assert torch.equal(velocity(other, batch), velocity(first, batch))
    state = first.state_dict()
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match="1 tensors are missing"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="another rank or another model"):
        roles.adapters["fake_score"].load_state_dict(first.state_dict())


def test_initial_adapters_come_from_the_generator(case: Case) -> None:
    def state(seed: int) -> list[Tensor]:
        roles = AdapterBase(fused_backbone(case))
        return list(roles.add("a", rank=4, generator=torch.Generator().manual_seed(seed)).state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(state(0), state(0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(state(0), state(1), strict=True))


def test_teacher_and_discriminator_live_on_the_base(case: Case) -> None:
    batch = batch_of(case)
    alone = fused_backbone(case)
    roles = AdapterBase(copy.deepcopy(alone))
    perturb(roles.add("step_1", rank=4), 0)
    teacher, discriminator = Teacher(roles.base), Discriminator(roles.base)
    assert torch.equal(teacher.sample(batch.x, batch.context), Teacher(alone).sample(batch.x, batch.context))
    x = batch.x.clone().requires_grad_(True)
    discriminator(x, batch.sigma, batch.context).sum().backward()
    assert bool((x.grad != 0).any())
    assert all(p.grad is None for p in roles.backbone.parameters())
    assert all(p.requires_grad for p in roles.adapters["step_1"].parameters())  # freezing the base froze no role


def test_wrong_adapters_are_explained(case: Case) -> None:
    roles = AdapterBase(fused_backbone(case))
    roles.add("step_1", rank=4)
    with pytest.raises(ValueError, match=r"name is 'step_1', expected .* that is not one of \['step_1'\]"):
        roles.add("step_1")
    with pytest.raises(ValueError, match=r"name is 'a\.b'"):
        roles.add("a.b")
    with pytest.raises(ValueError, match="rank is 0"):
        roles.add("b", rank=0)
    with pytest.raises(ValueError, match=r"rank is 2\.5"):
        roles.add("b", rank=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha is nan"):
        roles.add("b", alpha=math.nan)
    for again in (roles.backbone, roles.base):
        with pytest.raises(ValueError, match="belongs to an AdapterBase already"):
            AdapterBase(again)
    with pytest.raises(TypeError, match=r"given Teacher, expected a Backbone: pass its \.backbone"):
        AdapterBase(Teacher(roles.base))  # type: ignore[arg-type]
    other = fused_backbone(case)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=TARGETS[other.family]), other.model, "theirs")
    with pytest.raises(ValueError, match="has LoRA layers already"):
        AdapterBase(other)


def test_checkpoints_around_blocks_that_would_recompute_without_the_adapter_are_refused(case: Case) -> None:
    roles, batch = AdapterBase(fused_backbone(case)), batch_of(case)
    view = roles.add("a", rank=2)
    blocks = next(m for m in roles.backbone.model.children() if isinstance(m, nn.ModuleList) and m[0] in view.blocks())
    blocks[0] = checkpoint_wrapper(blocks[0])
    with pytest.raises(ValueError, match=r"call enable_gradient_checkpointing\(\) of the role"):
        view.velocity(batch.x, batch.sigma, batch.context)
    roles.base.velocity(batch.x, batch.sigma, batch.context)  # recomputed with every adapter off, as it ran
    with torch.no_grad():
        view.velocity(batch.x, batch.sigma, batch.context)


def test_two_threads_on_one_base_are_an_error_and_not_wrong_numbers(case: Case) -> None:
    roles, batch = AdapterBase(fused_backbone(case)), batch_of(case)
    view, inside, go_on = roles.add("a", rank=2), threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        assert go_on.wait(60)

    handle = view.blocks()[0].register_forward_pre_hook(wait)
    other = threading.Thread(target=view.velocity, args=(batch.x, batch.sigma, batch.context))
    other.start()
    assert inside.wait(60)
    try:
        with pytest.raises(RuntimeError, match="two threads use roles of one base at once"):
            roles.base.velocity(batch.x, batch.sigma, batch.context)
    finally:
        handle.remove()
        go_on.set()
        other.join()
    view.velocity(batch.x, batch.sigma, batch.context)  # one after the other


def test_a_compiled_role_runs_with_checkpointed_blocks(case: Case) -> None:
    """Its blocks are recomputed outside of what is compiled."""
    roles, batch = AdapterBase(fused_backbone(case)), batch_of(case)
    view = roles.add("a", rank=2)
    perturb(view, 1)
    view.enable_gradient_checkpointing()
    expected = view(batch.x, batch.sigma, batch.context)
    torch.compiler.reset()
    found = torch.compile(view, backend="eager")(batch.x, batch.sigma, batch.context)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in view.parameters())


def test_an_adapters_parameters_are_found_by_their_names(case: Case) -> None:
    roles, batch = AdapterBase(fused_backbone(case)), batch_of(case)
    view = roles.add("a", rank=2)
    perturb(view, 1)
    named = dict(view.named_parameters())
    assert all(view.get_parameter(name) is parameter for name, parameter in named.items())
    arguments = batch.x, batch.sigma, batch.context
    nothing = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    base = torch.func.functional_call(view, nothing, arguments)
    assert torch.equal(base, roles.base(*arguments)) and not torch.equal(base, view(*arguments))


def test_a_role_that_holds_an_adapter_has_its_parameters(case: Case) -> None:
    """parameters(), state_dict() and the like of a student on adapters are those of a student on networks."""
    batch = batch_of(case)
    student = TwoStepStudent.from_teacher(AdapterBase(fused_backbone(case)), kind="adapters", rank=4)
    for seed, view in enumerate((student.first, student.second)):
        perturb(view, seed)
    assert {id(p) for p in student.parameters()} == {id(p) for p in student.trainable_parameters()}
    state = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    assert len(state) == len(list(student.parameters())) > 0
    assert {n.removeprefix("networks.0.") for n in state if n.startswith("networks.0.")} == set(
        student.first.state_dict()
    )
    other = TwoStepStudent.from_teacher(AdapterBase(fused_backbone(case)), kind="adapters", rank=4)
    other.load_state_dict(state)
    assert torch.equal(other.sample(batch.x, batch.context), student.sample(batch.x, batch.context))
    name = next(iter(state))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({n: t for n, t in state.items() if n != name})
    with pytest.raises(RuntimeError, match="another rank or another model"):
        other.load_state_dict({**state, name: state[name][:1]})
    student.requires_grad_(False)
    assert not list(student.trainable_parameters())


def test_eval_switches_the_dropout_of_its_own_adapter_off(case: Case) -> None:
    batch = batch_of(case)
    roles = AdapterBase(fused_backbone(case))
    views = [roles.add(name, rank=4, dropout=0.5) for name in ("step_1", "step_2")]
    for seed, view in enumerate(views):
        perturb(view, seed)

    def repeats(view: AdapterView) -> bool:
        with torch.no_grad():
            return torch.equal(velocity(view, batch), velocity(view, batch))

    student = TwoStepStudent(*views)
    assert not repeats(views[0])
    views[0].eval()
    assert repeats(views[0]) and not repeats(views[1])
    student.eval()
    assert repeats(views[1])
    student.train()
    assert not repeats(views[0]) and not repeats(views[1])


def test_a_copy_is_switched_by_itself(case: Case) -> None:
    batch = batch_of(case)
    roles = AdapterBase(fused_backbone(case))
    perturb(roles.add("step_1", rank=4), 0)
    copied = copy.deepcopy(roles)
    for parameter in copied.adapters["step_1"].parameters():
        parameter.data.zero_()
    with torch.no_grad():
        plain = velocity(roles.base, batch)
        assert torch.equal(velocity(copied.adapters["step_1"], batch), plain)
        with roles._switch.on("step_1"):
            assert torch.equal(copied.backbone.velocity(batch.x, batch.sigma, batch.context), plain)
        again = pickle.loads(pickle.dumps(roles.adapters["step_1"]))
        assert torch.equal(velocity(again, batch), velocity(roles.adapters["step_1"], batch))


def test_an_adapter_saved_by_diffusers_loads_into_a_stock_model(case: Case, tmp_path: Path) -> None:
    batch = batch_of(case)
    roles = AdapterBase(fused_backbone(case))
    for seed, name in enumerate(("step_1", "step_2")):
        perturb(roles.add(name, rank=2 + seed), seed)
    roles.backbone.model.save_lora_adapter(tmp_path, adapter_name="step_2")
    stock = stock_model(case)
    stock.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        assert relative_error(velocity(roles.adapters["step_2"], batch), call_stock(stock, case, batch)) <= 1e-5
