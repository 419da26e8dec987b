"""Images from files as they are shown: turned by EXIF, transparency on white; what would be read wrongly is refused.
And the way back, from a model's numbers to what a file holds.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
_TURN = 0x0112  # EXIF's tag; 5 and more exchange width and height
_TURNS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Pillow finds it in a PNG
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel at most


def open_image(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None
    if image.mode not in _MODES:
        raise ValueError(f"{path} has pixels of mode {image.mode}, expected 8 bits a channel; convert it to RGB")
    return image


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) as it is shown, from the header alone."""
    with open_image(path) as image:
        # Pillow decodes a whole PNG to look for EXIF behind the pixels, where hardly anybody writes it. One that has it
        # there is still shown upright; only its size is that of the pixels as they are stored.
        behind = image.format == "PNG" and not any(name in image.info for name in _TURNS)
        try:
            turned = not behind and image.getexif().get(_TURN, 1) >= 5
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        return (image.width, image.height) if turned else (image.height, image.width)


def decoded(path: Path) -> Image.Image:
    """In RGB; of an animation the first picture."""
    with open_image(path) as image:
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PNG's are SyntaxErrors
            raise ValueError(f"{path} is damaged: {error}") from None
        if not upright.has_transparency_data:
            return upright.convert("RGB")
        clear = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")


def to_bytes(images: Tensor) -> Tensor:
    """[N, 3, H, W] in [-1, 1] to uint8; ValueError where there are numbers that no pixel can be."""
    finite = images.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        rows = (~finite).nonzero().flatten().tolist()
        raise ValueError(
            f"{len(rows)} of {len(images)} images hold numbers that are not finite (rows {rows[:5]}): the model's "
            f"weights, its dtype or its guidance are at fault"
        )
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def pil_image(pixels: Tensor) -> Image.Image:
    """Of bytes [3, H, W]."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
