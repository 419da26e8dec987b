"""Each method against the composition of its losses written out by hand, on tiny models of the real classes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo.models import relative_error
from twostep import losses
from twostep.train.methods import (
    DOPSD,
    DPDMD,
    DecoupledDMD,
    DecoupledDMDConfig,
    DOPSDConfig,
    DPDMDConfig,
    FlowMatching,
    FlowMatchingConfig,
    TurboPP,
    TurboPPConfig,
)
from twostep.zoo import Context, Student
from twostep.zoo.encoders import klein_reference_context

from .method_roles import CASES, KINDS, Roles, Streams, roles_of, student_of, training_batch


@pytest.fixture(params=CASES.keys())
def case(request: pytest.FixtureRequest) -> Any:
    return CASES[request.param]


def average_of(student: Student) -> Student:
    """A copy of a student that stands for its average; adapters are copied with their base."""
    return copy.deepcopy(student)


def method_of(name: str, roles: Roles) -> Any:
    if name == "turbo_pp":
        return TurboPP(roles.student, roles.guidance, TurboPPConfig())
    if name == "dp_dmd":
        return DPDMD(roles.student, roles.guidance, DPDMDConfig())
    if name == "decoupled_dmd":
        return DecoupledDMD(student_of(roles, 4), roles.guidance, DecoupledDMDConfig(), Streams(5))
    if name == "d_opsd":
        return DOPSD(roles.student, average_of(roles.student), DOPSDConfig())
    return FlowMatching(roles.student.first, FlowMatchingConfig(), roles.guidance.teacher.negative)


def gradients(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None and bool((p.grad != 0).any())}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["turbo_pp", "dp_dmd", "decoupled_dmd", "d_opsd", "flow_matching"])
def test_an_update_moves_what_it_trains_and_nothing_else(case: Any, kind: str, name: str) -> None:
    roles = roles_of(case, kind)
    method, batch, everything = method_of(name, roles), training_batch(case), roles.everything()
    groups = method.parameters()
    assert set(groups) == set(method.updates(0))
    trained = {group: {id(p) for p in parameters} for group, parameters in groups.items()}
    if len(trained) == 2:
        assert trained["generator"].isdisjoint(trained["guidance"])
    for update in groups:
        for parameter in everything.values():
            parameter.grad = None
        metrics = method.run(update, batch, Streams())
        moved = {n: p for n, p in everything.items() if p.grad is not None}
        assert moved and all(id(p) in trained[update] for p in moved.values()), sorted(moved)[:3]
        assert gradients(everything)
        assert all(bool(torch.as_tensor(value).isfinite().all()) for value in metrics.values())
        assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("name", ["turbo_pp", "dp_dmd", "decoupled_dmd", "d_opsd", "flow_matching"])
def test_scale_scales_gradients_and_not_numbers(name: str) -> None:
    case, results = CASES["z-image"], []
    for scale in (1.0, 0.25):
        roles = roles_of(case, "decoupled")
        method, batch = method_of(name, roles), training_batch(case)
        numbers = [method.run(update, batch, Streams(), scale) for update in method.parameters()]
        results.append((numbers, gradients(roles.everything())))
    (numbers, full), (same, quarter) = results
    assert full.keys() == quarter.keys()
    for key, value in full.items():
        assert relative_error(quarter[key], value / 4) <= 1e-5, key
    for a, b in zip(numbers, same, strict=True):
        assert all(torch.allclose(a[key], b[key]) for key in a)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inherit", [1.0, 0.1])
@pytest.mark.parametrize("step_one", [True, False])
def test_turbo_pp_is_its_terms_written_out(kind: str, inherit: float, step_one: bool) -> None:
    """One graph through both steps, the inherited part scaled by a hook, the terms by the losses' own names."""
    case = CASES["z-image"]
    roles, batch = roles_of(case, kind, dmd=0.3, generator_gan=0.7), training_batch(case)
    config = TurboPPConfig(inherit=inherit, step_one_loss=step_one)
    TurboPP(roles.student, roles.guidance, config).run("generator", batch, Streams())
    found = gradients(roles.everything())
    for parameter in roles.everything().values():
        parameter.grad = None

    streams, student, context, guide = Streams(), roles.student, batch.context, roles.guidance

    def terms(x: Tensor, below: float) -> Tensor:
        sigma = losses.sigmas_below(2, min(below, 0.98), low=0.02, generator=streams["matching"]).view(-1, 1, 1, 1)
        seen = (1 - sigma) * x.detach() + sigma * torch.randn(x.shape, generator=streams["matching"])
        with torch.no_grad():
            level = sigma.flatten()
            cond = guide.teacher.backbone.clean(seen, level, context)
            uncond = guide.teacher.backbone.clean(seen, level, guide.teacher.negative.repeat(2))
            # Turbo++'s form: alpha (real cond - real uncond) + (real cond - fake cond), alpha = w - 1
            direction = 3.0 * (cond - uncond) + (cond - guide.fake.clean(seen, level, context))
            size = (x - (uncond + 4.0 * (cond - uncond))).abs().mean((1, 2, 3), keepdim=True)
        level = losses.uniform_sigmas(2, 0.02, 0.98, generator=streams["discriminator"])
        sigma = level.view(-1, 1, 1, 1)
        noisy = (1 - sigma) * x + sigma * torch.randn(x.shape, generator=streams["discriminator"])
        logits = guide.discriminator(noisy, level, context)
        return 0.3 * (-(direction / size) * x).mean() + 0.7 * nn.functional.softplus(-logits).mean()

    noise = torch.randn(batch.shape, generator=streams["student"])
    v0 = student.velocity(0, noise, context)
    z = noise - 0.25 * v0
    z.register_hook(lambda g: inherit * g)
    x = z - 0.75 * student.velocity(1, z, context)
    loss = terms(x, 0.75)
    if step_one:
        loss = loss + terms(noise - v0, 1.0)
    loss.backward()
    true = {n: g for n, g in gradients(roles.everything()).items() if not n.startswith("discriminator.")}
    assert found.keys() == true.keys()
    for key, value in true.items():
        assert relative_error(found[key], value) <= 2e-4, key  # float32, through differences of predictions


