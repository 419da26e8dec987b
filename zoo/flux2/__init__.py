"""FLUX.2 and FLUX.2-klein: fused modules, and the batch through the network."""

from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers import transformer_flux2 as stock
from torch import nn

from ..parts_read import Norms
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

ATTENTION: tuple[type, ...] = (stock.Flux2Attention, stock.Flux2ParallelSelfAttention)
NORMS: dict[type, tuple[Norms, ...]] = {
    stock.Flux2TransformerBlock: tuple(
        Norms((name,), nn.LayerNorm, weight=False) for name in ("norm1", "norm1_context", "norm2", "norm2_context")
    ),
    stock.Flux2SingleTransformerBlock: (Norms(("norm",), nn.LayerNorm, weight=False),),
    stock.Flux2Attention: (
        Norms(("norm_q", "norm_k"), nn.RMSNorm, together=True),
        Norms(("norm_added_q", "norm_added_k"), nn.RMSNorm, together=True),
    ),
    stock.Flux2ParallelSelfAttention: (Norms(("norm_q", "norm_k"), nn.RMSNorm, together=True),),
    AdaLayerNormContinuous: (Norms(("norm",), nn.LayerNorm),),
}

__all__ = ["ATTENTION", "FUSED", "NORMS", "STOCK"]
