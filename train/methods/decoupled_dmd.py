"""Decoupled DMD (arXiv 2511.22677): how an N-step teacher is made from a multi-step base that answers to guidance.

One step of the student, the same on all ranks, is trained at a time. Its clean prediction is re-noised twice,
independently: below the step's input for guidance augmentation, anywhere for distribution matching (the paper's hybrid
schedule).
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
from .method import Cast, Metrics, Streams, TrainingBatch, alternate, check_alternation, noised, normal


@dataclass(frozen=True)
class DecoupledDMDConfig:
    kind: Literal["decoupled_dmd"] = "decoupled_dmd"
    guidance_per_generator: int = told(5, "guidance updates of an iteration, before the generator's")
    dm_weight: float = told(1.0, "of distribution matching, beside guidance augmentation (ours)")
    normalizer: Literal["guided", "separate", "none"] = told(
        "separate", "of the two terms: each by its own scale, both by the guided term's, or none (ours)"
    )

    def check(self) -> Iterable[str]:
        yield from check_alternation(self.guidance_per_generator)


class DecoupledDMD:
    """`shared` are streams that all ranks draw alike; the trained step is drawn from them."""

    roles: ClassVar[tuple[str, ...]] = ("real_score", "fake_score")
    steps: ClassVar[tuple[int, int | None]] = (1, None)

    @classmethod
    def wants(cls, config: DecoupledDMDConfig) -> frozenset[str]:
        return frozenset()

    @classmethod
    def build(cls, config: DecoupledDMDConfig, cast: Cast, shared: Streams) -> DecoupledDMD:
        assert cast.guidance is not None
        return cls(cast.student, cast.guidance, config, shared)

    def __init__(self, student: Student, guidance: Guidance, config: DecoupledDMDConfig, shared: Streams) -> None:
        self.student, self.guidance, self.config, self.shared = student, guidance, config, shared

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        return {"generator": list(self.student.trainable_parameters()), "guidance": self.guidance.parameters()}

    def updates(self, iteration: int) -> Sequence[str]:
        return alternate(self.config.guidance_per_generator)

    def run(self, update: str, batch: TrainingBatch, streams: Streams, scale: float = 1.0) -> Metrics:
        return (self._generator if update == "generator" else self._guidance)(batch, streams, scale)

    def sample(self, noise: Tensor, context: Context) -> Tensor:
        return self.student.sample(noise, context)

    def _step(self) -> int:
        return int(torch.randint(self.student.steps, (), generator=self.shared["trained_step"]))

    def _state(self, step: int, noise: Tensor, context: Context) -> Tensor:
        """What the student itself makes of the noise before this step."""
        x = noise
        with torch.no_grad():
            for earlier in range(step):
                x = self.student.step(earlier, x, context)
        # What autocast has cast without a graph must not serve the step that has one: in older torch its weights get no
        # gradient then (pytorch#158232).
        torch.clear_autocast_cache()
        return x

    def _prediction(self, step: int, noise: Tensor, context: Context) -> Tensor:
        x = self._state(step, noise, context)
        return x - self.student.sigmas[step] * self.student.velocity(step, x, context).to(x.dtype)

    def _generator(self, batch: TrainingBatch, streams: Streams, scale: float) -> Metrics:
        step, context = self._step(), batch.context
        x = self._prediction(step, normal(batch, streams, "student"), context)
        generator, low = streams["matching"], self.guidance.lowest
        augment = losses.sigmas_below(
            len(x), min(self.student.sigmas[step], 0.98), low=low, generator=generator, device=x.device
        )
        match = losses.uniform_sigmas(len(x), low, 0.98, generator=generator, device=x.device)
        teacher, negative = self.guidance.teacher, self._negative(len(x))
        with torch.no_grad():
            seen = noised(x, augment, normal(batch, streams, "matching"))
            conditional = teacher.clean(seen, augment, context, guidance=1.0)
            unconditional = teacher.clean(seen, augment, negative, guidance=1.0)
            seen = noised(x, match, normal(batch, streams, "matching"))
            real = teacher.clean(seen, match, context, guidance=1.0)
            fake = self.guidance.fake.clean(seen, match, context)
        loss = losses.decoupled_dmd_loss(
            x,
            dm_real_clean=real,
            dm_fake_clean=fake,
            ca_cond_clean=conditional,
            ca_uncond_clean=unconditional,
            guidance=self.guidance.guidance,
            dm_weight=self.config.dm_weight,
            normalizer=self.config.normalizer,
        )
        (scale * loss).backward()
        return {
            "final_loss": loss.detach(),
            "dmd_gradient_norm": (2 * loss.detach()).sqrt(),
            "trained_step": torch.tensor(float(step)),
            "sample_std": x.detach().std(),
        }

    def _negative(self, count: int) -> Context:
        negative = self.guidance.teacher.negative
        if negative is None:
            raise ValueError("decoupled_dmd: guidance augmentation needs the teacher's negative context")
        return negative.repeat(count) if negative.batch == 1 else negative

    @torch.no_grad()
    def _samples(self, batch: TrainingBatch, streams: Streams) -> Tensor:
        return self._prediction(self._step(), normal(batch, streams, "guidance"), batch.context)

    def _guidance(self, batch: TrainingBatch, streams: Streams, scale: float) -> Metrics:
        loss, metrics = self.guidance.train_fake_score(self._samples(batch, streams), batch.context, streams)
        (scale * loss).backward()
        return metrics
