"""The Frechet distance has the closed forms of Gaussians, and statistics that are added up are those of the whole."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluate.strategies import SEEDS, normal, permutation, rotation
from twostep.evaluate import FeatureStatistics, Gaussian, frechet_distance, frechet_floor

WIDTHS = st.integers(1, 12)
ROWS = st.integers(2, 30)  # fewer and more than the width


@given(SEEDS, WIDTHS)
@settings(deadline=None, max_examples=30)
def test_of_gaussians_with_common_axes_it_is_that_of_means_and_deviations(seed: int, width: int) -> None:
    # Then sqrt(C_a C_b) = sqrt C_a sqrt C_b, and the distance is |m_a - m_b|^2 + sum (s_a - s_b)^2.
    axes, means, deviations = rotation(seed, width), normal(seed + 1, 2, width), normal(seed + 2, 2, width).abs()
    a, b = (Gaussian.of_moments(m, axes @ s.square().diag() @ axes.T) for m, s in zip(means, deviations, strict=True))
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-10, abs=1e-12)


def test_of_full_covariances_it_is_the_trace_of_the_matrix_square_root() -> None:
    width = 5
    roots = [normal(seed, width, width + 2) for seed in (1, 2)]
    a, b = (root @ root.T for root in roots)
    product = mpmath.matrix((a @ b).tolist())
    trace = float(mpmath.re(sum(mpmath.sqrtm(product)[i, i] for i in range(width))))
    zero = torch.zeros(width, dtype=torch.float64)
    expected = float(a.trace() + b.trace()) - 2 * trace
    assert frechet_distance(Gaussian.of_moments(zero, a), Gaussian.of_moments(zero, b)) == pytest.approx(expected, 1e-9)


@given(SEEDS, ROWS, WIDTHS)
@settings(deadline=None, max_examples=30)
def test_a_set_is_at_0_from_itself_and_its_shifted_copy_at_the_shift(seed: int, rows: int, width: int) -> None:
    features, shift = normal(seed, rows, width), normal(seed + 1, width)
    variance = float(features.var(0).sum())
    assert frechet_distance(features, features) <= 1e-12 * variance
    assert frechet_distance(features, features + shift) == pytest.approx(float(shift.square().sum()), abs=1e-10)


@given(SEEDS, ROWS, ROWS, WIDTHS, st.floats(0.01, 100))
@settings(deadline=None, max_examples=30)
def test_rotations_and_orders_do_not_matter_and_a_scale_counts_squared(
    seed: int, first: int, second: int, width: int, scale: float
) -> None:
    a, b, turn = normal(seed, first, width), 1 + 2 * normal(seed + 1, second, width), rotation(seed + 2, width)
    distance = frechet_distance(a, b)
    close = {"rel": 1e-9, "abs": 1e-10}
    assert frechet_distance(b, a) == pytest.approx(distance, **close)
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(distance, **close)
    assert frechet_distance(a[permutation(seed, first)], b) == pytest.approx(distance, **close)
    assert frechet_distance(a * scale, b * scale) == pytest.approx(distance * scale**2, rel=1e-8, abs=1e-10 * scale**2)


@given(SEEDS, st.lists(st.integers(1, 9), min_size=2, max_size=6), WIDTHS)
@settings(deadline=None, max_examples=30)
def test_statistics_of_parts_are_those_of_the_whole(seed: int, sizes: list[int], width: int) -> None:
    features = 100 + normal(seed, sum(sizes), width)  # far from 0: sums of squares would lose four digits
    other = normal(seed + 1, 20, width)
    whole = FeatureStatistics("net", width)
    ranks = [FeatureStatistics("net", width) for _ in range(2)]
    for i, part in enumerate(features.split(sizes)):
        whole.update(part)
        ranks[i % 2].update(part)
    ranks[0].merge(ranks[1])
    for statistics in (whole, ranks[0], FeatureStatistics.from_state(whole.state())):
        assert statistics.count == len(features)
        torch.testing.assert_close(statistics.mean, features.mean(0), rtol=1e-13, atol=0)
        torch.testing.assert_close(statistics.covariance(), features.T.cov().view(width, width), rtol=1e-10, atol=1e-11)
        assert frechet_distance(statistics, other) == pytest.approx(frechet_distance(features, other), rel=1e-8)


def test_statistics_go_on_after_they_were_compared_and_an_empty_part_changes_nothing() -> None:
    features, other = normal(0, 20, 3), normal(1, 9, 3)
    statistics = FeatureStatistics("net", 3)
    statistics.update(features[:10])
    state = statistics.state()
    first = frechet_distance(statistics, other)
    statistics.update(features[10:])
    statistics.merge(FeatureStatistics("net", 3))
    assert frechet_distance(statistics, other) == pytest.approx(frechet_distance(features, other))
    assert frechet_distance(FeatureStatistics.from_state(state), other) == first, "a state is a copy"


def test_with_fewer_images_than_features_it_is_exact() -> None:
    # Two images each, on one line through the origin: variances 2 s^2 along it, nothing elsewhere.
    line = torch.zeros(1000, dtype=torch.float64)
    line[7] = 1
    a, b = torch.stack([line, -line]), torch.stack([3 * line, -3 * line])
    assert frechet_distance(a, b) == pytest.approx(2 * (3 - 1) ** 2, rel=1e-14)
    across = torch.stack([3 * line.roll(1), -3 * line.roll(1)])
    assert frechet_distance(a, across) == pytest.approx(2 + 18, rel=1e-14)


def test_half_precision_features_are_widened_first() -> None:
    features = normal(0, 50, 4).half()
    assert frechet_distance(features, features.double() + 1) == pytest.approx(4, rel=1e-12)


def test_the_floor_falls_with_the_number_of_images_and_its_draws_repeat() -> None:
    def floor(rows: int, seed: int) -> torch.Tensor:
        return frechet_floor(normal(0, rows, 8), generator=torch.Generator().manual_seed(seed), splits=5)

    assert floor(40, 0).shape == (5,)
    assert torch.equal(floor(41, 0), floor(41, 0))
    assert not torch.equal(floor(41, 0), floor(41, 1))
    # Of n against n: about 2 F / n from the means, and something more from the covariances.
    assert 2 * 8 / 1000 < floor(2000, 0).mean() < 4 * 8 / 1000 * 3
    assert floor(40, 0).mean() > 10 * floor(2000, 0).mean()


def test_mistakes_are_named() -> None:
    features = normal(0, 5, 3)
    with pytest.raises(ValueError, match=r"features has 1 row, expected at least 2"):
        frechet_distance(features[:1], features)
    with pytest.raises(ValueError, match=r"a has 3 features and b 2"):
        frechet_distance(features, features[:, :2])
    broken = features.clone()
    broken[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in 1 of 5 rows \(3\)"):
        frechet_distance(features, broken)
    with pytest.raises(ValueError, match=r"shape \[5\], expected \[images, features\]"):
        frechet_distance(features, features[:, 0])
    with pytest.raises(TypeError, match=r"int64, expected a floating"):
        frechet_distance(features, features.long())
    with pytest.raises(ValueError, match=r"at least 4"):
        frechet_floor(features[:3], generator=torch.Generator())
    with pytest.raises(TypeError, match=r"expected a torch\.Generator"):
        frechet_floor(features, generator=0)  # type: ignore[arg-type]


def test_mistaken_statistics_are_named() -> None:
    statistics = FeatureStatistics("net", 3)
    with pytest.raises(ValueError, match=r"at least 2 images and 0 were seen"):
        frechet_distance(statistics, normal(0, 5, 3))
    with pytest.raises(ValueError, match=r"features has 2 features and statistics 3"):
        statistics.update(normal(0, 5, 2))
    with pytest.raises(ValueError, match=r"3 features of 'other' cannot join those of 3 of 'net'"):
        statistics.merge(FeatureStatistics("other", 3))
    other = FeatureStatistics("other", 3)
    for each in (statistics, other):
        each.update(normal(0, 5, 3))
    with pytest.raises(ValueError, match=r"a is of 'net' and b of 'other'"):
        frechet_distance(statistics, other)
    with pytest.raises(ValueError, match=r"keys are \['count'\], expected"):
        FeatureStatistics.from_state({"count": 3})
    zero = torch.zeros(2)
    with pytest.raises(ValueError, match=r"eigenvalue -1, expected none below 0"):
        Gaussian.of_moments(zero, torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    with pytest.raises(ValueError, match=r"not symmetric"):
        Gaussian.of_moments(zero, torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
