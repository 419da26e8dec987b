"""The report: one page with nothing outside it, and the same numbers as a picture, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.browser import document, needs_browser, screenshot
from twostep.evaluate import Interval
from twostep.evaluate.charts import scatter, side_by_side
from twostep.evaluate.report import Picture, Report, Verdict
from twostep.evaluate.study import Measured


def interval(value: float) -> Interval:
    return Interval(value, value - 0.1, value + 0.2, 0.95)


@pytest.fixture
def report() -> Report:
    images = {name: torch.full((3, 3, 64, 64), shade) for name, shade in (("teacher", -0.5), ("<student>", 0.5))}
    real = Measured("real images", {"frechet": interval(1), "aligned": interval(1)}, 50, real=True)
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


def test_images_of_other_sizes_are_enlarged_for_the_picture() -> None:
    red, blue = (torch.eye(3)[channel].view(1, 3, 1, 1) * 2 - 1 for channel in (0, 2))
    rows = {"small": red.expand(2, 3, 32, 32), "wide": blue.expand(2, 3, 64, 128)}
    grid = side_by_side(rows, ["a ring", "a star"])
    assert grid.size == side_by_side({**rows, "small": rows["wide"]}, ["a ring", "a star"]).size
    counts = {colour: count for count, colour in grid.getcolors(1 << 24) or []}
    assert counts[255, 0, 0] == 2 * 64 * 64  # proportions are kept
    assert counts[0, 0, 255] == 2 * 64 * 128


def test_a_folder_of_images_is_not_the_real_ones(report: Report) -> None:
    folder = Measured("somebody's", {"frechet": interval(5), "aligned": interval(0.8)}, 50)
    rows = [folder, *report.measured]
    page = replace(report, measured=rows).page()
    assert re.findall(r'class="best">([^<]+)', page) == ["5", "0.95"]
    alone = replace(report, measured=[folder, *report.measured[1:]])
    assert "real images</text>" not in "".join(re.findall("<svg.*?</svg>", alone.page(), re.DOTALL))
    lines = re.findall("real images</text>", "".join(re.findall("<svg.*?</svg>", page, re.DOTALL)))
    assert len(lines) == 4  # a line in every plot of a metric
    dashed = [
        re.findall(r'<path d="([^"]+)"[^>]*stroke-dasharray', scatter(order, "frechet", "evaluations", "NFE"))
        for order in (rows, [*report.measured, folder])
    ]
    assert dashed[0][0] == dashed[1][0]  # the second is the legend's


def test_a_metric_that_a_row_lacks_is_an_empty_cell(report: Report) -> None:
    real, teacher, student = report.measured
    lacking = replace(student, metrics={"frechet": student.metrics["frechet"]})
    some = replace(report, measured=[real, teacher, lacking])
    assert len(some.text().splitlines()[3].split()) == len(some.text().splitlines()[2].split()) - 1
    assert re.findall(r'class="best">([^<]+)', some.page()) == ["20"]  # one alone is not the best
    only_real = replace(some, measured=[real, replace(teacher, metrics=lacking.metrics), lacking])
    assert only_real.page().count("<svg") == 3  # no plot of a metric without a point
    assert "aligned" not in {
        row["metric"] for row in csv.DictReader(io.StringIO(some.table_of_numbers())) if row["name"] == "<student>"
    }
    some.picture()


def test_the_page_says_what_its_intervals_and_features_are(report: Report) -> None:
    page = replace(report, features="some network", notes=["a line below"]).page()
    assert "held fixed" in page and "(features: some network); smaller is better</dd>" in page
    assert "<p>a line below</p>" in page


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
