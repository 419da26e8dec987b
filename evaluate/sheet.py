"""Samples on one sheet: a grid of images, each with its caption below it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..images import pil_image

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MARGIN = 8  # pixels around every cell
SIZE = 13  # of the captions, in pixels: the smallest that is easy to read on a screen
LINES = 3  # of a caption, before it is cut
NARROWEST = 128  # pixels of a cell with a caption: some twenty letters a line
FONTS = (
    "NotoSansCJK-Regular.ttc",
    "DejaVuSans.ttf",
    "Arial Unicode.ttf",
)  # by what they know: Chinese, Latin and Greek
PAPER, INK = (255, 255, 255), (32, 32, 32)
NOT_FINITE = (255, 0, 255)  # magenta, which no sample is by chance


def contact_sheet(
    images: Tensor,  # [N, 3, H, W] in [-1, 1]
    *,
    columns: int,
    captions: Sequence[str] | None = None,
    scale: int = 1,
    font: Font | None = None,
) -> Image.Image:
    """The images in rows, enlarged `scale` times without smoothing.

    What lies outside [-1, 1] is shown at the end of the range that it left, and pixels that are not finite are
    magenta; `out_of_range` says how many there are. Captions wrap, and are cut after three lines. A letter that the
    font does not know is a box: `font` is by default the first of `FONTS` that is installed, or else Pillow's own,
    which is ASCII.
    """
    _check(images, columns, captions, scale)
    count, _, height, width = images.shape
    height, width = height * scale, width * scale
    font = font or _installed_font()
    cell = max(width, NARROWEST) if captions else width
    texts = [wrapped(text, cell, font.getlength) for text in captions] if captions else [[]] * count
    row_starts = range(0, count, columns)
    below = [SIZE * 5 // 4 * max(map(len, texts[start : start + columns])) for start in row_starts]
    used = min(columns, count)
    size = (MARGIN + used * (cell + MARGIN), MARGIN + sum(height + text + MARGIN for text in below))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    pixels = painted(images)
    for start, text_height in zip(row_starts, below, strict=True):
        for index in range(start, min(start + columns, count)):
            left = MARGIN + (index - start) * (cell + MARGIN)
            picture = pil_image(pixels[index])
            picture = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + (cell - width) // 2, top))
            for line, text in enumerate(texts[index]):
                draw.text((left, top + height + SIZE * 5 // 4 * line), text, fill=INK, font=font)
        top += height + text_height + MARGIN
    return sheet


def painted(images: Tensor) -> Tensor:
    """[N, 3, H, W] in [-1, 1] to bytes in host memory, with the nearest byte for what is in range."""
    exact = images.detach().float().cpu()
    pixels = ((exact.nan_to_num(0.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    broken = ~exact.isfinite().all(dim=1, keepdim=True)
    return torch.where(broken, torch.tensor(NOT_FINITE, dtype=torch.uint8).view(1, 3, 1, 1), pixels)


def out_of_range(images: Tensor) -> float:
    """The share of values that a picture cannot show: outside [-1, 1], or not finite."""
    if not images.numel():
        raise ValueError(f"out_of_range: images have shape {list(images.shape)}, expected at least one value")
    return float((~(images.detach().abs() <= 1)).double().mean())  # NaN compares false


def wrapped(text: str, width: float, length: Callable[[str], float]) -> list[str]:
    """The text in lines no longer than `width`; words that are too long are broken, a cut text ends in an ellipsis."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest:
        fits = _prefix(rest, width, length)
        if len(lines) == LINES - 1 and fits < len(rest):
            return [*lines, rest[: _prefix(rest, width - length("…"), length)].rstrip() + "…"]
        blank = rest.rfind(" ", 0, fits + 1) if fits < len(rest) else -1
        end = blank if blank > 0 else fits
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return lines


def _prefix(text: str, width: float, length: Callable[[str], float]) -> int:
    """How many characters from the start fit, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if length(text[:middle]) <= width else (low, middle - 1)
    return low


@functools.cache
def _installed_font() -> Font:
    for name in FONTS:
        try:
            return ImageFont.truetype(name, SIZE)
        except OSError:
            continue
    return ImageFont.load_default(size=SIZE)


def _check(images: Tensor, columns: int, captions: Sequence[str] | None, scale: int) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or not images.numel() or not images.is_floating_point():
        raise ValueError(
            f"contact_sheet: images are {images.dtype} {list(images.shape)}, expected floating point "
            "[N, 3, height, width] in [-1, 1]"
        )
    if columns < 1 or scale < 1:
        raise ValueError(f"contact_sheet: columns is {columns} and scale {scale}, expected at least 1 each")
    if isinstance(captions, str):
        raise TypeError("contact_sheet: captions is one text, expected a list with a text for each image")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"contact_sheet: {len(captions)} captions for {len(images)} images, expected one each")
