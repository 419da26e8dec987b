"""The examples of docs/losses.md run and print what they say; every public name stands there."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from twostep import losses

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"


def test_examples_run() -> None:
    result = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 30
    assert result.failed == 0


@pytest.mark.parametrize("name", losses.__all__)
def test_page_names(name: str) -> None:
    page = PAGE.read_text()
    assert f"{name}(" in page
    examples = re.findall(r"^    (?:>>>|\.\.\.) .*$", page, re.M)
    assert any(re.search(rf"\b{name}\b", line) for line in examples), "not in any example"
