"""Confidence intervals by the bootstrap: the statistic of rows drawn again, with replacement, many times.

The interval is the percentile one: the middle `confidence` of the resampled values. Where rows belong together (images
of one prompt) whole groups are drawn, since rows of a group say little that is new about other groups.

A resample holds about 63 % of the rows, some of them several times. Statistics that grow as images repeat or lack
(Frechet distance, coverage, Vendi) are therefore shifted in resamples: their interval's width is of use, not its place,
and `recentre` puts it around the value.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import arguments
from .groups import rows_by_label


@dataclass(frozen=True)
class Interval:
    value: float  # the statistic of all rows
    low: float
    high: float
    confidence: float
    drawn: tuple[float, ...] = field(default=(), repr=False, compare=False)  # resampled values; none: a value alone

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap(
    statistic: Callable[[Tensor], float | Tensor],
    rows: Tensor,
    *,
    generator: torch.Generator,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    recentre: bool = False,
) -> Interval:
    """The statistic of rows, and the interval that its resamples fall in.

    Args:
        statistic: takes rows like `rows`, as many or, with groups of different sizes, about as many; gives one number.
        rows: [N, ...]. For a statistic of several tensors give torch.arange(N), and let it index them.
        generator: draws; equal states give equal intervals.
        groups: one label for each row; whole groups are drawn, as many as there are.
        resamples: a thousand place the ends of a 95 % interval to some hundredths of its width.
        confidence: between 0 and 1, both excluded.
        recentre: move the resampled values so that their median is the statistic: for those that repeated rows shift.
    """
    name = "bootstrap"
    if not isinstance(rows, Tensor) or rows.dim() == 0 or len(rows) < 2:
        given = f"shape {list(rows.shape)}" if isinstance(rows, Tensor) else f"type {type(rows).__name__}"
        raise ValueError(f"{name}: rows has {given}, expected a tensor [N, ...] with at least 2 rows")
    arguments.check_generator(name, generator)
    arguments.check_count(name, "resamples", resamples, least=2)
    if not 0 < confidence < 1:
        raise ValueError(f"{name}: confidence is {confidence}, expected a number between 0 and 1, such as 0.95")
    members = None
    if groups is not None:
        arguments.check_labels(name, "groups", groups, len(rows))
        members = [numbers.to(rows.device) for numbers in rows_by_label(groups).values()]
        if len(members) < 2:
            raise ValueError(f"{name}: all rows are one group, expected at least 2 groups to draw from")

    value = _number(statistic(rows))
    drawn = torch.empty(resamples, dtype=torch.float64)
    for i in range(resamples):
        drawn[i] = _number(statistic(rows[_draw(len(rows), members, generator, rows.device)]))
    tail = (1 - confidence) / 2
    low, middle, high = torch.quantile(drawn, torch.tensor([tail, 0.5, 1 - tail], dtype=torch.float64)).tolist()
    shift = value - middle if recentre else 0.0
    return Interval(value, low + shift, high + shift, confidence, tuple((drawn + shift).tolist()))


def combined(function: Callable[..., float], *intervals: Interval) -> Interval:
    """A function of several statistics. Their resamples are taken for the same draws, which they are where as many rows
    were drawn by generators of equal states: what is common to the statistics does not widen the interval.

    Intervals without resampled values count as exact. Where the function gives infinity in a resample, the interval may
    end there; where it gives NaN in one, both ends are NaN.
    """
    value, confidence = function(*(one.value for one in intervals)), intervals[0].confidence
    counts = {len(one.drawn) for one in intervals if one.drawn}
    if not counts:
        return Interval(value, value, value, confidence)
    if len(counts) > 1:
        raise ValueError(f"combined: the intervals have {sorted(counts)} resamples, expected as many each")
    (count,) = counts
    columns = [one.drawn or (one.value,) * count for one in intervals]
    drawn = sorted(function(*values) for values in zip(*columns, strict=True))
    tail = (1 - confidence) / 2
    low, high = (drawn[round(share * (count - 1))] for share in (tail, 1 - tail))
    if any(one != one for one in drawn):  # they cannot be sorted
        low = high = float("nan")
    return Interval(value, low, high, confidence, tuple(drawn))


def _draw(count: int, members: list[Tensor] | None, generator: torch.Generator, device: torch.device) -> Tensor:
    """Numbers of rows, with replacement: rows one by one, or group by group."""
    choices = count if members is None else len(members)
    drawn = torch.randint(choices, (choices,), generator=generator, device=generator.device)
    return drawn.to(device) if members is None else torch.cat([members[i] for i in drawn.tolist()])


def _number(given: float | Tensor) -> float:
    value = float(given)
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"bootstrap: the statistic gave {value}, expected a finite number for every draw of rows")
    return value
