"""FLUX.2 and FLUX.2-klein: fused modules, and the batch through the network."""

from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers import transformer_flux2 as stock

from . import blocks, model

STOCK = stock.Flux2Transformer2DModel
FUSED: dict[type, type] = {
    stock.Flux2Transformer2DModel: model.Flux2Transformer2DModel,
    stock.Flux2TransformerBlock: blocks.Flux2TransformerBlock,
    stock.Flux2SingleTransformerBlock: blocks.Flux2SingleTransformerBlock,
    stock.Flux2AttnProcessor: blocks.Flux2AttnProcessor,
    stock.Flux2ParallelSelfAttnProcessor: blocks.Flux2ParallelSelfAttnProcessor,
    stock.Flux2SwiGLU: blocks.Flux2SwiGLU,
    AdaLayerNormContinuous: blocks.AdaLayerNormContinuous,
}

__all__ = ["FUSED", "STOCK"]
