"""The whole transformer, for stock callers: lists in, lists out, as ZImagePipeline and trainers call it.

Images of one size go through as one batch (packing.py). Mixed sizes and the omni path keep stock's assembly of the
sequence, around fused blocks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_z_image as stock
from diffusers.utils import apply_lora_scale
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..fuse import fuse
from . import packing


class ZImageTransformer2DModel(stock.ZImageTransformer2DModel):  # type: ignore[misc]
    @functools.wraps(stock.ZImageTransformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Of type(model).from_pretrained and from_config; `fuse` calls no __init__. The blocks are to be fused too."""
        super().__init__(*args, **kwargs)
        fuse(self)

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        x,
        t: Tensor,
        cap_feats,
        return_dict: bool = True,
        controlnet_block_samples: dict[int, Tensor] | None = None,
        siglip_feats=None,
        image_noise_mask=None,
        patch_size: int = 2,
        f_patch_size: int = 1,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ):
        if isinstance(x[0], list) or any(image.shape != x[0].shape for image in x):
            return super().forward(
                x,
                t,
                cap_feats,
                return_dict=return_dict,
                controlnet_block_samples=controlnet_block_samples,
                siglip_feats=siglip_feats,
                image_noise_mask=image_noise_mask,
                patch_size=patch_size,
                f_patch_size=f_patch_size,
                joint_attention_kwargs=joint_attention_kwargs,
            )
        assert patch_size in self.all_patch_size and f_patch_size in self.all_f_patch_size
        out = packing.forward(
            self,
            torch.stack(list(x)),
            t,
            pad_sequence(list(cap_feats), batch_first=True),
            [len(caption) for caption in cap_feats],
            patch_size=patch_size,
            f_patch_size=f_patch_size,
            residuals=controlnet_block_samples,
        )
        assert isinstance(out, Tensor)
        images = list(out.unbind(0))
        return Transformer2DModelOutput(sample=images) if return_dict else (images,)
