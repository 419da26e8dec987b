"""The trainer's metrics are those of the parts, on the images that it gives."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from twostep.evaluate import (
    FeatureStatistics,
    ImageMetrics,
    MiniatureAlignment,
    MiniatureFeatures,
    frechet_distance,
    prompt_diversity,
    vendi_score,
)
from twostep.zoo.miniature import detector, samples


@dataclass(frozen=True)
class Means:
    """The means of the channels' quarters, which sees enough to compare."""

    name: str = "means"
    width: int = 12

    def __call__(self, images: Tensor) -> Tensor:
        return 2 + torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def images(seed: int, count: int) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def reference(network: Means) -> FeatureStatistics:
    statistics = FeatureStatistics(network.name, network.width)
    statistics.update(network(images(9, 50)))
    return statistics


def test_it_gives_the_metrics_of_the_parts() -> None:
    network, real, fake, captions = Means(), reference(Means()), images(0, 6), ["a", "b", "a", "c", "b", "a"]
    metrics = ImageMetrics(network, real, lambda shown, said: {"right": float(len(shown) + len(said))})
    features = network(fake)
    assert metrics(fake, captions) == {
        "frechet": frechet_distance(features, real),
        "diversity": prompt_diversity(features, captions),
        "vendi": vendi_score(features),
        "alignment/right": 12.0,
    }


def test_what_cannot_be_said_is_left_out() -> None:
    assert list(ImageMetrics(Means())(images(0, 3), ["a", "b", "c"])) == ["vendi"]


def test_variety_may_have_a_network_of_its_own() -> None:
    @dataclass(frozen=True)
    class Pixels:
        name: str = "pixels"
        width: int = 192

        def __call__(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    fake, captions, real = images(0, 6), ["a", "b"] * 3, reference(Means())
    assert ImageMetrics(Means(), real, variety=Pixels())(fake, captions) == {
        "frechet": frechet_distance(Means()(fake), real),
        "diversity": prompt_diversity(fake.flatten(1), captions),
        "vendi": vendi_score(fake.flatten(1)),
    }


def test_the_miniature_can_be_watched_whole() -> None:
    judge = detector.load()
    network = MiniatureFeatures(judge)
    real = FeatureStatistics(network.name, network.width)
    real.update(network(samples(seed=0, start=0, count=48).images))
    metrics = ImageMetrics(network, real, MiniatureAlignment(judge))
    batch = samples(seed=0, start=48, count=16)
    found = metrics(batch.images, batch.captions)
    assert found["alignment/aligned"] == 1
    collapsed = metrics(batch.images[:1].expand(16, -1, -1, -1), batch.captions[:1] * 16)
    assert collapsed["diversity"] == pytest.approx(0, abs=1e-9) and collapsed["vendi"] == pytest.approx(1, abs=1e-6)
    assert collapsed["frechet"] > found["frechet"]


def test_mistakes_are_named() -> None:
    metrics = ImageMetrics(Means())
    with pytest.raises(ValueError, match=r"1 image, expected at least 2"):
        metrics(images(0, 1), ["a"])
    with pytest.raises(ValueError, match=r"3 captions and 2 images"):
        metrics(images(0, 2), ["a"] * 3)
    broken = images(0, 3)
    broken[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"images has NaN or infinity in 1 of 3 rows \(1\)"):
        metrics(broken, ["a"] * 3)
    with pytest.raises(ValueError, match=r"holds 12 features of 'other', expected 12 of 'means'"):
        ImageMetrics(Means(), reference(Means("other")))
    with pytest.raises(ValueError, match=r"at least 2 images and 0 were seen"):
        ImageMetrics(Means(), FeatureStatistics("means", 12))
    with pytest.raises(ValueError, match=r"'means' gave features \[3, 12\], expected \[3, 7\]"):
        ImageMetrics(Means(width=7))(images(0, 3), ["a"] * 3)

    @dataclass(frozen=True)
    class Broken(Means):
        def __call__(self, images: Tensor) -> Tensor:
            return super().__call__(images) / 0

    with pytest.raises(ValueError, match=r"features of means has NaN or infinity"):
        ImageMetrics(Broken())(images(0, 3), ["a"] * 3)
