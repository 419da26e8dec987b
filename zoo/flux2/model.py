"""The whole transformer, for stock callers: Flux2Pipeline, Flux2KleinPipeline and trainers call it as ever."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers.models.transformers import transformer_flux2 as stock
from diffusers.utils import apply_lora_scale
from torch import Tensor

from ..fuse import fuse
from . import blocks, packing


class Flux2Transformer2DModel(stock.Flux2Transformer2DModel):  # type: ignore[misc]
    @functools.wraps(stock.Flux2Transformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Of type(model).from_pretrained and from_config; `fuse` calls no __init__. The blocks are to be fused too."""
        super().__init__(*args, **kwargs)
        fuse(self)

    @apply_lora_scale("joint_attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        kv_cache=None,
        kv_cache_mode: str | None = None,
        num_ref_tokens: int = 0,
        ref_fixed_timestep: float = 0.0,
    ):
        if kv_cache_mode is not None:
            raise ValueError(
                "a fused Flux2Transformer2DModel keeps no cache of reference tokens (kv_cache_mode): unfuse(model) "
                "first"
            )
        kwargs = joint_attention_kwargs or {}
        positions = torch.cat([ids[0] if ids.ndim == 3 else ids for ids in (txt_ids, img_ids)])
        out = packing.forward(
            self,
            hidden_states,
            timestep,
            encoder_hidden_states,
            blocks.table(self.pos_embed(positions)),
            guidance=guidance,
            attention_mask=kwargs.get("attention_mask"),
        )
        return stock.Flux2Transformer2DModelOutput(sample=out) if return_dict else (out,)
