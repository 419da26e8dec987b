"""docs/reproductions: every page holds the table that its results make, and no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from twostep.reproduce.command import only
from twostep.reproduce.experiments import EXPERIMENTS
from twostep.reproduce.table import markdown

PAGES = Path(__file__).resolve().parents[2] / "docs" / "reproductions"
RESULTS = sorted(PAGES.glob("*.json"))


def test_there_are_pages() -> None:
    assert {file.stem for file in PAGES.glob("*.md")} == EXPERIMENTS.keys()
    assert {file.stem for file in RESULTS} >= EXPERIMENTS.keys()


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_a_page_says_what_was_measured(file: Path) -> None:
    """Of at least 3 seeds, with the command, the machine and the picture."""
    found = json.loads(file.read_text())
    page = (PAGES / f"{found['experiment']}.md").read_text()
    assert file.stem.startswith(found["experiment"]) and found["seeds"] >= 3
    experiment = EXPERIMENTS[found["experiment"]]
    if len(found["values"]) < len(experiment.arms):
        experiment = only(experiment, list(found["values"]))
    assert markdown(experiment, found["values"], found["seeds"]) in page
    assert found["command"] in page and found["machine"]["device"] in page
    assert f"]({file.stem}.png)" in page and file.with_suffix(".png").is_file()
