"""What every metric asks of its arguments. An error says what was given, what is accepted, and what to do."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

# A decoder overshoots [-1, 1] by some tenths, a broken one by more; pixels of 0 .. 255 are another scale.
LARGEST_PIXEL = 8.0


def check_features(name: str, label: str, features: Tensor, least: int = 1) -> None:
    """features: [N, F], floating and finite, with N at least `least`."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{name}: {label} is a {type(features).__name__}, expected a tensor [images, features]")
    if features.dim() != 2 or features.shape[1] == 0:
        raise ValueError(f"{name}: {label} has shape {list(features.shape)}, expected [images, features]")
    if not features.is_floating_point():
        raise TypeError(f"{name}: {label} has dtype {features.dtype}, expected a floating one")
    if len(features) < least:
        raise ValueError(
            f"{name}: {label} has {len(features)} row{'s' * (len(features) != 1)}, expected at least {least}; "
            f"give more images"
        )
    check_finite(name, label, features)


def check_same_width(name: str, first: int, first_label: str, second: int, second_label: str) -> None:
    if first != second:
        raise ValueError(
            f"{name}: {first_label} has {first} features and {second_label} {second}; both must come from one network"
        )


def check_finite(name: str, label: str, values: Tensor) -> None:
    """Names the rows that hold NaN or infinity."""
    bad = (~values.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise ValueError(
            f"{name}: {label} has NaN or infinity in {len(bad)} of {len(values)} rows ({shown}), expected finite "
            f"numbers; find what made them, or leave these rows out"
        )


def check_images(name: str, images: Tensor) -> None:
    """images: [N, 3, H, W], floating, finite, meant to lie in [-1, 1]."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{name}: images is a {type(images).__name__}, expected a tensor [N, 3, H, W] in [-1, 1]")
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"{name}: images has shape {list(images.shape)}, expected [N, 3, H, W] with N, H, W above 0")
    if not images.is_floating_point():
        raise TypeError(f"{name}: images has dtype {images.dtype}, expected floating pixels in [-1, 1]")
    check_finite(name, "images", images)
    extent = images.abs().max().item()
    if extent > LARGEST_PIXEL:
        raise ValueError(f"{name}: pixels reach {extent:g}, expected [-1, 1]; from 0 .. 255 take pixels / 127.5 - 1")


def check_labels(name: str, label: str, labels: Sequence[Hashable], rows: int) -> None:
    """One label (a caption, as a rule) for each row."""
    if isinstance(labels, (str, bytes)):
        raise TypeError(f"{name}: {label} is one text, expected a sequence with one for each of {rows} images")
    if len(labels) != rows:
        raise ValueError(f"{name}: {len(labels)} {label} and {rows} images, expected one for each image")


def check_count(name: str, label: str, value: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {label} is {value!r}, expected a whole number")
    if value < least:
        raise ValueError(f"{name}: {label} is {value}, expected at least {least}")


def check_generator(name: str, generator: torch.Generator) -> None:
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{name}: generator is a {type(generator).__name__}, expected a torch.Generator, for example "
            f"torch.Generator().manual_seed(0)"
        )
