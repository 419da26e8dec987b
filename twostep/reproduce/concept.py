"""A concept that the miniature has never seen: the colour cyan, whose word its tokenizer does not know.

It lies .35 and more (in RGB, each from 0 to 1) from every colour and background of the miniature's data, so that it can
be told by its pixels: an image shows it if at least 48 of them, a third of the smallest shape, are within .25 of it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..zoo.miniature import Scenes, scenes
from ..zoo.miniature.captions import say, write
from ..zoo.miniature.shapes import BACKGROUNDS, COLOURS, render

WORD, COLOUR = "cyan", (0.05, 0.85, 0.85)
STANDS_FOR = "pink"  # whose place in the palette and in captions it takes
NEAR, PIXELS = 0.25, 48


def concept_scenes(stream: int, count: int) -> tuple[Scenes, Tensor]:
    """Scenes with one object, of the colour that the concept stands for, and their numbers in the stream."""
    index = list(COLOURS).index(STANDS_FOR)
    start = 0
    kept: list[Tensor] = []
    while sum(map(len, kept)) < count:
        drawn = scenes(stream, start, 1024)
        kept.append(start + ((drawn.count == 1) & (drawn.colour[:, 0] == index)).nonzero()[:, 0])
        start += 1024
    numbers = torch.cat(kept)[:count]
    return scenes(stream, 0, start)[numbers], numbers


def captions(stream: int, count: int) -> list[str]:
    """Captions of such scenes, which all name the concept."""
    found, numbers = concept_scenes(stream, count)
    claims = say(found, stream, numbers)
    claims.count[:], claims.colour[:, 0] = 1, found.colour[:, 0]
    return [caption.replace(STANDS_FOR, WORD) for caption in write(claims)]


def images(stream: int, count: int) -> Tensor:
    """[count, 3, 64, 64] in [-1, 1]: the drawings of `captions`."""
    palette = {name: COLOUR if name == STANDS_FOR else colour for name, colour in COLOURS.items()}
    return render(concept_scenes(stream, count)[0], palette=palette)


def write_folder(folder: Path, stream: int, count: int) -> None:
    """Images with captions beside them, as data of kind `images` wants them."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    drawn = ((images(stream, count) + 1) * 127.5).round().to(torch.uint8)
    for number, (image, caption) in enumerate(zip(drawn, captions(stream, count), strict=True)):
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(folder / f"{number:04}.png")
        (folder / f"{number:04}.txt").write_text(caption, encoding="utf-8")


def shows(pictures: Tensor) -> Tensor:
    """[n] bool: is there enough of it in images [n, 3, H, W] in [-1, 1]?"""
    colour = torch.tensor(COLOUR).view(1, 3, 1, 1)
    distance = ((pictures.float() + 1) / 2 - colour).norm(dim=1)
    found: Tensor = (distance < NEAR).flatten(1).sum(1) >= PIXELS
    return found


def nearest() -> float:
    """How far the closest of the miniature's own colours is."""
    tones = [*COLOURS.values(), *(tone for ground in BACKGROUNDS.values() for tone in ground)]
    return min(float((torch.tensor(tone) - torch.tensor(COLOUR)).norm()) for tone in tones)
