"""Z-Image Turbo++ (arXiv 2606.12575): an 8-step teacher becomes a 2-step student.

    generator   L(x) + L(x_A), L = GAN + DMD, on both clean predictions; and the gradient of L(x) through both steps, of
                which step 1 inherits `inherit` times (two_step_backward)
    guidance    the fake score on the student's samples, the discriminator on those against the teacher's images

Every row of the paper's ablation is a setting: `end_to_end=False` cuts the gradient between the steps,
`step_one_loss=False` drops L(x_A), the student's kind decides what the steps share, and the batch's latents are the
teacher's or external images. DP-DMD's diversity term may be added to step 1 (`diversity`, ours: the mixed recipe).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ... import losses, ops
from ...zoo import Context, TwoStepStudent
from ..told import told
from .guidance import Guidance
from .method import Cast, Metrics, Streams, TrainingBatch, alternate, check_alternation, normal, wanted


@dataclass(frozen=True)
class TurboPPConfig:
    kind: Literal["turbo_pp"] = "turbo_pp"
    guidance_per_generator: int = told(5, "guidance updates of an iteration, before the generator's")
    end_to_end: bool = told(
        True, "the final loss reaches step 1 through step 2; false: the gradient is cut between them"
    )
    step_one_loss: bool = told(True, "step 1's one-jump prediction has the same losses as the final image")
    inherit: float = told(0.1, "share of the gradient that step 1 inherits (w); 1 is the plain unroll")
    inherit_clip: float | None = told(None, "largest norm of a batch's inherited gradient; null: none (ours)")
    mode: Literal["recompute", "retain", "plain"] = told(
        "recompute", "how step 1's graph is kept: docs/two_step_backward.md"
    )
    diversity: float = told(
        0.0, "weight of DP-DMD's term on step 1; needs the cache's anchors (ours: the mixed recipe)"
    )

    def check(self) -> Iterable[str]:
        yield from check_alternation(self.guidance_per_generator)
        if self.inherit < 0:
            yield f"inherit is {self.inherit}, expected a share from 0 on; the paper's is .1, and 1 is the plain unroll"
        if self.inherit_clip is not None and self.inherit_clip <= 0:
            yield f"inherit_clip is {self.inherit_clip}, expected a number above 0, or null for none"
        if not self.end_to_end and (self.inherit != TurboPPConfig.inherit or self.inherit_clip is not None):
            yield "inherit or inherit_clip is given, and end_to_end is off: nothing is inherited"
        if self.diversity and not self.step_one_loss:
            yield "diversity is a part of step 1's loss, and step_one_loss is off"
        if not self.step_one_loss and not (self.end_to_end and self.inherit):
            yield (
                "step 1 would learn nothing: step_one_loss is off and no gradient is inherited (end_to_end, inherit)"
            )


class TurboPP:
    roles: ClassVar[tuple[str, ...]] = ("real_score", "fake_score", "discriminator")
    steps: ClassVar[tuple[int, int | None]] = (2, 2)

    @classmethod
    def wants(cls, config: TurboPPConfig) -> frozenset[str]:
        return frozenset({"latents", "anchor"} if config.diversity else {"latents"})

    @classmethod
    def build(cls, config: TurboPPConfig, cast: Cast, shared: Streams) -> TurboPP:
        assert isinstance(cast.student, TwoStepStudent) and cast.guidance is not None
        return cls(cast.student, cast.guidance, config)

    def __init__(self, student: TwoStepStudent, guidance: Guidance, config: TurboPPConfig) -> None:
        if guidance.discriminator is None:
            raise ValueError("turbo_pp: it is adversarial, and there is no discriminator among the roles")
        for fault in config.check():
            raise ValueError(f"turbo_pp: {fault}")
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
        config, context, student = self.config, batch.context, self.student
        noise = normal(batch, streams, "student")
        if config.diversity:  # the teacher's path from this very noise
            noise = wanted(batch.anchor_noise, "turbo_pp", "anchor_noise", "diversity needs the teacher's anchors")
        metrics: Metrics = {}

        def final_loss(x: Tensor) -> Tensor:
            return self._both_terms("final", x, student.sigmas[1], batch, streams, metrics)

        def first_loss(x_a: Tensor) -> Tensor:
            loss = self._both_terms("first", x_a, student.sigmas[0], batch, streams, metrics)
            if config.diversity:
                anchor = wanted(batch.anchor, "turbo_pp", "anchor", "diversity needs the teacher's anchors")
                # x_A = noise - v0, so this is the loss of v0.
                apart = losses.target_prediction_loss(noise - x_a, noise, anchor, student.sigmas[1])
                metrics["diversity_loss"] = apart.detach()
                loss = loss + config.diversity * apart
            return loss

        result = ops.two_step_backward(
            lambda x: student.velocity(0, x, context),
            lambda z: student.velocity(1, z, context),
            noise,
            student.sigmas,
            first_loss if config.step_one_loss else None,
            final_loss,
            inherit=config.inherit if config.end_to_end else 0.0,
            clip=config.inherit_clip,
            mode=config.mode,
            loss_scale=scale,
            modules=(student.first, student.second),
        )
        if result.inherited_norm is not None:
            metrics["inherited_norm"] = result.inherited_norm
        metrics["sample_std"] = result.x.std()
        return metrics

    def _both_terms(
        self, name: str, x: Tensor, step_sigma: float, batch: TrainingBatch, streams: Streams, metrics: Metrics
    ) -> Tensor:
        matching, seen = self.guidance.matching(x, step_sigma, batch.context, streams)
        adversarial, more = self.guidance.adversarial(x, batch.context, streams, batch.latents)
        metrics.update({f"{name}_{key}": value for key, value in (seen | more).items()})
        metrics[f"{name}_loss"] = (matching + adversarial).detach()
        return matching + adversarial

    def _guidance(self, batch: TrainingBatch, streams: Streams, scale: float) -> Metrics:
        real = wanted(batch.latents, "turbo_pp", "latents", "write the teacher's images with `twostep cache`")
        fake = self._samples(batch, streams)
        score, metrics = self.guidance.train_fake_score(fake, batch.context, streams)
        heads, more = self.guidance.train_discriminator(fake, real, batch.context, streams)
        (scale * (score + heads)).backward()
        return metrics | more

    @torch.no_grad()
    def _samples(self, batch: TrainingBatch, streams: Streams) -> Tensor:
        """What the generator is judged by: final images, and step 1's one-jump predictions where those are trained too;
        which of the two, by a coin for each sample (ours: the paper does not say)."""
        noise = normal(batch, streams, "guidance")
        v0 = self.student.velocity(0, noise, batch.context)
        z = noise + (self.student.sigmas[1] - 1) * v0
        x = self.student.step(1, z, batch.context)
        if not self.config.step_one_loss:
            return x
        generator = streams["guidance"]
        coin = torch.rand(len(x), generator=generator, device=generator.device).to(x.device) < 0.5
        return torch.where(coin.view(-1, 1, 1, 1), x, noise - v0)
