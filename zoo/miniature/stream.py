"""The data of the miniature as training takes it: sample `index` of stream `seed` is one picture and one caption,
always the same.

A loader keeps no state but the next index; several readers take every k-th. Streams of different seeds are independent,
so training and evaluation never share a draw by using different ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .captions import Claims, say, write
from .shapes import Scenes, render, scenes_at


@dataclass(frozen=True)
class Samples:
    images: Tensor  # [n, 3, 64, 64] in [-1, 1]
    captions: list[str]
    claims: Claims
    scenes: Scenes


def samples(seed: int, start: int, count: int) -> Samples:
    """Samples start .. start + count - 1."""
    return samples_at(seed, torch.arange(start, start + count))


def samples_at(seed: int, index: Tensor) -> Samples:
    """The samples of these indices, an int64 tensor [n]."""
    scenes = scenes_at(seed, index)
    claims = say(scenes, seed, index)
    return Samples(render(scenes), write(claims), claims, scenes)