@pytest.mark.parametrize("kind", ["softplus", "hinge", "bce", "relativistic"])
def test_every_adversarial_loss_trains_both_sides(kind: str) -> None:
    roles = roles_of(CASES["z-image"], "decoupled", dmd=0.0)
    roles.guidance.kind = kind
    method, batch = TurboPP(roles.student, roles.guidance, TurboPPConfig()), training_batch(CASES["z-image"])
    method.run("generator", batch, Streams())
    assert {name.split(".")[0] for name in gradients(roles.everything())} == {"student"}
    method.run("guidance", batch, Streams())
    assert {name.split(".")[0] for name in gradients(roles.everything())} == {"student", "fake", "discriminator"}


def test_turbo_pp_ablations_cut_what_they_say() -> None:
    case = CASES["z-image"]

    def first_step(**changes: Any) -> dict[str, Tensor]:
        roles = roles_of(case, "decoupled")
        method = TurboPP(roles.student, roles.guidance, TurboPPConfig(**changes))
        method.run("generator", training_batch(case), Streams())
        return {n: g for n, g in gradients(roles.everything()).items() if n.startswith("student.0.")}

    local, inherited, both = (
        first_step(end_to_end=False),
        first_step(step_one_loss=False, inherit=1.0),
        first_step(inherit=1.0),
    )
    assert local and inherited
    for key, value in both.items():
        assert relative_error(value, local[key] + inherited[key]) <= 1e-4, key


def test_turbo_pps_mixed_recipe_adds_dp_dmds_term_to_step_one() -> None:
    case, batch = CASES["z-image"], training_batch(CASES["z-image"])
    found = []
    for diversity in (0.0, 0.5):
        roles = roles_of(case, "decoupled", dmd=0.0, generator_gan=0.0)
        TurboPP(roles.student, roles.guidance, TurboPPConfig(diversity=diversity)).run("generator", batch, Streams())
        found.append(gradients(roles.everything()))
    roles = roles_of(case, "decoupled")
    v0 = roles.student.velocity(0, batch.anchor_noise, batch.context)
    target = (batch.anchor_noise - batch.anchor) / 0.25
    (0.5 * (v0 - target).square().mean()).backward()
    true = gradients(roles.everything())
    assert not found[0] and found[1].keys() == true.keys()
    for key, value in true.items():
        assert relative_error(found[1][key], value) <= 1e-4, key


