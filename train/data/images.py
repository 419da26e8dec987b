"""A folder of images with captions, in buckets of one size each.

    name.png + name.txt     the caption beside the image, or
    metadata.jsonl          one object a line: {"file_name": "name.png", "caption": "..."}

Bucket sizes have about one pixel area and sides that are multiples of a factor. An image goes to the bucket whose
aspect ratio is nearest (in logarithms), the largest part of it with that ratio is cut from its centre, and one Lanczos
resampling makes it the bucket's size; small images are enlarged. EXIF rotation is applied, transparency lies on white,
and of an animation the first picture is taken. Files and folders whose names begin with a dot are not looked at.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...images import ENDINGS, decoded, size_of
from .prompts import is_text

METADATA = "metadata.jsonl"
_SHOWN = 5


def bucket_sizes(area: int, factor: int, max_aspect: float = 2.0) -> list[tuple[int, int]]:
    """(height, width) of about this area, in multiples of the factor, from tall to wide: a square, and others."""
    for name, value in (("area", area), ("factor", factor)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"image buckets: {name} is {value!r}, expected an integer of at least 1")
    if not 1 <= max_aspect < math.inf:
        raise ValueError(f"image buckets: max_aspect is {max_aspect!r}, expected a number from 1 on; 1 is squares only")
    if area < factor**2:
        raise ValueError(f"image buckets: area {area} is less than one square of the factor {factor}: {factor**2}")
    units = area / factor**2
    square = max(1, math.floor(math.sqrt(units) + 0.5)) * factor
    sizes = {(square, square)}
    for wide in range(1, math.ceil(math.sqrt(units * max_aspect)) + 1):
        tall = max(1, round(units / wide))
        if max(tall, wide) <= max_aspect * min(tall, wide):
            sizes |= {(tall * factor, wide * factor), (wide * factor, tall * factor)}
    return sorted(sizes, key=lambda size: (size[1] / size[0], size))


def nearest_bucket(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> int:
    aspect = math.log(width / height)
    return min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i][1] / sizes[i][0]) - aspect))


@dataclass(frozen=True)
class Entry:
    path: Path
    caption: str


class ImageFolder:
    """The images of a folder and its subfolders, sorted by name; `folder[i]` is one, [3, H, W] in [-1, 1].

    Reads all captions and the headers of all images at once, and refuses a folder in which some are missing or broken.
    Damage behind a header shows when the image is read, as an error that names it; `check` looks for it beforehand.

    Args:
        area: pixels of a bucket, about.
        factor: sides of buckets are multiples of it: pixels of a latent times the backbone's latent_factor.
        max_aspect: of the longest buckets; what is longer is cut to them.
    """

    def __init__(
        self, folder: str | Path, *, area: int = 1024 * 1024, factor: int = 16, max_aspect: float = 2.0
    ) -> None:
        self.folder, self.area, self.factor = Path(folder).expanduser(), area, factor
        sizes = bucket_sizes(area, factor, max_aspect)
        self.entries, problems = _entries(self.folder)
        places: dict[int, list[int]] = {}
        for number, entry in enumerate(self.entries):
            try:
                places.setdefault(nearest_bucket(*size_of(entry.path), sizes), []).append(number)
            except ValueError as error:
                problems.append(str(error))
        _raise(self.folder, problems)
        self.sizes = [sizes[bucket] for bucket in sorted(places)]  # those that have images
        self.buckets = [places[bucket] for bucket in sorted(places)]
        self._bucket = {number: bucket for bucket, items in enumerate(self.buckets) for number in items}

    @staticmethod
    def check(folder: str | Path) -> list[str]:
        """Decodes every image and returns what is wrong with the folder, one line for each file; empty if nothing."""
        entries, problems = _entries(Path(folder).expanduser())
        for entry in entries:
            try:
                decoded(entry.path)
            except ValueError as error:
                problems.append(str(error))
        return problems

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> Tensor:
        """One image at its bucket's size."""
        if not 0 <= number < len(self):
            raise IndexError(f"image folder: number {number} was asked for, and {self.folder} has {len(self)}")
        return fit(decoded(self.entries[number].path), *self.sizes[self._bucket[number]])

    def caption(self, number: int) -> str:
        return self.entries[number].caption


