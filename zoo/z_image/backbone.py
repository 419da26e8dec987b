"""Z-Image as a velocity field.

The network takes t = 1 - sigma and returns x - eps, with one frame axis; the public pipelines negate its output. A
context may be longer than the text alone (text and image from a vision-language encoder: same path). If its lengths
count segments, the omni path runs, in which caption segments stand around the references and clean tokens have a
modulation of their own; without references there is one segment.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor, nn

from ..backbone import Backbone
from ..context import Context
from . import omni, packing


class ZImageBackbone(Backbone):
    family = "z-image"

    def __init__(self, model: nn.Module, shift: float = 3.0, doubt: str | None = None) -> None:
        """shift is the scheduler's; 3 is Z-Image-Turbo's. doubt: why the pipeline's grid is another."""
        super().__init__(model)
        self.shift, self.doubt = shift, doubt
        self.patch_size, self.frame_patch = self.model.all_patch_size[0], self.model.all_f_patch_size[0]
        if self.frame_patch != 1:
            raise ValueError(
                f"ZImageBackbone: the model has frame patches of {self.frame_patch}, expected 1: one image a sample"
            )
        self.latent_factor = self.patch_size

    @property
    def channels(self) -> int:
        return self.model.in_channels

    @property
    def context_width(self) -> int:
        return self.model.config.cap_feat_dim

    @property
    def width(self) -> int:
        return self.model.dim

    def blocks(self) -> list[nn.Module]:
        return list(self.model.layers)

    def default_shift(self, height: int, width: int, steps: int) -> float:
        if self.doubt is not None:
            warnings.warn(f"{self.doubt}: give the shift or the sigmas if that is not meant", stacklevel=2)
        return self.shift

    def _predict(self, x: Tensor, sigma: Tensor, context: Context, taps: Sequence[int] | None) -> Tensor | list[Tensor]:
        # The pipeline's own rounding: it counts time in thousandths.
        t = (1000 - sigma * 1000) / 1000
        segments = 0 if context.lengths is None or context.lengths.dim() == 1 else context.lengths.shape[1]
        if segments > 1 and not context.references:
            raise ValueError(
                f"ZImageBackbone: the context has captions of {segments} segments and no references; segments stand "
                f"around reference images"
            )
        if context.references or context.vision or segments:  # one segment: the omni model without an image
            out = omni.forward(
                self.model, x.unsqueeze(2), t, context, patch_size=self.patch_size, taps=taps, real_tables=self.fused
            )
        else:
            out = packing.forward(
                self.model,
                x.unsqueeze(2),
                t,
                context.features,
                context.lengths_of_samples(),
                patch_size=self.patch_size,
                f_patch_size=self.frame_patch,
                taps=taps,
                real_tables=self.fused,
            )
        return out if isinstance(out, list) else -out.squeeze(2)
