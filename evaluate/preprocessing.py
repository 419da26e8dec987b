"""Images in [-1, 1] to what a vision model of transformers reads, as its folder says: resize, crop, normalise.

On tensors and on their device, where transformers' own processors go through 8-bit pixels on the host: the two agree to
the rounding of these. Images are clamped to [-1, 1] first, as saving them to a file does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


@dataclass(frozen=True)
class Preprocessing:
    size: tuple[int, int] | int | None  # (height, width), or the shorter edge; None: as it comes
    resample: str
    crop: tuple[int, int] | None  # the centre, (height, width)
    mean: tuple[float, ...]  # of pixels in [0, 1]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """images: [N, 3, H, W] in [-1, 1]; gives float32 [N, 3, h, w]."""
        pixels = (images.float().clamp(-1, 1) + 1) / 2
        if self.size is not None:
            height, width = self._resized(*pixels.shape[2:])
            pixels = F.interpolate(pixels, (height, width), mode=self.resample, align_corners=False, antialias=True)
            pixels = pixels.clamp(0, 1)  # the bicubic kernel overshoots at edges, and 8-bit pixels cannot
        if self.crop is not None:
            pixels = self._cropped(pixels)
        mean, std = (torch.tensor(numbers, device=pixels.device).view(1, 3, 1, 1) for numbers in (self.mean, self.std))
        return (pixels - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size
        assert self.size is not None
        short, long = min(height, width), max(height, width)
        long = int(self.size * long / short)
        return (self.size, long) if height <= width else (long, self.size)

    def _cropped(self, pixels: Tensor) -> Tensor:
        assert self.crop is not None
        height, width = pixels.shape[2:]
        if height < self.crop[0] or width < self.crop[1]:
            raise ValueError(
                f"Preprocessing: images are {height} x {width} where {self.crop[0]} x {self.crop[1]} are to be cut "
                f"out; give larger images"
            )
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        return pixels[:, :, top : top + self.crop[0], left : left + self.crop[1]]


def read_preprocessing(folder: str | Path) -> Preprocessing:
    """What preprocessor_config.json of a model's folder (or the image processor in processor_config.json) says."""
    folder = Path(folder)
    settings, path = _settings(folder)

    def complain(key: str, expected: str) -> ValueError:
        return ValueError(f"read_preprocessing: {key} is {settings.get(key)!r} in {path}, expected {expected}")

    size = None
    if settings.get("do_resize", True):
        size = _size(settings.get("size"))
        if size is None:
            raise complain("size", "a shortest_edge, or a height and a width")
    crop = None
    if settings.get("do_center_crop", False):
        given = _size(settings.get("crop_size"))
        if given is None:
            raise complain("crop_size", "a height and a width")
        crop = (given, given) if isinstance(given, int) else given
    resample = _RESAMPLE.get(settings.get("resample", -1))
    if resample is None:
        raise complain("resample", "2 (bilinear) or 3 (bicubic)")
    mean, std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    if settings.get("do_normalize", True):
        for key in ("image_mean", "image_std"):
            if not isinstance(settings.get(key), list) or len(settings[key]) != 3:
                raise complain(key, "three numbers")
        mean, std = settings["image_mean"], settings["image_std"]
    return Preprocessing(size, resample, crop, tuple(mean), tuple(std))


def _settings(folder: Path) -> tuple[Mapping[str, Any], Path]:
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / name
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            settings = settings if key is None else settings.get(key)
            if isinstance(settings, dict):
                return settings, path
    raise ValueError(
        f"read_preprocessing: {folder} has neither preprocessor_config.json nor an image processor in "
        f"processor_config.json, so it does not say how its model reads images; download the model's folder whole"
    )


def _size(given: Any) -> tuple[int, int] | int | None:
    if isinstance(given, int):
        return given
    if isinstance(given, dict) and "shortest_edge" in given:
        return int(given["shortest_edge"])
    if isinstance(given, dict) and {"height", "width"} <= set(given):
        return int(given["height"]), int(given["width"])
    return None
