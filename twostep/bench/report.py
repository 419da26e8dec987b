"""What a benchmark leaves: a table on the screen, and a table, CSV, JSON and plot in a folder."""

from __future__ import annotations

import csv
import datetime
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from twostep.ops import build_info
from twostep.tables import markdown
from twostep.version import __version__

from .measure import Row


def environment(device: str) -> dict[str, Any]:
    info = build_info()
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "twostep": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_isa": info["cpu_isa"],
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
    }
    if device == "cuda":
        found["cuda"] = torch.version.cuda
        found["archs"] = info.get("archs")
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def _others(rows: Sequence[Row]) -> list[str]:
    names: list[str] = []
    for row in rows:
        names += [name for name in row.seconds if name != "twostep" and name not in names]
    return names


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def table(rows: Sequence[Row]) -> str:
    """A Markdown table; the ratio columns say how many times longer the other one takes."""
    others = _others(rows)
    head = ["op", "shape", "dtype", "direction", "ms", "GB/s", "% of copy"]
    head += [f"vs {name}" for name in others] + ["saved MB", "eager saved", "error", "eager error"]
    lines = []
    for row in rows:
        seconds = row.seconds["twostep"]
        cells = [row.op, row.shape, row.dtype, row.direction, f"{seconds * 1e3:.3f}"]
        cells += [f"{row.floor_bytes / seconds / 1e9:.1f}", f"{row.percent_of_copy:.0f}"]
        cells += [_cell(row.ratio(name), "{:.2f}x") for name in others]
        cells += [f"{row.saved_bytes[name] / 1e6:.1f}" for name in ("twostep", "eager")]
        cells += [f"{row.errors[name]:.1e}" for name in ("twostep", "eager")]
        lines.append(cells)
    return markdown(head, lines, aligned=True)


def summary(rows: Sequence[Row]) -> str:
    """Geometric means of the ratios for each direction, and the worst case of each."""
    lines = []
    for direction in dict.fromkeys(row.direction for row in rows):
        chosen = [row for row in rows if row.direction == direction]
        parts = []
        for name in _others(chosen):
            ratios = [ratio for row in chosen if (ratio := row.ratio(name)) is not None]
            parts.append(f"{geometric_mean(ratios):.2f}x {name} (worst {min(ratios):.2f}x)")
        percents = [row.percent_of_copy for row in chosen]
        parts.append(f"{geometric_mean(percents):.0f} % of copy bandwidth (worst {min(percents):.0f} %)")
        lines.append(f"{direction}: " + ", ".join(parts))
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    directions = list(dict.fromkeys(row.direction for row in rows))
    figure, axes = pyplot.subplots(
        1, len(directions), figsize=(7 * len(directions), 0.32 * len(rows) + 2), squeeze=False
    )
    for axis, direction in zip(axes[0], directions, strict=True):
        chosen = [row for row in rows if row.direction == direction]
        labels = [f"{row.op}\n{row.shape} {row.dtype}" for row in chosen]
        names = ["twostep", *_others(chosen)]
        height = 0.8 / len(names)
        for i, name in enumerate(names):
            percents = [
                100 * row.floor_bytes / row.seconds[name] / row.copy_bytes_per_second if name in row.seconds else 0
                for row in chosen
            ]
            axis.barh([k + i * height for k in range(len(chosen))], percents, height, label=name)
        axis.axvline(100, color="grey", linewidth=0.8)
        axis.set_yticks([k + 0.4 for k in range(len(chosen))], labels, fontsize=6)
        axis.margins(y=0.01)
        axis.invert_yaxis()
        axis.set_xlabel("% of the copy bandwidth, counting unavoidable bytes")
        axis.set_title(direction)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.06 - 0.8 / len(chosen)), ncols=len(names))
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def save(rows: Sequence[Row], folder: Path, device: str, command: str) -> list[Path]:
    """kernels.md, kernels.csv, kernels.json and, where matplotlib is installed, kernels.png."""
    folder.mkdir(parents=True, exist_ok=True)
    found = environment(device)
    described = ", ".join(f"{key} {value}" for key, value in found.items())
    written = [folder / f"kernels.{suffix}" for suffix in ("md", "csv", "json")]
    written[0].write_text(f"`{command}`\n\n{described}\n\n{table(rows)}\n\n{summary(rows)}\n")
    with written[1].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["op", "shape", "dtype", "direction", "candidate", "seconds", "floor_bytes", "copy_bytes_per_second"]
        )
        for row in rows:
            for name, seconds in row.seconds.items():
                case = (row.op, row.shape, row.dtype, row.direction)
                writer.writerow([*case, name, seconds, row.floor_bytes, row.copy_bytes_per_second])
    content = {"command": command, "environment": found, "rows": [asdict(row) for row in rows]}
    written[2].write_text(json.dumps(content, indent=1) + "\n")
    try:
        plot(rows, folder / "kernels.png", f"{found['device']}, torch {found['torch']}, {found['date']}")
        written.append(folder / "kernels.png")
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed (pip install 'twostep[bench]')")
    return written
