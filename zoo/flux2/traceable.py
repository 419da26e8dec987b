"""FLUX.2's network as a program of tensors alone, for torch.export: batch, image and caption may have any size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed
from torch import Tensor, nn

from . import packing
from .blocks import table


class TraceableFlux2(nn.Module):
    """forward(x [B, C, H, W], sigma [B], features [B, L, F]) -> v. All of a caption is seen, as klein has it."""

    def __init__(self, model: Any, embedded_guidance: float | None) -> None:
        super().__init__()
        self.model: Any = model
        self.embedded_guidance = embedded_guidance
        config = self.model.config
        self.positions = Flux2PosEmbed(theta=config.rope_theta, axes_dim=list(config.axes_dims_rope))

    LONGEST = 4096  # tokens of a side and of a caption; torch.export wants a bound

    def example(self, batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        """Random inputs for latents of this size and captions of this many tokens."""
        config, like = self.model.config, next(self.model.parameters())
        features = torch.randn(batch, tokens, config.joint_attention_dim).to(like)
        x = torch.randn(batch, config.in_channels, height, width).to(like)
        return {"x": x, "sigma": torch.full((batch,), 0.5, device=like.device), "features": features}

    def dims(self, batch: Any) -> dict[str, dict[int, Any]]:
        names = ("rows", "columns", "captions")
        height, width, captions = (torch.export.Dim(name, min=2, max=self.LONGEST) for name in names)
        return {"x": {0: batch, 2: height, 3: width}, "sigma": {0: batch}, "features": {0: batch, 1: captions}}

    def forward(self, x: Tensor, sigma: Tensor, features: Tensor) -> Tensor:
        height, width, tokens = x.shape[2], x.shape[3], features.shape[1]
        rows = torch.arange(height, device=x.device).unsqueeze(1).expand(height, width).reshape(-1)
        columns = torch.arange(width, device=x.device).unsqueeze(0).expand(height, width).reshape(-1)
        none = torch.zeros_like(rows)
        image = torch.stack([none, rows, columns, none], dim=1)
        order = torch.arange(tokens, device=x.device)
        text = torch.stack([torch.zeros_like(order)] * 3 + [order], dim=1)
        rotary = table(self.positions(torch.cat([text, image])))
        guidance = None if self.embedded_guidance is None else torch.full_like(sigma, self.embedded_guidance)
        out = packing.forward(self.model, x.flatten(2).transpose(1, 2), sigma, features, rotary, guidance=guidance)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).unflatten(2, (height, width))