@pytest.mark.parametrize("brings_anchor", [True, False])
def test_dp_dmd_teaches_step_one_the_teachers_path_and_cuts_it_off(brings_anchor: bool) -> None:
    """Step 1's gradient is that of the average velocity from the same noise to the first boundary, and nothing else."""
    case = CASES["z-image"]
    roles, batch = roles_of(case, "decoupled"), training_batch(case)
    if not brings_anchor:
        batch = replace(batch, anchor=None, anchor_noise=None)
    config = DPDMDConfig(diversity=0.5, teacher_steps=8, anchor_guidance=2.0)
    DPDMD(roles.student, roles.guidance, config).run("generator", batch, Streams())
    found = {n: g for n, g in gradients(roles.everything()).items() if n.startswith("student.0.")}
    for parameter in roles.everything().values():
        parameter.grad = None
    noise, anchor = batch.anchor_noise, batch.anchor
    if not brings_anchor:
        noise = torch.randn(batch.shape, generator=Streams()["student"])
        states: list[Tensor] = []
        roles.guidance.teacher.sample(
            noise, batch.context, steps=8, guidance=2.0, on_step=lambda _, x: states.append(x)
        )
        anchor = states[3]  # 1, .9545, .9, .8333, and then .75: the student's boundary is on the teacher's grid
    v0 = roles.student.velocity(0, noise, batch.context)
    (0.5 * (v0 - (noise - anchor) / 0.25).square().mean()).backward()
    true = gradients(roles.everything())
    assert found.keys() == true.keys()
    for key, value in true.items():
        assert relative_error(found[key], value) <= 1e-4, key


@pytest.mark.parametrize("diversity", [0.0, 0.5])
def test_without_its_cut_dp_dmd_is_plain_dmd_and_its_term(diversity: float) -> None:
    """Through both steps, by autograd on the whole of them."""
    case = CASES["z-image"]
    roles, batch = roles_of(case, "decoupled"), training_batch(case)
    DPDMD(roles.student, roles.guidance, DPDMDConfig(diversity=diversity, cut=False)).run("generator", batch, Streams())
    found = gradients(roles.everything())
    for parameter in roles.everything().values():
        parameter.grad = None
    noise, anchor, context = batch.anchor_noise, batch.anchor, batch.context
    v0 = roles.student.velocity(0, noise, context)
    x = roles.student.step(1, noise - 0.25 * v0, context)
    matching, _ = roles.guidance.matching(x, 0.75, context, Streams())
    (matching + diversity * (v0 - (noise - anchor) / 0.25).square().mean()).backward()
    true = gradients(roles.everything())
    assert found.keys() == true.keys() and any(name.startswith("student.0.") for name in true)
    for key, value in true.items():
        assert relative_error(found[key], value) <= 1e-4, key


def test_plain_dmd_asks_no_teacher_for_anchors() -> None:
    case = CASES["z-image"]
    roles, batch = roles_of(case, "decoupled"), training_batch(case)
    levels: list[Tensor | float] = []
    velocity = roles.guidance.teacher.velocity

    def counted(x: Tensor, sigma: Tensor | float, *rest: Any, **settings: Any) -> Tensor:
        levels.append(sigma)
        return velocity(x, sigma, *rest, **settings)

    roles.guidance.teacher.velocity = counted  # type: ignore[method-assign]
    alone = replace(batch, anchor=None, anchor_noise=None)
    plain = DPDMD(roles.student, roles.guidance, DPDMDConfig(diversity=0, cut=False))
    assert "diversity_loss" not in plain.run("generator", alone, Streams()) and len(levels) == 1
    DPDMD(roles.student, roles.guidance, DPDMDConfig()).run("generator", alone, Streams())
    assert len(levels) > 2