def fit(image: Image.Image, height: int, width: int) -> Tensor:
    """The centre of an RGB image at this size, [3, height, width] in [-1, 1]."""
    small = image.resize((width, height), Image.Resampling.LANCZOS, box=centre(image.size, (width, height)))
    pixels = torch.from_numpy(np.array(small, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def centre(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest box in the middle of an image that has the shape of what is wanted; both (width, height)."""
    scale = min(has / wants for has, wants in zip(size, wanted, strict=True))  # pixels of the source for one of ours
    sides = [min(scale * wants, has) for has, wants in zip(size, wanted, strict=True)]  # rounding may reach beyond
    left, top = ((has - side) / 2 for has, side in zip(size, sides, strict=True))
    return left, top, left + sides[0], top + sides[1]


def _entries(folder: Path) -> tuple[list[Entry], list[str]]:
    """Images with captions, and what is wrong with the others."""
    if not folder.is_dir():
        raise ValueError(f"image folder: there is no folder {folder}")
    files = _files(folder)
    images = [path for path in files if path.suffix.lower() in ENDINGS]
    if not images:
        raise ValueError(f"image folder: {folder} holds no images ({', '.join(ENDINGS)})")
    if (folder / METADATA).is_file():
        return _from_metadata(folder, images)
    entries, problems = [], _unclear(files)
    for image in images:
        beside = image.with_suffix(".txt")
        try:
            caption = beside.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            problems.append(f"{image} has no caption: there is no {beside.name} beside it, and no {METADATA}")
        except UnicodeDecodeError:
            problems.append(f"{beside} is not UTF-8")
        else:
            if caption:
                entries.append(Entry(image, caption))
            else:
                problems.append(f"{image} has no caption: {beside.name} is empty")
    return entries, problems


def _files(folder: Path) -> list[Path]:
    """Those in it and below it, sorted; links to folders are followed, but not in a circle."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        above = {os.path.realpath(one) for one in (Path(place), *Path(place).parents)}
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(place, name)) not in above
        ]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _unclear(files: list[Path]) -> list[str]:
    """Captions of which it is not clear what they are of: of two images, or of a file that is not known as an image."""
    beside: dict[Path, list[Path]] = {}
    for file in files:
        beside.setdefault(file.with_suffix(""), []).append(file)
    problems = []
    for group in beside.values():
        caption = [file for file in group if file.suffix.lower() == ".txt"]
        others = [file for file in group if file not in caption]
        images = [file for file in others if file.suffix.lower() in ENDINGS]
        if caption and len(images) > 1:
            problems.append(f"{caption[0]} is the caption of {' and of '.join(file.name for file in images)}")
        elif caption and others and not images:
            problems.append(f"{others[0]} has a caption and none of the endings of images: {', '.join(ENDINGS)}")
    return problems


def _from_metadata(folder: Path, images: list[Path]) -> tuple[list[Entry], list[str]]:
    file = folder / METADATA
    captions: dict[Path, str] = {}
    problems = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, caption = row["file_name"], row["caption"]
            if not isinstance(name, str) or not isinstance(caption, str) or not caption.strip():
                raise TypeError
            if not is_text(name + caption):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            problems.append(f'{file}, line {number}, is not {{"file_name": "...", "caption": "..."}}: {line[:80]!r}')
            continue
        path = folder / os.path.normpath(name)
        if not path.is_relative_to(folder) or ".." in path.relative_to(folder).parts:
            problems.append(f"{file}, line {number}, names {name}, which is not in the folder")
        elif path in captions:
            problems.append(f"{file}, line {number}, names {name} a second time")
        elif not path.is_file():
            problems.append(f"{file}, line {number}, names {name}, which is not there")
        else:
            captions[path] = caption.strip()
    problems += [f"{image} has no caption: {METADATA} does not name it" for image in images if image not in captions]
    return [Entry(path, captions[path]) for path in sorted(captions)], problems


def _raise(folder: Path, problems: list[str]) -> None:
    if not problems:
        return
    more = (
        f"\n  and {len(problems) - _SHOWN} more: ImageFolder.check(folder) lists all" if len(problems) > _SHOWN else ""
    )
    listed = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
    raise ValueError(f"image folder: {folder} has {len(problems)} files to repair or remove:{listed}{more}")
