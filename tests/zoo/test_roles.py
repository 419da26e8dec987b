"""Teacher, student, fake score and discriminator: how they begin, what moves them, and what must not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from twostep.zoo import AdapterBase, Backbone, Context, Discriminator, FakeScore, Student, Teacher, TwoStepStudent
from twostep.zoo.discriminator import default_blocks

from .models import Case, batch_of, flux2, fused_backbone, relative_error, z_image

CASES = {
    "z-image": Case("z-image", z_image(n_layers=4), lengths=(5, 40)),
    "flux2": Case("flux2", flux2(), size=(4, 3), lengths=(5, 11)),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_velocity_and_clean_prediction_belong_together(case: Case) -> None:
    backbone, batch = fused_backbone(case), batch_of(case)
    with torch.no_grad():
        v = backbone.velocity(batch.x, batch.sigma, batch.context)
        clean = backbone.clean(batch.x, batch.sigma, batch.context)
        assert torch.equal(clean, batch.x - batch.sigma.view(-1, 1, 1, 1) * v)
        low = batch.x.bfloat16()
        v = backbone.velocity(low, 0.9545, batch.context)
        exact = low.double() - 0.9545 * v.double()  # sigma is not rounded to what x is in
        for role in (backbone, Teacher(backbone)):
            assert role.clean(low, 0.9545, batch.context).dtype == torch.float32
        assert relative_error(backbone.clean(low, 0.9545, batch.context), exact) < 1e-6
        one = backbone.velocity(batch.x, 0.3, batch.context)
        assert torch.equal(one, backbone.velocity(batch.x, torch.tensor([0.3, 0.3]), batch.context))


def test_time_runs_the_right_way() -> None:
    """Z-Image is told 1 - sigma and answers x - eps. A network that is the identity on its t embedding cannot be had,
    but its very inputs and outputs can be seen at the border."""
    backbone, batch = fused_backbone(CASES["z-image"]), batch_of(CASES["z-image"])
    seen: list[Tensor] = []
    backbone.model.t_embedder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    layer = backbone.model.all_final_layer["2-1"].linear
    with torch.no_grad():
        layer.weight.zero_(), layer.bias.fill_(1.0)
        v = backbone.velocity(batch.x, torch.tensor([1.0, 0.25]), batch.context)
    assert torch.allclose(seen[0], torch.tensor([0.0, 750.0]))
    assert torch.equal(v, -torch.ones_like(v))


@pytest.mark.parametrize("kind", ["decoupled", "shared", "adapters"])
def test_a_student_begins_as_its_teacher(case: Case, kind: str) -> None:
    backbone, batch = fused_backbone(case), batch_of(case)
    teacher = Teacher(backbone)
    true = teacher.sample(batch.x, batch.context, sigmas=(1, 0.75, 0))
    student = TwoStepStudent.from_teacher(AdapterBase(backbone) if kind == "adapters" else backbone, kind=kind, rank=4)
    assert student.sigmas == (1, 0.75, 0)
    assert relative_error(student.sample(batch.x, batch.context), true) <= 1e-6
    assert len(student.distinct_networks()) == (1 if kind == "shared" else 2)
    with torch.no_grad():
        z = student.step_one(batch.x, batch.context)
        assert torch.equal(student.step_two(z, batch.context), student.sample(batch.x, batch.context))
        v0 = student.first.velocity(batch.x, 1.0, batch.context)
        assert relative_error(z, batch.x - 0.25 * v0) <= 1e-6
        assert relative_error(student.one_jump(batch.x, batch.context), batch.x - v0) <= 1e-6


@pytest.mark.parametrize("kind", ["decoupled", "shared", "adapters"])
def test_a_step_moves_its_own_parameters_and_nobody_elses(case: Case, kind: str) -> None:
    backbone, batch = fused_backbone(case), batch_of(case)
    backbone.requires_grad_(False)
    source = AdapterBase(backbone) if kind == "adapters" else backbone
    student = TwoStepStudent.from_teacher(source, kind=kind, rank=4)
    fake = FakeScore.from_teacher(source, rank=4)
    z = student.step_one(batch.x, batch.context).detach()
    student.step_two(z, batch.context).square().sum().backward()
    assert any(p.grad is not None for p in student.second.parameters())
    others = (
        [*fake.network.parameters(), *backbone.parameters()] if kind != "adapters" else list(fake.network.parameters())
    )
    if kind != "shared":
        others += list(student.first.parameters())
    assert all(p.grad is None for p in others)
    if kind == "adapters":
        assert all(p.grad is None for n, p in backbone.named_parameters() if ".lora_" not in n)
    trained = {id(p) for p in student.trainable_parameters()}
    assert trained.isdisjoint(id(p) for p in fake.trainable_parameters())
    assert len(trained) == sum(1 for n in student.distinct_networks() for _ in n.parameters())


def test_a_student_of_more_steps(case: Case) -> None:
    backbone, batch = fused_backbone(case), batch_of(case)
    student = Student([backbone] * 4, Teacher(backbone).sigmas(*batch.x.shape[2:], 4))
    found = student.sample(batch.x, batch.context)
    assert relative_error(found, Teacher(backbone).sample(batch.x, batch.context, steps=4)) <= 1e-6


def test_wrong_students_are_explained(case: Case) -> None:
    backbone = fused_backbone(case)
    with pytest.raises(ValueError, match="kind is 'both', expected one of 'decoupled', 'shared', 'adapters'"):
        TwoStepStudent.from_teacher(backbone, kind="both")
    with pytest.raises(TypeError, match=r"needs an AdapterBase"):
        TwoStepStudent.from_teacher(backbone, kind="adapters")
    with pytest.raises(ValueError, match=r"2 networks and sigmas \[1.0, 0.5, 0.2, 0.0\]"):
        TwoStepStudent(backbone, backbone, sigmas=(1, 0.5, 0.2, 0))
    with pytest.raises(ValueError, match=r"begin at 0\.9"):
        TwoStepStudent(backbone, backbone, sigmas=(0.9, 0.5, 0))
    with pytest.raises(ValueError, match="fall strictly"):
        TwoStepStudent(backbone, backbone, sigmas=(1, 1, 0))
    for step in (2, -1):
        with pytest.raises(ValueError, match=f"step is {step}, expected 0 to 1"):
            TwoStepStudent(backbone, backbone).step(step, torch.zeros(1, 4, 2, 2), Context(torch.zeros(1, 1, 20)))
    with pytest.raises(ValueError, match="step is 2, expected 0 to 1"):
        TwoStepStudent(backbone, backbone).velocity(2, torch.zeros(1, 4, 2, 2), Context(torch.zeros(1, 1, 20)))


def discriminator_of(backbone: Backbone) -> Discriminator:
    return Discriminator(backbone, generator=torch.Generator().manual_seed(0))


def test_the_default_blocks() -> None:
    assert default_blocks(30) == (14, 21, 29)
    assert default_blocks(25) == (11, 18, 24)
    assert default_blocks(4) == (1, 2, 3)
    assert default_blocks(1) == (0,)


def test_gradients_reach_the_discriminators_input_and_not_its_backbone(case: Case) -> None:
    backbone, batch = fused_backbone(case), batch_of(case)
    discriminator = discriminator_of(backbone)
    x = batch.x.clone().requires_grad_(True)
    logits = discriminator(x, batch.sigma, batch.context)
    tokens = batch.x.shape[2] * batch.x.shape[3] // backbone.latent_factor**2
    assert logits.shape == (2, len(discriminator.blocks) * tokens) and logits.dtype == torch.float32
    logits.sum().backward()
    assert x.grad is not None and bool((x.grad != 0).any())
    assert all(p.grad is None for p in backbone.parameters())
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in discriminator.heads.parameters())


def test_the_generator_learns_from_a_frozen_discriminator(case: Case) -> None:
    """Freezing the heads for the generator's update must not cut the way to the input."""
    backbone, batch = fused_backbone(case), batch_of(case)
    discriminator = discriminator_of(backbone).requires_grad_(False)
    x = batch.x.clone().requires_grad_(True)
    discriminator(x, batch.sigma, batch.context).sum().backward()
    assert bool((x.grad != 0).any())
    assert all(p.grad is None for p in discriminator.parameters())


