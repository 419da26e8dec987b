"""Several subjects, measured alike: the same captions and seeds, the same judge, intervals for every number.

    quality    `images` captions, each once: Frechet distance, precision, recall, density, coverage; whether captions
               are kept, where images have any
    variety    some captions, each with several seeds: diversity of a caption's images, Vendi score of all
    speed      evaluations of the network, seconds for an image, and those of the transformer alone

Every metric compares equal numbers of images. Settings are never to be chosen by a study that is reported: `stream`
gives another set of captions, seeds and real images to choose by.

Only what was drawn is resampled; the real images are held fixed. An interval is therefore one given these real images,
to compare rows by, which all share them; over fresh sets of real images it is too narrow (tests/evaluate/test_study).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .diversity import diversity_by_prompt, vendi_score
from .features import FeatureNetwork
from .frechet import Gaussian, frechet_distance
from .intervals import Interval, bootstrap
from .neighbours import Balls, balls_around
from .speed import Speed
from .subjects import Drawn, Order

AT_ONCE = 256
NEIGHBOURS = 5


@dataclass(frozen=True)
class Metric:
    title: str
    better: str  # "less" or "more"
    says: str


METRICS = {
    "frechet": Metric("Frechet", "less", "distance of features to those of as many real images"),
    "aligned": Metric("aligned", "more", "images that show all that their caption says"),
    "clip_score": Metric("CLIP", "more", "100 cos of image and caption"),
    "vqa_score": Metric("VQA", "more", "probability of Yes to: does it show the caption?"),
    "psnr": Metric("clean, dB", "more", "distance to the drawing of what is seen: how cleanly it is drawn"),
    "precision": Metric("precision", "more", "images that lie among real ones"),
    "recall": Metric("recall", "more", "real images that lie among these"),
    "density": Metric("density", "more", "how many real images' balls an image lies in, over k"),
    "coverage": Metric("coverage", "more", "real images with an image in their ball"),
    "diversity": Metric("diversity", "more", "1 - mean cosine of images of one caption"),
    "vendi": Metric("Vendi", "more", "effective number of different images"),
}


@dataclass(frozen=True)
class Judge:
    features: FeatureNetwork
    variety: FeatureNetwork
    # Of each image; without captions (None) only those scores that no caption decides.
    scores: Callable[[Tensor, Sequence[str] | None], dict[str, Tensor]]
    real: Tensor  # features of real images, at least as many as are judged
    # Features [N, F] to what Frechet distances take for samples, [N, S, G]: by default an image is one.
    samples: Callable[[Tensor], Tensor] = lambda features: features[:, None]


@dataclass(frozen=True)
class Measured:
    name: str
    metrics: dict[str, Interval]
    images: int
    steps: int | None = None
    evaluations: int | None = None
    seconds: float | None = None
    network_seconds: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    real: bool = False  # the real images themselves: what a perfect model would score


def variety_order(order: Order, captions: int, seeds: int) -> Order:
    """The first different captions of an order, each with several seeds of its own."""
    chosen = list(dict.fromkeys(order.captions))[:captions]
    numbers = range(1 << 30, (1 << 30) + len(chosen) * seeds)  # seeds that the order has not
    return Order(tuple(c for c in chosen for _ in range(seeds)), tuple(numbers), order.size, order.batch)


def measure(
    name: str,
    drawn: Drawn,
    varied: Drawn | None,
    judge: Judge,
    *,
    speed: Speed | None = None,
    real: bool = False,
    seed: int = 0,
    resamples: int = 100,
    **facts: Any,
) -> Measured:
    """
    Args:
        drawn: what quality is measured on; images without any caption get no score that a caption decides.
        varied: captions that come several times; None: no diversity.
        real: these are real images, and no model's.
        seed: of the intervals.
        resamples: of the intervals of the metrics that are slow to measure again.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(drawn.images)
    if len(judge.real) < count:
        raise ValueError(f"{name}: {count} images, and {len(judge.real)} real ones to compare them with: give as many")
    seen, scores = _look(drawn, judge.features, judge.scores)
    balls = balls_around(judge.real[:count], seen, k=NEIGHBOURS)
    metrics = _quality(seen, judge.real[:count], balls, judge.samples, generator, resamples)
    metrics["recall"] = _recall(balls, torch.Generator().manual_seed(seed), resamples)
    for what, values in scores.items():
        metrics[what] = bootstrap(torch.mean, values.double(), generator=generator)
    if varied is not None:
        metrics |= _variety(varied, judge.variety, generator, resamples)
    ordered = {what: metrics[what] for what in METRICS if what in metrics}
    seconds, network_seconds = (None, None) if speed is None else (speed.seconds, speed.network_seconds)
    return Measured(name, ordered, count, drawn.steps, drawn.evaluations, seconds, network_seconds, dict(facts), real)


def features_of(drawn: Drawn, network: FeatureNetwork) -> Tensor:
    return _look(drawn, network, lambda images, captions: {})[0]


def _look(
    drawn: Drawn, network: FeatureNetwork, scores: Callable[[Tensor, Sequence[str] | None], dict[str, Tensor]]
) -> tuple[Tensor, dict[str, Tensor]]:
    captions = drawn.captions if any(drawn.captions) else None  # "" claims nothing, and would always be kept
    seen, found = [], []
    for start in range(0, len(drawn.images), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        images = drawn.pixels(rows)
        seen.append(network(images).cpu())
        found.append(scores(images, None if captions is None else captions[rows]))
    return torch.cat(seen), {what: torch.cat([part[what].cpu() for part in found]) for what in found[0]}


def _quality(
    fake: Tensor,
    real: Tensor,
    balls: Balls,
    samples: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    resamples: int,
) -> dict[str, Interval]:
    precise, inside = balls.precise, balls.inside
    gaussian, drawn = Gaussian.of_features(samples(real).flatten(0, 1)), samples(fake)
    numbers = torch.arange(len(fake))

    def interval(statistic: Callable[[Tensor], float | Tensor], recentre: bool = False) -> Interval:
        return bootstrap(statistic, numbers, generator=generator, resamples=resamples, recentre=recentre)

    return {
        "frechet": interval(lambda rows: frechet_distance(drawn[rows].flatten(0, 1), gaussian), recentre=True),
        "precision": interval(lambda rows: precise[rows].double().mean()),
        "density": interval(lambda rows: int(inside[rows].sum()) / (NEIGHBOURS * len(rows))),
        "coverage": interval(lambda rows: inside[rows].any(0).double().mean(), recentre=True),
    }


def _recall(balls: Balls, generator: torch.Generator, resamples: int) -> Interval:
    """A resample lacks some of the balls, which keep the radius that they have among all images."""

    def recalled(rows: Tensor) -> Tensor:
        return balls.holds[rows].any(0).double().mean()

    numbers = torch.arange(len(balls.holds))
    return bootstrap(recalled, numbers, generator=generator, resamples=resamples, recentre=True)


def _variety(varied: Drawn, network: FeatureNetwork, generator: torch.Generator, resamples: int) -> dict[str, Interval]:
    seen = features_of(varied, network)
    by_caption = torch.tensor(list(diversity_by_prompt(seen, varied.captions).values()), dtype=torch.float64)
    captions, numbers = varied.captions, torch.arange(len(seen))
    vendi = bootstrap(
        lambda rows: vendi_score(seen[rows]),
        numbers,
        generator=generator,
        groups=captions,
        resamples=resamples,
        recentre=True,
    )
    return {"diversity": bootstrap(torch.mean, by_caption, generator=generator), "vendi": vendi}
