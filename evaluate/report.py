"""A study as a page, a picture, JSON and CSV: `report.html` (nothing outside it), `report.png`, `report.json`,
`report.csv`.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..durable import replaced
from ..tables import columns
from . import charts
from .study import METRICS, Measured

PAGE = Path(__file__).parent / "pages" / "report.html"


@dataclass(frozen=True)
class Picture:
    title: str
    says: str
    image: Image.Image


@dataclass(frozen=True)
class Verdict:
    text: str
    asked: str
    found: str
    met: bool
    sure: bool = True  # the interval of what was found lies on one side of the bar

    @property
    def said(self) -> str:
        return ("met" if self.met else "missed") + ("" if self.sure else ", and the interval holds the bar")


@dataclass(frozen=True)
class Report:
    title: str
    summary: str
    measured: Sequence[Measured]
    pictures: Sequence[Picture] = ()
    training: Mapping[str, Mapping[str, Mapping[str, charts.Curve]]] = field(default_factory=dict)  # run, plot, line
    settings: Mapping[str, Any] = field(default_factory=dict)
    verdicts: Sequence[Verdict] = ()
    features: str = ""  # the network that Frechet distance, precision and the like are of
    notes: Sequence[str] = ()  # a line each, below the table

    def write(self, folder: Path) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        files: dict[str, bytes] = {
            "report.html": self.page().encode(),
            "report.json": (json.dumps(self.facts(), indent=1) + "\n").encode(),
            "report.csv": self.table_of_numbers().encode(),
            "report.png": charts.png(self.picture()),
        }
        written = []
        for name, data in files.items():
            path = folder / name
            with replaced(path) as new:
                new.write_bytes(data)
            written.append(path)
        return written

    def page(self) -> str:
        from jinja2 import Environment, StrictUndefined

        environment = Environment(autoescape=True, undefined=StrictUndefined)
        plots = [
            charts.scatter(self.measured, metric, across, label)
            for metric in ("frechet", "aligned", "clip_score", "diversity")
            for across, label in (("evaluations", "evaluations of the network"), ("seconds", "seconds an image"))
            if any(metric in row.metrics and getattr(row, across) is not None for row in self.measured)
        ]
        text: str = environment.from_string(PAGE.read_text(encoding="utf-8")).render(
            title=self.title,
            summary=self.summary,
            verdicts=self.verdicts,
            heads=self._heads(),
            rows=[self._cells(row) for row in self.measured],
            notes=self.notes,
            pictures=[
                {"title": p.title, "says": p.says, "data": base64.b64encode(charts.png(p.image)).decode()}
                for p in self.pictures
            ],
            plots=plots,
            training={
                name: [charts.curves(lines, label) for label, lines in plots.items()]
                for name, plots in self.training.items()
            },
            settings=json.dumps(dict(self.settings), indent=1, default=str),
        )
        return text

    def text(self) -> str:
        """The table for a terminal, and the notes."""
        rows = [[head["title"] for head in self._heads()]]
        rows += [[cell["text"] for cell in self._cells(row)] for row in self.measured]
        return "".join(f"{line}\n" for line in [columns(rows, right=range(1, len(rows[0]))), *self.notes])

    def facts(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "settings": json.loads(json.dumps(dict(self.settings), default=str)),
            "notes": list(self.notes),
            "measured": [_facts_of(row) for row in self.measured],
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
        }

    def table_of_numbers(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            ["name", "images", "steps", "evaluations", "seconds", "network_seconds", "metric", "value", "low", "high"]
        )
        for row in self.measured:
            fixed = [row.name, row.images, row.steps, row.evaluations, row.seconds, row.network_seconds]
            for name, interval in row.metrics.items():
                writer.writerow([*fixed, name, interval.value, interval.low, interval.high])
        return text.getvalue()

    def picture(self) -> Image.Image:
        """Table and pictures under each other."""
        from matplotlib.figure import Figure

        heads = [head["title"] for head in self._heads()]
        cells = [
            [charts.literal(f"{c['text']}\n{c['interval']}" if c["interval"] else c["text"]) for c in self._cells(row)]
            for row in self.measured
        ]
        figure = Figure(figsize=(1.3 * len(heads) + 1, 0.5 * (len(cells) + 1)), dpi=110, layout="constrained")
        axes = figure.subplots()
        axes.axis("off")
        table = axes.table(cells, colLabels=heads, cellLoc="center", loc="center", edges="horizontal")
        table.auto_set_font_size(False)
        table.set_fontsize(8)
        table.scale(1, 2)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        parts = [Image.open(buffer).convert("RGB"), *(picture.image.convert("RGB") for picture in self.pictures)]
        whole = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
        top = 0
        for part in parts:
            whole.paste(part, (0, top))
            top += part.height
        return whole

    # Cells

    def _present(self) -> list[str]:
        return [name for name in METRICS if any(name in row.metrics for row in self.measured)]

    def _heads(self) -> list[dict[str, str]]:
        fixed = [
            ("", ""),
            ("NFE", "evaluations of the network for an image"),
            ("ms", "for an image, from caption to pixels"),
        ]
        fixed.append(("network ms", "for an image, of the transformer alone"))
        heads = [{"title": title, "says": says} for title, says in fixed]
        arrows = {"less": "smaller is better", "more": "larger is better"}
        for name in self._present():
            metric = METRICS[name]
            of = f" (features: {self.features})" if name == "frechet" and self.features else ""
            heads.append({"title": metric.title, "says": f"{metric.says}{of}; {arrows[metric.better]}"})
        return heads

    def _cells(self, row: Measured) -> list[dict[str, Any]]:
        def plain(text: str) -> dict[str, Any]:
            return {"text": text, "interval": "", "best": False}

        def milliseconds(value: float | None) -> dict[str, Any]:
            return plain("" if value is None else f"{1000 * value:.4g}")

        cells = [plain(row.name), plain("" if row.evaluations is None else str(row.evaluations))]
        cells += [milliseconds(row.seconds), milliseconds(row.network_seconds)]
        for name in self._present():
            interval = row.metrics.get(name)
            if interval is None:
                cells.append(plain(""))
                continue
            cells.append(
                {
                    "text": f"{interval.value:.4g}",
                    "interval": f"{interval.low:.4g} to {interval.high:.4g}",
                    "best": row is self._best(name),
                }
            )
        return cells

    def _best(self, metric: str) -> Measured | None:
        rows = [row for row in self.measured if not row.real and metric in row.metrics]
        if len(rows) < 2:
            return None
        choose = min if METRICS[metric].better == "less" else max
        return choose(rows, key=lambda row: row.metrics[metric].value)


def _facts_of(row: Measured) -> dict[str, Any]:
    """Of intervals the ends alone, not the hundreds of values that they were found by."""
    ends = ("value", "low", "high", "confidence")
    metrics = {name: {end: getattr(interval, end) for end in ends} for name, interval in row.metrics.items()}
    return {**vars(row), "metrics": metrics}
