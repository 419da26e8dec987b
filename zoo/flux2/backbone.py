"""FLUX.2 and FLUX.2-klein as a velocity field.

The network takes sigma and returns eps - x, of tokens: latents come packed, 32 x 2 x 2 channels, one token a position.
References of a context (klein's editing path) follow the image as clean tokens; their part of the output is dropped.
A context without lengths is attended to in full, padding and all, as the klein pipeline does; with lengths, padding is
masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn

from ..backbone import Backbone
from ..context import Context
from . import packing


class Flux2Backbone(Backbone):
    family = "flux2"
    latent_factor = 1

    def __init__(self, model: nn.Module, embedded_guidance: float | None = None) -> None:
        super().__init__(model)
        takes = self.model.config.guidance_embeds
        if takes and embedded_guidance is None:
            raise ValueError(
                "Flux2Backbone: this model was distilled with a guidance input (guidance_embeds in its config): give "
                "it with embedded_guidance=..., 4.0 in the public pipeline"
            )
        if not takes and embedded_guidance is not None:
            raise ValueError("Flux2Backbone: embedded_guidance was given, and this model has no guidance input")
        self.embedded_guidance = embedded_guidance

    @property
    def channels(self) -> int:
        return self.model.config.in_channels

    @property
    def context_width(self) -> int:
        return self.model.config.joint_attention_dim

    @property
    def width(self) -> int:
        return self.model.inner_dim

    def blocks(self) -> list[nn.Module]:
        return [*self.model.transformer_blocks, *self.model.single_transformer_blocks]

    def default_shift(self, height: int, width: int, steps: int) -> float:
        """The pipeline shifts by exp(mu), and has fitted mu to the number of tokens and steps."""
        return math.exp(compute_empirical_mu(height * width, steps))

    def _predict(self, x: Tensor, sigma: Tensor, context: Context, taps: Sequence[int] | None) -> Tensor | list[Tensor]:
        if context.vision:
            raise ValueError("Flux2Backbone: the context has vision features, which FLUX.2 does not take")
        images = (x, *context.references)
        grids = [(image.shape[2], image.shape[3]) for image in images]
        tokens = torch.cat([image.flatten(2).transpose(1, 2) for image in images], dim=1)
        length, own = context.features.shape[1], grids[0][0] * grids[0][1]
        lengths = None if context.lengths is None else context.lengths_of_samples()
        seen = packing.mask(lengths, length, tokens.shape[1], x.device)
        features = context.features
        if seen is not None:  # whatever stands in the padding, a NaN too, gets no further than this
            features = features.masked_fill(~seen[:, 0, 0, :length].unsqueeze(-1), 0)
        table = packing.table(self.model, length, grids, x.device)
        rotary = table if self.fused else packing.stock_table(table)
        out = packing.forward(
            self.model,
            tokens,
            sigma,
            features,
            rotary,
            guidance=None if self.embedded_guidance is None else torch.full_like(sigma, self.embedded_guidance),
            attention_mask=seen,
            taps=taps,
        )
        if isinstance(out, list):
            return [tapped[:, :own] for tapped in out]
        return out[:, :own].transpose(1, 2).unflatten(2, grids[0])
