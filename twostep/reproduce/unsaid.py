"""How varied is drawn what captions leave unsaid: the background.

Of the images of one caption, the share of pairs whose backgrounds differ, as the detector reads them: a count of modes,
where distances of features also see how well things are drawn. Backgrounds are drawn and read without error: of 333
captions that name one, every image of the base, the teacher and five students, collapsed ones among them, shows it.
Independent draws from the data would give .82 for captions that name none, since some colours exclude some backgrounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..zoo.miniature import say, scenes_at, write
from ..zoo.miniature.detector import Detector, detect


def captions(stream: int, count: int) -> list[str]:
    """Captions of the stream, no two the same, that say nothing of the background."""
    kept: dict[str, None] = {}
    start = 0
    while len(kept) < count:
        index = torch.arange(start, start + 1024)
        claims = say(scenes_at(stream, index), stream, index)
        said = write(claims)
        kept |= {said[row]: None for row in (claims.background < 0).nonzero()[:, 0].tolist()}
        start += 1024
    return list(kept)[:count]


def variety(backgrounds: Tensor) -> float:
    """Backgrounds [captions, seeds]: the share of pairs of a caption's images in which they differ."""
    _, seeds = backgrounds.shape
    differ = (backgrounds[:, :, None] != backgrounds[:, None, :]).double().sum((1, 2))
    return float((differ / (seeds * (seeds - 1))).mean())


def shown(detector: Detector, pictures: Tensor, seeds: int) -> float:
    """`variety` of images [captions * seeds, 3, 64, 64] in [-1, 1], each caption's one after the other."""
    return variety(detect(detector, pictures).background.view(-1, seeds))
