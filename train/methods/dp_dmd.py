"""DP-DMD (arXiv 2602.03139): step 1 keeps diversity, later steps learn distribution matching.

    step 1          the velocity is taught the teacher's average velocity from the same noise down to an anchor
    between         the gradient is cut (without the cut and step 1's loss this is plain DMD)
    later steps     keep their gradient to each other, and learn DMD on the final image

No discriminator, no images. The teacher's K steps are deterministic; anchors come with the batch (`twostep cache`) or
are sampled here. Ours for two steps: the anchor stands at the student's own first boundary. Ours too: re-noise levels
of the matching stay below the second step's input (Turbo++'s rule; DMD2 draws them up to .98).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ... import losses
from ...zoo import Context, Student
from ..told import told
from .guidance import Guidance
from .method import Cast, Metrics, Streams, TrainingBatch, alternate, check_alternation, normal, wanted


@dataclass(frozen=True)
class DPDMDConfig:
    kind: Literal["dp_dmd"] = "dp_dmd"
    guidance_per_generator: int = told(5, "guidance updates of an iteration, before the generator's")
    diversity: float = told(0.05, "weight of step 1's loss to the teacher's average velocity (lambda)")
    cut: bool = told(True, "no gradient of the later steps reaches step 1")
    teacher_steps: int = told(28, "of the teacher's whole path, where the batch brings no anchor")
    anchor_guidance: float = told(3.5, "of the teacher on that path")
    cached_anchors: bool = told(
        False, "take the cache's anchors, and so one noise a prompt, instead of running the teacher"
    )

    def check(self) -> Iterable[str]:
        yield from check_alternation(self.guidance_per_generator)
        if self.teacher_steps < 1:
            yield f"teacher_steps is {self.teacher_steps}, expected at least 1"
        if self.diversity < 0:
            yield f"diversity is {self.diversity}, expected at least 0"
        if self.cut and self.diversity == 0:
            yield "diversity is 0 and cut is true: step 1 would learn nothing; cut: false is plain DMD"


class DPDMD:
    roles: ClassVar[tuple[str, ...]] = ("real_score", "fake_score")
    steps: ClassVar[tuple[int, int | None]] = (2, None)

    @classmethod
    def wants(cls, config: DPDMDConfig) -> frozenset[str]:
        return frozenset({"anchor"} if config.cached_anchors else ())

    @classmethod
    def build(cls, config: DPDMDConfig, cast: Cast, shared: Streams) -> DPDMD:
        assert cast.guidance is not None
        return cls(cast.student, cast.guidance, config)

    def __init__(self, student: Student, guidance: Guidance, config: DPDMDConfig) -> None:
        if student.steps < 2:
            raise ValueError(
                f"dp_dmd: the student has {student.steps} step, expected at least 2: step 1 has a task of its own"
            )
        for fault in config.check():
            raise ValueError(f"dp_dmd: {fault}")
        self.student, self.guidance, self.config = student, guidance, config

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        return {"generator": list(self.student.trainable_parameters()), "guidance": self.guidance.parameters()}

    def updates(self, iteration: int) -> Sequence[str]:
        return alternate(self.config.guidance_per_generator)

    def run(self, update: str, batch: TrainingBatch, streams: Streams, scale: float = 1.0) -> Metrics:
        return (self._generator if update == "generator" else self._guidance)(batch, streams, scale)

    def sample(self, noise: Tensor, context: Context) -> Tensor:
        return self.student.sample(noise, context)

    def _generator(self, batch: TrainingBatch, streams: Streams, scale: float) -> Metrics:
        student, context = self.student, batch.context
        noise, anchor = self._anchor(batch, streams)
        v0 = student.velocity(0, noise, context)
        seen: Metrics = {}
        first = noise.new_zeros(())
        if anchor is not None:
            diversity = losses.target_prediction_loss(v0, noise, anchor, student.sigmas[1])
            seen["diversity_loss"] = diversity.detach()
            first = scale * self.config.diversity * diversity
        if self.config.cut:
            first.backward()
            v0 = v0.detach()
        x = noise + (student.sigmas[1] - student.sigmas[0]) * v0.to(noise.dtype)
        for step in range(1, student.steps):
            x = student.step(step, x, context)
        matching, metrics = self.guidance.matching(x, student.sigmas[1], context, streams)
        (scale * matching if self.config.cut else scale * matching + first).backward()
        return metrics | seen | {"final_loss": matching.detach(), "sample_std": x.detach().std()}

    def _anchor(self, batch: TrainingBatch, streams: Streams) -> tuple[Tensor, Tensor | None]:
        """The noise, and where the teacher is on its way from it at the end of step 1; None where nobody asks."""
        boundary = self.student.sigmas[1]
        if batch.anchor is not None:
            source = "an anchor is useless without the noise that it came from"
            return wanted(batch.anchor_noise, "dp_dmd", "anchor_noise", source), batch.anchor
        noise = normal(batch, streams, "student")
        if self.config.diversity == 0:
            return noise, None
        path = [s for s in self.guidance.teacher.sigmas(*batch.shape[2:], self.config.teacher_steps) if s > boundary]
        with torch.no_grad():
            x = noise
            for a, b in zip(path, [*path[1:], boundary], strict=True):
                v = self.guidance.teacher.velocity(x, a, batch.context, guidance=self.config.anchor_guidance)
                x = x + (b - a) * v
        return noise, x

    def _guidance(self, batch: TrainingBatch, streams: Streams, scale: float) -> Metrics:
        fake = self.student.sample(normal(batch, streams, "guidance"), batch.context)
        loss, metrics = self.guidance.train_fake_score(fake, batch.context, streams)
        (scale * loss).backward()
        return metrics
