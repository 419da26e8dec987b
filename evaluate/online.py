"""What a trainer calls every so often: a few numbers on a few hundred images, cheap enough to watch a run by.

frechet         to the reference, where there is one. Biased upwards by the number of images: compare equal numbers
diversity       of images with equal captions, where a caption comes twice
vendi           the effective number of different images among all
alignment/...   what `alignment` gives, under its own names
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from . import arguments
from .diversity import prompt_diversity, vendi_score
from .features import FeatureNetwork
from .frechet import FeatureStatistics, frechet_distance


@dataclass(frozen=True)
class ImageMetrics:
    """Metrics of images [N, 3, H, W] in [-1, 1] and their captions.

    Args:
        features: what Frechet distance looks at, and diversity and Vendi score where there is no `variety`.
        reference: statistics of real images, by `features`.
        alignment: for example `MiniatureAlignment(detector.load())` or `load_clip_score(folder)`.
        variety: what diversity and Vendi score look at; for the miniature `MiniatureFeatures(judge, "each")`, since
            images of one caption differ most in where things stand.
    """

    features: FeatureNetwork
    reference: FeatureStatistics | None = None
    alignment: Callable[[Tensor, Sequence[str]], dict[str, float]] | None = None
    variety: FeatureNetwork | None = None

    def __post_init__(self) -> None:
        if self.reference is None:
            return
        given = (self.reference.features, self.reference.width)
        if given != (self.features.name, self.features.width):
            raise ValueError(
                f"ImageMetrics: the reference holds {given[1]} features of {given[0]!r}, expected "
                f"{self.features.width} of {self.features.name!r}; make it with the features that are given"
            )
        self.reference.gaussian()  # factored once, here; an empty reference is an error here as well

    def __call__(self, images: Tensor, captions: Sequence[str]) -> dict[str, float]:
        name = "ImageMetrics"
        arguments.check_images(name, images)
        arguments.check_labels(name, "captions", captions, len(images))
        if len(images) < 2:
            raise ValueError(f"{name}: {len(images)} image, expected at least 2")
        metrics: dict[str, float] = {}
        seen = _features_of(self.features, images)
        if self.reference is not None:
            metrics["frechet"] = frechet_distance(seen, self.reference)
        varied = seen if self.variety is None else _features_of(self.variety, images)
        if len(set(captions)) < len(captions):
            metrics["diversity"] = prompt_diversity(varied, captions)
        metrics["vendi"] = vendi_score(varied)
        if self.alignment is not None:
            metrics.update({f"alignment/{key}": value for key, value in self.alignment(images, captions).items()})
        return metrics


def _features_of(network: FeatureNetwork, images: Tensor) -> Tensor:
    """Features as the network promises them."""
    found = network(images)
    arguments.check_features("ImageMetrics", f"features of {network.name}", found, least=2)
    if found.shape != (len(images), network.width):
        raise ValueError(
            f"ImageMetrics: {network.name!r} gave features {list(found.shape)}, expected "
            f"[{len(images)}, {network.width}]"
        )
    return found
