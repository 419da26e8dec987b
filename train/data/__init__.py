"""Data for training: prompts, images, contexts and the teacher's samples, in an order that checkpoints keep.

Importing this loads nothing: the command line looks in here, and `twostep doctor` runs without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batches import Batch, PromptBatches, ShapesBatch, ShapesBatches
    from .images import ImageFolder, bucket_sizes
    from .noise import NoiseStreams, draw_noise, noise_generator, sample_noise
    from .order import BucketOrder, Order
    from .pairs import TeacherCache
    from .prefetch import Prefetch, Stateful
    from .prompts import Prompts, read_prompts

_HOMES = {
    "batches": ("Batch", "PromptBatches", "ShapesBatch", "ShapesBatches"),
    "images": ("ImageFolder", "bucket_sizes"),
    "noise": ("NoiseStreams", "draw_noise", "noise_generator", "sample_noise"),
    "order": ("BucketOrder", "Order"),
    "pairs": ("TeacherCache",),
    "prefetch": ("Prefetch", "Stateful"),
    "prompts": ("Prompts", "read_prompts"),
}

__all__ = [
    "Batch",
    "BucketOrder",
    "ImageFolder",
    "NoiseStreams",
    "Order",
    "Prefetch",
    "PromptBatches",
    "Prompts",
    "ShapesBatch",
    "ShapesBatches",
    "Stateful",
    "TeacherCache",
    "bucket_sizes",
    "draw_noise",
    "noise_generator",
    "read_prompts",
    "sample_noise",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