def test_a_discriminator_holds_its_heads_alone(case: Case) -> None:
    backbone = fused_backbone(case)
    discriminator = discriminator_of(backbone)
    assert all(name.startswith("heads.") for name in discriminator.state_dict())
    assert {id(p) for p in discriminator.parameters()} == {id(p) for p in discriminator.heads.parameters()}
    again = discriminator_of(backbone)
    for a, b in zip(discriminator.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)  # from the generator alone


def test_discriminators_with_unknown_blocks_are_refused(case: Case) -> None:
    backbone, batch = fused_backbone(case), batch_of(case)
    with pytest.raises(ValueError, match=r"blocks are \[1, 4\], expected different indices from 0 to 3"):
        Discriminator(backbone, blocks=[1, 4])
    with pytest.raises(ValueError, match=r"blocks are \[-1\]"):
        backbone.features(batch.x, batch.sigma, batch.context, [-1])
    with pytest.raises(ValueError, match=r"blocks are \[\], expected at least one"):
        backbone.features(batch.x, batch.sigma, batch.context, [])


def test_a_fake_score_begins_as_its_teacher_and_is_trained(case: Case) -> None:
    backbone, batch = fused_backbone(case), batch_of(case)
    backbone.requires_grad_(False)
    fake = FakeScore.from_teacher(backbone)
    with torch.no_grad():
        true = backbone.clean(batch.x, batch.sigma, batch.context)
        assert torch.equal(fake.clean(batch.x, batch.sigma, batch.context), true)
    fake.velocity(batch.x, batch.sigma, batch.context).sum().backward()
    assert all(p.grad is None for p in backbone.parameters())
    assert sum(p.grad is not None for p in fake.trainable_parameters()) > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {"x": b.x[:, :3]}, r"x has shape .* expected \[batch, \d+, height, width\]"),
        (lambda b: {"x": list(b.x)}, r"x is list, expected one tensor .* different sizes go into different batches"),
        (
            lambda b: {"x": b.x[:0], "sigma": b.sigma[:0], "context": b.context[:0]},
            r"x has shape \[0, .* at least one sample",
        ),
        (lambda b: {"x": b.x[0]}, r"x is \[\d+, \d+, \d+\], expected one tensor"),
        (lambda b: {"sigma": torch.rand(3)}, r"sigma has shape \[3\], expected a number or \[2\]"),
        (lambda b: {"sigma": 1.5}, r"sigma is 1\.5, expected numbers from 0 \(clean\) to 1 \(noise\)"),
        (lambda b: {"sigma": torch.tensor([750.0, 0.5])}, r"sigma is \[750\.0, 0\.5\], expected numbers from 0"),
        (lambda b: {"sigma": torch.tensor([1, 0])}, r"sigma has dtype torch\.int64"),
        (lambda b: {"sigma": [0.5, 0.5]}, r"sigma is list, expected numbers"),
        (lambda b: {"x": b.x[:, :, :0]}, r"a batch needs at least one sample, of some size"),
        (lambda b: {"sigma": float("nan")}, "sigma is nan"),
        (lambda b: {"x": b.x.to(torch.uint8)}, r"x is torch\.uint8, expected a floating-point dtype"),
        (lambda b: {"context": b.context[:1]}, r"context has 1 samples and x has 2; repeat"),
        (lambda b: {"context": b.context.features}, r"context is Tensor, expected a twostep\.zoo\.Context"),
        (
            lambda b: {"context": Context(torch.zeros(2, 3, 99), encoder="qwen-abc")},
            r"context \(encoder qwen-abc\) has 99 channels, expected \d+: it was made by another text encoder",
        ),
    ],
)
def test_bad_input_is_explained(case: Case, change: object, message: str) -> None:
    backbone, batch = fused_backbone(case), batch_of(case)
    inputs = {"x": batch.x, "sigma": batch.sigma, "context": batch.context, **change(batch)}
    with pytest.raises((ValueError, TypeError), match=message):
        backbone.velocity(inputs["x"], inputs["sigma"], inputs["context"])


def test_sizes_that_are_no_multiple_of_a_patch_are_refused() -> None:
    backbone, batch = fused_backbone(CASES["z-image"]), batch_of(CASES["z-image"])
    with pytest.raises(ValueError, match="multiples of 2"):
        backbone.velocity(batch.x[..., :5], batch.sigma, batch.context)
