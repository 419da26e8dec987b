"""Z-Image's network as a program of tensors alone, for torch.export: batch, image and caption may have any size.

What `packing` decides on the CPU and keeps, the tables of a layout, is computed here from shapes, which may be symbols.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor, nn

from .packing import Layout, axis_tables, round_up, through


class TraceableZImage(nn.Module):
    """forward(x [B, C, H, W], sigma [B], features [B, L, F], lengths [B]) -> v.

    L is a multiple of 32. A caption's tokens from its length on are taken for padding; all captions of a batch fill L
    but for less than 32 tokens, as stock pads a caption, so that there is nothing that attention must not see.
    """

    table_t: Tensor
    table_h: Tensor
    table_w: Tensor

    def __init__(self, model: Any, patch_size: int) -> None:
        super().__init__()
        self.model: Any = model
        self.patch_size = patch_size
        config = self.model.config
        tables = axis_tables(
            tuple(config.axes_dims), tuple(config.axes_lens), float(config.rope_theta), model.x_pad_token.device
        )
        for axis, table in zip("thw", tables, strict=True):
            self.register_buffer(f"table_{axis}", table.clone(), persistent=False)

    def example(self, batch: int, height: int, width: int, tokens: int) -> dict[str, Tensor]:
        """Random inputs for latents of this size and captions that fill this many tokens, a multiple of 32."""
        like = self.model.x_pad_token
        features = torch.randn(batch, tokens, self.model.config.cap_feat_dim)
        lengths = tokens - torch.arange(batch) % SEQ_MULTI_OF
        return {
            "x": torch.randn(batch, self.model.in_channels, height, width).to(like),
            "sigma": torch.full((batch,), 0.5, device=like.device),
            "features": features.to(like),
            "lengths": lengths.to(like.device),
        }

    def dims(self, batch: Any) -> dict[str, dict[int, Any]]:
        lens = self.model.config.axes_lens
        height, width = (torch.export.Dim(n, min=1, max=lens[axis]) for n, axis in (("rows", 1), ("columns", 2)))
        captions = torch.export.Dim("captions", min=1, max=(lens[0] - 2) // SEQ_MULTI_OF)
        image = {0: batch, 2: self.patch_size * height, 3: self.patch_size * width}
        return {
            "x": image,
            "sigma": {0: batch},
            "features": {0: batch, 1: SEQ_MULTI_OF * captions},
            "lengths": {0: batch},
        }

    def _layout(self, height: int, width: int, tokens: int) -> Layout:
        """Rows are looked up; no tensor holds the padding alone, since what may be empty makes two programs."""
        rows, columns = (torch.arange(n, device=self.table_t.device) for n in (height, width))
        h = rows.unsqueeze(1).expand(height, width).flatten()
        w = columns.unsqueeze(0).expand(height, width).flatten()
        at, inside = _with_padding(h)
        order = torch.arange(tokens, device=h.device)
        # Padding of the image stands at (0, 0, 0). order[-1] + 2 is tokens + 1: ONNX knows no symbol times a tensor.
        image = self._rows(inside * (order[-1] + 2), inside * h[at], inside * w[at])
        caption = self._rows(order + 1, order * 0, order * 0)
        return Layout(height * width, tokens, image, caption, torch.cat([image, caption], dim=1), None, None)

    def _rows(self, t: Tensor, h: Tensor, w: Tensor) -> Tensor:
        """[1, L, Dh/2, 2] of positions [L] along each axis."""
        return torch.cat([self.table_t[t], self.table_h[h], self.table_w[w]], dim=-2).unsqueeze(0)

    def forward(self, x: Tensor, sigma: Tensor, features: Tensor, lengths: Tensor) -> Tensor:
        height, width = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        tokens = features.shape[1]
        caption = self.model.cap_embedder(features)
        beyond = torch.arange(tokens, device=x.device) >= lengths.unsqueeze(1)  # [B, L]
        caption = torch.where(beyond.unsqueeze(-1), self.model.cap_pad_token.to(caption.dtype), caption)
        plan = self._layout(height, width, tokens)
        t = (1000 - sigma * 1000) / 1000
        out = through(self.model, x.unsqueeze(2), t, caption, plan, patch_size=self.patch_size, pad=_padded)
        assert isinstance(out, Tensor)
        return -out.squeeze(2)


def _with_padding(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """For each row up to a multiple of 32: the token that stands there, or the last one, and whether it is a token."""
    index = torch.arange(round_up(tokens.shape[0]), device=tokens.device)
    last = torch.arange(tokens.shape[0], device=tokens.device)[-1]
    return torch.minimum(index, last), index <= last


def _padded(tokens: Tensor, pad_token: Tensor) -> Tensor:
    at, inside = _with_padding(tokens[0])
    return torch.where(inside.unsqueeze(-1), tokens[:, at], pad_token.to(tokens.dtype))
