"""What a method is: roles, two kinds of update, and how they alternate. The trainer knows nothing else of it.

A method fills gradients and returns numbers to watch; optimizers, accumulation, clipping, EMA and checkpoints are the
trainer's. Its randomness comes from streams by purpose, so that two ranks never draw the same and a resumed run draws
on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ...zoo import Context, Student
from ..data import draw_noise

if TYPE_CHECKING:
    from .guidance import Guidance

Metrics = dict[str, Tensor]
Part = TypeVar("Part", Tensor, Context)


class Streams(Protocol):
    """Random generators by purpose (twostep.train.data.NoiseStreams)."""

    def __getitem__(self, purpose: str) -> torch.Generator: ...


@dataclass(frozen=True)
class TrainingBatch:
    """What an update is given. Latents are float32, [B, C, H, W], where the networks are."""

    context: Context
    shape: tuple[int, int, int, int]  # of the noise
    latents: Tensor | None = None  # of the images: the teacher's, external ones, or the data's
    anchor: Tensor | None = None  # DP-DMD: the teacher's state at the anchor's sigma
    anchor_noise: Tensor | None = None  # and the noise that it came from
    target_context: Context | None = None  # D-OPSD: the same captions with their images
    kept: Context | None = None  # D-OPSD: of prompts on which the student is to stay as it is; not of `shape`'s rows


@dataclass
class Cast:
    """The roles of a run, as `twostep.train.cast` makes them for a method."""

    student: Student
    guidance: Guidance | None = None  # real score, fake score, discriminator
    average: Student | None = None  # D-OPSD's teacher: the student's average, which nobody trains
    empty: Context | None = None  # of the empty caption

    def modules(self) -> dict[str, nn.Module]:
        """What moves in training, by role: what a checkpoint holds."""
        found: dict[str, nn.Module] = {"student": self.student}
        if self.guidance is not None:
            found["fake_score"] = self.guidance.fake
            if self.guidance.discriminator is not None:
                found["discriminator"] = self.guidance.discriminator
        if self.average is not None:
            found["average"] = self.average
        return found


class Method(Protocol):
    """A method may also have `follow()`, which the trainer calls after each step of the student's optimizer."""

    roles: ClassVar[tuple[str, ...]]  # besides the student: real_score, fake_score, discriminator, average
    steps: ClassVar[tuple[int, int | None]]  # how many a student may have: least and most

    @classmethod
    def wants(cls, config: Any) -> frozenset[str]:
        """What a batch must bring beside its context: latents, anchor, target_context."""

    @classmethod
    def build(cls, config: Any, cast: Cast, shared: Streams) -> Method:
        """The method on these roles; `shared` are streams that all ranks draw alike."""

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """What each kind of update trains: an optimizer each."""

    def updates(self, iteration: int) -> Sequence[str]:
        """The kinds of update of an iteration, in order."""

    def run(self, update: str, batch: TrainingBatch, streams: Streams, scale: float = 1.0) -> Metrics:
        """Adds the gradients of one update, times scale, to the parameters of that kind."""

    def sample(self, noise: Tensor, context: Context) -> Tensor:
        """Clean latents from noise, as the model in training is meant to be sampled."""


def check_alternation(guidance_per_generator: int) -> Iterable[str]:
    if guidance_per_generator < 1:
        yield f"guidance_per_generator is {guidance_per_generator}, expected at least 1"


def alternate(guidance_per_generator: int) -> tuple[str, ...]:
    """DMD2's two time scales: several guidance updates, then one of the generator."""
    for fault in check_alternation(guidance_per_generator):
        raise ValueError(fault)
    return ("guidance",) * guidance_per_generator + ("generator",)


def normal(batch: TrainingBatch, streams: Streams, purpose: str) -> Tensor:
    """Noise of the batch's shape, where its context is."""
    return draw_noise(batch.shape, streams[purpose], batch.context.features.device)


def draw_noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return draw_noise(x.shape, generator, x.device)


def noised(x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """(1 - sigma) x + sigma noise."""
    level = sigma.to(x.device, x.dtype).view(-1, 1, 1, 1)
    return (1 - level) * x + level * noise


def wanted(value: Part | None, method: str, name: str, source: str) -> Part:
    """A part of the batch that this method cannot do without."""
    if value is None:
        raise ValueError(f"{method}: the batch has no {name}; {source}")
    return value