@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize(("family", "form"), [("z-image", "velocity"), ("z-image", "clean"), ("flux2", "velocity")])
def test_d_opsd_step_by_step_is_the_summed_loss(family: str, form: str, kept: int) -> None:
    """At prompts to keep the teacher sees what the student sees; a row counts as much as another. FLUX.2's teacher sees
    latents beside the captions, and at prompts to keep none."""
    case = CASES[family]
    roles, batch = roles_of(case, "decoupled"), training_batch(case)
    if family == "flux2":
        assert batch.latents is not None
        batch = replace(batch, target_context=klein_reference_context(batch.context, batch.latents))
    prompts = batch.context
    if kept:
        batch = replace(batch, kept=training_batch(case, 8).context.repeat(3)[range(kept)])
        assert batch.kept is not None
        prompts = Context.cat([batch.context, batch.kept])
    student = student_of(roles, 4)
    teacher = average_of(student)
    method = DOPSD(student, teacher, DOPSDConfig(form=form))
    metrics = method.run("generator", batch, Streams())
    found = gradients(dict(student.named_parameters()))
    student.zero_grad()
    count, shape = batch.context.batch, batch.shape[1:]
    x = torch.randn((count + kept, *shape), generator=Streams()["student"])
    total, of_images, of_kept = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for step, (a, b) in enumerate(zip(student.sigmas, student.sigmas[1:], strict=False)):
        v = student.velocity(step, x, prompts)
        with torch.no_grad():
            seen = [(x[:count], batch.target_context), (x[count:], batch.kept)]
            target = torch.cat([teacher.velocity(step, rows, context) for rows, context in seen if len(rows)])
        apart = (a**2 if form == "clean" else 1.0) * (v - target).square().mean((1, 2, 3)) / 4
        total, of_kept = total + apart.mean(), of_kept + apart[count:].detach().mean()
        of_images = of_images + apart[:count].detach().mean()
        x = (x + (b - a) * v).detach()
    total.backward()
    assert torch.allclose(metrics["final_loss"], of_images, rtol=1e-4)
    assert torch.allclose(metrics["kept_loss"], of_kept, rtol=1e-3) if kept else "kept_loss" not in metrics
    true = gradients(dict(student.named_parameters()))
    assert found.keys() == true.keys()
    for key, value in true.items():
        assert relative_error(found[key], value) <= 1e-4, key


def test_d_opsd_off_policy_stands_at_noised_images() -> None:
    """The oracle: the loss written out at (1 - sigma) x + sigma noise, with the noise that the stream draws first."""
    case = CASES["z-image"]
    roles, batch = roles_of(case, "decoupled"), training_batch(case)
    teacher = average_of(roles.student)
    method = DOPSD(roles.student, teacher, DOPSDConfig(on_policy=False))
    found = method.run("generator", batch, Streams(3))
    assert batch.latents is not None and batch.target_context is not None
    noise = torch.randn(batch.shape, generator=Streams(3)["student"])
    for step, sigma in enumerate(roles.student.sigmas[:-1]):
        x = (1 - sigma) * batch.latents + sigma * noise
        with torch.no_grad():
            apart = roles.student.velocity(step, x, batch.context) - teacher.velocity(step, x, batch.target_context)
        assert torch.allclose(found[f"step_{step + 1}_loss"], apart.square().mean(), rtol=1e-4)
    assert DOPSD.wants(DOPSDConfig(on_policy=False)) == {"target_context", "latents"}
    with pytest.raises(ValueError, match="the batch has no latents; on_policy=false noises the target images"):
        method.run("generator", replace(batch, latents=None), Streams())
    with pytest.raises(ValueError, match="the batch has prompts to keep, and on_policy=false wants an image for each"):
        method.run("generator", replace(batch, kept=batch.context), Streams())


