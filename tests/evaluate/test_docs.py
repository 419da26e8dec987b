"""The examples of docs/evaluate.md run and print what they say; every metric stands there."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

from twostep import evaluate

PAGE = Path(__file__).parents[2] / "docs" / "evaluate.md"
TYPES = {"Alignment", "ClipScore", "FeatureNetwork", "Gaussian", "Interval", "ModelFeatures", "NeighbourMetrics"}


def test_examples_run() -> None:
    result = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 20
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted(set(evaluate.__all__) - TYPES))
def test_page_names(name: str) -> None:
    assert f"`{name}" in PAGE.read_text() or f"import {name}" in PAGE.read_text()
