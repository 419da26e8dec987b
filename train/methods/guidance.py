"""The guidance networks of distribution matching and their use: fake score, real score, discriminator.

    levels        one a sample, shared by the real and the fake score (Turbo++): below the input of the step in training
    matching      DMD's gradient from the guided real and the fake clean prediction: three forwards without a graph
    adversarial   the discriminator's logits, at a level of its own

Every term comes with its weight and with numbers to watch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ... import losses
from ...zoo import Context, Discriminator, FakeScore, Teacher
from ..told import told
from .method import Metrics, Streams, draw_noise_like, noised, wanted


@dataclass(frozen=True)
class Weights:
    """Of the terms; the defaults are Turbo++'s (arXiv 2606.12575)."""

    dmd: float = told(1e-2, "distribution matching")
    fake_score: float = told(1e-2, "the fake score's denoising")
    generator_gan: float = told(1e-3, "the generator's adversarial loss")
    discriminator: float = told(1e-3, "the discriminator's loss")
    r1: float = told(0.0, "approximate R1 of the discriminator (ours: off)")

    def check(self) -> Iterable[str]:
        for name, value in vars(self).items():
            if value < 0:
                yield f"{name} is {value}, expected at least 0"


@contextlib.contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """What runs inside leaves these parameters without a gradient, and hands gradients through to its input."""
    switched = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in switched:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in switched:
            parameter.requires_grad_(True)


@dataclass
class Guidance:
    teacher: Teacher  # the real score: it answers to guidance
    fake: FakeScore
    discriminator: Discriminator | None
    weights: Weights
    guidance: float = 4.0  # of the real score; ours (Turbo++'s is not published)
    kind: str = "softplus"
    lowest: float = 0.02  # of re-noise levels, as DMD2
    r1_noise: float = 0.1

    def parameters(self) -> list[nn.Parameter]:
        heads = [] if self.discriminator is None else list(self.discriminator.trainable_parameters())
        return [*self.fake.trainable_parameters(), *heads]

    def matching(self, x: Tensor, step_sigma: float, context: Context, streams: Streams) -> tuple[Tensor, Metrics]:
        """The distribution-matching loss of clean predictions x of a step whose input was at step_sigma."""
        sigma = losses.sigmas_below(
            len(x), min(step_sigma, 0.98), low=self.lowest, generator=streams["matching"], device=x.device
        )
        seen = noised(x.detach(), sigma, draw_noise_like(x, streams["matching"]))
        with torch.no_grad():
            real = self.teacher.clean(seen, sigma, context, guidance=self.guidance)
            fake = self.fake.clean(seen, sigma, context)
        loss = losses.dmd_loss(x, real, fake)
        return self.weights.dmd * loss, {"dmd_gradient_norm": (2 * loss.detach()).sqrt()}

    def adversarial(
        self, x: Tensor, context: Context, streams: Streams, real: Tensor | None = None
    ) -> tuple[Tensor, Metrics]:
        """The generator's loss from the discriminator; `real` are the paired images, for a loss that compares."""
        assert self.discriminator is not None
        sigma = self._level(x, streams)
        noise = draw_noise_like(x, streams["discriminator"])
        real_logits = None
        if self.kind == "relativistic":
            real = wanted(real, "the relativistic loss", "latents", "it compares with real images")
            with torch.no_grad():
                real_logits = self.discriminator(noised(real, sigma, noise), sigma, context)
        with frozen(self.discriminator.trainable_parameters()):
            logits = self.discriminator(noised(x, sigma, noise), sigma, context)
        loss = losses.generator_adversarial_loss(
            logits, real_logits, kind=self.kind, sample=x, missing_gradient="error"
        )
        return self.weights.generator_gan * loss, {"fake_logit": logits.detach().mean()}

    def train_fake_score(self, x: Tensor, context: Context, streams: Streams) -> tuple[Tensor, Metrics]:
        """Plain denoising of detached samples, at any level."""
        generator = streams["fake_score"]
        sigma = losses.uniform_sigmas(len(x), generator=generator, device=x.device)
        noise = draw_noise_like(x, generator)
        v = self.fake.velocity(noised(x, sigma, noise), sigma, context)
        loss = losses.fake_score_loss(v, x, noise)
        return self.weights.fake_score * loss, {"fake_score_loss": loss.detach()}

    def train_discriminator(
        self, fake: Tensor, real: Tensor, context: Context, streams: Streams
    ) -> tuple[Tensor, Metrics]:
        """Real and fake share caption and level."""
        assert self.discriminator is not None
        sigma, generator = self._level(fake, streams), streams["discriminator"]
        seen = noised(real, sigma, draw_noise_like(real, generator))
        real_logits = self.discriminator(seen, sigma, context)
        fake_logits = self.discriminator(noised(fake, sigma, draw_noise_like(fake, generator)), sigma, context)
        loss = losses.discriminator_loss(fake_logits, real_logits, kind=self.kind)
        metrics = {"discriminator_loss": loss.detach(), "logit_gap": (real_logits - fake_logits).detach().mean()}
        loss = self.weights.discriminator * loss
        if self.weights.r1 > 0:
            nudged = self.discriminator(seen + self.r1_noise * draw_noise_like(seen, generator), sigma, context)
            r1 = losses.approximate_r1(real_logits, nudged)
            metrics["r1"] = r1.detach()
            loss = loss + self.weights.r1 * r1
        return loss, metrics

    def _level(self, x: Tensor, streams: Streams) -> Tensor:
        return losses.uniform_sigmas(len(x), 0.02, 0.98, generator=streams["discriminator"], device=x.device)