def test_d_opsds_teacher_is_the_students_average() -> None:
    roles = roles_of(CASES["z-image"], "decoupled")
    teacher = average_of(roles.student)
    method = DOPSD(roles.student, teacher, DOPSDConfig(ema=0.9))
    before = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for parameter in roles.student.parameters():
            parameter.add_(1.0)
    method.follow()
    for average, old in zip(teacher.parameters(), before, strict=True):
        assert torch.allclose(average, old + 0.1, atol=1e-6)
        assert not average.requires_grad


def test_decoupled_dmd_trains_the_same_step_on_every_rank() -> None:
    roles = roles_of(CASES["z-image"], "decoupled")
    batch, steps = training_batch(CASES["z-image"]), []
    for rank in range(2):
        method = DecoupledDMD(student_of(roles, 4), roles.guidance, DecoupledDMDConfig(), Streams(5))
        streams = Streams(100 + rank)
        steps.append([int(method.run("generator", batch, streams)["trained_step"]) for _ in range(6)])
    assert steps[0] == steps[1] and len(set(steps[0])) > 1


def test_decoupled_dmd_without_guidance_is_distribution_matching_alone() -> None:
    """At w = 1 the augmentation vanishes; what is left follows real - fake at the second level."""
    case = CASES["z-image"]
    roles, batch = roles_of(case, "decoupled"), training_batch(case)
    roles.guidance.guidance = 1.0
    student = student_of(roles, 4)
    DecoupledDMD(student, roles.guidance, DecoupledDMDConfig(normalizer="none"), Streams(5)).run(
        "generator", batch, Streams()
    )
    found = gradients(dict(student.named_parameters()))
    student.zero_grad()
    streams, context = Streams(), batch.context
    step = int(torch.randint(4, (), generator=Streams(5)["trained_step"]))
    x = torch.randn(batch.shape, generator=streams["student"])
    with torch.no_grad():
        for earlier in range(step):
            x = student.step(earlier, x, context)
    x = x - student.sigmas[step] * student.velocity(step, x, context)
    generator = streams["matching"]
    losses.sigmas_below(2, min(student.sigmas[step], 0.98), low=0.02, generator=generator)
    level = losses.uniform_sigmas(2, 0.02, 0.98, generator=generator)
    torch.randn(batch.shape, generator=generator)
    sigma = level.view(-1, 1, 1, 1)
    with torch.no_grad():
        seen = (1 - sigma) * x + sigma * torch.randn(batch.shape, generator=generator)
        real = roles.guidance.teacher.backbone.clean(seen, level, context)
        direction = real - roles.guidance.fake.clean(seen, level, context)
    (-(direction) * x).mean().backward()
    for key, value in gradients(dict(student.named_parameters())).items():
        assert relative_error(found[key], value) <= 2e-4, key


def test_flow_matching_learns_and_drops_captions() -> None:
    case = CASES["z-image"]
    roles, batch = roles_of(case, "decoupled"), training_batch(case)
    network = roles.student.first
    empty = roles.guidance.teacher.negative
    method = FlowMatching(network, FlowMatchingConfig(caption_dropout=0.1), empty)
    optimizer = torch.optim.AdamW(method.parameters()["generator"], lr=1e-2)
    streams, history = Streams(), []
    for _ in range(100):
        optimizer.zero_grad()
        history.append(float(method.run("generator", batch, streams)["final_loss"]))
        optimizer.step()
    assert sum(history[-20:]) < 0.7 * sum(history[:20])

    seen: list[Tensor] = []
    hook = network.model.cap_embedder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for share, expected in ((1.0, empty.features), (0.0, batch.context.features)):
        FlowMatching(network, FlowMatchingConfig(caption_dropout=share), empty).run("generator", batch, Streams())
        assert torch.equal(seen[-1][0, :5], expected[0, :5])
    shown = replace(batch, target_context=roles.guidance.teacher.negative.repeat(batch.context.batch))
    config = FlowMatchingConfig(image_contexts=1.0)
    FlowMatching(network, config, empty).run("generator", shown, Streams())
    assert torch.equal(seen[-1][0, :5], empty.features[0, :5])
    with pytest.raises(ValueError, match="the batch has no target_context; image_contexts asks for them"):
        FlowMatching(network, config, empty).run("generator", replace(batch, target_context=None), Streams())
    hook.remove()


