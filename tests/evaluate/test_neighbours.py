"""Precision, recall, density and coverage are what loops over all pairs count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.evaluate.strategies import SEEDS, normal, permutation, rotation
from twostep.evaluate import MiniatureFeatures, NeighbourMetrics, neighbour_metrics
from twostep.evaluate.neighbours import balls_around
from twostep.zoo.miniature import claims_of, detector, samples


def by_loops(real: Tensor, fake: Tensor, k: int) -> NeighbourMetrics:
    """The papers' definitions, pair by pair."""

    def distance(x: Tensor, y: Tensor) -> float:
        return float((x - y).square().sum().sqrt())

    def radius(points: Tensor, i: int) -> float:
        return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    real_balls = [(x, radius(real, i)) for i, x in enumerate(real)]
    fake_balls = [(y, radius(fake, j)) for j, y in enumerate(fake)]
    held = [[distance(x, y) < r for x, r in real_balls] for y in fake]  # [fake][real]
    return NeighbourMetrics(
        precision=sum(any(distance(x, y) <= r for x, r in real_balls) for y in fake) / len(fake),
        recall=sum(any(distance(x, y) <= r for y, r in fake_balls) for x in real) / len(real),
        density=sum(map(sum, held)) / (k * len(fake)),
        coverage=sum(any(row[i] for row in held) for i in range(len(real))) / len(real),
    )


def values(metrics: NeighbourMetrics) -> list[float]:
    return [metrics.precision, metrics.recall, metrics.density, metrics.coverage]


@given(SEEDS, st.integers(7, 20), st.integers(7, 20), st.integers(1, 5), st.integers(1, 6), st.integers(1, 25))
@settings(deadline=None, max_examples=40)
def test_it_counts_what_loops_count(seed: int, n: int, m: int, width: int, k: int, rows: int) -> None:
    real, fake = normal(seed, n, width), 0.5 + 0.7 * normal(seed + 1, m, width)
    assert values(neighbour_metrics(real, fake, k=k, rows=rows)) == pytest.approx(values(by_loops(real, fake, k)))


@given(SEEDS, st.integers(7, 20), st.integers(1, 5))
@settings(deadline=None, max_examples=20)
def test_it_counts_what_loops_count_where_points_coincide_and_distances_tie(seed: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    real, fake = (torch.randint(0, 3, (n, 2), generator=generator).double() for _ in range(2))
    assert values(neighbour_metrics(real, fake, k=k, rows=4)) == pytest.approx(values(by_loops(real, fake, k)))


@given(SEEDS, st.integers(7, 20), st.integers(7, 20), st.integers(1, 6), st.integers(1, 25))
@settings(deadline=None, max_examples=20)
def test_image_by_image_they_are_the_same(seed: int, n: int, m: int, k: int, rows: int) -> None:
    real, fake = normal(seed, n, 2), 0.5 + 0.7 * normal(seed + 1, m, 2)
    balls = balls_around(real, fake, k=k, rows=rows)
    assert balls.precise.shape == (m,) and balls.inside.shape == balls.holds.shape == (m, n)
    found = NeighbourMetrics(
        precision=balls.precise.double().mean().item(),
        recall=balls.holds.any(0).double().mean().item(),
        density=int(balls.inside.sum()) / (k * m),
        coverage=balls.inside.any(0).double().mean().item(),
    )
    assert values(found) == pytest.approx(values(neighbour_metrics(real, fake, k=k)))


@given(SEEDS, st.integers(7, 20), st.integers(1, 6))
@settings(deadline=None, max_examples=20)
def test_a_set_is_perfect_against_itself(seed: int, n: int, k: int) -> None:
    points = normal(seed, n, 3)
    assert neighbour_metrics(points, points, k=k) == NeighbourMetrics(1, 1, 1, 1)


def test_far_sets_share_nothing_a_collapsed_one_covers_little_and_a_wide_one_is_imprecise() -> None:
    real = normal(0, 200, 2)
    assert neighbour_metrics(real, real + 100) == NeighbourMetrics(0, 0, 0, 0)
    collapsed = neighbour_metrics(real, real[:1] + 1e-3 * normal(1, 200, 2))
    assert collapsed.precision == 1 and collapsed.recall < 0.05 and collapsed.coverage < 0.1
    wide = neighbour_metrics(real, 5 * normal(2, 200, 2))
    assert wide.precision < 0.5 and wide.recall > 0.9


def test_rotations_orders_and_scales_do_not_matter() -> None:
    real, fake, turn = normal(0, 60, 4), 0.3 + normal(1, 50, 4), rotation(2, 4)
    expected = neighbour_metrics(real, fake, k=3)
    assert neighbour_metrics(real @ turn * 7, fake @ turn * 7, k=3) == expected
    assert neighbour_metrics(real[permutation(3, 60)], fake[permutation(4, 50)], k=3) == expected


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"fake has 5 rows, expected at least 6"):
        neighbour_metrics(normal(0, 9, 2), normal(0, 5, 2), k=5)
    with pytest.raises(ValueError, match=r"real has 2 features and fake 3"):
        neighbour_metrics(normal(0, 9, 2), normal(0, 9, 3))
    with pytest.raises(ValueError, match=r"k is 0, expected at least 1"):
        neighbour_metrics(normal(0, 9, 2), normal(0, 9, 2), k=0)
    with pytest.raises(ValueError, match=r"real has NaN"):
        neighbour_metrics(normal(0, 9, 2) / 0 * 0, normal(0, 9, 2))


@pytest.mark.slow
def test_precision_does_not_see_speckle_and_cleanness_does() -> None:
    """The table of docs/evaluate.md: the miniature's images, others of them with noise on them."""
    network = MiniatureFeatures(detector.load(), "each")
    clean, other = samples(0x5EC1, 0, 1000), samples(0x5EC2, 0, 1000)
    real, noise = network(clean.images), normal(0, *other.images.shape)
    found = []
    for deviation in (0.0, 0.3, 0.6):
        speckled = (other.images + deviation * noise).clamp(-1, 1)
        metrics = neighbour_metrics(real, network(speckled))
        said = claims_of(other.captions[:100])
        psnr = detector.check(network.detector, speckled[:100], said).psnr.mean().item()
        found.append((metrics.precision, metrics.coverage, psnr))
    (none, covered, drawn), (some, less, dirty), (much, least, _) = found
    assert none - some < 0.01 and covered - less < 0.03 and drawn - dirty > 20, found
    assert 0.85 < much < 0.95 and 0.75 < least < 0.9, found
