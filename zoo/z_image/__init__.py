"""Z-Image: fused modules, and the batch through the network."""

from diffusers.models.transformers import transformer_z_image as stock

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

__all__ = ["FUSED", "STOCK"]
