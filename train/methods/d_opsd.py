"""D-OPSD (arXiv 2605.05204): on-policy self-distillation, which tunes a few-step model and keeps its few steps.

The student rolls its own sampler from noise, seeing the caption. At every state that it visits the teacher, an average
of the student, sees the caption and the target image, and the student's velocity is pulled to the teacher's. States are
data: no gradient crosses steps, so each step's backward runs at once, with one step's activations.

`on_policy=False` is what the paper argues against, for comparison: the same two contexts, at noised target images
instead of the student's own states.

Beside its images a batch may bring prompts to keep (the paper has none): at the student's states for them the teacher
sees the prompt alone, as the student does. That pulls the student back to its average, which follows slowly: .9999 is
after 2000 updates still 82 % of what the student was. A row counts as much as another, so the share of prompts in a
batch is the weight of not forgetting. Numbers to watch are of the images' rows, `kept_loss` is of the prompts'.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ... import losses
from ...zoo import Context, Student
from ..data import draw_noise
from ..told import told
from .method import Cast, Metrics, Streams, TrainingBatch, noised, wanted


@dataclass(frozen=True)
class DOPSDConfig:
    kind: Literal["d_opsd"] = "d_opsd"
    form: Literal["velocity", "clean"] = told(
        "velocity", "compare velocities, or clean predictions (the released code; a weight of sigma squared)"
    )
    ema: float = told(
        0.9999, "of the student's average, which is the teacher: .9 is poor and 0 collapses, says the paper"
    )
    on_policy: bool = told(True, "at the student's own states; false: at noised target images")

    def check(self) -> Iterable[str]:
        if not 0 <= self.ema < 1:
            yield f"ema is {self.ema}, expected a number from 0 up to 1"


class DOPSD:
    """`teacher` is a copy of the student's networks that nobody trains: `follow` moves it after each step."""

    roles: ClassVar[tuple[str, ...]] = ("average",)
    steps: ClassVar[tuple[int, int | None]] = (1, None)

    @classmethod
    def wants(cls, config: DOPSDConfig) -> frozenset[str]:
        return frozenset({"target_context"} if config.on_policy else {"target_context", "latents"})

    @classmethod
    def build(cls, config: DOPSDConfig, cast: Cast, shared: Streams) -> DOPSD:
        assert cast.average is not None
        return cls(cast.student, cast.average, config)

    def __init__(self, student: Student, teacher: Student, config: DOPSDConfig) -> None:
        if teacher.sigmas != student.sigmas:
            raise ValueError(f"d_opsd: the teacher's sigmas are {teacher.sigmas}, and the student's {student.sigmas}")
        for fault in config.check():
            raise ValueError(f"d_opsd: {fault}")
        self.student, self.teacher, self.config = student, teacher, config
        teacher.requires_grad_(False)

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        return {"generator": list(self.student.trainable_parameters())}

    def updates(self, iteration: int) -> Sequence[str]:
        return ("generator",)

    def run(self, update: str, batch: TrainingBatch, streams: Streams, scale: float = 1.0) -> Metrics:
        if batch.target_context is None:
            raise ValueError("d_opsd: the batch has no target_context: the captions encoded together with their images")
        context, shown = batch.context, batch.context.batch
        if batch.kept is not None:
            if not self.config.on_policy:
                raise ValueError("d_opsd: the batch has prompts to keep, and on_policy=false wants an image for each")
            context = Context.cat([context, batch.kept])
        shape = (context.batch, *batch.shape[1:])
        noise, metrics = draw_noise(shape, streams["student"], context.features.device), {}
        x, target_image = noise, None
        if not self.config.on_policy:
            target_image = wanted(batch.latents, "d_opsd", "latents", "on_policy=false noises the target images")
        total, kept = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
        for step in range(self.student.steps):
            if target_image is not None:
                x = noised(target_image, torch.full((len(x),), self.student.sigmas[step]), noise)
            with torch.no_grad():
                target = self.teacher.velocity(step, x[:shown], batch.target_context)
                if batch.kept is not None:
                    target = torch.cat([target, self.teacher.velocity(step, x[shown:], batch.kept)])
            v = self.student.velocity(step, x, context)
            each = losses.self_distillation_loss(
                v, target, self.student.sigmas[step], form=self.config.form, reduction="none"
            )
            (scale * each.mean() / self.student.steps).backward()
            loss = each[:shown].detach().mean()
            total += loss / self.student.steps
            if batch.kept is not None:
                kept += each[shown:].detach().mean() / self.student.steps
            metrics[f"step_{step + 1}_loss"] = loss
            x = x + (self.student.sigmas[step + 1] - self.student.sigmas[step]) * v.detach().to(x.dtype)
        metrics |= {"final_loss": total} if batch.kept is None else {"final_loss": total, "kept_loss": kept}
        return metrics | {"sample_std": x.std()}

    def sample(self, noise: Tensor, context: Context) -> Tensor:
        return self.student.sample(noise, context)

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the teacher: after a step of the student's optimizer, and at no other time."""
        students, teachers = self.student.distinct_networks(), self.teacher.distinct_networks()
        for ours, theirs in zip(students, teachers, strict=True):
            for p, average in zip(ours.parameters(), theirs.parameters(), strict=True):
                average.lerp_(p.to(average.dtype), 1 - self.config.ema)
