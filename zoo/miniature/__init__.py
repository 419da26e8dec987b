"""The embedded miniature: a real latent text-to-image pipeline, small enough to ship with the package, and its data."""

from .captions import Claims, Verdict, claims_of, judge, say, write
from .model import BASE_AT_ITS_BEST, Miniature, miniature
from .shapes import Scenes, render, scenes, scenes_at
from .stream import Samples, samples, samples_at

__all__ = [
    "BASE_AT_ITS_BEST",
    "Claims",
    "Miniature",
    "Samples",
    "Scenes",
    "Verdict",
    "claims_of",
    "judge",
    "miniature",
    "render",
    "samples",
    "samples_at",
    "say",
    "scenes",
    "scenes_at",
    "write",
]
