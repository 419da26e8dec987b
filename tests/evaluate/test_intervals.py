"""Bootstrap intervals have the width that theory gives a mean, draw whole groups, and repeat with their generator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.evaluate.strategies import normal
from twostep.evaluate.intervals import Interval, bootstrap, combined


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_mean_has_the_interval_of_the_normal_distribution() -> None:
    rows = normal(0, 400)
    interval = bootstrap(torch.mean, rows, generator=seeded(), resamples=4000)
    error = float(rows.std()) / 20
    assert interval.value == pytest.approx(float(rows.mean()))
    assert interval.low == pytest.approx(float(rows.mean()) - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(float(rows.mean()) + 1.96 * error, abs=0.15 * error)
    narrow = bootstrap(torch.mean, rows, generator=seeded(), resamples=4000, confidence=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 * error, rel=0.1)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    held = 0
    for seed in range(100):
        interval = bootstrap(torch.mean, normal(seed, 50), generator=seeded(seed), resamples=100, confidence=0.9)
        held += interval.low <= 0 <= interval.high
    assert 0.8 < held / 100 < 0.97


def test_groups_are_drawn_whole() -> None:
    # Rows of a group are equal, so 10 groups of 40 know as much as 10 rows.
    means = normal(0, 10)
    rows, groups = means.repeat_interleave(40), [i for i in range(10) for _ in range(40)]
    grouped = bootstrap(torch.mean, rows, generator=seeded(), groups=groups)
    one_each = bootstrap(torch.mean, means, generator=seeded())
    assert (grouped.low, grouped.high) == pytest.approx((one_each.low, one_each.high))
    alone = bootstrap(torch.mean, rows, generator=seeded())
    assert grouped.high - grouped.low > 4 * (alone.high - alone.low)


def test_a_draw_holds_every_row_of_a_group_or_none() -> None:
    groups = ["a", "b", "a", "c", "c", "c"]

    def statistic(drawn: Tensor) -> float:
        counts = drawn.bincount(minlength=6).tolist()
        assert counts[0] == counts[2] and counts[3] == counts[4] == counts[5]
        assert counts[0] + counts[1] + counts[3] == 3
        return float(counts[1])

    assert bootstrap(statistic, torch.arange(6), generator=seeded(), groups=groups, resamples=50).high > 1


def test_equal_generators_give_equal_intervals() -> None:
    rows = normal(0, 30, 2)

    def statistic(drawn: Tensor) -> Tensor:
        return drawn.cov().diagonal().median()

    first, again, other = (bootstrap(statistic, rows, generator=seeded(seed), resamples=50) for seed in (1, 1, 2))
    assert first == again != other
    assert str(first) == f"{first.value:.4g} [{first.low:.4g}, {first.high:.4g}]"


def test_what_two_statistics_share_does_not_widen_their_difference() -> None:
    """The oracle: the bootstrap of the differences themselves. Equal generators draw the same rows."""
    common, own = normal(1, 400), 0.1 * normal(2, 400)
    one, other, apart = (
        bootstrap(torch.mean, rows, generator=seeded(5), resamples=400) for rows in (common + own, common, common - own)
    )
    found = combined(lambda a, b: a - b, one, other)
    alone = bootstrap(torch.mean, own, generator=seeded(5), resamples=400)
    assert found.value == pytest.approx(alone.value, abs=1e-6)
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high), abs=2e-3)
    assert found.high - found.low < 0.2 * (one.high - one.low)
    assert combined(max, one, other, apart).value == max(one.value, other.value, apart.value)
    exact = Interval(2.0, 2.0, 2.0, 0.95)
    assert combined(lambda a, b: a * b, exact, exact) == Interval(4.0, 4.0, 4.0, 0.95)
    scaled = combined(lambda a, b: a * b, one, exact)
    assert (scaled.low, scaled.high) == pytest.approx((2 * one.low, 2 * one.high), abs=5e-3)
    with pytest.raises(ValueError, match=r"the intervals have \[300, 400\] resamples, expected as many each"):
        combined(max, one, bootstrap(torch.mean, common, generator=seeded(), resamples=300))


def test_resampled_values_lie_as_the_interval_does() -> None:
    """Recentred ones too."""
    for recentre in (False, True):
        found = bootstrap(lambda r: r.std(), normal(3, 50), generator=seeded(), resamples=200, recentre=recentre)
        drawn = torch.tensor(found.drawn, dtype=torch.float64)
        assert len(drawn) == 200 and drawn.quantile(0.025).item() == pytest.approx(found.low)
        assert drawn.quantile(0.975).item() == pytest.approx(found.high)


def test_mistakes_are_named() -> None:
    rows = normal(0, 4)
    with pytest.raises(ValueError, match=r"shape \[1\], expected a tensor .* at least 2 rows"):
        bootstrap(torch.mean, rows[:1], generator=seeded())
    with pytest.raises(TypeError, match=r"generator is a int"):
        bootstrap(torch.mean, rows, generator=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"confidence is 95, expected a number between 0 and 1"):
        bootstrap(torch.mean, rows, generator=seeded(), confidence=95)
    with pytest.raises(ValueError, match=r"all rows are one group"):
        bootstrap(torch.mean, rows, generator=seeded(), groups=[0] * 4)
    with pytest.raises(ValueError, match=r"3 groups and 4 "):
        bootstrap(torch.mean, rows, generator=seeded(), groups=[0, 1, 2])
    with pytest.raises(ValueError, match=r"statistic gave nan"):
        bootstrap(lambda drawn: drawn.sum() / 0 * 0, rows, generator=seeded())
