"""Several seeds' measurements as one table, with intervals over seeds, and what they say of a paper's claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .. import tables
from ..evaluate.study import METRICS
from .experiments import Claim, Experiment

# Two-sided 95 % of Student's t, by degrees of freedom; beyond ten the last serves, and is a little wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
BETTER = {"concept": "more", "unsaid": "more", **{name: metric.better for name, metric in METRICS.items()}}
# arm, metric: a number for each seed; one where nothing is trained
Values = Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Spread:
    mean: float
    half: float  # of the 95 % interval of the mean; NaN for a single number

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        count = len(numbers)
        mean = sum(numbers) / count
        if count < 2:
            return cls(mean, math.nan)
        deviation = math.sqrt(sum((number - mean) ** 2 for number in numbers) / (count - 1))
        return cls(mean, _T[min(count - 1, len(_T)) - 1] * deviation / math.sqrt(count))

    def __str__(self) -> str:
        return f"{self.mean:.3g}" if math.isnan(self.half) else f"{self.mean:.3g} ± {self.half:.2g}"


def judge(claim: Claim, values: Values) -> tuple[str, Spread]:
    """Whether the ordering holds here, and the difference seed by seed: better minus worse. Differences that are all
    the same say nothing of how far seeds scatter: counts of images are that coarse."""
    one, other = values[claim.better][claim.metric], values[claim.worse][claim.metric]
    count = max(len(one), len(other))
    pairs = zip(*(list(numbers) * (count if len(numbers) == 1 else 1) for numbers in (one, other)), strict=True)
    difference = Spread.of([a - b for a, b in pairs])
    gain = difference.mean if BETTER[claim.metric] == "more" else -difference.mean
    scatters = difference.half > 1e-9 * abs(difference.mean)
    if not scatters or abs(difference.mean) <= difference.half:
        return "cannot be told", difference
    return ("holds" if gain > 0 else "is reversed"), difference


def markdown(experiment: Experiment, values: Values, seeds: int) -> str:
    metrics = [metric for metric in experiment.metrics if any(metric in row for row in values.values())]
    heads = ["", *(title(metric) for metric in metrics), *(f"paper: {column}" for column in experiment.columns)]
    rows = []
    for arm in experiment.arms:
        cells = [str(Spread.of(values[arm.name][metric])) if metric in values[arm.name] else "" for metric in metrics]
        printed = [str(value) for value in arm.paper] or [""] * len(experiment.columns)
        rows.append([arm.name, *cells, *printed])
    claims = []
    for claim in experiment.claims:
        verdict, difference = judge(claim, values)
        said = f"{claim.better} is better than {claim.worse}{' (ours)' if claim.ours else ''}"
        claims.append([said, title(claim.metric), verdict, str(difference)])
    return (
        f"The right half is {experiment.paper}, on its own models and metrics. The left half is the miniature: means "
        f"of {seeds} seeds and 95 % intervals over seeds (Student's t); a single number where nothing is trained.\n\n"
        + tables.markdown(heads, rows)
        + "\n\nA claim holds, or is reversed, where the difference of the two arms, seed by seed, has an interval "
        f"without 0. Each is asked at 95 %, and they are {len(experiment.claims)}: were all differences chance, about "
        f"{len(experiment.claims) / 20:.1f} of them would be told.\n\n"
        + tables.markdown(["claim", "by", "here", "difference"], claims)
        + "\n"
    )


def title(metric: str) -> str:
    better = "↑" if BETTER[metric] == "more" else "↓"
    return f"{METRICS[metric].title if metric in METRICS else metric} {better}"
