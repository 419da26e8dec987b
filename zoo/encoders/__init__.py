"""Encoders of captions, and of captions with a target image: one file per family, all handing out a Context."""

from .klein import KleinTextEncoder, encode_reference, klein_reference_context
from .load import load_text_encoder, text_encoder_files
from .protocol import TextEncoder
from .tokens import TruncatedPrompt
from .vision import ZImageVisionEncoder, load_vision_encoder
from .zimage import ZImageOmniTextEncoder, ZImageTextEncoder

__all__ = [
    "KleinTextEncoder",
    "TextEncoder",
    "TruncatedPrompt",
    "ZImageOmniTextEncoder",
    "ZImageTextEncoder",
    "ZImageVisionEncoder",
    "encode_reference",
    "klein_reference_context",
    "load_text_encoder",
    "load_vision_encoder",
    "text_encoder_files",
]
