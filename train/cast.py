"""The roles of a run, from its recipe: loaded, frozen or trainable, full or adapters, in shards or whole.

    full    a trainable copy in float32 for the student's steps (or one for all) and for the fake score; what is frozen
            (real score, the discriminator's features) is loaded once for each source, in the compute dtype
    lora    frozen bases in the compute dtype: the student's with an adapter for each step and D-OPSD's average, and the
            real score's with the fake score's adapter, so that the fake score begins as the real one; one base for both
            where they have the same weights

Two calls, since data come in between: the student's networks say what latents look like, and the latents' size decides
the sigma grid of some families.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..zoo import (
    AdapterBase,
    Backbone,
    Context,
    Discriminator,
    FakeScore,
    Student,
    Teacher,
    TwoStepStudent,
    load_backbone,
)
from ..zoo.sampling import sigma_grid
from ..zoo.saved_student import FACTS, student_facts
from .data import TeacherCache, noise_generator
from .methods import Cast, Guidance, method_class
from .recipe import DiscriminatorRole, FakeScoreRole, GuidanceConfig, PromptsData, RealScoreRole, Recipe, StudentRole
from .sharding import shard
from .source_identity import source_identity

Source = tuple[str, str]  # a model and its subfolder
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
Load = Callable[..., Backbone]


@dataclass
class Casting:
    recipe: Recipe
    model: str  # the recipe's, resolved: a folder or a hub id
    device: torch.device
    mesh: Any = None  # of the shards
    load: Load = load_backbone
    _frozen: dict[Source, Backbone] = field(default_factory=dict)
    _bases: dict[Source, AdapterBase] = field(default_factory=dict)
    _networks: list[Backbone] = field(default_factory=list)

    def sources(self) -> dict[str, str]:
        """What lies where the roles come from: a checkpoint belongs to these weights, wherever they are moved to."""
        roles: dict[str, StudentRole | RealScoreRole | DiscriminatorRole] = {
            "student": self.recipe.roles.student,
            "real_score": self.recipe.roles.real_score or RealScoreRole(),
            "discriminator": self.recipe.roles.discriminator or DiscriminatorRole(),
        }
        needed = ("student", *method_class(self.recipe.method).roles)
        found = {name: self._source(role.source, role.subfolder) for name, role in roles.items() if name in needed}
        if "fake_score" in needed and self._fake_score_is_adapter:
            found["fake_score"] = self._fake_source  # which a checkpoint does not hold
        return {name: source_identity(*source) for name, source in found.items()}

    # The student's networks

    def networks(self) -> list[Backbone]:
        """One for each step; the same one where the steps share it."""
        if self._networks:
            return self._networks
        role = self.recipe.roles.student
        names = [f"step_{n}" for n in range(1, role.steps + 1)] if role.per_step else ["student"]
        if role.weights == "lora":
            source = self._student_source
            made: list[Backbone] = [self._adapter(source, name, role.rank, role.alpha) for name in names]
        else:
            made = [self._prepared(self._load(self._student_source, trainable=True)) for _ in names]
        self._networks = made if role.per_step else made * role.steps
        return self._networks

    def roles(self, size: tuple[int, int], empty: Context | None) -> Cast:
        """All roles of the method, for latents of this height and width."""
        networks, method = self.networks(), method_class(self.recipe.method)
        student = self._student(networks, size)
        cast = Cast(student, empty=empty)
        if "real_score" in method.roles:
            self._check_lowest(student.sigmas)
            cast.guidance = self._guidance(empty, "discriminator" in method.roles)
        if "average" in method.roles:
            cast.average = self._average(student)
        for base in self._bases.values():
            self._prepared(base.backbone)  # after its adapters: FSDP divides what is there when it comes
        return cast

    def sigmas(self, size: tuple[int, int]) -> tuple[float, ...]:
        """The student's grid for latents of this height and width."""
        role = self.recipe.roles.student
        if role.sigmas is not None:
            return role.sigmas
        if role.shift is None and (own := self._sigmas_of_a_student()) is not None:
            return own
        shift = self.networks()[0].default_shift(*size, role.steps) if role.shift is None else role.shift
        return sigma_grid(role.steps, shift)

    def _sigmas_of_a_student(self) -> tuple[float, ...] | None:
        """Of one that another run has left, where it is what this one begins with and has as many steps."""
        folder = Path(self._student_source[0]).expanduser()
        if not (folder / FACTS).is_file():
            return None
        sigmas: tuple[float, ...] = tuple(student_facts(folder)["sigmas"])
        return sigmas if len(sigmas) == self.recipe.roles.student.steps + 1 else None

    def anchor_sigma(self) -> float:
        """Where the teacher's anchors must stand: at the end of the student's first step."""
        data = self.recipe.data
        assert isinstance(data, PromptsData) and data.teacher is not None  # the recipe's own checks
        _, height, width = TeacherCache(data.teacher).shape
        return self.sigmas((height, width))[1]

    def _student(self, networks: list[Backbone], size: tuple[int, int]) -> Student:
        sigmas = self.sigmas(size)
        if len(networks) == 2:
            return TwoStepStudent(*networks, sigmas=sigmas)
        return Student(networks, sigmas)

    def _check_lowest(self, sigmas: Sequence[float]) -> None:
        lowest, last = (self.recipe.guidance or GuidanceConfig()).lowest, min(sigmas[-2], 0.98)
        if lowest >= last:
            raise ValueError(
                f"guidance.lowest is {lowest}, and re-noise levels lie between it and the input of the student's last "
                f"step, at most .98: expected less than {last:.4g}"
            )

    def _guidance(self, empty: Context | None, adversarial: bool) -> Guidance:
        recipe, settings = self.recipe, self.recipe.guidance or GuidanceConfig()
        student = self.networks()[0]
        real = recipe.roles.real_score or RealScoreRole()
        fake = self._fake_score()  # first: its adapter may be on the network that the others look at
        teacher = Teacher(
            self._frozen_network(self._real_source),
            shift=real.shift,
            guidance=settings.scale,
            negative=empty,
        )
        discriminator = self._discriminator() if adversarial else None
        others = {"real_score": teacher.backbone, "fake_score": fake.network}
        if discriminator is not None:
            others["discriminator"] = discriminator.backbone
        for name, network in others.items():
            mine, theirs = ((one.family, one.channels, one.context_width) for one in (student, network))
            if mine != theirs:
                raise ValueError(
                    f"roles.{name}.source is a {theirs[0]} for latents of {theirs[1]} channels and contexts "
                    f"{theirs[2]} wide, and the student a {mine[0]} for {mine[1]} and {mine[2]}: expected models of "
                    f"one family"
                )
        return Guidance(
            teacher,
            fake,
            discriminator,
            settings.weights,
            guidance=settings.scale,
            kind=settings.loss,
            lowest=settings.lowest,
            r1_noise=settings.r1_noise,
        )

    def _fake_score(self) -> FakeScore:
        role = self.recipe.roles.fake_score or FakeScoreRole()
        if self._fake_score_is_adapter:
            rank = self.recipe.roles.student.rank if role.rank is None else role.rank
            return FakeScore(self._adapter(self._fake_source, "fake_score", rank, role.alpha))
        return FakeScore(self._prepared(self._load(self._fake_source, trainable=True)))

    def _discriminator(self) -> Discriminator:
        role = self.recipe.roles.discriminator or DiscriminatorRole()
        backbone = self._frozen_network(self._source(role.source, role.subfolder))
        generator = noise_generator(self.recipe.seed, "discriminator heads")
        return Discriminator(backbone, blocks=role.blocks, hidden=role.hidden, generator=generator)

    def _average(self, student: Student) -> Student:
        """A second set of networks that begins as the student's."""
        role, twins = self.recipe.roles.student, {}
        for number, network in enumerate(student.distinct_networks(), start=1):
            if role.weights == "lora":
                twin = self._adapter(self._student_source, f"average_{number}", role.rank, role.alpha)
                twin.load_state_dict(network.state_dict())
            else:
                twin = self._prepared(self._load(self._student_source, trainable=False, dtype=torch.float32))
            twins[id(network)] = twin
        return Student([twins[id(network)] for network in student.networks], student.sigmas)

    # Networks

    @property
    def _student_source(self) -> Source:
        role = self.recipe.roles.student
        return self._source(role.source, role.subfolder)

    @property
    def _real_source(self) -> Source:
        role = self.recipe.roles.real_score or RealScoreRole()
        return self._source(role.source, role.subfolder)

    @property
    def _fake_source(self) -> Source:
        role = self.recipe.roles.fake_score or FakeScoreRole()
        return self._real_source if role.source is None else self._source(role.source, role.subfolder)

    @property
    def _fake_score_is_adapter(self) -> bool:
        role = self.recipe.roles.fake_score or FakeScoreRole()
        return (role.weights or self.recipe.roles.student.weights) == "lora"

    def _source(self, source: str | None, subfolder: str) -> Source:
        return (self.model if source is None else source, subfolder)

    def _adapter(self, source: Source, name: str, rank: int, alpha: float | None) -> Backbone:
        if source not in self._bases:
            self._bases[source] = AdapterBase(self._load(source, trainable=False))
        generator = noise_generator(self.recipe.seed, f"adapter {name}")
        return self._bases[source].add(name, rank=rank, alpha=alpha, generator=generator)

    def _frozen_network(self, source: Source) -> Backbone:
        """A network that nobody trains: the base of adapters where one has these weights, and one copy for all that
        ask."""
        if source in self._bases:
            return self._bases[source].base
        if source not in self._frozen:
            self._frozen[source] = self._prepared(self._load(source, trainable=False))
        return self._frozen[source]

    def _load(self, source: Source, *, trainable: bool, dtype: torch.dtype | None = None) -> Backbone:
        path, subfolder = source
        wide = torch.float32 if trainable else DTYPES[self.recipe.compute.dtype]
        network = self.load(
            path, dtype=wide if dtype is None else dtype, device=self.device, fused=self.recipe.compute.fused,
            subfolder=subfolder,
        )  # fmt: skip
        return network.requires_grad_(trainable)

    def _prepared(self, network: Backbone) -> Backbone:
        """Checkpointed, compiled and divided, as the recipe has it; before the next one is loaded."""
        compute = self.recipe.compute
        if compute.checkpointing:
            network.enable_gradient_checkpointing()
        if compute.compile:
            for block in network.blocks():
                block.compile()
        if self.mesh is not None:
            shard(network, self.mesh, DTYPES[compute.dtype])
        return network
