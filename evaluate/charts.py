"""The report's pictures: grids of the same seeds side by side, and plots, as bytes of PNG and text of SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .sheet import NARROWEST, contact_sheet
from .study import METRICS, Measured

Curve = Sequence[tuple[float, float]]
COLOURS = ("#2a6fbb", "#d1495b", "#3a7d44", "#8d5a97", "#e08d2c", "#5b6770", "#17a2a2", "#a03e1e")


def side_by_side(rows: Mapping[str, Tensor], captions: Sequence[str]) -> Image.Image:
    """A row of images [n, 3, H, W] in [-1, 1] for each subject, of the same captions and seeds; captions come last.
    Smaller images are enlarged to the largest ones' size."""
    names, images = list(rows), torch.stack(_of_one_size(list(rows.values())))  # [subjects, n, 3, H, W]
    scale = -(-NARROWEST // images.shape[-1])  # cells are as wide with captions as without
    sheets = [contact_sheet(row, columns=len(row), scale=scale) for row in images[:-1]]
    sheets.append(contact_sheet(images[-1], columns=len(captions), captions=list(captions), scale=scale))
    return _stacked(names, sheets)


def _of_one_size(rows: Sequence[Tensor]) -> list[Tensor]:
    """Without smoothing, as a sheet enlarges, and in their own proportions: what is left over is paper."""
    height, width = (max(row.shape[axis] for row in rows) for axis in (-2, -1))

    def fitted(row: Tensor) -> Tensor:
        scale = min(height / row.shape[-2], width / row.shape[-1])
        size = (round(row.shape[-2] * scale), round(row.shape[-1] * scale))
        larger = F.interpolate(row, size, mode="nearest-exact")
        left, top = (width - size[1]) // 2, (height - size[0]) // 2
        return F.pad(larger, (left, width - size[1] - left, top, height - size[0] - top), value=1.0)

    return [fitted(row) for row in rows]


def _stacked(names: Sequence[str], sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets under each other with their names before them, in columns of the last one's width."""
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(15)
    left = 16 + math.ceil(max(font.getlength(name) for name in names))
    whole = Image.new("RGB", (left + max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    pen, top = ImageDraw.Draw(whole), 0
    for name, sheet in zip(names, sheets, strict=True):
        pen.text((8, top + 16), name, fill="#202020", font=font)
        whole.paste(sheet, (left, top))
        top += sheet.height
    return whole


def scatter(measured: Sequence[Measured], metric: str, across: str, label: str) -> str:
    """SVG: a metric with its interval against steps or seconds, each subject a point."""
    figure, axes = _axes()
    for number, row in enumerate(measured):
        x, interval = getattr(row, across), row.metrics.get(metric)
        if x is None or interval is None:
            continue
        error = [[max(0.0, interval.value - interval.low)], [max(0.0, interval.high - interval.value)]]
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar([x], [interval.value], yerr=error, fmt="o", color=colour, capsize=3, label=literal(row.name))
    real = next((row.metrics[metric].value for row in measured if row.real and metric in row.metrics), None)
    if real is not None:
        axes.axhline(real, color="#999999", linewidth=1, linestyle="--", label="real images")
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel(METRICS[metric].title)
    axes.legend(fontsize=8, frameon=False)
    return _svg(figure)


def literal(text: str) -> str:
    """As it is: between two dollars matplotlib would read mathematics."""
    return text.replace("$", r"\$")


def curves(lines: Mapping[str, Curve], label: str) -> str:
    """SVG: numbers of a run against its iterations."""
    figure, axes = _axes()
    for number, (name, points) in enumerate(lines.items()):
        axes.plot(*zip(*points, strict=True), color=COLOURS[number % len(COLOURS)], linewidth=1.2, label=name)
    axes.set_xlabel("iteration")
    axes.set_ylabel(label)
    axes.legend(fontsize=8, frameon=False)
    return _svg(figure)


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "twostep", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
