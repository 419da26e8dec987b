"""Small roles for the methods' tests, full copies, one shared network or adapters on one base, and batches for them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import nn

from tests.zoo.models import Case, batch_of, flux2, fused_backbone, z_image
from twostep.train.methods import Guidance, TrainingBatch, Weights
from twostep.zoo import AdapterBase, Discriminator, FakeScore, Student, Teacher, TwoStepStudent

CASES = {
    "z-image": Case("z-image", z_image(n_refiner_layers=0), size=(4, 6), lengths=(5, 40)),
    "flux2": Case("flux2", flux2(num_layers=1, num_single_layers=1), size=(2, 3), lengths=(5, 7)),
}
KINDS = ("decoupled", "shared", "adapters")


class Streams(dict):  # type: ignore[type-arg]
    """A generator by purpose; two of one seed draw alike."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def __missing__(self, purpose: str) -> torch.Generator:
        generator = torch.Generator().manual_seed(zlib.crc32(purpose.encode()) + self.seed)
        self[purpose] = generator
        return generator


@dataclass
class Roles:
    student: TwoStepStudent
    guidance: Guidance
    base: AdapterBase | None

    def everything(self) -> dict[str, nn.Parameter]:
        """Every parameter of every role once, by a name that says whose it is."""
        found: dict[int, tuple[str, nn.Parameter]] = {}
        assert self.guidance.discriminator is not None
        owners = {
            "student": self.student.distinct_networks(),
            "fake": [self.guidance.fake.network],
            "discriminator": [self.guidance.discriminator],
            "teacher": [self.guidance.teacher.backbone],
        }
        for owner, modules in owners.items():
            for i, module in enumerate(modules):
                for name, parameter in module.named_parameters():
                    found.setdefault(id(parameter), (f"{owner}.{i}.{name}", parameter))
        return dict(found.values())


def roles_of(case: Case, kind: str, **weights: float) -> Roles:
    backbone = fused_backbone(case).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    negative = batch_of(case, seed=7).context[:1]
    base = AdapterBase(backbone) if kind == "adapters" else None
    source = backbone if base is None else base
    frozen = backbone if base is None else base.base
    student = TwoStepStudent.from_teacher(source, kind=kind, rank=2, generator=generator)
    fake = FakeScore.from_teacher(source, rank=2, generator=generator)
    with torch.no_grad():  # away from the teacher, so that no difference is zero
        for parameter in [*student.trainable_parameters(), *fake.trainable_parameters()]:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return Roles(
        student,
        Guidance(
            Teacher(frozen, negative=negative),
            fake,
            Discriminator(frozen, generator=generator),
            Weights(**weights),
        ),
        base,
    )


def student_of(roles: Roles, steps: int) -> Student:
    """More steps on the same two networks."""
    networks = [roles.student.first, *[roles.student.second] * (steps - 1)]
    return Student(networks, roles.guidance.teacher.sigmas(4, 6, steps))


def training_batch(case: Case, seed: int = 3) -> TrainingBatch:
    batch = batch_of(case, seed)
    shape = tuple(batch.x.shape)
    generator = torch.Generator().manual_seed(seed + 100)
    draws = [torch.randn(shape, generator=generator) for _ in range(2)]
    return TrainingBatch(
        batch.context,
        shape,
        latents=batch.x,
        anchor=draws[0],
        anchor_noise=draws[1],
        target_context=batch_of(case, seed + 1).context,
    )
