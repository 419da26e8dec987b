"""Z-Image: fused modules, and the batch through the network."""

from diffusers.models.attention_processor import Attention
from diffusers.models.transformers import transformer_z_image as stock
from torch import nn

from ..parts_read import Norms
from . import blocks, model

STOCK = stock.ZImageTransformer2DModel
FUSED: dict[type, type] = {
    stock.ZImageTransformer2DModel: model.ZImageTransformer2DModel,
    stock.ZImageTransformerBlock: blocks.ZImageTransformerBlock,
    stock.ZSingleStreamAttnProcessor: blocks.ZSingleStreamAttnProcessor,
    stock.FeedForward: blocks.FeedForward,
    stock.FinalLayer: blocks.FinalLayer,
    stock.RMSNorm: blocks.RMSNorm,
}

ATTENTION: tuple[type, ...] = (Attention,)
NORMS: dict[type, tuple[Norms, ...]] = {
    stock.ZImageTransformer2DModel: tuple(
        Norms((name,), stock.RMSNorm) for name in ("cap_embedder.0", "siglip_embedder.0")
    ),
    stock.ZImageTransformerBlock: (
        Norms(("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"), stock.RMSNorm),
    ),
    Attention: (Norms(("norm_q", "norm_k"), stock.RMSNorm, together=True),),
    stock.FinalLayer: (Norms(("norm_final",), nn.LayerNorm, weight=False),),
}

__all__ = ["ATTENTION", "FUSED", "NORMS", "STOCK"]
