"""Several seeds' measurements as a picture: a panel for each metric, a row for each arm."""

from __future__ import annotations

import math
from pathlib import Path

from .experiments import Experiment
from .table import Spread, Values, title

TRAINED, SAMPLED = "#2a6fbb", "#5b6770"


def draw(experiment: Experiment, values: Values, path: Path) -> None:
    """Points are seeds, bars the 95 % interval of their mean; a line goes down from what is not trained."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = [metric for metric in experiment.metrics if any(metric in row for row in values.values())]
    arms = experiment.arms
    figure = Figure(figsize=(2.5 + 1.9 * len(metrics), 1.1 + 0.32 * len(arms)), layout="constrained", dpi=120)
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for row, arm in enumerate(arms):
            numbers = values[arm.name].get(metric, [])
            if not numbers:
                continue
            spread, colour = Spread.of(numbers), SAMPLED if arm.recipe is None else TRAINED
            if arm.recipe is None:
                axes.axvline(spread.mean, color=colour, linewidth=0.7, linestyle=":")
            axes.plot(numbers, [row] * len(numbers), "o", color=colour, markersize=3, alpha=0.6)
            half = 0.0 if math.isnan(spread.half) else spread.half
            axes.errorbar([spread.mean], [row], xerr=[half], fmt="|", color=colour, capsize=3)
        axes.set_title(title(metric), fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(axis="y", linewidth=0.3)
        axes.locator_params(axis="x", nbins=4)
    panels[0].set_yticks(range(len(arms)), [arm.name for arm in arms], fontsize=8)
    panels[0].invert_yaxis()
    FigureCanvasAgg(figure).print_figure(path, metadata={"Software": None})
