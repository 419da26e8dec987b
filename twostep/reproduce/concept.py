"""A concept that the miniature does not know: a zorp, by which its owner means a purple star.

The miniature has no token for the word, and what it draws for it is any shape in any colour. A zorp is in images whose
captions name it and say neither its shape nor its colour, but all else; it is there if the detector finds one object, a
purple star.

Beside images of it there is something ordinary, that the rest may be kept: images of any kind with captions as the
stream has them, which leave things open; or images of one shape whose captions leave nothing open (no caption says in
which row two shapes stand); or, for D-OPSD, the first kind's captions without any image. What a caption leaves open is
another thing in the student's own image and in the image that D-OPSD's teacher is shown, which is likely to pull the
student away from what it has begun.

Why no shape or colour that was never seen: the frozen parts have no place for one. The autoencoder decodes cyan as
blue (none of 64 images shows cyan afterwards), and of an unseen shape, which it keeps, the vision tower tells the
nearest of its eight. D-OPSD's teacher knows an image by that tower alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..images import pil_image, to_bytes
from ..train.data.prompts import write_prompts
from ..zoo.miniature import Scenes, samples, scenes
from ..zoo.miniature.captions import say_all, write
from ..zoo.miniature.detector import Detector, detect
from ..zoo.miniature.shapes import COLOURS, SHAPES, render

WORD = "zorp"
SHAPE, COLOUR = "star", "purple"
_SHAPE, _COLOUR = SHAPES.index(SHAPE), list(COLOURS).index(COLOUR)


def concept_scenes(stream: int, count: int) -> tuple[Scenes, Tensor]:
    """Scenes with one object, which is the concept, and their numbers in the stream."""
    start = 0
    kept: list[Tensor] = []
    while sum(map(len, kept)) < count:
        drawn = scenes(stream, start, 4096)
        alone = (drawn.count == 1) & (drawn.shape[:, 0] == _SHAPE) & (drawn.colour[:, 0] == _COLOUR)
        kept.append(start + alone.nonzero()[:, 0])
        start += 4096
    numbers = torch.cat(kept)[:count]
    return scenes(stream, 0, start)[numbers], numbers


def captions(stream: int, count: int) -> list[str]:
    """Captions of such scenes, which all name the concept, and all else that is to be seen."""
    found, _ = concept_scenes(stream, count)
    return [caption.replace(f"{COLOUR} {SHAPE}", WORD) for caption in write(say_all(found))]


def images(stream: int, count: int) -> Tensor:
    """[count, 3, 64, 64] in [-1, 1]: the drawings of `captions`."""
    return render(concept_scenes(stream, count)[0])


def write_folder(folder: Path, stream: int, count: int, others: int) -> None:
    """Images with captions beside them, as data of kind `images` wants them, and prompts.

    alone/       the concept
    any/         the concept, and ordinary images of any kind, whose captions leave things open
    one-shape/   the concept, and ordinary images of one shape, whose captions say all
    prompts.txt  the captions of the ordinary images of any kind
    """
    drawn, said = images(stream, count), captions(stream, count)
    ordinary = samples(stream + 1, 0, others)
    many = scenes(stream + 1, 0, 4 * others)
    single = many[(many.count == 1).nonzero()[:others, 0]]
    _write_images(folder / "alone", drawn, said)
    _write_images(folder / "any", torch.cat([drawn, ordinary.images]), said + ordinary.captions)
    _write_images(folder / "one-shape", torch.cat([drawn, render(single)]), said + write(say_all(single)))
    write_prompts(folder / "prompts.txt", ordinary.captions)


def _write_images(folder: Path, drawn: Tensor, said: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, caption) in enumerate(zip(to_bytes(drawn), said, strict=True)):
        pil_image(image).save(folder / f"{number:04}.png")
        (folder / f"{number:04}.txt").write_text(caption, encoding="utf-8")


def shows(detector: Detector, pictures: Tensor) -> Tensor:
    """[n] bool: is the concept, and nothing else, in images [n, 3, 64, 64] in [-1, 1]?"""
    seen = detect(detector, pictures)
    found: Tensor = (seen.count == 1) & (seen.shape[:, 0] == _SHAPE) & (seen.colour[:, 0] == _COLOUR)
    return found
