"""Flow matching: pre-training of a base, and plain fine-tuning, the baseline that D-OPSD is compared with.

    loss = mean (v(x_sigma, sigma, caption) - (eps - x))^2,   sigma logit-normal, shifted

A share of the captions is replaced by the empty one, so that the base answers to guidance. A share of the batches may
have their captions' images in the context (a pipeline's vision-language twin, or references), so that the base answers
to those as well: what D-OPSD's teacher is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ... import losses
from ...zoo import Backbone, Context, Teacher
from ..told import told
from .method import Cast, Metrics, Streams, TrainingBatch, noised, normal, wanted


@dataclass(frozen=True)
class FlowMatchingConfig:
    kind: Literal["flow_matching"] = "flow_matching"
    caption_dropout: float = told(
        0.1, "share of captions that become the empty one, so that the base answers to guidance"
    )
    image_contexts: float = told(0.0, "share of batches whose contexts hold the images as well")
    mean: float = told(0.0, "of the logit-normal that noise levels are drawn from")
    std: float = told(1.0, "of the logit-normal")
    shift: float = told(1.0, "of the noise levels; above 1 favours noise")
    sample_steps: int = told(28, "of samples that are drawn while it trains")
    sample_guidance: float = told(4.0, "of those samples")

    def check(self) -> Iterable[str]:
        if not 0 <= self.caption_dropout <= 1:
            yield f"caption_dropout is {self.caption_dropout}, expected 0 to 1"
        if not 0 <= self.image_contexts <= 1:
            yield f"image_contexts is {self.image_contexts}, expected 0 to 1"
        if self.std <= 0 or self.shift <= 0:
            yield f"std is {self.std} and shift {self.shift}, expected numbers above 0"
        if self.sample_steps < 1:
            yield f"sample_steps is {self.sample_steps}, expected at least 1"


class FlowMatching:
    roles: ClassVar[tuple[str, ...]] = ()
    steps: ClassVar[tuple[int, int | None]] = (1, None)

    @classmethod
    def wants(cls, config: FlowMatchingConfig) -> frozenset[str]:
        return frozenset({"latents", "target_context"} if config.image_contexts else {"latents"})

    @classmethod
    def build(cls, config: FlowMatchingConfig, cast: Cast, shared: Streams) -> FlowMatching:
        networks = cast.student.distinct_networks()
        if len(networks) > 1:
            raise ValueError(f"flow_matching: it trains one network, and the student has {len(networks)}: per_step")
        return cls(networks[0], config, cast.empty)

    def __init__(self, network: Backbone, config: FlowMatchingConfig, empty: Context | None = None) -> None:
        if config.caption_dropout and empty is None:
            raise ValueError("flow_matching: caption_dropout needs the context of the empty caption")
        for fault in config.check():
            raise ValueError(f"flow_matching: {fault}")
        self.network, self.config, self.empty = network, config, empty

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        return {"generator": [p for p in self.network.parameters() if p.requires_grad]}

    def updates(self, iteration: int) -> Sequence[str]:
        return ("generator",)

    def run(self, update: str, batch: TrainingBatch, streams: Streams, scale: float = 1.0) -> Metrics:
        x = wanted(batch.latents, "flow_matching", "latents", "it learns from images")
        generator = streams["student"]
        sigma = losses.logit_normal_sigmas(
            len(x), self.config.mean, self.config.std, generator=generator, device=x.device
        )
        sigma = losses.shift_sigmas(sigma, self.config.shift)
        noise = normal(batch, streams, "student")
        v = self.network.velocity(noised(x, sigma, noise), sigma, self._context(batch, generator))
        loss = losses.flow_matching_loss(v, x, noise)
        (scale * loss).backward()
        return {"final_loss": loss.detach()}

    def sample(self, noise: Tensor, context: Context) -> Tensor:
        teacher = Teacher(
            self.network, steps=self.config.sample_steps, guidance=self.config.sample_guidance, negative=self.empty
        )
        return teacher.sample(noise, context)

    def _context(self, batch: TrainingBatch, generator: torch.Generator) -> Context:
        share = self.config.image_contexts
        if share == 1 or (share and float(torch.rand((), generator=generator)) < share):
            return wanted(batch.target_context, "flow_matching", "target_context", "image_contexts asks for them")
        dropped = torch.rand(batch.context.batch, generator=generator) < self.config.caption_dropout
        if self.empty is None or not bool(dropped.any()):
            return batch.context
        joined = Context.cat([batch.context, self.empty])
        index = torch.arange(batch.context.batch)
        index[dropped] = batch.context.batch
        return joined[index]