def turbo(change: Callable[[Roles], None]) -> None:
    roles = roles_of(CASES["z-image"], "decoupled")
    change(roles)
    TurboPP(roles.student, roles.guidance, TurboPPConfig())


def test_wrong_compositions_are_explained() -> None:
    case, batch = CASES["z-image"], training_batch(CASES["z-image"])
    roles = roles_of(case, "decoupled")
    with pytest.raises(ValueError, match="turbo_pp: it is adversarial, and there is no discriminator"):
        turbo(lambda r: setattr(r.guidance, "discriminator", None))
    with pytest.raises(ValueError, match=r"the batch has no latents; write the teacher's images with `twostep cache`"):
        method_of("turbo_pp", roles).run("guidance", replace(batch, latents=None), Streams())
    with pytest.raises(ValueError, match="diversity is a part of step 1's loss"):
        TurboPP(roles.student, roles.guidance, TurboPPConfig(diversity=0.1, step_one_loss=False))
    with pytest.raises(ValueError, match="step 1 would learn nothing"):
        TurboPP(roles.student, roles.guidance, TurboPPConfig(end_to_end=False, step_one_loss=False))
    with pytest.raises(ValueError, match="has 1 step, expected at least 2"):
        DPDMD(Student([roles.student.first], (1, 0)), roles.guidance, DPDMDConfig())
    with pytest.raises(ValueError, match="dp_dmd: diversity is 0 and cut is true: step 1 would learn nothing"):
        DPDMD(roles.student, roles.guidance, DPDMDConfig(diversity=0))
    with pytest.raises(ValueError, match="no target_context"):
        method_of("d_opsd", roles).run("generator", replace(batch, target_context=None), Streams())
    with pytest.raises(ValueError, match="caption_dropout needs the context of the empty caption"):
        FlowMatching(roles.student.first, FlowMatchingConfig())
    with pytest.raises(ValueError, match="guidance_per_generator is 0"):
        TurboPP(roles.student, roles.guidance, TurboPPConfig(guidance_per_generator=0))
    with pytest.raises(ValueError, match="useless without the noise"):
        method_of("dp_dmd", roles).run("generator", replace(batch, anchor_noise=None), Streams())


def test_alternation_is_guidance_first() -> None:
    roles = roles_of(CASES["z-image"], "decoupled")
    assert list(method_of("turbo_pp", roles).updates(7)) == ["guidance"] * 5 + ["generator"]


def test_methods_see_backbones_by_their_interface_alone() -> None:
    """No method reaches into a model: none of their files names diffusers, a family, or `.model`."""
    from pathlib import Path

    import twostep.train.methods as methods

    for file in Path(methods.__file__).parent.glob("*.py"):
        text = file.read_text()
        assert not any(word in text for word in ("diffusers", "z_image", "flux2", ".model")), file.name


@pytest.mark.parametrize("step_one", [True, False])
def test_turbo_pps_guidance_learns_from_what_the_generator_is_judged_by(step_one: bool) -> None:
    """Final images; and, where step 1 is trained on its own prediction, that one for about half of the samples."""
    case = CASES["z-image"]
    roles, batch = roles_of(case, "decoupled"), training_batch(case)
    method = TurboPP(roles.student, roles.guidance, TurboPPConfig(step_one_loss=step_one))
    streams, kinds = Streams(), []
    for _ in range(8):
        state = streams["guidance"].get_state()
        found = method._samples(batch, streams)
        streams["again"].set_state(state)
        noise = torch.randn(batch.shape, generator=streams["again"])
        final, jump = roles.student.sample(noise, batch.context), roles.student.one_jump(noise, batch.context).detach()
        for sample, x, x_a in zip(found, final, jump, strict=True):
            assert relative_error(x, x_a) > 1e-2
            kinds.append(min(("final", "jump"), key=lambda k: relative_error(sample, {"final": x, "jump": x_a}[k])))
            assert min(relative_error(sample, x), relative_error(sample, x_a)) <= 1e-5
    assert set(kinds) == ({"final", "jump"} if step_one else {"final"})
