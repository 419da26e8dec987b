"""The report: one page with nothing outside it, and the same numbers as a picture, as JSON and as CSV."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.browser import document, needs_browser, screenshot
from twostep.evaluate import Interval
from twostep.evaluate.charts import side_by_side
from twostep.evaluate.report import Picture, Report, Verdict
from twostep.evaluate.study import Measured


def interval(value: float) -> Interval:
    return Interval(value, value - 0.1, value + 0.2, 0.95)


@pytest.fixture
def report() -> Report:
    images = {name: torch.full((3, 3, 64, 64), shade) for name, shade in (("teacher", -0.5), ("<student>", 0.5))}
    real = Measured("real images", {"frechet": interval(1), "aligned": interval(1)}, 50)
    teacher = Measured("teacher", {"frechet": interval(20), "aligned": interval(0.9)}, 50, 8, 8, 0.08, 0.06)
    student = Measured("<student>", {"frechet": interval(30), "aligned": interval(0.95)}, 50, 2, 2, 0.03, 0.015)
    return Report(
        "a title & more",
        "a summary",
        [real, teacher, student],
        [Picture("Pictures", "of both", side_by_side(images, ["a ring", "a star", "two shapes"]))],
        {"run": {"losses": {"final": [(1, 2.0), (2, 1.5)]}}},
        {"settings": {"out": Path("somewhere")}},
        [Verdict("fast", "at least 3.5", "4.0", True), Verdict("good", "at least 80%", "50%", False)],
    )


def test_the_page_has_everything_and_loads_nothing(report: Report) -> None:
    page = report.page()
    assert "<h1>a title &amp; more</h1>" in page and "&lt;student&gt;" in page and "<student>" not in page
    assert "met</td>" in page and "missed</td>" in page and "somewhere" in page
    assert page.count("<svg") == 5  # two metrics against two axes, and a curve
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    best = re.findall(r'class="best">([^<]+)', page)
    assert best == ["20", "0.95"]  # real images apart


def test_all_files_have_the_same_numbers(report: Report, tmp_path: Path) -> None:
    assert [path.name for path in report.write(tmp_path)] == ["report.html", "report.json", "report.csv", "report.png"]
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["measured"][2]["metrics"]["frechet"] == {"value": 30, "low": 29.9, "high": 30.2, "confidence": 0.95}
    with (tmp_path / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["value"] for row in rows if row["name"] == "teacher"] == ["20", "0.9"]
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width > 400 and picture.height > 300
    assert report.text().splitlines()[0].split() == ["NFE", "ms", "network", "ms", "Frechet", "aligned"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.csv",
        "report.html",
        "report.json",
        "report.png",
    ]


def test_a_row_of_the_grid_is_a_subject(report: Report) -> None:
    grid = report.pictures[0].image
    shades = {grid.getpixel((grid.width - 60, y)) for y in range(grid.height)}
    assert (64, 64, 64) in shades and (191, 191, 191) in shades


@needs_browser
def test_a_browser_shows_it(report: Report, tmp_path: Path) -> None:
    """The page as a browser draws it: the picture is there, wide enough to read, and no image is broken."""
    report.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    probe = """<script>addEventListener("load", () => { const images = [...document.images];
      document.title = JSON.stringify({broken: images.filter(i => !i.complete || !i.naturalWidth).length,
      images: images.length, wide: document.documentElement.scrollWidth <= innerWidth,
      svg: [...document.querySelectorAll("svg")].every(s => s.getBoundingClientRect().width > 200),
      font: parseFloat(getComputedStyle(document.querySelector("td")).fontSize)}); });</script></body>"""
    (tmp_path / "probed.html").write_text(page.replace("</body>", probe))
    with Image.open(screenshot((tmp_path / "report.html").as_uri(), tmp_path, (1280, 1600))) as seen:
        colours = seen.convert("RGB").getcolors(1 << 24)
        assert seen.size == (1280, 1600) and colours is not None
        shown = {colour for count, colour in colours if count > 500}
    assert {(64, 64, 64), (191, 191, 191), (255, 255, 255)} <= shown  # both subjects' images, on white
    dumped = document((tmp_path / "probed.html").as_uri(), tmp_path, (1280, 1600))
    title = re.search(r"<title>(.*?)</title>", dumped)
    assert title is not None
    found = json.loads(title[1].replace("&quot;", '"'))
    assert found == {"broken": 0, "images": 1, "wide": True, "svg": True, "font": 13}
